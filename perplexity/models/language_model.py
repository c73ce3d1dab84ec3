"""A causal language model as hidden states and a head, so that full logits are never needed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, first_line, theirs
from ..fingerprints import tensors_digest
from ..text.tokenizers import as_tokenizer
from ..wording import counted
from .fingerprint_cache import FingerprintCache, files_key
from .heads import (
    Head,
    before_head,
    difference,
    fetched,
    find_rule,
    head_of,
    no_rounding,
    options,
    output_layer,
    tolerance,
    weight_and_bias,
)
from .weights import read_model

VERIFIED_POSITIONS = 16
STUDIED_POSITIONS = 8


@runtime_checkable
class LanguageModel(Protocol):
    """The interface of a model that ``evaluate`` scores.

    A Hugging Face causal model is wrapped; any other model has these four attributes. ``logits`` is
    called once a run, on a few positions, to verify the head.
    """

    head: Head
    context_length: int | None  # the most positions it reads; None: any

    # [B, T] -> [B, T, D], the head's input
    def hidden_states(self, input_ids: Tensor) -> Tensor: ...

    def logits(self, input_ids: Tensor) -> Tensor: ...  # [B, T] -> [B, T, V]


class HuggingFaceModel:
    """``LanguageModel`` of a transformers causal model.

    Rows of a batch may be padded on the right, without a mask: causal attention does not see the
    padding.
    """

    def __init__(self, model) -> None:
        if hasattr(model, "get_base_model"):  # PEFT's wrapper: its base_model contains the head
            if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
                kind = type(model.active_peft_config).__name__
                raise InputError(
                    f"model: expected adapters inside the model, as LoRA's, got {kind}, "
                    "whose prompt is outside it"
                )
            model = model.get_base_model()
        self.model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
        # The part whose last hidden states are the head's input; None: the whole model is called.
        self.body = None
        with torch.no_grad():
            held = weight_and_bias(self.model)
        self.head = head_of(self.model, held)
        self._rotary = [
            part for part in model.modules() if "dynamic" in str(getattr(part, "rope_type", ""))
        ]
        config = self.model.config.get_text_config()
        self.context_length = positions_of(self.model, config)
        self.extended_context_length, self.extended_by = scaled_positions(
            config, self.context_length
        )
        if any(
            part.is_meta and not hasattr(module, "_hf_hook")
            for module in model.modules()
            for part in _own(module)
        ):
            self.body = _body(self.model)  # no values to compute with yet
        else:
            self._study(held)

    @torch.no_grad()
    def _study(self, held: tuple[Tensor, Tensor | None, bool]) -> None:
        """Find the head's input and the rule that follows it, by a pass over a few positions.

        ``held`` is the head's ``weight_and_bias``.
        """
        model, count = self.model, min(STUDIED_POSITIONS, self.context_length or STUDIED_POSITIONS)
        # From the middle of the vocabulary, where no family has its special tokens.
        rows = self.head.weight.shape[0]
        input_ids = (torch.arange(count, device=self.head.weight.device)[None] + rows // 2) % rows
        with evaluation_mode(self):
            hidden, body = self._before_head(input_ids), _body(model)
            whole = hidden is not None and hidden.shape[:2] == input_ids.shape
            if body is not None:
                try:
                    own = self._last_of(body, input_ids)
                except InputError:  # a body that needs more than tokens
                    own = None
                if own is not None and (hidden is None or not whole or _equal(hidden, own)):
                    self.body, hidden = body, own
            if self.body is None and not whole:
                shape = "none" if hidden is None else tuple(hidden.shape)
                raise InputError(
                    f"model: expected hidden states of all {count} positions before the output "
                    f"embedding of {type(model).__name__}, got {shape}; give a LanguageModel "
                    "(hidden_states, head, logits)"
                )
            logits = self.logits(input_ids)
        weight, bias, quantised = held
        if isinstance(logits, Tensor) and logits.dim() == 3 and hidden is not None:
            if hidden.shape[-1] != weight.shape[1] or logits.shape[-1] > len(weight):
                raise InputError(
                    "model: expected a last linear layer with a weight [V, D] = "
                    f"[{logits.shape[-1]}, {hidden.shape[-1]}], as logits and hidden states are, "
                    f"got {type(output_layer(model)).__name__} with {list(weight.shape)}; give a "
                    "LanguageModel (hidden_states, head, logits)"
                )
            seen = hidden[0, -logits.shape[1] :].to(weight.device)
            find_rule(model, Head(weight, bias, quantised=quantised), seen, logits[0])
            self.head = head_of(model, held)

    def _forget(self) -> None:
        """Reset dynamic rotary embeddings, which keep the frequencies of the longest call."""
        for part in self._rotary:
            for name in [name for name in part._buffers if name.endswith("original_inv_freq")]:
                prefix = name.removesuffix("original_inv_freq")
                part.register_buffer(f"{prefix}inv_freq", getattr(part, name), persistent=False)
                if hasattr(part, f"{prefix}max_seq_len_cached"):
                    setattr(part, f"{prefix}max_seq_len_cached", part.original_max_seq_len)

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """Return the head's input [B, T, D] for input_ids [B, T]."""
        if self.body is None:
            hidden: Any = self._before_head(input_ids)  # not None, as ``_study`` checked
        else:
            hidden = self._last_of(self.body, input_ids)
        # Layers may be on several devices.
        return hidden.to(self.head.weight.device)

    def _before_head(self, input_ids: Tensor) -> Tensor | None:
        """Return the input of the output layer [B, T, D]; None where it is no hidden states."""
        self._forget()
        with self._forward():
            hidden = before_head(
                self.model, input_ids=input_ids, **options(self.model.forward, use_cache=False)
            )
        if not (isinstance(hidden, Tensor) and hidden.is_floating_point()):
            return None  # the input embedding is the output layer, and was called with ids
        rows = hidden.dim() == 2 and len(hidden) == input_ids.numel()
        return hidden.unflatten(0, tuple(input_ids.shape)) if rows else hidden

    def _last_of(self, body, input_ids: Tensor) -> Tensor:
        """Return the last hidden states [B, T, D] of a body."""
        self._forget()
        with self._forward():
            return last_hidden_state(
                body(input_ids=input_ids, **options(body.forward, use_cache=False))
            )

    def logits(self, input_ids: Tensor) -> Tensor:
        """Return the model's own logits [B, T, V] for input_ids [B, T]."""
        self._forget()
        with self._forward():
            outputs: Any = self.model(
                input_ids=input_ids, **options(self.model.forward, use_cache=False)
            )
        if isinstance(outputs, tuple):  # of a class without names of outputs
            logits = next(
                (t for t in outputs if isinstance(t, Tensor) and t.dim() == 3), outputs[0]
            )
        elif isinstance(outputs, Mapping):
            logits = outputs.get("logits")
        else:
            logits = getattr(outputs, "logits", outputs)
        return logits.to(self.head.weight.device) if isinstance(logits, Tensor) else logits

    def _forward(self):
        """Return a context that names the model in errors of its forward pass."""
        return theirs(
            f"model: expected a forward pass of {type(self.model).__name__}, got one that fails"
        )


def last_hidden_state(outputs) -> Tensor:
    """Return the hidden states [B, T, D] of a body's outputs, which have names or are a tuple."""
    if isinstance(outputs, Mapping):
        return outputs["last_hidden_state"]
    if isinstance(outputs, tuple):
        return outputs[0]
    return outputs if isinstance(outputs, Tensor) else outputs.last_hidden_state


def _own(module) -> list[Tensor]:
    """Return the parameters of a module without those of its submodules."""
    return list(module.parameters(recurse=False))


def _body(model):
    """Return the part of a model below its head, where the model names one."""
    body = model.base_model
    return None if body is model else body


def _equal(hidden: Tensor, other) -> bool:
    """Return whether two hidden states [B, T, D] are equal, but for rounding."""
    if not isinstance(other, Tensor) or hidden.shape != other.shape:
        return False
    one, other = hidden.float(), other.to(hidden.device).float()
    finite = other.isfinite()
    apart = (one - other).where(finite, 0).abs().max().item()
    return apart <= (1e-5 if no_rounding(hidden) else 1e-2) * max(
        1.0, other.where(finite, 0).abs().max().item()
    )


def positions_of(model, config) -> int | None:
    """Return the number of positions a model reads; None for any number.

    It is the configuration's number, or fewer where a table of positions has fewer: RoBERTa's
    begins after its padding, a Whisper decoder's is not the encoder's.
    """
    numbers = (
        getattr(config, name, None) for name in ("max_position_embeddings", "n_ctx", "max_seq_len")
    )
    limits = [limit for limit in numbers if isinstance(limit, int) and limit > 0][:1]
    for name, part in model.named_modules():
        words = name.split(".")
        positions = (
            any(word in words[-1] for word in ("position", "pos_emb"))
            and "relative" not in words[-1]
        )
        if not positions or not isinstance(part, torch.nn.Embedding):
            continue
        if any(word.startswith(("vision", "visual", "image", "audio")) for word in words):
            continue
        before = getattr(part, "offset", 0) if part.padding_idx is None else part.padding_idx + 1
        limits.append(part.num_embeddings - before)
    return min(limits, default=None)


def scaled_positions(config, limit: int | None) -> tuple[int | None, str]:
    """Return the positions to which RoPE scaling extends ``limit``, and the scaling's name.

    Without scaling they are ``limit`` and "".
    """
    extended, by = limit, ""
    settings = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
    ropes = [rope for rope in settings if isinstance(rope, dict)]
    by_layer = [part for rope in ropes for part in rope.values() if isinstance(part, dict)]
    for rope in ropes + by_layer:
        kind = str(rope.get("rope_type") or rope.get("type") or "default")
        factor, original = rope.get("factor"), rope.get("original_max_position_embeddings") or limit
        if (
            kind == "default"
            or not isinstance(factor, int | float)
            or not original
            or limit is None
        ):
            continue
        if (longest := int(original * factor)) > (extended or 0):
            extended, by = longest, f"{kind}, factor {factor:g}"
    return extended, by


def context_limit(model: LanguageModel, asked: int | None) -> int | None:
    """Return a window's most positions: the model's, or RoPE scaling's if ``asked`` is more."""
    limit, extended = model.context_length, getattr(model, "extended_context_length", None)
    return extended if limit and extended and asked and asked > limit else limit


def context_notes(model: LanguageModel, context_length: int) -> list[str]:
    """Return a note where windows are longer than the configuration's number of positions."""
    limit = model.context_length
    if not limit or context_length <= limit:
        return []
    scaled: Any = model  # only a model with scaling reads more than its limit
    return [
        f"windows of {counted(context_length, 'token')} are longer than the configuration's {limit} "
        f"positions: RoPE scaling ({scaled.extended_by}) extends these to "
        f"{scaled.extended_context_length}"
    ]


@contextmanager
def mode(network: LanguageModel, training: bool):
    """Put every module of ``network`` into training or evaluation mode for a while.

    Each module is restored afterwards. Modules with running statistics (batch norm) stay in
    evaluation mode: the statistics are never trained.
    """
    parts = [part for module in modules(network) for part in module.modules()]
    before = [part.training for part in parts]
    for part in parts:
        part.training = training and getattr(part, "running_mean", None) is None
    try:
        yield
    finally:
        for part, was in zip(parts, before, strict=True):
            part.training = was


def evaluation_mode(network: LanguageModel):
    """Put every module of ``network`` into evaluation mode for a while, as ``mode`` does."""
    return mode(network, training=False)


@contextmanager
def seeded(network: HuggingFaceModel):
    """Fix the random numbers for a while; the generators are restored afterwards."""
    weight = network.head.weight
    with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
        torch.manual_seed(0)
        yield


@torch.no_grad()
def same_body_in_training(network: HuggingFaceModel, ids: np.ndarray) -> bool:
    """Return whether the body's hidden states of ``ids`` [n] are the head's input in training."""
    if network.body is None:
        return True
    input_ids = torch.from_numpy(ids[None]).to(network.head.weight.device)
    with mode(network, training=True):
        with seeded(network):
            own = network._before_head(input_ids)
        with seeded(network):
            of_body = network._last_of(network.body, input_ids)
    # A head that is called in parts, or on other axes, shows nothing: the caller compares losses.
    return own is None or own.shape != of_body.shape or _equal(own, of_body)


def as_language_model(model) -> LanguageModel:
    """Return ``model`` as a ``LanguageModel``: itself, or a wrapped transformers model.

    Raises:
        InputError: The model is neither; the message names the missing attributes.
    """
    if isinstance(model, LanguageModel):
        return model
    if hasattr(model, "base_model") and hasattr(model, "get_output_embeddings"):
        return HuggingFaceModel(model)
    missing = [
        name
        for name in ("head", "context_length", "hidden_states", "logits")
        if not hasattr(model, name)
    ]
    raise InputError(
        "model: expected a transformers causal model or a LanguageModel, got "
        f"{type(model).__name__} without {', '.join(missing)}"
    )


@torch.no_grad()
def verify(model: LanguageModel, ids: np.ndarray, context_length: int) -> None:
    """Raise InputError unless the head gives the model's own logits, and the model is causal.

    This is the one place that computes logits: of a few positions, once a run. The check of
    causality needs none: a model that looks ahead (an encoder, for example) would read the tokens
    that it is scored on.

    Args:
        model: The model.
        ids: Token ids [n], of which the first few are read.
        context_length: The most positions of a window.
    """
    head, name = model.head, type(getattr(model, "model", model)).__name__
    if head.weight.is_meta:
        raise InputError(
            f"model: expected weights with values, got {name}'s head on the meta device: "
            "load them first"
        )
    rows = head.weight.shape[0]
    # A short text is extended by different ids, since a rule may show on some logits only.
    count = min(VERIFIED_POSITIONS, context_length)
    few = np.concatenate([ids[:count], np.arange(count) % rows])[:count]
    input_ids = torch.from_numpy(few[None]).to(head.weight.device)
    expected, hidden = model.logits(input_ids), model.hidden_states(input_ids)
    for what, tensor, last in (
        ("logits", expected, rows),
        ("hidden_states", hidden, head.weight.shape[1]),
    ):
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        # Some models return the logits of the last position only.
        if shape not in ((1, count, last), (1, 1, last) if what == "logits" else None):
            raise InputError(f"model: expected {what} of shape {(1, count, last)}, got {shape}")
    seen = hidden[0, -expected.shape[1] :]
    relative, apart = difference(head, seen, expected[0])
    if relative > tolerance(head, expected, hidden):
        raise InputError(
            f"model: {name}'s own logits differ from its head on its hidden states by {apart:.3g}; "
            "it applies a rule after the head that is not known here (or drops out, or rounds to "
            "16 bits inside): its perplexity would be wrong; a LanguageModel (hidden_states, head, "
            "logits) can say the rule"
        )
    wide = no_rounding(head.weight, expected, hidden)
    half = count // 2
    changed = input_ids.clone()
    changed[:, half:] = (changed[:, half:] + 1) % rows
    hidden = hidden[0, :half].float()
    ahead = (model.hidden_states(changed)[0, :half].float() - hidden).abs().max().item()
    if ahead > (1e-4 if wide else 2e-2) * max(1.0, hidden.abs().max().item()):
        raise InputError(
            f"model: {name}'s hidden states depend on later tokens (by {ahead:.3g}): it is not a "
            f"causal model, and its perplexity would mean nothing{_causal_hint(model)}"
        )


def _causal_hint(model: LanguageModel) -> str:
    """Return a hint for a configuration that says itself that its model is not causal."""
    config = getattr(getattr(model, "model", None), "config", None)
    name = next(
        (name for name in ("is_decoder", "causal") if getattr(config, name, None) is False), None
    )
    return (
        "" if name is None else f"; its configuration has {name} = false, and true makes it causal"
    )


def modules(model: LanguageModel) -> list[torch.nn.Module]:
    """Return the modules that a ``LanguageModel`` is, or has as attributes."""
    if isinstance(model, torch.nn.Module):
        return [model]
    return [part for part in vars(model).values() if isinstance(part, torch.nn.Module)]


@dataclass(frozen=True)
class Source:
    """The folder or name that a model was loaded from, and notes on its weights."""

    name: str
    notes: list[str]
    # Key in the fingerprint cache, where the weights stay as they were read.
    files: str | None = None


# Sources of the models that ``load`` returned, as long as these live.
SOURCES: WeakKeyDictionary[torch.nn.Module, Source] = WeakKeyDictionary()


def source(model: LanguageModel) -> Source | None:
    """Return the source of a model that ``load`` returned; None for any other."""
    return next((SOURCES[module] for module in modules(model) if module in SOURCES), None)


def loading_notes(model: LanguageModel) -> list[str]:
    """Return notes on how the model's weights were loaded."""
    loaded = source(model)
    return [] if loaded is None else loaded.notes


# Fields of a configuration about the software and the place, or about what the model's class and
# tensors show themselves.
NOT_OF_THE_MODEL = (
    "_name_or_path",
    "transformers_version",
    "_commit_hash",
    "architectures",
    "dtype",
    "torch_dtype",
)


def configuration(model: LanguageModel) -> str | None:
    """Return a transformers model's configuration as JSON, without its place and versions."""
    config = getattr(getattr(model, "model", None), "config", None)
    if config is None or not hasattr(config, "to_json_string"):
        return None
    record = json.loads(config.to_json_string())
    return json.dumps(
        {k: v for k, v in record.items() if k not in NOT_OF_THE_MODEL}, sort_keys=True
    )


def _tensors(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of ``model``: the head's, parameters, all buffers, its own attributes."""
    yield "head.weight", model.head.weight
    if model.head.bias is not None:
        yield "head.bias", model.head.bias
    parts = modules(model)
    for module in parts:
        named = dict(module.named_parameters(remove_duplicate=False))
        named |= dict(module.named_buffers(remove_duplicate=False)) | module.state_dict(
            keep_vars=True
        )
        passing = _last_calls_frequencies(module)
        for name, tensor in named.items():
            if name in passing:
                continue
            if not (isinstance(tensor, Tensor) and tensor.is_meta):
                yield name, tensor
                continue
            owner, _, leaf = name.rpartition(".")
            # accelerate's offloaded weights, of one module at a time.
            with fetched(module.get_submodule(owner)):
                yield name, getattr(module.get_submodule(owner), leaf, tensor)
    if model not in parts:
        yield from sorted(
            (name, value) for name, value in vars(model).items() if isinstance(value, Tensor)
        )


def _last_calls_frequencies(module: torch.nn.Module) -> set[str]:
    """Return the buffers of dynamic rotary embeddings that the last call left."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        if any(kind in str(getattr(part, "rope_type", "")) for kind in ("dynamic", "longrope"))
        for name in part._buffers
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
    }


def _adapters_state(model: LanguageModel) -> list:
    """Return PEFT's settings that are no tensors: active adapters and their factors."""
    names = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")
    return [
        (name, [repr(getattr(layer, setting, None)) for setting in names])
        for module in modules(model)
        for name, layer in module.named_modules()
        if type(layer).__module__.startswith("peft.") and hasattr(layer, "active_adapters")
    ]


@torch.no_grad()
def fingerprint(model: LanguageModel) -> str:
    """Return a hash of the configuration, the head's rule and every bit of the weights and buffers.

    A model of which one weight differs has another fingerprint. Code is not part of it. The
    commands, whose models stay unchanged between loading and scoring, cache it by the path, size
    and times of the files (``load``'s ``unchanged``).
    """
    return _fingerprint(model, configuration(model))


def _fingerprint(model: LanguageModel, config: str | None) -> str:
    """Return the fingerprint of a model with this configuration, if possible from the cache."""
    loaded = source(model)
    cached = None if loaded is None or loaded.files is None else FingerprintCache(loaded.files)
    if cached is not None and (known := cached.read()):
        return known
    head = model.head
    parts = [type(model).__name__, head.softcap, head.logit_scale, config, _adapters_state(model)]
    parts.append(tensors_digest(_tensors(model)))
    value = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    if cached is not None:
        cached.write(value)
    return value


@torch.no_grad()
def described(model: LanguageModel, name: str | None = None) -> dict:
    """Return a result file's record of its model.

    Returns:
        name: Folder or name; None where the model was not loaded from one.
        fingerprint: Result of ``fingerprint``.
        architecture: Name of the model's class.
        parameters: Number of parameters.
        dtype: Dtype of the head's weight.
        config: Hash of the configuration; None where there is none.
    """
    loaded, config = source(model), configuration(model)
    counted = {id(p): p.numel() for module in modules(model) for p in module.parameters()}
    return {
        "name": name or (None if loaded is None else loaded.name),
        "fingerprint": _fingerprint(model, config),
        "architecture": type(getattr(model, "model", model)).__name__,
        "parameters": sum(counted.values()),
        "dtype": str(model.head.weight.dtype).removeprefix("torch."),
        "config": None if config is None else hashlib.sha256(config.encode()).hexdigest()[:16],
    }


def _cached(name: str | Path, revision: str | None, what: str) -> bool:
    """Return whether Hugging Face's cache holds the model; otherwise ask its hub once.

    transformers would try for a minute without a network. Raises InputError where the hub has no
    such model.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if isinstance(try_to_load_from_cache(str(name), "config.json", revision=revision), str):
            return True
        HfApi().model_info(str(name), revision=revision, timeout=10)
    except Exception as error:  # httpx's, the hub's own, or one for an invalid name
        of = "" if revision is None else f" with revision {revision}"
        got = f"no such folder and no such model{of}; check the name"
        # The hub's answers are errors with a response; without one nothing answered.
        if getattr(error, "response", None) is None and not isinstance(error, ValueError):
            got = (
                "no such folder and no answer from the hub; check the network, or give a folder "
                f"with the {what}'s files"
            )
        raise InputError(
            f"{name}: expected a {what} folder or name, got {got} ({first_line(error)})"
        )
    return False


def _source(
    name: str | Path,
    trust_remote_code: bool,
    needs: str = "config.json",
    revision: str | None = None,
    what: str = "model",
) -> dict:
    """Return options of ``from_pretrained`` for a local folder, or a name of the hub or its cache.

    ``needs`` is a file that a folder has to have; ``what`` is the name in errors.
    """
    path = Path(name)
    local = path.is_dir()
    if local and needs and not (path / needs).is_file():
        raise InputError(f"{name}: expected a Hugging Face model folder, got one without {needs}")
    if not local and (
        path.exists() or len(path.parts) > 2 or path.is_absolute() or str(name).startswith(".")
    ):
        raise InputError(
            f"{name}: expected a local {what} folder, got "
            f"{'a file; give its folder' if path.exists() else 'no such folder; check the path'}"
        )
    if local and revision is not None:
        raise InputError(
            f"revision: expected none for the folder {name}, which has one only, got {revision!r}"
        )
    return {
        "local_files_only": local or _cached(name, revision, what),
        "trust_remote_code": trust_remote_code,
    } | ({} if revision is None else {"revision": revision})


def _of_tokenizer(name: str) -> bool:
    """Return whether a file may be a tokenizer's: a vocabulary, merges, a model, its settings."""
    return name.startswith(("token", "vocab", "merges")) or name.endswith(
        (".model", ".tiktoken", ".spm", ".bpe", ".py", ".vocab")
    )


def _tokenizer(name: str | Path, rest: dict):
    """Return the tokenizer of a name; ``rest`` are options of ``from_pretrained``."""
    from transformers import AutoTokenizer

    if Path(name).is_dir() and not any(map(_of_tokenizer, os.listdir(name))):
        raise InputError(
            f"{name}: expected a tokenizer (tokenizer.json) there, got a folder without one; name a "
            "folder that has one (--tokenizer DIR)"
        )
    # transformers raises many kinds here, from OSError to KeyError and SafetensorError.
    with theirs(
        f"{name}: expected a tokenizer (tokenizer.json) there, got none that can be read; "
        "name a folder that has one (--tokenizer DIR)"
    ):
        return AutoTokenizer.from_pretrained(name, **rest)


def _tokenizer_file(file: Path):
    """Return the tokenizer in a tokenizer.json, or in sentencepiece's .model."""
    if file.suffix == ".model":
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise InputError(f"{file}: needs sentencepiece; install it beside fused-perplexity")
        with theirs(f"{file}: expected a sentencepiece model, got another file"):
            return as_tokenizer(SentencePieceProcessor(model_file=str(file)))
    from tokenizers import Tokenizer

    with theirs(f"{file}: expected a tokenizer.json or a sentencepiece .model, got another file"):
        return as_tokenizer(Tokenizer.from_file(str(file)))


def load_tokenizer(name: str | Path, *, trust_remote_code: bool):
    """Return the tokenizer of a folder, with or without a model, of a file, or of a name.

    Raises:
        InputError: There is none that can be read.
    """
    if Path(name).is_file():
        return _tokenizer_file(Path(name))
    return _tokenizer(name, _source(name, trust_remote_code, needs="", what="tokenizer"))


def load(
    name: str | Path,
    *,
    device: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    unchanged: bool = False,
    revision: str | None = None,
    device_map: str | None = None,
    tokenizer: str | Path | None = None,
):
    """Return model and tokenizer of a Hugging Face folder, or of a name in its cache or on its hub.

    Weights are read as safetensors (whole or sharded), never unpickled. Weights that the model does
    not use become a note in its results.

    Args:
        name: Folder or name.
        device: Device of the model. Default: None, a GPU if there is one.
        dtype: As in ``from_pretrained``. Default: "auto".
        trust_remote_code: Whether a model's own code may run. Default: False.
        unchanged: Whether the caller leaves the weights as they are: their fingerprint is then
            cached by the path, size and times of the files. Default: False.
        revision: Branch, tag or commit of a name on the hub. Default: None.
        device_map: As in ``from_pretrained``, "auto" for what fits where (accelerate's); ``device``
            is then None. Default: None.
        tokenizer: Folder, file or name of the tokenizer. Default: None, the model's.

    Raises:
        InputError: Something is missing or cannot be loaded, above all a weight that the files
            lack.
    """
    rest = _source(name, trust_remote_code, revision=revision)
    if device_map is not None:
        rest["device_map"] = _device_map(device_map, device)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()
    # For an unknown device, one without values (meta), or one that is not built in.
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device: expected one that this torch can use, got {device!r} ({first_line(error)})"
        )
    chosen = (
        _tokenizer(name, rest)
        if tokenizer is None
        else load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    )
    # A model's own code may put anything into its weights, whatever its files hold.
    files = files_key(name, dtype, revision) if unchanged and not trust_remote_code else None
    try:
        with theirs("expected the weights of a causal language model, got none that can be read"):
            model, notes = read_model(name, dtype, rest)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error.__cause__
    if device_map is None:
        _move(model, name, device)
    model.eval()
    # The files changed during the reading.
    if files is not None and files != files_key(name, dtype, revision):
        files = None
    SOURCES[model] = Source(str(name) if revision is None else f"{name}@{revision}", notes, files)
    return model, chosen


def _device_map(device_map: str, device: str | None) -> str:
    """Return ``device_map``; raise InputError if ``device`` is set or accelerate is missing."""
    if device is not None:
        raise InputError(
            f"device: expected none with device_map, which places the model, got {device!r}"
        )
    if importlib.util.find_spec("accelerate") is None:
        raise InputError(
            "device_map: expected accelerate to be installed (pip install accelerate), got none"
        )
    return device_map


def _move(model, name: str | Path, device: str) -> None:
    """Move a model to a device; raise InputError where it does not fit."""
    try:
        with theirs(
            f"{name}: expected a model that runs on {device}, got one that cannot be moved there"
        ):
            model.to(device)
    except torch.OutOfMemoryError:
        raise InputError(
            f"{name}: the weights do not fit in the memory of {device}: take a smaller dtype "
            "(bfloat16), device_map 'auto', or another device"
        )
