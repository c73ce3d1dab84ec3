"""``python bench/families.py``: every causal family of transformers, built small, beside its own logits and loss.

Each family is built from its configuration in a process of its own, with random weights. ``evaluate``'s
loss is compared with the model's own logits in float64, and the loss and gradients of
``use_fused_loss`` with the model's own. The rows go to bench/results/families.json and the table to
docs/families.md: five minutes of one core. ``--table`` writes the table anew from the file alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import random
import resource
import sys
import time
import traceback
import warnings
from pathlib import Path

from environment import HERE, RESULTS, commit, now, one_line, version, write

RESULT = RESULTS / "families.json"
TABLE = HERE.parent / "docs" / "families.md"
SECONDS, BYTES = 90, 12 << 30  # of one family; nothing is built that needs more
VOCABULARY, LENGTH = 320, 64
TEXTS = [
    "The cat sat on the mat, and the dog lay by the door until the rain had gone over the hills.",
    "A loss of three nats is a choice among twenty.",
    "caf\u00e9, na\u00efve, \u4f60\u597d: bytes are not characters",
]
# context and stride of ``evaluate``; None: its own choice for the model
WINDOWS = [(None, None), (24, 24 - 1), (16, 8)]
# A float32 sum of a row's terms in another order, or a row in a batch beside one alone: 1e-6 of the loss.
# A rule that is not known is off by 1e-2 and more, at these weights.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-3

# A configuration's field -> its size here, where the default is larger (or None where ALWAYS says so).
SMALL = {
    32: "hidden_size d_model n_embd dim_model emb_dim embedding_size word_embed_proj_dim input_embedding_size "
    "output_embedding_size backbone_hidden_size hidden_size_global lru_width mamba_d_ssm hidden_size_per_layer_input "
    "input_size cross_attention_hidden_size projection_dim mm_embed_dim embed_dim out_hidden_size vision_output_dim "
    "projector_input_dim projector_output_dim audio_embed_dim adapter_out_dim adapter_in_dim adapter_input_size",
    48: "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim moe_intermediate_size dim_ff dff "
    "ffn_hidden_size expert_ffn_hidden_size shared_expert_intermediate_size intermediate_size_mlp feed_forward_size "
    "dense_intermediate_size moe_shared_expert_intermediate_size shared_experts_intermediate_size mlp_dim "
    "d_inner shared_intermediate_size attention_hidden_size block_ff_dim prefix_dense_intermediate_size",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers depth num_global_layers num_blocks num_experts_per_tok moe_topk moe_top_k moe_k top_k "
    "num_experts_per_token num_key_value_heads multi_query_group_num kv_n_heads swa_num_key_value_heads "
    "hc_mult hc_count laurel_rank gated_norm_rank d_rel adapter_rank mamba_expand expand index_topk_blocks "
    "n_group topk_group num_zero_experts zero_expert_num mamba_ngroups mamba_n_groups n_groups router_rank",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads num_experts num_local_experts "
    "n_routed_experts moe_num_experts index_n_heads linear_num_key_heads linear_num_value_heads linear_num_heads "
    "mamba_n_heads mamba_num_heads n_mamba_heads o_groups",
    8: "head_dim kv_channels dim_head kv_lora_rank q_lora_rank v_head_dim qk_nope_head_dim swa_head_dim linear_head_dim "
    "linear_key_head_dim linear_value_head_dim mamba_d_state state_size ssm_state_size mamba_d_head mamba_head_dim "
    "attention_head_size global_head_dim o_lora_rank qk_head_dim hc_lowrank router_hidden_size index_head_dim "
    "rotary_dim qk_rope_head_dim time_step_rank mamba_dt_rank",
    16: "sliding_window window_size sliding_window_size attention_chunk_size chunk_size mamba_chunk_size local_attention "
    "local_attn_chunk_length lsh_attn_chunk_length attention_window_size block_size index_topk index_block_size "
    "block_multiple_of ffn_round_up_to_multiple_of local_attention_window_len image_size patch_size crop_size "
    "num_mel_bins feature_size base_channels rel_extent keep_window_size",
    LENGTH: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions "
    "context_length max_sequence_length original_max_position_embeddings num_position_embeddings "
    "position_embedding_size floor_scale log_scaling_n_floor",
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size audio_vocab_size encoder_hash_byte_group_vocab "
    "ngram_vocab_size_base codebook_size pronunciation_vocab_size shape_vocab_size",
}
SIZES = {name: size for size, names in SMALL.items() for name in names.split()}
# Set where the default is None as well: what families of that field cannot do without.
ALWAYS = ("head_dim", "n_routed_experts", "num_experts_per_tok")
# The rules of heads, in force: their defaults are often none.
RULES = {
    "logit_scale": 0.5, "logits_scaling": 4.0, "lm_head_multiplier": 0.5, "final_logit_softcapping": 3.0,
    "logits_soft_cap": 3.0,
}  # fmt: skip
# Families whose parts must fit each other in a way of their own: fields of the configuration, nested by ".".
OVERRIDES: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"vision_config.mlp_layer_types": ["dense", "dense"]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0, "text_config.vocab_size_per_layer_input": 0},
    "gemma4_unified_assistant": {"text_config.num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 16},
    "moshi": {"audio_encoder_config": None, "depth_decoder_config": None, "audio_vocab_size": 64},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": (_INDEXER := {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    }),
    "qwen4_exp": {f"text_config.{name}": value for name, value in _INDEXER.items()},
    "reformer": {
        "attn_layers": ["local", "lsh"], "axial_pos_embds": False, "is_decoder": True, "num_buckets": 2, "hash_seed": 1,
        # Its dropout draws from the clock.
        "hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0,
    },
    "xlstm": {"hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
}  # fmt: skip


def small_config(kind, default=None, layers: int | None = None) -> dict:
    """Return the keywords that make a configuration of class ``kind`` small."""
    if default is None:
        try:
            default = kind()
        except Exception:
            default = None
    given, ids = {}, iter(range(VOCABULARY - 1, VOCABULARY - 60, -1))
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name, field in fields.items():
        value = field.default
        number = isinstance(value, int) and not isinstance(value, bool)
        if name in SIZES:
            if name in ALWAYS or value is dataclasses.MISSING or (number and value > SIZES[name]):
                given[name] = SIZES[name]
        elif name in RULES:
            given[name] = RULES[name]
        elif name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            given[name] = ("bos_token_id", "eos_token_id", "pad_token_id").index(name)
        elif number and name.endswith(("_token_id", "_token_index")) and value >= VOCABULARY:
            given[name] = next(ids)
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"):
        if name in given:
            given[name] = layers or _layers(default)
    for heads, few in (("num_attention_heads", "num_key_value_heads"), ("num_heads", "num_key_value_heads")):
        # Heads that are not grouped by default have no groups here either: latent attention cannot have them.
        if heads in given and few in given and fields[heads].default == fields[few].default:
            given[few] = given[heads]
    for name, part in getattr(kind, "sub_configs", {}).items():
        own = getattr(default, name, None)
        part = type(own) if own is not None else part
        if dataclasses.is_dataclass(part) and part.__name__ != "AutoConfig":
            given[name] = small_config(part, own)
            if isinstance(getattr(part, "model_type", None), str):
                given[name]["model_type"] = part.model_type
    return given


def _layers(default) -> int:
    """Return how many layers show every kind of layer that the family has: 2 to 8."""
    kinds = getattr(default, "layer_types", None) or []
    seen = next((k for k in range(len(kinds)) if set(kinds[:k]) == set(kinds)), 2)
    return min(max(seen, 2), 8)


@functools.cache
def families() -> dict[str, str]:
    """Return the model class of each family with a causal head: transformers' mapping, and classes beside it."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as mapped

    found = dict(mapped)
    for name in dir(transformers):
        if (
            name.endswith(("ForCausalLM", "LMHeadModel"))
            and name not in mapped.values()
            and not name.startswith("Auto")
        ):
            found[name] = name
    return found


def build(family: str):
    """Return the small model of a family, in evaluation mode, its weights drawn so that logits spread."""
    import torch
    import transformers

    torch.manual_seed(0)
    name = families()[family]
    kind = getattr(transformers, name, None)
    configuration = kind.config_class if family == name else transformers.CONFIG_MAPPING[family]
    given = small_config(configuration)
    for path, value in OVERRIDES.get(family, {}).items():
        *parts, last = path.split(".")
        place = given
        for part in parts:
            place = place.setdefault(part, {})
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    config = configuration(**given)
    if getattr(config, "is_decoder", None) is False and not getattr(config, "is_encoder_decoder", False):
        config.is_decoder = True
    config.use_cache = False
    model = kind(config) if family == name else transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float().eval()


def tokenizer():
    """Return a tokenizer of bytes, with a BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    built = Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="</s>")


def own_nll(model, ids: list[int], context: int, stride: int) -> list[float]:
    """Return −log p of every token but the first, from the model's own logits in float64, window by window."""
    import torch

    found, scored, begin = [], 1, 0
    while scored < len(ids):
        end = min(begin + context, len(ids))
        read = torch.tensor([ids[begin : end - 1]])
        logits = model(input_ids=read).logits
        if logits.shape[1] != read.shape[1]:  # of the last position alone
            logits = torch.cat([model(input_ids=read[:, : k + 1]).logits for k in range(read.shape[1])], 1)
        target = torch.tensor(ids[scored:end])
        found += torch.nn.functional.cross_entropy(
            logits[0, scored - begin - 1 :].double(), target, reduction="none"
        ).tolist()
        begin, scored = begin + stride, end
    return found


def compare_evaluate(model) -> dict:
    """Compare ``evaluate``'s loss with the model's own logits, at several windows."""
    import torch

    from perplexity import evaluate

    tokens, largest = tokenizer(), 0.0
    for context, stride in WINDOWS:
        options = {} if context is None else dict(context_length=context, stride=stride)
        got = evaluate(model, tokens, TEXTS, **options)
        own = []
        with torch.no_grad():
            for text in TEXTS:
                ids = [tokens.bos_token_id, *tokens(text)["input_ids"]]
                own += own_nll(model, ids, got.context_length, got.stride)
        expected = sum(own) / len(own)
        difference = abs(got.loss - expected) / max(1.0, expected)
        if got.tokens != len(own) or not difference <= LOSS_TOLERANCE:
            return dict(
                outcome="wrong", difference=difference,
                message=f"{got.loss:.6g} over {got.tokens} tokens, expected {expected:.6g} over {len(own)}, "
                f"context {got.context_length}, stride {got.stride}",
            )  # fmt: skip
        largest = max(largest, difference)
    return dict(outcome="equal", difference=largest)


def batch() -> dict:
    """Return two rows of bytes with labels, some of which are left out."""
    tokens = tokenizer()
    import torch

    ids = torch.tensor([[tokens.bos_token_id, *tokens(text)["input_ids"][:31]] for text in TEXTS[:2]])
    labels = ids.clone()
    labels[0, :4] = labels[1, -3:] = -100
    return dict(input_ids=ids, labels=labels)


def training_step(model, **given) -> tuple:
    """Return the loss of ``batch`` and every parameter's gradient; dropout draws the same numbers in each call."""
    import torch

    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    loss = getattr(model(**batch(), **given), "loss", None)
    if loss is None:
        raise TypeError("no loss of labels")
    loss.backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def compare_fused(model) -> dict:
    """Compare the loss and gradients of ``use_fused_loss`` with the model's own, in training mode."""
    import torch

    from perplexity.integrations.transformers import use_fused_loss

    model.train()
    cases, own = [{}, dict(num_items_in_batch=torch.tensor(50))], []
    for given in [*cases]:
        try:
            own.append(training_step(model, **given))
        except Exception as error:
            if not given:
                return dict(outcome="not comparable", message=f"the model's own loss fails: {said(error)}")
            cases.remove(given)  # Trainer gives such a model no number of items either
    largest = 0.0
    with use_fused_loss(model):
        for given, (expected, gradients) in zip(cases, own, strict=True):
            loss, found = training_step(model, **given)
            difference = abs(loss - expected) / max(1.0, abs(expected))
            what = "loss"
            scale = max(gradient.abs().max().item() for gradient in gradients.values())
            for name in gradients.keys() | found.keys():
                pair = found.get(name), gradients.get(name)
                # A parameter that one way leaves out and the other gives zeros has the same gradient.
                one, other = (torch.zeros(()) if part is None else part for part in pair)
                off = (one - other).abs().max().item() / scale
                if not off <= GRADIENT_TOLERANCE:
                    difference, what = max(difference, off), f"gradient of {name}"
                largest = max(largest, off)
            if what != "loss" or not difference <= LOSS_TOLERANCE:
                return dict(
                    outcome="wrong", difference=difference, message=f"{what}: {loss:.6g}, expected {expected:.6g}"
                )
            largest = max(largest, difference)
    return dict(outcome="equal", difference=largest)


def study(family: str) -> dict:
    """Return the row of one family."""
    row = dict(family=family, architecture=families()[family], built=None)
    try:
        model = build(family)
        row["parameters"] = sum(p.numel() for p in model.parameters())
        row["architecture"] = type(model).__name__
        import torch

        with torch.no_grad():
            logits = model(input_ids=batch()["input_ids"]).logits
        if not logits.isfinite().all():
            raise ValueError("the model's own logits are not finite")
        row["spread"] = float(f"{logits.float().std().item():.3g}")
    except Exception as error:
        return row | dict(built=said(error))
    for name, compare in (("evaluate", compare_evaluate), ("fused", compare_fused)):
        row[name] = outcome(compare, model)
    return row


def outcome(compare, model) -> dict:
    from perplexity.errors import InputError

    try:
        return compare(model)
    except InputError as error:
        return dict(outcome="refused", message=one_line(error).partition(": ")[2])
    except Exception as error:
        return dict(outcome="crashed", message=said(error))


def said(error: Exception) -> str:
    """Return the error's first line and the place in the code where it was raised."""
    if os.environ.get("FAMILIES_TRACEBACK"):
        traceback.print_exception(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{one_line(error)[:200]} ({Path(last.filename).name}:{last.lineno})"


def _child(family: str, pipe) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    warnings.simplefilter("ignore")
    started = time.process_time()
    row = study(family)
    row["seconds"] = round(time.process_time() - started, 2)
    pipe.send(row)
    pipe.close()


def in_a_process(family: str) -> dict:
    """Return ``study``'s row from a process that is ended after ``SECONDS``."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(family, theirs))
    process.start()
    theirs.close()
    row = dict(family=family, architecture=families()[family], built=None)
    try:
        if not ours.poll(SECONDS):
            return row | dict(built=f"not finished after {SECONDS} seconds")
        return ours.recv()
    except EOFError:
        process.join()
        return row | dict(built=f"its process ended with status {process.exitcode}")
    finally:
        process.kill()
        process.join()


COMPARED = {"evaluate": "`evaluate`", "fused": "`use_fused_loss`"}
OUTCOMES = ("equal", "refused", "not comparable", "crashed", "wrong")


def table(results: dict) -> str:
    """Return docs/families.md, of the results file's content."""
    rows = results["rows"]
    built = [row for row in rows if not row["built"]]
    lines = [
        "# Model families",
        "",
        f"Written by `python bench/families.py` with transformers {results['transformers']} and torch {results['torch']}: "
        f"{len(built)} of its {len(rows)} families with a causal head, built small with random weights.",
        "`evaluate`'s loss is compared with the model's own logits in float64, at three choices of context and stride; the loss "
        "and every gradient of `use_fused_loss`, in training mode, with the model's own loss.",
        "A number is the largest difference: of a loss, relative; of a gradient, to the largest of the model. Equal is at most "
        f"{LOSS_TOLERANCE:.0e} of the loss and {GRADIENT_TOLERANCE:.0e} of the gradient.",
        "",
        "| | " + " | ".join(OUTCOMES) + " |",
        "| --- |" + " ---: |" * len(OUTCOMES),
    ]
    for name, title in COMPARED.items():
        counts = [sum(row[name]["outcome"] == outcome for row in built) for outcome in OUTCOMES]
        lines.append(f"| {title} | " + " | ".join(map(str, counts)) + " |")
    lines += ["", "| family | class | `evaluate` | `use_fused_loss` |", "| --- | --- | --- | --- |"]
    for row in built:
        cells = [row["family"], row["architecture"], *(_cell(row[name]) for name in COMPARED)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## Not built", "", "| family | class | reason |", "| --- | --- | --- |"]
    for row in rows:
        if row["built"]:
            lines.append(f"| {row['family']} | {row['architecture']} | {_escaped(row['built'])} |")
    return "\n".join(lines) + "\n"


def _cell(found: dict) -> str:
    if found["outcome"] == "equal":
        return f"{found['difference']:.0e}"
    return f"{found['outcome']}: {_escaped(found['message'])}"


def _escaped(message: str) -> str:
    return message.replace("|", "\\|").replace("<", "&lt;")


def sweep(names: list[str]) -> list[dict]:
    """Return the rows of families, in order."""
    import torch
    import transformers

    import perplexity.integrations.transformers  # noqa: F401 (imported once, for all processes)

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = []
    for name in names:
        rows.append(in_a_process(name))
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict) -> str:
    if row["built"]:
        return f"{row['family']:24} not built: {row['built']}"
    parts = []
    for name in ("evaluate", "fused"):
        found = row[name]
        difference = f" {found['difference']:.1e}" if "difference" in found else ""
        parts.append(f"{name} {found['outcome']}{difference} {found.get('message', '')}")
    return f"{row['family']:24} {row['seconds']:5.1f} s  spread {row['spread']:5}  " + " | ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="families to study; all by default")
    parser.add_argument("--draw", type=int, metavar="N", help="N families drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="results file; bench/results/families.json for all families")
    parser.add_argument("--table", action="store_true", help="write docs/families.md from the results file alone")
    options = parser.parse_args()
    if options.table:
        TABLE.write_text(table(json.loads(RESULT.read_text())))
        return
    names = options.families or sorted(families())
    if options.draw:
        names = sorted(random.Random(options.seed).sample(names, options.draw))
    rows = sweep(names)
    versions = dict(torch=version("torch"), transformers=version("transformers"), date=now(), commit=commit())
    results = versions | dict(rows=rows)
    everything = names == sorted(families())
    if options.out or everything:
        write(results, options.out or RESULT)
    if everything and not options.out:
        TABLE.write_text(table(results))
    sys.exit(any(found["outcome"] == "wrong" for row in rows for found in map(row.get, COMPARED) if found))


if __name__ == "__main__":
    main()
