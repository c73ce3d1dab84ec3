"""Texts that a model generates, by transformers' own ``generate``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import InputError
from .prompts import Asked
from .settings import GenerationSettings


@dataclass(frozen=True)
class Generated:
    """``ids`` [tokens] after the prompt, without the end-of-text token; ``ended``: it came."""

    prompt: int  # place among the prompts
    sample: int
    ids: np.ndarray
    text: str
    ended: bool


def ends_of_text(model, tokenizer) -> set[int]:
    """Tokens that end a text: the model's own, else the tokenizer's."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if configured is None:
        configured = getattr(model.config, "eos_token_id", None)
    if configured is None:
        configured = tokenizer.eos_token_id
    return set() if configured is None else set(configured if isinstance(configured, list) else [configured])


def generate(
    model,
    tokenizer,
    asked: list[Asked],
    settings: GenerationSettings,
    progress: Callable[[int], None] | None = None,
) -> list[Generated]:
    """``settings.samples`` texts for each prompt, in order of prompt and sample; ``progress`` is told how many are there.

    The same call gives the same texts on the same machine. Raises InputError where the model cannot generate.
    """
    from transformers import GenerationConfig

    if not (hasattr(model, "generate") and hasattr(model, "generation_config")):
        raise InputError(f"model: expected a transformers model that generates, got {type(model).__name__}")
    ends = sorted(ends_of_text(model, tokenizer))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0] if ends else 0
    sampled = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=not settings.greedy,
        num_return_sequences=settings.samples,
        eos_token_id=ends or None,
        pad_token_id=padding,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
        **({} if settings.greedy else sampled),
    )
    found: list[Generated] = []
    device = next(model.parameters()).device
    rows = max(1, settings.batch_size // settings.samples)
    # Prompts of about one length together: little padding.
    order = sorted(range(len(asked)), key=lambda place: len(asked[place].ids))
    with _no_other_settings(model, config), torch.random.fork_rng(enabled=True, devices=_cuda(device)), torch.no_grad():
        torch.manual_seed(settings.seed)
        for begin in range(0, len(order), rows):
            places = order[begin : begin + rows]
            longest = max(len(asked[place].ids) for place in places)
            ids = np.full((len(places), longest), padding, dtype=np.int64)
            mask = np.zeros_like(ids)
            for row, place in enumerate(places):
                length = len(asked[place].ids)
                ids[row, longest - length :], mask[row, longest - length :] = asked[place].ids, 1
            try:
                out = model.generate(
                    input_ids=torch.from_numpy(ids).to(device), attention_mask=torch.from_numpy(mask).to(device)
                )
            except torch.OutOfMemoryError:
                raise InputError(
                    f"batch_size: {len(places) * settings.samples} texts at once do not fit in the memory of {device}"
                )
            except RuntimeError as error:  # probabilities that are no numbers, above all
                raise InputError(f"model: cannot be sampled from ({str(error).splitlines()[0]})")
            for number, tokens in enumerate(out[:, longest:].cpu().numpy()):
                end = np.flatnonzero(np.isin(tokens, ends))
                kept = tokens[: end[0]] if len(end) else tokens
                text = tokenizer.decode(kept.tolist(), skip_special_tokens=True)
                place, sample = places[number // settings.samples], number % settings.samples
                found.append(Generated(place, sample, kept.astype(np.int64), text, len(end) > 0))
            if progress is not None:
                progress(len(found))
    return sorted(found, key=lambda text: (text.prompt, text.sample))


@contextmanager
def _no_other_settings(model, config):
    """``generate`` fills what a configuration leaves open from the model's own, a repetition penalty say: not here."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def _cuda(device: torch.device) -> list[int]:
    return [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
