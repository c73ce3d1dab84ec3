"""A causal language model as hidden states and a head, so that the logits never have to exist."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, first_line, theirs
from ..kernels import reference
from .weights import read_model

VERIFIED_POSITIONS = 16


@dataclass(frozen=True)
class Head:
    """logits = softcap · tanh((logit_scale · (hidden @ weightᵀ + bias)) / softcap)."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    logit_scale: float = 1.0

    def arguments(self) -> dict:
        """Keywords of ``token_nll`` and ``token_statistics``."""
        return {"linear_bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}


@runtime_checkable
class LanguageModel(Protocol):
    """What ``evaluate`` asks of a model. A Hugging Face causal model is wrapped; anything else gives these four.

    ``logits`` is called once a run, on a few positions, to compare the head with the model's own.
    """

    head: Head
    context_length: int | None  # the most positions it reads; None: any

    def hidden_states(self, input_ids: Tensor) -> Tensor: ...  # [B, T] -> [B, T, D], what the head multiplies

    def logits(self, input_ids: Tensor) -> Tensor: ...  # [B, T] -> [B, T, V]


class HuggingFaceModel:
    """``LanguageModel`` of a transformers causal model.

    Rows of a batch may be padded on the right and no mask is given: causal attention keeps padding out of sight.
    """

    def __init__(self, model) -> None:
        if hasattr(model, "get_base_model"):  # PEFT's wrapper, whose base_model has the head, too
            if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
                kind = type(model.active_peft_config).__name__
                raise InputError(
                    f"model: expected adapters inside the model, as LoRA's, got {kind}, whose prompt is outside it"
                )
            model = model.get_base_model()
        self.model = model
        self.body = model.base_model
        if self.body is model:
            raise InputError(f"model: expected a body and a head ({type(model).__name__} shows none as base_model)")
        self.head = head_of(model)
        config = model.config.get_text_config()
        self.context_length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_ctx", None)

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        with self._forward():
            return self.body(input_ids=input_ids, use_cache=False).last_hidden_state

    def logits(self, input_ids: Tensor) -> Tensor:
        with self._forward():
            return self.model(input_ids=input_ids, use_cache=False).logits

    def _forward(self):
        return theirs(f"model: expected a forward pass of {type(self.model).__name__}, got one that fails")


def as_language_model(model) -> LanguageModel:
    """``model`` itself where it is a ``LanguageModel``, a wrapped transformers model, or InputError."""
    if isinstance(model, LanguageModel):
        return model
    if hasattr(model, "base_model") and hasattr(model, "get_output_embeddings"):
        return HuggingFaceModel(model)
    missing = [name for name in ("head", "context_length", "hidden_states", "logits") if not hasattr(model, name)]
    raise InputError(
        f"model: expected a transformers causal model or a LanguageModel, got {type(model).__name__} "
        f"without {', '.join(missing)}"
    )


# What a configuration calls the logits' factor (Cohere, Falcon H1), divisor (Granite) and softcap (Gemma, RecurrentGemma).
FACTORS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")


def head_of(model) -> Head:
    """Weight, bias and logit rule of a transformers model, from its modules and its configuration; differentiable.

    What a configuration does not say is caught by ``verify``.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise InputError(f"model: expected an output embedding, {type(model).__name__} has none")
    config = model.config.get_text_config()
    scale = 1.0
    for name in FACTORS:
        scale *= getattr(config, name, None) or 1.0
    for name in DIVISORS:
        scale /= getattr(config, name, None) or 1.0
    softcap = next((cap for name in SOFTCAPS if (cap := getattr(config, name, None))), None)
    return Head(*_weight_and_bias(layer), softcap, scale)


def _weight_and_bias(layer) -> tuple[Tensor, Tensor | None]:
    """Of an output layer, with PEFT's adapters in it: a copy that is trained instead of it, or low-rank additions (LoRA)."""
    if hasattr(layer, "modules_to_save"):
        adapters = layer.active_adapters if not layer.disable_adapters else []
        layer = layer.modules_to_save[adapters[0]] if adapters else layer.original_module
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if type(layer).__module__.startswith("peft."):
        if not (hasattr(layer, "get_delta_weight") and hasattr(layer, "lora_A")):
            raise InputError(f"model: expected plain LoRA on the head, got PEFT's {type(layer).__name__}")
        for option in ("use_dora", "lora_bias"):
            if any((getattr(layer, option, None) or {}).values()):
                raise InputError(f"{option}: expected plain LoRA on the head")
        if not (layer.merged or layer.disable_adapters):
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A:
                    weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
    return weight, bias


@torch.no_grad()
def verify(model: LanguageModel, ids: np.ndarray, context_length: int) -> None:
    """InputError unless the head on the hidden states gives the model's own logits, causally; on the first of ``ids`` [n].

    The one place where logits are asked for: a few positions, once a run. The second check needs no logits: a model that
    looks ahead (an encoder, say) would be told what it is scored on.
    """
    head, name = model.head, type(getattr(model, "model", model)).__name__
    rows = head.weight.shape[0]
    # A short text is followed by other ids, all different: a rule that shows on some logits only is found, too.
    count = min(VERIFIED_POSITIONS, context_length)
    few = np.concatenate([ids[:count], np.arange(count) % rows])[:count]
    input_ids = torch.from_numpy(few[None]).to(head.weight.device)
    expected, hidden = model.logits(input_ids), model.hidden_states(input_ids)
    for what, tensor, last in (("logits", expected, rows), ("hidden_states", hidden, head.weight.shape[1])):
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        # Some models give the logits of the last position alone.
        if shape not in ((1, count, last), (1, 1, last) if what == "logits" else None):
            raise InputError(f"model: expected {what} of shape {(1, count, last)}, got {shape}")
    bias = None if head.bias is None else head.bias.float()
    with torch.autocast(input_ids.device.type, enabled=False):
        got = reference.logits(
            hidden[0].float(), head.weight.float(), bias, softcap=head.softcap, logit_scale=head.logit_scale
        )[-expected.shape[1] :]
    # 16-bit logits or hidden states are rounded by the model: 2⁻⁸ relative for bfloat16.
    wide = all(tensor.dtype in (torch.float32, torch.float64) for tensor in (head.weight, expected, hidden))
    wide = wide and not torch.is_autocast_enabled(input_ids.device.type)
    tolerance = 1e-3 if wide else 2e-2
    expected = expected[0].float()
    finite = expected.isfinite()  # a model that gives NaN by both roads is reported by its tokens
    largest = expected.where(finite, 0).abs().max().item()
    difference = (got - expected).where(finite, 0).abs().max().item()
    if difference > tolerance * max(1.0, largest) or not torch.equal(finite, got.isfinite()):
        raise InputError(
            f"model: {name}'s own logits differ from its head on its hidden states by {difference:.3g}; "
            "it applies a rule after the head that is not known here (or drops out, or rounds to 16 bits inside): "
            "its perplexity would be wrong"
        )
    half = count // 2
    changed = input_ids.clone()
    changed[:, half:] = (changed[:, half:] + 1) % rows
    hidden = hidden[0, :half].float()
    ahead = (model.hidden_states(changed)[0, :half].float() - hidden).abs().max().item()
    if ahead > (1e-4 if wide else 2e-2) * max(1.0, hidden.abs().max().item()):
        raise InputError(
            f"model: {name}'s hidden states depend on later tokens (by {ahead:.3g}): it is not a causal model, "
            "and its perplexity would mean nothing"
        )


def modules(model: LanguageModel) -> list[torch.nn.Module]:
    """Modules a ``LanguageModel`` is, or has as attributes."""
    found = model if isinstance(model, torch.nn.Module) else None
    return [found] if found else [part for part in vars(model).values() if isinstance(part, torch.nn.Module)]


@dataclass(frozen=True)
class Source:
    """The folder or name that a model was loaded from, and notes on its weights."""

    name: str
    notes: list[str]


# Of the models that ``load`` returned, as long as they live.
SOURCES: WeakKeyDictionary[torch.nn.Module, Source] = WeakKeyDictionary()


def source(model: LanguageModel) -> Source | None:
    """Return where ``load`` found ``model``; None for one that was made otherwise."""
    return next((SOURCES[module] for module in modules(model) if module in SOURCES), None)


def loading_notes(model: LanguageModel) -> list[str]:
    """Return what a reader must know of how the model's weights were loaded."""
    found = source(model)
    return [] if found is None else found.notes


@torch.no_grad()
def fingerprint(model: LanguageModel) -> str:
    """Hash of configuration, head's rule and a sample of the weights: tells one model from another in no time.

    Not a proof that two are equal; code is not looked at.
    """
    head = model.head
    config = getattr(getattr(model, "model", None), "config", None)
    parts = [type(model).__name__, head.softcap, head.logit_scale]
    parts.append(config.to_json_string() if hasattr(config, "to_json_string") else None)
    digest = hashlib.sha256(repr(parts).encode())
    tensors = [head.weight] if head.bias is None else [head.weight, head.bias]
    for module in modules(model):
        tensors += [*module.parameters(), *module.buffers()]
    for tensor in tensors:
        digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        flat = tensor.detach().flatten()
        digest.update(flat[:: max(1, len(flat) // 64)].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_tokenizer(tokenizer, vocabulary: int) -> None:
    """InputError where the tokenizer has more entries than the model has logits."""
    if len(tokenizer) > vocabulary:
        raise InputError(
            f"tokenizer: expected at most {vocabulary} entries, the model's vocabulary, got {len(tokenizer)}: "
            "it belongs to another model"
        )


def _cached(name: str | Path) -> bool:
    """Whether Hugging Face's cache holds the model; asks its hub once where it does not, and InputError if that has none.

    Asked before transformers does: it tries for a minute where there is no network.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if isinstance(try_to_load_from_cache(str(name), "config.json"), str):
            return True
        HfApi().model_info(str(name), timeout=10)
    except Exception as error:  # of httpx, of the hub's own kinds, or a name it does not take
        raise InputError(
            f"{name}: expected a model folder or name, got no such folder and no such model ({first_line(error)})"
        )
    return False


def _source(name: str | Path, trust_remote_code: bool, needs: str = "config.json") -> dict:
    """Options of ``from_pretrained`` for a local folder with the file ``needs``, or a name of the hub or its cache."""
    path = Path(name)
    local = path.is_dir()
    if local and needs and not (path / needs).is_file():
        raise InputError(f"{name}: expected a Hugging Face model folder, got one without {needs}")
    if not local and (path.exists() or len(path.parts) > 2 or path.is_absolute() or str(name).startswith(".")):
        raise InputError(
            f"{name}: expected a local model folder, got {'a file' if path.exists() else 'no such folder'}"
        )
    return {"local_files_only": local or _cached(name), "trust_remote_code": trust_remote_code}


def _tokenizer(name: str | Path, rest: dict):
    from transformers import AutoTokenizer

    # transformers raises anything here, from OSError to KeyError and SafetensorError.
    with theirs(f"{name}: expected a tokenizer (tokenizer.json) there, got none that can be read"):
        return AutoTokenizer.from_pretrained(name, **rest)


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False):
    """The tokenizer of a folder, with or without a model beside it, or of a name. Raises InputError."""
    return _tokenizer(name, _source(name, trust_remote_code, needs=""))


def load(name: str | Path, *, device: str | None = None, dtype: str = "auto", trust_remote_code: bool = False):
    """Model and tokenizer of a Hugging Face folder, or of a name in its cache or on its hub.

    Weights are read as safetensors (whole or sharded), never unpickled; a model's own code runs only with
    ``trust_remote_code``. Raises InputError where something is missing or cannot be loaded: a weight of the model that its
    files lack, above all. Weights that the model does not use become a note in what is measured of it.
    """
    rest = _source(name, trust_remote_code)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # an unknown name, one that holds no numbers, or not built in
        raise InputError(f"device: expected one that this torch can use, got {device!r} ({first_line(error)})")
    tokenizer = _tokenizer(name, rest)
    try:
        with theirs("expected the weights of a causal language model, got none that can be read"):
            model, notes = read_model(name, dtype, rest)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error.__cause__
    with theirs(f"{name}: expected a model that runs on {device}, got one that cannot be moved there"):
        model = model.to(device).eval()
    SOURCES[model] = Source(str(name), notes)
    return model, tokenizer
