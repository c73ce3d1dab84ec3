"""Every weight of a model comes from its files: missing ones are an error, unused ones a note."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TEXTS, build_model, build_tokenizer

from perplexity import evaluate, models
from perplexity.errors import InputError
from perplexity.evaluation.model_comparison import compare_models

QUERY, DOWN = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint in one file, and the same one in several."""
    folder = tmp_path_factory.mktemp("weights")
    tokenizer = build_tokenizer(bos=True)
    for name, size in (("whole", "1GB"), ("shards", "20KB")):
        build_model(len(tokenizer)).save_pretrained(folder / name, max_shard_size=size)
        tokenizer.save_pretrained(folder / name)
    return folder


def change_weights(change):
    def damage(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return damage


def change_config(**values):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return damage


def without(*names):
    return change_weights(lambda weights: [weights.pop(name) for name in names])


def drop_from_shard(folder):
    """The index still names the weight."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"][QUERY]
    weights = load_file(shard)
    del weights[QUERY]
    save_file(weights, shard, {"format": "pt"})


def only_the_body(folder):
    """A checkpoint as ``AutoModel`` saves it: no head, and no "model." before the names."""
    build_model(len(build_tokenizer(bos=True))).model.save_pretrained(folder)


# case -> (checkpoint, damage, words of the error)
INCOMPLETE = {
    "two weights": ("whole", without(QUERY, DOWN), rf"2 weights \({DOWN}, {QUERY}\) missing"),
    "a norm": ("whole", without("model.norm.weight"), r"1 weight \(model.norm.weight\) missing"),
    "the head, which nothing is tied to": (
        "whole",
        without("lm_head.weight"),
        r"\(lm_head.weight\) missing",
    ),
    "a body alone": ("whole", only_the_body, r"\(lm_head.weight\) missing"),
    "more layers by the configuration": (
        "whole",
        change_config(num_hidden_layers=3),
        r"layers\.2\..* more\) missing",
    ),
    "tied, and neither is there": (
        "whole",
        lambda folder: (
            change_config(tie_word_embeddings=True)(folder),
            without("lm_head.weight", "model.embed_tokens.weight")(folder),
        ),
        "model.embed_tokens.weight",
    ),
    "another shape": (
        "whole",
        change_weights(lambda weights: weights.update({QUERY: torch.ones(16, 32)})),
        rf"1 weight \({QUERY} \[16, 32\] instead of \[32, 32\]\) of another shape",
    ),
    "not in the shard that the index names": (
        "shards",
        drop_from_shard,
        rf"1 weight \({QUERY}\) missing",
    ),
    "a shard that is not there": (
        "shards",
        lambda folder: next(folder.glob("model-00002*.safetensors")).unlink(),
        "model-00002",
    ),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_a_checkpoint_that_lacks_weights_is_refused(saved, tmp_path, case):
    """Evaluated with random weights in their place, it gave another perplexity each time, and exit
    status 0.
    """
    kind, damage, words = INCOMPLETE[case]
    folder = tmp_path / "model"
    shutil.copytree(saved / kind, folder)
    models.load(folder, device="cpu")
    damage(folder)
    with pytest.raises(InputError, match=f"{folder}: expected .*{words}"):
        models.load(folder, device="cpu")


def test_an_encoder_is_no_checkpoint_of_a_causal_model(tmp_path):
    import transformers

    tokenizer = build_tokenizer(bos=True)
    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    config = transformers.BertConfig(vocab_size=len(tokenizer), **size)
    transformers.BertModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"cls\.predictions.* missing"):
        models.load(tmp_path, device="cpu")


@pytest.mark.parametrize("head", ["absent", "present"])
def test_tied_weights_need_not_be_there_twice(saved, tmp_path, head):
    folder = tmp_path / "model"
    shutil.copytree(saved / "whole", folder)
    change_config(tie_word_embeddings=True)(folder)
    if head == "absent":
        without("lm_head.weight")(folder)
    else:
        change_weights(
            lambda weights: weights.update(
                {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
            )
        )(folder)
    model, tokenizer = models.load(folder, device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not [note for note in evaluate(model, tokenizer, TEXTS).notes if "checkpoint" in note]


def test_a_body_with_tied_embeddings_is_whole(tmp_path):
    tokenizer = build_tokenizer(bos=True)
    model = build_model(len(tokenizer))
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = models.load(tmp_path, device="cpu")
    for (name, ours), (_, theirs) in zip(
        loaded.named_parameters(), model.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_weights_that_are_not_used_are_noted(saved, tmp_path):
    from perplexity.probe.prober import probe

    folder = tmp_path / "model"
    shutil.copytree(saved / "whole", folder)
    change_config(num_hidden_layers=1)(folder)
    model, tokenizer = models.load(folder, device="cpu")
    words = "the checkpoint holds 9 weights (model.layers.1.input_layernorm.weight, "
    assert evaluate(model, tokenizer, TEXTS).notes[0].startswith(words)
    other, _ = models.load(saved / "whole", device="cpu")
    assert not any("checkpoint" in note for note in evaluate(other, tokenizer, TEXTS).notes)
    found = compare_models(other, model, tokenizer, TEXTS)
    assert found.to_dict()["notes"][0].startswith(f"model B: {words}")
    assert probe(model, tokenizer, ["the cat"]).notes[0].startswith(words)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_beside_the_weights_below_them(saved, tmp_path, dtype):
    """transformers reports on the adapters alone: weights missing below them went unnoticed."""
    import peft

    folder = tmp_path / "model"
    shutil.copytree(saved / "whole", folder)
    torch.manual_seed(1)
    settings = peft.LoraConfig(
        target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    peft.get_peft_model(build_model(len(build_tokenizer(bos=True))), settings).save_pretrained(
        folder
    )
    model, _ = models.load(folder, device="cpu", dtype=dtype)
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, theirs(ids).logits)
        plain, _ = models.load(saved / "whole", device="cpu", dtype=dtype)
        assert not torch.equal(model(ids).logits, plain(ids).logits)
    weights = load_file(folder / "adapter_model.safetensors")
    removed = next(iter(weights))
    save_file(
        {k: v for k, v in weights.items() if k != removed},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        InputError,
        match="of the adapters in the checkpoint, got 1 weight .*q_proj.lora_A.* missing",
    ):
        models.load(folder, device="cpu")
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    without(DOWN)(folder)
    with pytest.raises(InputError, match=rf"1 weight \({DOWN}\) missing"):
        models.load(folder, device="cpu")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors, got no such file"):
        models.load(folder, device="cpu")
