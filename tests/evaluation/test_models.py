"""Model families from tiny configurations: the head's rule is read right, verified, and the loss is
the model's own.
"""

import numpy as np
import pytest
import torch
from tiny_models import TEXTS, build_model, build_tokenizer

from perplexity import evaluate, models
from perplexity.errors import InputError
from perplexity.evaluation import Head

SIZE = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
GROUPED = dict(num_key_value_heads=2)
# family -> (configuration, its arguments, what must be found of the head)
FAMILIES = {
    "gpt2": ("GPT2Config", dict(n_embd=32, n_layer=2, n_head=4, n_positions=64), {}),
    "llama": ("LlamaConfig", SIZE | GROUPED, {}),
    "llama tied": ("LlamaConfig", SIZE | GROUPED | dict(tie_word_embeddings=True), {}),
    "mistral": ("MistralConfig", SIZE | GROUPED | dict(sliding_window=16, head_dim=8), {}),
    "mixtral": (
        "MixtralConfig",
        SIZE | GROUPED | dict(num_local_experts=4, num_experts_per_tok=2),
        {},
    ),
    "qwen2": ("Qwen2Config", SIZE | GROUPED, {}),
    "qwen3": ("Qwen3Config", SIZE | GROUPED | dict(head_dim=8), {}),
    "olmo": ("OlmoConfig", SIZE | GROUPED, {}),
    "olmo2": ("Olmo2Config", SIZE | GROUPED, {}),
    "opt": (
        "OPTConfig",
        dict(
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
        | dict(word_embed_proj_dim=16),
        {},
    ),
    "gpt-neox": ("GPTNeoXConfig", SIZE, {}),
    "falcon": (
        "FalconConfig",
        dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        {},
    ),
    "falcon alibi": (
        "FalconConfig",
        dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True),
        {},
    ),
    "phi": ("PhiConfig", SIZE, {"bias": True}),
    "gemma": ("GemmaConfig", SIZE | GROUPED | dict(head_dim=8), {}),
    "gemma2": (
        "Gemma2Config",
        SIZE | GROUPED | dict(head_dim=8, final_logit_softcapping=3.0),
        {"softcap": 3.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        SIZE | GROUPED | dict(head_dim=8, final_logit_softcapping=2.0),
        {"softcap": 2.0},
    ),
    "cohere": ("CohereConfig", SIZE | GROUPED | dict(logit_scale=0.25), {"logit_scale": 0.25}),
    "cohere2": (
        "Cohere2Config",
        SIZE | GROUPED | dict(logit_scale=0.5, head_dim=8),
        {"logit_scale": 0.5},
    ),
    "granite": ("GraniteConfig", SIZE | GROUPED | dict(logits_scaling=8.0), {"logit_scale": 0.125}),
}


def build(family: str, vocabulary: int):
    import transformers

    name, arguments, _ = FAMILIES[family]
    torch.manual_seed(0)
    special = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    config = getattr(transformers, name)(
        vocab_size=vocabulary, initializer_range=0.3, **special | arguments
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # a bias starts as zeros, which any rule would fit
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            model.get_output_embeddings().bias.normal_()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_models_own(family, tokenizer):
    model = build(family, len(tokenizer) + 5)
    head = models.as_language_model(model).head
    expected = {"bias": False, "softcap": None, "logit_scale": 1.0} | FAMILIES[family][2]
    assert {
        "bias": head.bias is not None,
        "softcap": head.softcap,
        "logit_scale": head.logit_scale,
    } == expected
    got = evaluate(model, tokenizer, TEXTS, context_length=24, stride=23, batch_size=3)
    total, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text)["input_ids"]])
        for begin in range(0, len(ids) - 1, 23):
            window = ids[begin : begin + 24][None]
            with torch.no_grad():
                # The loss transformers itself computes from labels: a mean over the window.
                total += model(input_ids=window, labels=window).loss.item() * (window.shape[1] - 1)
            count += window.shape[1] - 1
    assert got.tokens == count
    assert got.loss == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    "family", ["gpt2", "llama tied", "gemma2", "cohere", "granite", "phi", "opt"]
)
def test_a_forgotten_rule_stops_the_run(family, tokenizer, monkeypatch):
    model = build(family, len(tokenizer))
    network = models.as_language_model(model)
    sample = np.arange(16)
    models.verify(network, sample, 24)
    wrong = {
        "gpt2": Head(network.head.weight, logit_scale=1.05),
        "llama tied": Head(network.head.weight, softcap=5.0),
    }
    network.head = wrong.get(family, Head(network.head.weight))
    if family == "opt":
        network.head = Head(network.head.weight.roll(1, 0))
    with pytest.raises(InputError, match="own logits differ from its head on its hidden states by"):
        models.verify(network, sample, 24)


def test_a_model_that_looks_ahead_is_refused(tokenizer):
    import transformers

    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    encoder = transformers.BertModel(config, add_pooling_layer=False).eval()

    class Encoder:
        head = Head(encoder.embeddings.word_embeddings.weight)
        context_length = 64

        def hidden_states(self, input_ids):
            return encoder(input_ids).last_hidden_state

        def logits(self, input_ids):
            return self.hidden_states(input_ids) @ self.head.weight.T

    with pytest.raises(InputError, match="depend on later tokens .* not a causal model"):
        evaluate(Encoder(), tokenizer, TEXTS)


class NanoGPT(torch.nn.Module):
    """A nanoGPT-style module: position and token embeddings, blocks, a norm, a tied head; logits
    out.
    """

    def __init__(self, vocabulary: int, block_size: int = 64, width: int = 32):
        super().__init__()
        self.wte, self.wpe = (
            torch.nn.Embedding(vocabulary, width),
            torch.nn.Embedding(block_size, width),
        )
        layer = torch.nn.TransformerEncoderLayer(
            width, 4, 64, dropout=0.1, batch_first=True, norm_first=True
        )
        self.blocks = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.ln_f = torch.nn.LayerNorm(width)
        self.lm_head = torch.nn.Linear(width, vocabulary, bias=False)
        self.block_size = block_size

    def features(self, idx):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        mask = torch.nn.Transformer.generate_square_subsequent_mask(idx.shape[1])
        return self.ln_f(self.blocks(x, mask=mask, is_causal=True))

    def forward(self, idx):
        return self.lm_head(self.features(idx))


def test_a_module_of_ones_own_plugs_in(tokenizer):
    torch.manual_seed(0)
    nano = NanoGPT(len(tokenizer)).eval()

    class Adapter:
        def __init__(self, model):
            self.model = model
            self.head = Head(model.lm_head.weight)
            self.context_length = model.block_size

        def hidden_states(self, input_ids):
            return self.model.features(input_ids)

        def logits(self, input_ids):
            return self.model(input_ids)

    nano.train()
    got = evaluate(Adapter(nano), tokenizer, TEXTS, context_length=64)
    assert nano.training
    nano.eval()
    total = count = 0
    for text in TEXTS:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            total += torch.nn.functional.cross_entropy(
                nano(ids)[0, :-1], ids[0, 1:], reduction="sum"
            ).item()
        count += ids.shape[1] - 1
    assert got.loss == pytest.approx(total / count, rel=1e-5)


def test_something_else_is_named(tokenizer):
    with pytest.raises(
        InputError,
        match=r"model: expected .* LanguageModel, got Linear without head, context_length",
    ):
        evaluate(torch.nn.Linear(3, 3), tokenizer, TEXTS)


def test_a_body_without_a_head(tokenizer):
    with pytest.raises(InputError, match="model: expected"):
        evaluate(build_model(len(tokenizer)).model, tokenizer, TEXTS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_and_shards(tmp_path, dtype):
    """A checkpoint in several files, read in the dtype asked for; logits stay float32."""
    tokenizer = build_tokenizer(bos=True)
    model = build_model(len(tokenizer))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    loaded, its = models.load(tmp_path, dtype=dtype, device="cpu")
    assert loaded.dtype == getattr(torch, dtype)
    got = evaluate(loaded, its, TEXTS)
    assert got.precision == "float32"
    exact = evaluate(model, tokenizer, TEXTS).loss
    assert got.loss == pytest.approx(
        exact, rel={"float32": 1e-9, "float16": 5e-3, "bfloat16": 3e-2}[dtype]
    )


def test_pickled_weights_are_not_read(tmp_path):
    tokenizer = build_tokenizer(bos=True)
    model = build_model(len(tokenizer))
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="expected the weights of a causal language model"):
        models.load(tmp_path, device="cpu")


def test_code_that_comes_with_a_model_runs_only_where_asked(tmp_path):
    import json

    tokenizer = build_tokenizer(bos=True)
    build_model(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "of_its_own"
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'of_its_own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(InputError):
        models.load(tmp_path, device="cpu")
    assert not (tmp_path / "ran").exists()
    loaded, _ = models.load(tmp_path, device="cpu", trust_remote_code=True)
    assert (tmp_path / "ran").exists() and type(loaded).__name__ == "OwnModel"


class Looking:
    """Looks ahead where asked, and gives logits as asked."""

    def __init__(self, model, ahead=0.0, logits=None):
        self.net, self.ahead, self.own = model, ahead, logits
        self.head, self.context_length = Head(model.lm_head.weight), 64

    def hidden_states(self, input_ids):
        hidden = self.net.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden + self.ahead * hidden.mean(1, keepdim=True)

    def logits(self, input_ids):
        logits = self.hidden_states(input_ids) @ self.head.weight.T
        return logits if self.own is None else self.own(logits)


def test_looking_ahead_shows_on_a_text_of_one_token_repeated(tokenizer):
    from perplexity.evaluation import Document

    documents = [Document("d", "", ids=np.full(40, 9))]
    model = build_model(len(tokenizer))
    assert evaluate(Looking(model), tokenizer, documents, bos="never").tokens == 39
    with pytest.raises(InputError, match="depend on later tokens"):
        evaluate(Looking(model, ahead=0.1), tokenizer, documents, bos="never")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (lambda logits: logits * torch.nan, "own logits differ"),
        (
            lambda logits: logits[..., :-1],
            r"expected logits of shape \(1, 16, \d+\), got \(1, 16, \d+\)",
        ),
        (lambda logits: "logits", r"expected logits of shape .*, got str"),
        (lambda logits: logits.roll(1, 1)[:, -1:], "own logits differ"),
    ],
)
def test_logits_that_are_not_the_heads(tokenizer, own, message):
    with pytest.raises(InputError, match=message):
        evaluate(Looking(build_model(len(tokenizer)), logits=own), tokenizer, TEXTS)


def test_logits_of_the_last_position_alone_do(tokenizer):
    """nanoGPT's, without targets."""
    model = build_model(len(tokenizer))
    assert evaluate(Looking(model, logits=lambda logits: logits[:, -1:]), tokenizer, TEXTS).ok


def test_every_modules_mode_is_put_back(tokenizer):
    model = build_model(len(tokenizer))
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    for network in (model, Looking(model)):
        evaluate(network, tokenizer, TEXTS)
        assert [module.training for module in model.modules()] == before


def test_what_a_model_caches_serves_training_afterwards(tokenizer):
    """Under inference_mode a mask made on first use raised in the next backward pass."""

    class Caches(NanoGPT):
        def features(self, idx):
            if not hasattr(self, "table"):
                self.table = torch.rand(64, 32)
            return super().features(idx) * self.table[: idx.shape[1]]

    class Adapter(Looking):
        def hidden_states(self, input_ids):
            return self.net.features(input_ids)

    net = Caches(len(tokenizer))
    evaluate(Adapter(net), tokenizer, TEXTS)
    net(torch.arange(9)[None]).sum().backward()


def test_a_peft_model(tokenizer):
    import peft

    torch.manual_seed(0)
    wrapped = peft.get_peft_model(
        build_model(len(tokenizer)),
        peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
    )
    got = evaluate(wrapped, tokenizer, TEXTS[:1])
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(TEXTS[0])["input_ids"]]])
    with torch.no_grad():
        assert got.loss == pytest.approx(
            wrapped.eval()(input_ids=ids, labels=ids).loss.item(), rel=1e-5
        )
