"""Small configurations of transformers' causal families, and models of them with random weights."""

from __future__ import annotations

import dataclasses
import functools

VOCABULARY, LENGTH = 320, 64

# A size -> the configurations' fields that are cut down to it.
SMALL = {
    32: """
        hidden_size d_model n_embd dim_model emb_dim embedding_size word_embed_proj_dim
        input_embedding_size output_embedding_size backbone_hidden_size hidden_size_global
        lru_width mamba_d_ssm hidden_size_per_layer_input input_size
        cross_attention_hidden_size projection_dim mm_embed_dim embed_dim out_hidden_size
        vision_output_dim projector_input_dim projector_output_dim audio_embed_dim
        adapter_out_dim adapter_in_dim adapter_input_size
    """,
    48: """
        intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim
        moe_intermediate_size dim_ff dff ffn_hidden_size expert_ffn_hidden_size
        shared_expert_intermediate_size intermediate_size_mlp feed_forward_size
        dense_intermediate_size moe_shared_expert_intermediate_size
        shared_experts_intermediate_size mlp_dim d_inner shared_intermediate_size
        attention_hidden_size block_ff_dim prefix_dense_intermediate_size
    """,
    2: """
        num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers
        num_decoder_layers num_encoder_layers depth num_global_layers num_blocks
        num_experts_per_tok moe_topk moe_top_k moe_k top_k num_experts_per_token
        num_key_value_heads multi_query_group_num kv_n_heads swa_num_key_value_heads hc_mult
        hc_count laurel_rank gated_norm_rank d_rel adapter_rank mamba_expand expand
        index_topk_blocks n_group topk_group num_zero_experts zero_expert_num mamba_ngroups
        mamba_n_groups n_groups router_rank
    """,
    4: """
        num_attention_heads n_head n_heads num_heads decoder_attention_heads
        encoder_attention_heads attention_heads num_encoder_attention_heads
        num_decoder_attention_heads swa_num_attention_heads num_experts num_local_experts
        n_routed_experts moe_num_experts index_n_heads linear_num_key_heads
        linear_num_value_heads linear_num_heads mamba_n_heads mamba_num_heads n_mamba_heads
        o_groups
    """,
    8: """
        head_dim kv_channels dim_head kv_lora_rank q_lora_rank v_head_dim qk_nope_head_dim
        swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim mamba_d_state
        state_size ssm_state_size mamba_d_head mamba_head_dim attention_head_size
        global_head_dim o_lora_rank qk_head_dim hc_lowrank router_hidden_size index_head_dim
        rotary_dim qk_rope_head_dim time_step_rank mamba_dt_rank
    """,
    16: """
        sliding_window window_size sliding_window_size attention_chunk_size chunk_size
        mamba_chunk_size local_attention local_attn_chunk_length lsh_attn_chunk_length
        attention_window_size block_size index_topk index_block_size block_multiple_of
        ffn_round_up_to_multiple_of local_attention_window_len image_size patch_size
        crop_size num_mel_bins feature_size base_channels rel_extent keep_window_size
    """,
    LENGTH: """
        max_position_embeddings n_positions n_ctx max_seq_len max_target_positions
        max_source_positions context_length max_sequence_length
        original_max_position_embeddings num_position_embeddings position_embedding_size
        floor_scale log_scaling_n_floor
    """,
    VOCABULARY: """
        vocab_size vocab_size_per_layer_input unpadded_vocab_size audio_vocab_size
        encoder_hash_byte_group_vocab ngram_vocab_size_base codebook_size
        pronunciation_vocab_size shape_vocab_size
    """,
}
SIZES = {name: size for size, names in SMALL.items() for name in names.split()}
# Set where the default is None, too: families with these fields cannot do without.
ALWAYS = ("head_dim", "n_routed_experts", "num_experts_per_tok")
# The rules of heads, in force: their defaults are often none.
RULES = {
    "logit_scale": 0.5, "logits_scaling": 4.0, "lm_head_multiplier": 0.5,
    "final_logit_softcapping": 3.0, "logits_soft_cap": 3.0, "output_logit_soft_cap": 3.0,
}  # fmt: skip
SLIDING = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 8,
    "swa_kv_lora_rank": 8, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
}  # fmt: skip
INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}  # fmt: skip


def in_text_config(fields: dict) -> dict:
    return {f"text_config.{name}": value for name, value in fields.items()}


# Families whose parts must fit each other in a way of their own: fields, nested by ".".
OVERRIDES: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"vision_config.mlp_layer_types": ["dense", "dense"]} | in_text_config(SLIDING),
    "dots3_note_text": SLIDING,
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 16},
    "moshi": {"audio_encoder_config": None, "depth_decoder_config": None, "audio_vocab_size": 64},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": in_text_config(INDEXER),
    "qwen4_exp_text": INDEXER,
    "reformer": {
        "attn_layers": ["local", "lsh"], "axial_pos_embds": False, "is_decoder": True,
        "num_buckets": 2, "hash_seed": 1,
        # Its dropout draws from the clock.
        "hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0,
    },
    "xlstm": {"hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3,
    },
}  # fmt: skip


def small_config(kind, default=None) -> dict:
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
            unset = value is dataclasses.MISSING or (value is None and name in ALWAYS)
            if unset or (number and value > SIZES[name]):
                given[name] = SIZES[name]
        elif name in RULES:
            given[name] = RULES[name]
        elif name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            given[name] = ("bos_token_id", "eos_token_id", "pad_token_id").index(name)
        elif number and name.endswith(("_token_id", "_token_index")) and value >= VOCABULARY:
            given[name] = next(ids)
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"):
        if name in given:
            given[name] = _layers(default)
    # Heads that are not grouped by default have no groups here either, as in latent attention.
    heads, few = "num_attention_heads", "num_key_value_heads"
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


CAUSAL = ("ForCausalLM", "LMHeadModel")


@functools.cache
def families() -> dict[str, str]:
    """Return the class of each family with a causal head: AutoModelForCausalLM's, and others."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as mapped

    others = {name for name in dir(transformers) if name.endswith(CAUSAL)}
    others -= {*mapped.values(), "AutoModelForCausalLM"}
    return dict(mapped) | {name: name for name in others}


def build(family: str):
    """Return a family's small model, in evaluation mode; its weights make logits that spread."""
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
    for switch in ("is_decoder", "causal"):
        if getattr(config, switch, None) is False:
            setattr(config, switch, True)
    config.use_cache = False
    made = kind if family == name else transformers.AutoModelForCausalLM.from_config
    model = made(config)
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
