"""A causal language model as hidden states and a head, so that the logits never have to exist."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels import reference


@dataclass(frozen=True)
class Head:
    """logits = softcap · tanh((logit_scale · (hidden @ weightᵀ + bias)) / softcap)."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(": ")


def load(folder: str | Path, *, device: str | None = None, dtype: str = "auto"):
    """Model and tokenizer of a local Hugging Face folder; InputError where it is missing or cannot be loaded."""
    path = Path(folder)
    if not path.is_dir():
        raise InputError(
            f"{folder}: expected a local model folder, got {'a file' if path.exists() else 'no such folder'}"
        )
    if not (path / "config.json").is_file():
        raise InputError(f"{folder}: expected a Hugging Face model folder, got one without config.json")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a torch built without that device
        raise InputError(f"device: expected one that this torch can use, got {device!r} ({_first_line(error)})")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers raises anything here, from OSError to KeyError and SafetensorError.
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise InputError(f"{folder}: expected a tokenizer (tokenizer.json) beside the model, got {_first_line(error)}")
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    except Exception as error:
        raise InputError(f"{folder}: expected the weights of a causal language model, got {_first_line(error)}")
    return model.to(device).eval(), tokenizer


def backbone(model) -> torch.nn.Module:
    """The part of a Hugging Face causal model that gives hidden states."""
    body = model.base_model
    if body is model:
        raise InputError(f"model: expected a body and a head ({type(model).__name__} shows none as base_model)")
    return body


def head(model) -> Head:
    """Weight, bias and logit rule of a Hugging Face model's head, from its modules and its configuration.

    Softcap as Gemma 2's ``final_logit_softcapping``, scale as Cohere's ``logit_scale`` or 1 / Granite's ``logits_scaling``;
    what a configuration does not say is caught by ``verify_head``.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        raise InputError(f"model: expected an output embedding, {type(model).__name__} has none")
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return Head(layer.weight, getattr(layer, "bias", None), getattr(config, "final_logit_softcapping", None), scale)


def check_tokenizer(tokenizer, vocabulary: int) -> None:
    """InputError where the tokenizer has more entries than the model has logits."""
    if len(tokenizer) > vocabulary:
        raise InputError(
            f"tokenizer: expected at most {vocabulary} entries, the model's vocabulary, got {len(tokenizer)}: "
            "it belongs to another model"
        )


@torch.no_grad()
def verify_head(model, head: Head, input_ids: Tensor) -> None:
    """Compare ``head`` on the backbone's hidden states with the model's own logits at input_ids [1, T]; InputError if not equal.

    The one place where logits are asked for: a few positions, once a run.
    """
    expected = model(input_ids=input_ids, use_cache=False).logits[0].float()
    hidden = backbone(model)(input_ids=input_ids, use_cache=False).last_hidden_state[0]
    bias = None if head.bias is None else head.bias.float()
    got = reference.logits(
        hidden.float(), head.weight.float(), bias, softcap=head.softcap, logit_scale=head.logit_scale
    )
    # 16-bit logits are rounded by the model: 2⁻⁸ relative for bfloat16.
    tolerance = 1e-3 if head.weight.dtype == torch.float32 else 2e-2
    difference = (got - expected).abs().max().item()
    if not difference <= tolerance * max(1.0, expected.abs().max().item()):
        raise InputError(
            f"model: {type(model).__name__}'s own logits differ from its head on its hidden states by {difference:.3g}; "
            "it applies a rule after the head that is not known here, so its perplexity would be wrong"
        )
