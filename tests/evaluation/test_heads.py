"""Heads that are no plain linear layer on the body's last hidden states, and models that say little
about themselves.
"""

import copy
import json

import pytest
import torch
from tiny_models import TEXTS, build_model, build_tokenizer

from perplexity import evaluate, models
from perplexity.errors import InputError
from perplexity.models import heads

transformers = pytest.importorskip("transformers")
CausalLMOutput = transformers.modeling_outputs.CausalLMOutput
SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2,
)  # fmt: skip
GROUPED = SMALL | dict(num_key_value_heads=2, head_dim=8)
DECODER = SMALL | dict(is_decoder=True)
LLAMA4 = GROUPED | dict(
    intermediate_size_mlp=48, num_local_experts=2, interleave_moe_layer_step=2,
    attention_chunk_size=64, layer_types=["full_attention"] * 2,
)  # fmt: skip
GEMMA3 = dict(
    text_config=GROUPED | dict(final_logit_softcapping=2.0),
    vision_config=dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    ),
)
# name -> class, configuration, positions that the model reads
FAMILIES = {
    "a transform before the last layer": ("BertLMHeadModel", "BertConfig", DECODER, 64),
    "positions behind the padding": ("RobertaForCausalLM", "RobertaConfig", DECODER, 62),
    "an output embedding of another size": (
        "ElectraForCausalLM", "ElectraConfig", DECODER | dict(embedding_size=16), 64,
    ),
    "no base_model": ("Llama4ForCausalLM", "Llama4TextConfig", LLAMA4, 64),
    "a factor that other families divide by": (
        "HyperCLOVAXForCausalLM", "HyperCLOVAXConfig", GROUPED | dict(logits_scaling=4.0), 64,
    ),
    "a softcap that is not applied": ("Gemma3ForConditionalGeneration", "Gemma3Config", GEMMA3, 64),
    "positions of the decoder": (
        "WhisperForCausalLM", "WhisperConfig",
        dict(
            d_model=16, decoder_layers=1, encoder_layers=1, decoder_attention_heads=2,
            decoder_ffn_dim=16, max_target_positions=40, max_source_positions=90, pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        ), 40,
    ),
    "positions by another name": (
        "MptForCausalLM", "MptConfig", dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=48), 48,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(bos=True)


def family(name, vocabulary):
    kind, configuration, given, _ = FAMILIES[name]
    given = copy.deepcopy(given)
    given.get("text_config", given)["vocab_size"] = vocabulary
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, configuration)(**given)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


@torch.no_grad()
def own_loss(model, tokenizer, texts=TEXTS, context=24):
    """Return the mean −log p of the model's own logits in float64, in windows that do not
    overlap.
    """
    total = count = 0
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
        for begin in range(0, len(ids) - 1, context - 1):
            window = torch.tensor(ids[begin : begin + context])
            found = model(input_ids=window[None, :-1])
            logits = found[0] if isinstance(found, tuple) else found.logits
            nll = torch.nn.functional.cross_entropy(logits[0].double(), window[1:], reduction="sum")
            total, count = total + nll.item(), count + len(window) - 1
    return total / count


def evaluated(model, tokenizer, **options):
    return evaluate(model, tokenizer, TEXTS, **dict(context_length=24, stride=23) | options)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, tokenizer):
    model = family(name, len(tokenizer) + 3)
    positions = FAMILIES[name][-1]
    assert models.as_language_model(model).context_length == positions
    # Float32 against float64 of the same logits.
    assert evaluated(model, tokenizer).loss == pytest.approx(own_loss(model, tokenizer), rel=1e-6)
    whole = evaluated(model, tokenizer, context_length=positions, stride=positions - 1)
    assert whole.loss == pytest.approx(own_loss(model, tokenizer, context=positions), rel=1e-6)
    with pytest.raises(
        InputError, match=f"context_length: expected 2 to {positions}, the model's limit"
    ):
        evaluated(model, tokenizer, context_length=positions + 1)


class Config(transformers.PreTrainedConfig):
    model_type = "of_its_own"


class Body(transformers.PreTrainedModel):
    config_class, base_model_prefix = Config, "body"

    def __init__(self, config):
        super().__init__(config)
        self.embedding = torch.nn.Embedding(310, 32)
        self.recurrent = torch.nn.GRU(32, 32, batch_first=True)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        return transformers.modeling_outputs.BaseModelOutput(
            self.recurrent(self.embedding(input_ids))[0]
        )


class Own(transformers.PreTrainedModel):
    """A model of one's own, whose forward takes no ``use_cache``."""

    config_class, base_model_prefix = Config, "body"

    def __init__(self, config):
        super().__init__(config)
        torch.manual_seed(0)
        self.body = Body(config)
        self.lm_head = torch.nn.Linear(32, 310, bias=False)
        self.post_init()
        torch.nn.init.normal_(self.lm_head.weight)

    def get_output_embeddings(self):
        return self.lm_head

    def hidden(self, input_ids):
        return self.body(input_ids)[0]

    def forward(self, input_ids, attention_mask=None):
        return CausalLMOutput(logits=self.lm_head(self.hidden(input_ids)))


class Tuples(Own):
    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return self.lm_head(self.hidden(input_ids)), None


class TupleBody(Own):
    def hidden(self, input_ids):
        return self.body(input_ids).to_tuple()[0]


class BodyAsksForMore(Own):
    """Its body reads embeddings, which the model makes."""

    def hidden(self, input_ids):
        return self.body.recurrent(self.body.embedding(input_ids) * 2)[0]

    def __init__(self, config):
        super().__init__(config)
        self.body.forward = lambda inputs_embeds: self.body.recurrent(inputs_embeds)


class TwoLayers(Own):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head = torch.nn.Sequential(
            torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 310)
        )


class Unnamed(Own):
    """Says nothing of its output embedding, and has a norm before it."""

    def get_output_embeddings(self):
        return None

    def hidden(self, input_ids):
        return torch.nn.functional.layer_norm(self.body(input_ids)[0], (32,))


class NoModule(Own):
    """Multiplies by the head's weight itself."""

    def forward(self, input_ids, attention_mask=None):
        return CausalLMOutput(logits=self.hidden(input_ids) @ self.lm_head.weight.T)


class Scaled(Own):
    """Has a factor and a number of columns under names of its own."""

    def forward(self, input_ids, attention_mask=None):
        logits = self.lm_head(self.hidden(input_ids))[..., : self.config.real_vocabulary]
        return CausalLMOutput(logits=logits / self.config.output_multiplier)


class Capped(Own):
    """Has a softcap under a name of its own (xLSTM's), and no factor under a name that others
    use.
    """

    def forward(self, input_ids, attention_mask=None):
        cap = self.config.output_logit_soft_cap
        return CausalLMOutput(logits=cap * torch.tanh(self.lm_head(self.hidden(input_ids)) / cap))


KINDS = [Own, Tuples, TupleBody, BodyAsksForMore, TwoLayers, Unnamed, NoModule, Scaled, Capped]


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_ones_own(kind, tokenizer):
    rule = dict(
        output_multiplier=2.5, real_vocabulary=305, output_logit_soft_cap=1.5, logit_scale=0.5
    )
    model = kind(Config(**rule)).eval()
    assert evaluated(model, tokenizer).loss == pytest.approx(own_loss(model, tokenizer), rel=1e-6)


def test_a_rule_that_was_shown_is_the_configurations(tokenizer):
    """Another model of the class, with another factor, has its own; so has a copy."""
    for factor in (2.5, 1.0, 4.0):
        model = Scaled(Config(output_multiplier=factor, real_vocabulary=305)).eval()
        assert models.as_language_model(model).head.logit_scale == pytest.approx(1 / factor)
    assert heads.head_of(copy.deepcopy(model)).logit_scale == 0.25


def test_an_unknown_rule_is_refused(tokenizer):
    class Squared(Own):
        def forward(self, input_ids, attention_mask=None):
            return CausalLMOutput(logits=self.lm_head(self.hidden(input_ids)) ** 2)

    with pytest.raises(InputError, match="Squared's own logits differ .* a LanguageModel"):
        evaluated(Squared(Config()).eval(), tokenizer)


def test_an_encoder_is_refused_with_what_to_set(tokenizer):
    config = transformers.BertConfig(vocab_size=len(tokenizer), **SMALL)
    with pytest.raises(InputError, match="depend on later tokens .* is_decoder = false"):
        evaluated(transformers.BertLMHeadModel(config).eval(), tokenizer)


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64), 256),
        (dict(rope_type="linear", factor=2.0), 128),
        (dict(rope_type="dynamic", factor=2.0), 128),
        (dict(rope_type="default"), 64),
    ],
)
def test_windows_that_rope_scaling_extends(scaling, longest, tokenizer):
    config = build_model(len(tokenizer)).config
    config.rope_parameters = dict(rope_theta=1e4) | scaling
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    # one window: dynamic scaling keeps what the last call left
    text = (" ".join(TEXTS) * 3)[: 2 * longest]
    assert evaluate(model, tokenizer, [text]).context_length == 64
    if longest > 64:
        got = evaluate(model, tokenizer, [text], context_length=longest, stride=longest - 1)
        expected = own_loss(model, tokenizer, [text], context=longest)
        assert got.loss == pytest.approx(expected, rel=1e-6)
        assert (
            f"windows of {longest} tokens are longer than the configuration's 64 positions"
            in got.notes[0]
        )
    with pytest.raises(
        InputError, match=f"context_length: expected 2 to {longest}, the model's limit"
    ):
        evaluate(model, tokenizer, [text], context_length=longest + 1)


def test_a_head_kept_in_float32(tokenizer):
    model = build_model(len(tokenizer), torch.bfloat16)
    head = model.lm_head.float()
    head.forward = lambda hidden: torch.nn.functional.linear(hidden.float(), head.weight)
    # Alone: the body's 16-bit products depend on how many rows there are.
    got = evaluated(model, tokenizer, batch_size=1)
    assert got.loss == pytest.approx(own_loss(model, tokenizer), rel=1e-6)
    assert head.weight.dtype == torch.float32


class Packed(torch.nn.Module):
    """Stands for a quantised layer: int8 rows and their scales; ``inputs`` quantises what comes in
    as well.
    """

    def __init__(self, layer, inputs=False, bias=None):
        super().__init__()
        self.inputs, self.bias = inputs, bias
        self.register_buffer("scale", layer.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("packed", (layer.weight.detach() / self.scale).round().to(torch.int8))
        self.in_features = layer.in_features

    def forward(self, hidden):
        if self.inputs:
            scale = hidden.abs().amax(-1, keepdim=True) / 127
            hidden = (hidden / scale.clamp(min=1e-9)).round() * scale
        return torch.nn.functional.linear(
            hidden, self.packed.to(hidden) * self.scale.to(hidden), self.bias
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_quantised_head(tokenizer, dtype, bias, monkeypatch):
    monkeypatch.setattr(heads, "COLUMNS_AT_ONCE", 5)
    model = build_model(len(tokenizer), dtype)
    with_bias = torch.randn(len(tokenizer)).to(dtype) if bias else None
    model.lm_head = Packed(model.lm_head, bias=with_bias)
    # The model rounds its logits to bfloat16, by 2⁻⁹ at most, at random.
    rel = 1e-6 if dtype == torch.float32 else 2e-3
    assert evaluated(model, tokenizer).loss == pytest.approx(own_loss(model, tokenizer), rel=rel)


def test_a_quantised_head_is_dequantised_once(tokenizer, monkeypatch):
    """It takes a pass over every unit vector: a second one doubled that time."""
    model, calls, dequantised = build_model(len(tokenizer)), [], heads._dequantised
    model.lm_head = Packed(model.lm_head)
    monkeypatch.setattr(heads, "_dequantised", lambda *a: calls.append(a) or dequantised(*a))
    models.HuggingFaceModel(model)
    assert len(calls) == 1


def test_a_head_that_quantises_its_inputs(tokenizer):
    model = build_model(len(tokenizer))
    model.lm_head = Packed(model.lm_head, inputs=True)
    with pytest.raises(
        InputError,
        match=r"got Packed: if it is quantised, .*modules_to_not_convert.* rounds its inputs",
    ):
        evaluated(model, tokenizer)


def test_torchs_own_quantised_layers(tokenizer):
    """Dynamic quantisation rounds every input: no weight gives its logits."""
    model = torch.ao.quantization.quantize_dynamic(
        build_model(len(tokenizer)), {torch.nn.Linear}, dtype=torch.qint8
    )
    with pytest.raises(
        InputError, match="expected a head whose weight can be read, got Linear: if it is quantised"
    ):
        evaluated(model, tokenizer)


@pytest.mark.parametrize("tied", [False, True])
def test_an_offloaded_model(tokenizer, tied):
    accelerate = pytest.importorskip("accelerate")
    model = build_model(len(tokenizer))
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    expected = evaluated(model, tokenizer)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    assert offloaded.lm_head.weight.is_meta
    got = evaluated(offloaded, tokenizer)
    assert got.loss == expected.loss
    assert got.model["fingerprint"] == expected.model["fingerprint"]
    assert offloaded.lm_head.weight.is_meta
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[7, 3] += 1
    again = evaluated(accelerate.cpu_offload(model, execution_device="cpu"), tokenizer)
    assert again.model["fingerprint"] != got.model["fingerprint"]


def test_a_model_without_values(tokenizer):
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(build_model(len(tokenizer)).config)
    with pytest.raises(
        InputError, match="model: expected weights with values, got .* on the meta device"
    ):
        evaluated(model, tokenizer)


LLAVA = dict(
    text_config=dict(model_type="llama") | GROUPED,
    vision_config=dict(
        model_type="clip_vision_model", hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, image_size=16, patch_size=8, projection_dim=16,
    ),
    image_token_index=1,
)  # fmt: skip


@pytest.mark.parametrize("device_map", [None, "auto"])
def test_an_image_text_model_by_the_command_line(device_map, tmp_path, tokenizer, ppl_here):
    given = copy.deepcopy(LLAVA)
    given["text_config"]["vocab_size"] = len(tokenizer)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**given)).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXTS[0])
    place = ["--device", "cpu"] if device_map is None else ["--device-map", device_map]
    options = ["--context-length", "24", "--stride", "23", "--json", tmp_path / "out.json", *place]
    done = ppl_here("eval", tmp_path / "model", tmp_path / "text.txt", *options)
    assert done.returncode == 0, done.stderr
    got = json.loads((tmp_path / "out.json").read_text())
    assert got["loss"] == pytest.approx(own_loss(model, tokenizer, TEXTS[:1]), rel=1e-6)


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ("T5Config", {}, ["T5Config", "model_type 't5'", "take a decoder-only model"]),
        ("ViTConfig", {}, ["ViTConfig", "model_type 'vit'", "take a decoder-only model"]),
        ("LlamaConfig", dict(revision="v2"), ["revision: expected none for the folder", "'v2'"]),
        (
            "LlamaConfig",
            dict(device_map="auto", device="cpu"),
            ["device: expected none with device_map", "'cpu'"],
        ),
    ],
)
def test_what_cannot_be_loaded_says_what_to_do(config, options, words, tmp_path, tokenizer):
    getattr(transformers, config)().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError) as caught:
        models.load(
            tmp_path, **{"device": "cpu" if "device_map" not in options else None} | options
        )
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), (
        caught.value
    )


def test_a_revision_is_asked_for_everywhere(monkeypatch, tmp_path, tokenizer):
    """By tokenizer, configuration, weights and the cache alike, and named in what is measured."""
    import huggingface_hub

    model, asked = build_model(len(tokenizer)), []

    def known(name, file, revision=None, **rest):
        asked.append(("cache", revision))
        return str(tmp_path / "config.json")

    def returning(what, value):
        def call(name, revision=None, **rest):
            asked.append((what, revision))
            return value

        return call

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", known)
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", returning("tokenizer", tokenizer)
    )
    monkeypatch.setattr(
        transformers.AutoConfig, "from_pretrained", returning("config", model.config)
    )
    report = (model, {"missing_keys": set()})
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", returning("weights", report)
    )
    monkeypatch.setattr("transformers.utils.find_adapter_config_file", returning("adapters", None))
    loaded, _ = models.load("owner/name", revision="v2", device="cpu", unchanged=True)
    assert {what for what, _ in asked} == {"cache", "tokenizer", "config", "weights", "adapters"}
    assert {revision for _, revision in asked} == {"v2"}
    assert models.source(models.as_language_model(loaded)).name == "owner/name@v2"


def test_weights_that_do_not_fit(monkeypatch, tmp_path, tokenizer):
    model = build_model(len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def full(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(model), "to", full)
    with pytest.raises(
        InputError,
        match=r"the weights do not fit in the memory of cpu: take .*bfloat16.*device_map",
    ):
        models.load(tmp_path, device="cpu")
