"""A causal language model as hidden states and a head, so that the logits never have to exist."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels import reference

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
        self.model = model
        self.body = model.base_model
        if self.body is model:
            raise InputError(f"model: expected a body and a head ({type(model).__name__} shows none as base_model)")
        self.head = _head(model)
        config = model.config.get_text_config()
        self.context_length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_ctx", None)

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        return self.body(input_ids=input_ids, use_cache=False).last_hidden_state

    def logits(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits

    def parameters(self):
        return self.model.parameters()


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


# What a configuration calls the factor of the logits (Cohere, Falcon H1), and their divisor (Granite).
FACTORS = ("logit_scale", "lm_head_multiplier")
DIVISORS = ("logits_scaling",)


def _head(model) -> Head:
    """Weight, bias and logit rule of a transformers model, from its modules and its configuration.

    Softcap as Gemma's ``final_logit_softcapping``; what a configuration does not say is caught by ``verify``.
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
    return Head(layer.weight, getattr(layer, "bias", None), getattr(config, "final_logit_softcapping", None), scale)


@torch.no_grad()
def verify(model: LanguageModel, input_ids: Tensor) -> None:
    """InputError unless the head on the hidden states of input_ids [1, T] gives the model's own logits, causally.

    The one place where logits are asked for: a few positions, once a run. The second check needs no logits: a model that
    looks ahead (an encoder, say) would be told what it is scored on.
    """
    head, name = model.head, type(getattr(model, "model", model)).__name__
    expected = model.logits(input_ids)[0].float()
    hidden = model.hidden_states(input_ids)[0]
    bias = None if head.bias is None else head.bias.float()
    got = reference.logits(
        hidden.float(), head.weight.float(), bias, softcap=head.softcap, logit_scale=head.logit_scale
    )
    # 16-bit logits are rounded by the model: 2⁻⁸ relative for bfloat16.
    wide = head.weight.dtype in (torch.float32, torch.float64)
    tolerance = 1e-3 if wide else 2e-2
    known = expected.isfinite() & got.isfinite()  # a model that gives NaN is reported by its tokens
    difference = (got - expected).where(known, 0).abs().max().item()
    if difference > tolerance * max(1.0, expected.where(known, 0).abs().max().item()):
        raise InputError(
            f"model: {name}'s own logits differ from its head on its hidden states by {difference:.3g}; "
            "it applies a rule after the head that is not known here, so its perplexity would be wrong"
        )
    if input_ids.shape[1] < 2:
        return
    half = input_ids.shape[1] // 2
    changed = input_ids.clone()
    changed[:, half:] = changed[:, :1]
    ahead = (model.hidden_states(changed)[0, :half].float() - hidden[:half].float()).abs().max().item()
    if ahead > (1e-4 if wide else 2e-2) * max(1.0, hidden.float().abs().max().item()):
        raise InputError(
            f"model: {name}'s hidden states depend on later tokens (by {ahead:.3g}): it is not a causal model, "
            "and its perplexity would mean nothing"
        )


@torch.no_grad()
def fingerprint(model: LanguageModel) -> str:
    """Hash of a sample of the weights: tells one checkpoint from another in no time, not a proof that two are equal."""
    digest = hashlib.sha256()
    tensors = model.parameters() if hasattr(model, "parameters") else [model.head.weight]
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


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(": ")


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
            f"{name}: expected a model folder or name, got no such folder and no such model ({_first_line(error)})"
        )
    return False


def load(name: str | Path, *, device: str | None = None, dtype: str = "auto", trust_remote_code: bool = False):
    """Model and tokenizer of a Hugging Face folder, or of a name in its cache or on its hub.

    Weights are read as safetensors (whole or sharded), never unpickled; a model's own code runs only with
    ``trust_remote_code``. Raises InputError where something is missing or cannot be loaded.
    """
    path = Path(name)
    local = path.is_dir()
    if local and not (path / "config.json").is_file():
        raise InputError(f"{name}: expected a Hugging Face model folder, got one without config.json")
    if not local and (path.exists() or len(path.parts) > 2 or path.is_absolute() or str(name).startswith(".")):
        raise InputError(
            f"{name}: expected a local model folder, got {'a file' if path.exists() else 'no such folder'}"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a torch built without that device
        raise InputError(f"device: expected one that this torch can use, got {device!r} ({_first_line(error)})")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rest = {"local_files_only": local or _cached(name), "trust_remote_code": trust_remote_code}
    # transformers raises anything here, from OSError to KeyError and SafetensorError.
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **rest)
    except Exception as error:
        raise InputError(f"{name}: expected a tokenizer (tokenizer.json) beside the model, got {_first_line(error)}")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, **rest)
    except Exception as error:
        raise InputError(f"{name}: expected the weights of a causal language model, got {_first_line(error)}")
    return model.to(device).eval(), tokenizer
