"""A causal language model as hidden states and a head, so that the logits never have to exist."""

from __future__ import annotations

import hashlib
import importlib.util
import json
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
    """What ``evaluate`` asks of a model. A Hugging Face causal model is wrapped; anything else
    gives these four.

    ``logits`` is called once a run, on a few positions, to compare the head with the model's own.
    """

    head: Head
    context_length: int | None  # the most positions it reads; None: any

    # [B, T] -> [B, T, D], what the head multiplies
    def hidden_states(self, input_ids: Tensor) -> Tensor: ...

    def logits(self, input_ids: Tensor) -> Tensor: ...  # [B, T] -> [B, T, V]


class HuggingFaceModel:
    """``LanguageModel`` of a transformers causal model.

    Rows of a batch may be padded on the right and no mask is given: causal attention keeps padding
    out of sight.
    """

    def __init__(self, model) -> None:
        if hasattr(model, "get_base_model"):  # PEFT's wrapper, whose base_model has the head, too
            if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
                kind = type(model.active_peft_config).__name__
                raise InputError(
                    f"model: expected adapters inside the model, as LoRA's, got {kind}, whose prompt is outside it"
                )
            model = model.get_base_model()
        self.model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
        self.body = None  # whose last hidden states are the head's; None: asked of the whole model
        self.head = head_of(self.model)
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
            self.body = _body(self.model)  # nothing to compute with yet
        else:
            self._study()

    @torch.no_grad()
    def _study(self) -> None:
        """Find out what the head multiplies and which rule follows, by a pass over a few
        positions.
        """
        model, count = self.model, min(STUDIED_POSITIONS, self.context_length or STUDIED_POSITIONS)
        # From the middle of the vocabulary, where no family keeps its special tokens.
        rows = self.head.weight.shape[0]
        input_ids = (torch.arange(count, device=self.head.weight.device)[None] + rows // 2) % rows
        with evaluation_mode(self):
            hidden, body = self._before_head(input_ids), _body(model)
            whole = hidden is not None and hidden.shape[:2] == input_ids.shape
            if body is not None:
                try:
                    own = self._last_of(body, input_ids)
                except InputError:  # a body that asks for more than tokens
                    own = None
                if own is not None and (hidden is None or not whole or _equal(hidden, own)):
                    self.body, hidden = body, own
            if self.body is None and not whole:
                shape = "none" if hidden is None else tuple(hidden.shape)
                raise InputError(
                    f"model: expected hidden states of all {count} positions before the output embedding of "
                    f"{type(model).__name__}, got {shape}; give a LanguageModel (hidden_states, head, logits)"
                )
            logits = self.logits(input_ids)
        weight, bias, quantised = held = weight_and_bias(model)
        if isinstance(logits, Tensor) and logits.dim() == 3 and hidden is not None:
            if hidden.shape[-1] != weight.shape[1] or logits.shape[-1] > len(weight):
                raise InputError(
                    f"model: expected a last linear layer with a weight [V, D] = [{logits.shape[-1]}, "
                    f"{hidden.shape[-1]}], as logits and hidden states are, got {type(output_layer(model)).__name__} "
                    f"with {list(weight.shape)}; give a LanguageModel (hidden_states, head, logits)"
                )
            seen = hidden[0, -logits.shape[1] :].to(weight.device)
            find_rule(model, Head(weight, bias, quantised=quantised), seen, logits[0])
            self.head = head_of(model, held)

    def _forget(self) -> None:
        """Put dynamic rotary embeddings back: they keep the frequencies of the longest call before,
        whoever made it.
        """
        for part in self._rotary:
            for name in [name for name in part._buffers if name.endswith("original_inv_freq")]:
                prefix = name.removesuffix("original_inv_freq")
                part.register_buffer(f"{prefix}inv_freq", getattr(part, name), persistent=False)
                if hasattr(part, f"{prefix}max_seq_len_cached"):
                    setattr(part, f"{prefix}max_seq_len_cached", part.original_max_seq_len)

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        if self.body is None:
            found: Any = self._before_head(input_ids)  # not None: ``_study`` looked
        else:
            found = self._last_of(self.body, input_ids)
        return found.to(self.head.weight.device)  # layers on several devices end elsewhere

    def _before_head(self, input_ids: Tensor) -> Tensor | None:
        self._forget()
        with self._forward():
            found = before_head(
                self.model, input_ids=input_ids, **options(self.model.forward, use_cache=False)
            )
        if not (isinstance(found, Tensor) and found.is_floating_point()):
            return None  # the input embedding is the output layer, and was called with ids
        rows = found.dim() == 2 and len(found) == input_ids.numel()
        return found.unflatten(0, tuple(input_ids.shape)) if rows else found

    def _last_of(self, body, input_ids: Tensor) -> Tensor:
        self._forget()
        with self._forward():
            return last_hidden_state(
                body(input_ids=input_ids, **options(body.forward, use_cache=False))
            )

    def logits(self, input_ids: Tensor) -> Tensor:
        self._forget()
        with self._forward():
            found: Any = self.model(
                input_ids=input_ids, **options(self.model.forward, use_cache=False)
            )
            if isinstance(found, tuple):  # of a class that gives no names
                found = next((t for t in found if isinstance(t, Tensor) and t.dim() == 3), found[0])
            found = (
                found.get("logits")
                if isinstance(found, Mapping)
                else getattr(found, "logits", found)
            )
        return found.to(self.head.weight.device) if isinstance(found, Tensor) else found

    def _forward(self):
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
    return list(module.parameters(recurse=False))


def _body(model):
    """Return the part of a model below its head, where the model names one."""
    body = model.base_model
    return None if body is model else body


def _equal(hidden: Tensor, other) -> bool:
    """Return whether two ways to hidden states [B, T, D] give the same, but for rounding."""
    if not isinstance(other, Tensor) or hidden.shape != other.shape:
        return False
    one, other = hidden.float(), other.to(hidden.device).float()
    finite = other.isfinite()
    apart = (one - other).where(finite, 0).abs().max().item()
    return apart <= (1e-5 if no_rounding(hidden) else 1e-2) * max(
        1.0, other.where(finite, 0).abs().max().item()
    )


def positions_of(model, config) -> int | None:
    """Return how many positions a model reads; None for any number.

    The configuration's number, or fewer where a table of positions has fewer: RoBERTa's begins
    behind its padding, a Whisper decoder's is not the encoder's.
    """
    given = (
        getattr(config, name, None) for name in ("max_position_embeddings", "n_ctx", "max_seq_len")
    )
    limits = [limit for limit in given if isinstance(limit, int) and limit > 0][:1]
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
    """Return the positions to which RoPE scaling extends ``limit``, and its name; ``limit`` and ""
    without.
    """
    found, by = limit, ""
    given = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
    ropes = [rope for rope in given if isinstance(rope, dict)]
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
        if (longest := int(original * factor)) > (found or 0):
            found, by = longest, f"{kind}, factor {factor:g}"
    return found, by


def context_limit(model: LanguageModel, asked: int | None) -> int | None:
    """Return the most positions of a window: the model's, or RoPE scaling's where ``asked`` is
    more.
    """
    limit, extended = model.context_length, getattr(model, "extended_context_length", None)
    return extended if limit and extended and asked and asked > limit else limit


def context_notes(model: LanguageModel, context_length: int) -> list[str]:
    """Return a note where windows are longer than the configuration's number of positions."""
    limit = model.context_length
    if not limit or context_length <= limit:
        return []
    scaled: Any = model  # others read no more than their limit
    return [
        f"windows of {context_length} tokens are longer than the configuration's {limit} positions: RoPE scaling "
        f"({scaled.extended_by}) extends these to {scaled.extended_context_length}"
    ]


@contextmanager
def mode(network: LanguageModel, training: bool):
    """Every module behind ``network`` in training or in evaluation mode, and each put back as it
    was.

    Running statistics (batch norm) are never trained: their modules stay in evaluation.
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
    """Every module behind ``network`` in evaluation mode, and each put back as it was."""
    return mode(network, training=False)


@contextmanager
def seeded(network: HuggingFaceModel):
    """The same random numbers each time, and afterwards those that were next before."""
    weight = network.head.weight
    with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
        torch.manual_seed(0)
        yield


@torch.no_grad()
def same_body_in_training(network: HuggingFaceModel, ids: np.ndarray) -> bool:
    """Return whether in training, too, nothing lies between the body's hidden states of ``ids`` [n]
    and the head.
    """
    if network.body is None:
        return True
    input_ids = torch.from_numpy(ids[None]).to(network.head.weight.device)
    with mode(network, training=True):
        with seeded(network):
            own = network._before_head(input_ids)
        with seeded(network):
            of_body = network._last_of(network.body, input_ids)
    # A head that is called by parts, or on other axes, shows nothing: the losses are compared next.
    return own is None or own.shape != of_body.shape or _equal(own, of_body)


def as_language_model(model) -> LanguageModel:
    """``model`` itself where it is a ``LanguageModel``, a wrapped transformers model, or
    InputError.
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
        f"model: expected a transformers causal model or a LanguageModel, got {type(model).__name__} "
        f"without {', '.join(missing)}"
    )


@torch.no_grad()
def verify(model: LanguageModel, ids: np.ndarray, context_length: int) -> None:
    """InputError unless the head on the hidden states gives the model's own logits, causally; on
    the first of ``ids`` [n].

    The one place where logits are asked for: a few positions, once a run. The second check needs no
    logits: a model that looks ahead (an encoder, say) would be told what it is scored on.
    """
    head, name = model.head, type(getattr(model, "model", model)).__name__
    if head.weight.is_meta:
        raise InputError(
            f"model: expected weights with values, got {name}'s head on the meta device: load them first"
        )
    rows = head.weight.shape[0]
    # A short text is followed by other ids, all different: a rule that shows on some logits only is
    # found, too.
    count = min(VERIFIED_POSITIONS, context_length)
    few = np.concatenate([ids[:count], np.arange(count) % rows])[:count]
    input_ids = torch.from_numpy(few[None]).to(head.weight.device)
    expected, hidden = model.logits(input_ids), model.hidden_states(input_ids)
    for what, tensor, last in (
        ("logits", expected, rows),
        ("hidden_states", hidden, head.weight.shape[1]),
    ):
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        # Some models give the logits of the last position alone.
        if shape not in ((1, count, last), (1, 1, last) if what == "logits" else None):
            raise InputError(f"model: expected {what} of shape {(1, count, last)}, got {shape}")
    seen = hidden[0, -expected.shape[1] :]
    relative, apart = difference(head, seen, expected[0])
    if relative > tolerance(head, expected, hidden):
        raise InputError(
            f"model: {name}'s own logits differ from its head on its hidden states by {apart:.3g}; "
            "it applies a rule after the head that is not known here (or drops out, or rounds to 16 bits inside): "
            "its perplexity would be wrong; a LanguageModel (hidden_states, head, logits) can say the rule"
        )
    wide = no_rounding(head.weight, expected, hidden)
    half = count // 2
    changed = input_ids.clone()
    changed[:, half:] = (changed[:, half:] + 1) % rows
    hidden = hidden[0, :half].float()
    ahead = (model.hidden_states(changed)[0, :half].float() - hidden).abs().max().item()
    if ahead > (1e-4 if wide else 2e-2) * max(1.0, hidden.abs().max().item()):
        raise InputError(
            f"model: {name}'s hidden states depend on later tokens (by {ahead:.3g}): it is not a causal model, "
            f"and its perplexity would mean nothing{_causal_hint(model)}"
        )


def _causal_hint(model: LanguageModel) -> str:
    """Return what to set where a configuration says itself that its model is not causal."""
    config = getattr(getattr(model, "model", None), "config", None)
    name = next(
        (name for name in ("is_decoder", "causal") if getattr(config, name, None) is False), None
    )
    return (
        "" if name is None else f"; its configuration has {name} = false, and true makes it causal"
    )


def modules(model: LanguageModel) -> list[torch.nn.Module]:
    """Modules a ``LanguageModel`` is, or has as attributes."""
    found = model if isinstance(model, torch.nn.Module) else None
    return (
        [found]
        if found
        else [part for part in vars(model).values() if isinstance(part, torch.nn.Module)]
    )


@dataclass(frozen=True)
class Source:
    """The folder or name that a model was loaded from, and notes on its weights."""

    name: str
    notes: list[str]
    # the fingerprint cache's key, where the weights stay as they were read
    files: str | None = None


# Of the models that ``load`` returned, as long as they live.
SOURCES: WeakKeyDictionary[torch.nn.Module, Source] = WeakKeyDictionary()


def source(model: LanguageModel) -> Source | None:
    """Return where ``load`` found ``model``; None for one that was made otherwise."""
    return next((SOURCES[module] for module in modules(model) if module in SOURCES), None)


def loading_notes(model: LanguageModel) -> list[str]:
    """Return what a reader must know of how the model's weights were loaded."""
    found = source(model)
    return [] if found is None else found.notes


# What a configuration says of the software and the place, and what its class and its tensors say
# themselves.
NOT_OF_THE_MODEL = (
    "_name_or_path",
    "transformers_version",
    "_commit_hash",
    "architectures",
    "dtype",
    "torch_dtype",
)


def configuration(model: LanguageModel) -> str | None:
    """Return the JSON of a transformers model's configuration, without the place and the software's
    version.
    """
    config = getattr(getattr(model, "model", None), "config", None)
    if config is None or not hasattr(config, "to_json_string"):
        return None
    record = json.loads(config.to_json_string())
    return json.dumps(
        {k: v for k, v in record.items() if k not in NOT_OF_THE_MODEL}, sort_keys=True
    )


def _tensors(model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor behind ``model``: the head's, parameters, all buffers, attributes of its
    own.
    """
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
            # accelerate's offloaded weights, one module's at a time
            with fetched(module.get_submodule(owner)):
                yield name, getattr(module.get_submodule(owner), leaf, tensor)
    if model not in parts:
        yield from sorted(
            (name, value) for name, value in vars(model).items() if isinstance(value, Tensor)
        )


def _last_calls_frequencies(module: torch.nn.Module) -> set[str]:
    """Return the buffers of dynamic rotary embeddings that the last call left, beside the original
    ones.
    """
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        if any(kind in str(getattr(part, "rope_type", "")) for kind in ("dynamic", "longrope"))
        for name in part._buffers
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
    }


def _adapters_state(model: LanguageModel) -> list:
    """Return the settings of PEFT's layers that are no tensors: which adapters are active, and
    their factors.
    """
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

    It tells one model from another: a model of which one weight differs has another fingerprint.
    Code is not looked at. The commands, whose models nobody changes between loading and scoring,
    keep it by the path, size and times of the files (``load``'s ``unchanged``).
    """
    return _fingerprint(model, configuration(model))


def _fingerprint(model: LanguageModel, config: str | None) -> str:
    found = source(model)
    cached = None if found is None or found.files is None else FingerprintCache(found.files)
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
    """Return what a result file says of its model.

    Returns:
        name: the folder or name, None where the model was not loaded from one; fingerprint;
        architecture: the class; parameters: their number; dtype: of the head's weight;
        config: a hash of the configuration, None where there is none.
    """
    found, config = source(model), configuration(model)
    counted = {id(p): p.numel() for module in modules(model) for p in module.parameters()}
    return {
        "name": name or (None if found is None else found.name),
        "fingerprint": _fingerprint(model, config),
        "architecture": type(getattr(model, "model", model)).__name__,
        "parameters": sum(counted.values()),
        "dtype": str(model.head.weight.dtype).removeprefix("torch."),
        "config": None if config is None else hashlib.sha256(config.encode()).hexdigest()[:16],
    }


def _cached(name: str | Path, revision: str | None) -> bool:
    """Whether Hugging Face's cache holds the model; asks its hub once where it does not, and
    InputError if that has none.

    Asked before transformers does: it tries for a minute where there is no network.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if isinstance(try_to_load_from_cache(str(name), "config.json", revision=revision), str):
            return True
        HfApi().model_info(str(name), revision=revision, timeout=10)
    except Exception as error:  # of httpx, of the hub's own kinds, or a name it does not take
        of = "" if revision is None else f" with revision {revision}"
        raise InputError(
            f"{name}: expected a model folder or name, got no such folder and no such model{of} ({first_line(error)})"
        )
    return False


def _source(
    name: str | Path,
    trust_remote_code: bool,
    needs: str = "config.json",
    revision: str | None = None,
) -> dict:
    """Options of ``from_pretrained`` for a local folder with the file ``needs``, or a name of the
    hub or its cache.
    """
    path = Path(name)
    local = path.is_dir()
    if local and needs and not (path / needs).is_file():
        raise InputError(f"{name}: expected a Hugging Face model folder, got one without {needs}")
    if not local and (
        path.exists() or len(path.parts) > 2 or path.is_absolute() or str(name).startswith(".")
    ):
        raise InputError(
            f"{name}: expected a local model folder, got {'a file' if path.exists() else 'no such folder'}"
        )
    if local and revision is not None:
        raise InputError(
            f"revision: expected none for the folder {name}, which has one only, got {revision!r}"
        )
    return {
        "local_files_only": local or _cached(name, revision),
        "trust_remote_code": trust_remote_code,
    } | ({} if revision is None else {"revision": revision})


def _tokenizer(name: str | Path, rest: dict):
    from transformers import AutoTokenizer

    # transformers raises anything here, from OSError to KeyError and SafetensorError.
    with theirs(f"{name}: expected a tokenizer (tokenizer.json) there, got none that can be read"):
        return AutoTokenizer.from_pretrained(name, **rest)


def load_tokenizer(name: str | Path, *, trust_remote_code: bool):
    """The tokenizer of a folder, with or without a model beside it, or of a name. Raises
    InputError.
    """
    return _tokenizer(name, _source(name, trust_remote_code, needs=""))


def load(
    name: str | Path,
    *,
    device: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    unchanged: bool = False,
    revision: str | None = None,
    device_map: str | None = None,
):
    """Model and tokenizer of a Hugging Face folder, or of a name in its cache or on its hub.

    Weights are read as safetensors (whole or sharded), never unpickled; a model's own code runs
    only with ``trust_remote_code``. Raises InputError where something is missing or cannot be
    loaded: a weight of the model that its files lack, above all. Weights that the model does not
    use become a note in what is measured of it. revision: branch, tag or commit of a name on the
    hub. device_map: as in ``from_pretrained``, "auto" for what fits where (accelerate's);
    ``device`` is then left out. unchanged: the caller does not change the weights; their
    fingerprint is then kept by the path, size and times of the files.
    """
    rest = _source(name, trust_remote_code, revision=revision)
    if device_map is not None:
        rest["device_map"] = _device_map(device_map, device)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # an unknown name, one that holds no numbers, or not built in
        raise InputError(
            f"device: expected one that this torch can use, got {device!r} ({first_line(error)})"
        )
    tokenizer = _tokenizer(name, rest)
    # A model's own code may put anything into its weights: its files do not say what.
    files = files_key(name, dtype, revision) if unchanged and not trust_remote_code else None
    try:
        with theirs("expected the weights of a causal language model, got none that can be read"):
            model, notes = read_model(name, dtype, rest)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error.__cause__
    if device_map is None:
        _move(model, name, device)
    model.eval()
    # they changed under the reading
    if files is not None and files != files_key(name, dtype, revision):
        files = None
    SOURCES[model] = Source(str(name) if revision is None else f"{name}@{revision}", notes, files)
    return model, tokenizer


def _device_map(device_map: str, device: str | None) -> str:
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
    try:
        with theirs(
            f"{name}: expected a model that runs on {device}, got one that cannot be moved there"
        ):
            model.to(device)
    except torch.OutOfMemoryError:
        raise InputError(
            f"{name}: the weights do not fit in the memory of {device}: take a smaller dtype (bfloat16), "
            "device_map 'auto', or another device"
        )
