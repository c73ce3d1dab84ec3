"""Texts that a model generates, by transformers' own ``generate``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from ..errors import InputError, theirs
from ..models.language_model import as_language_model
from ..scoring.batching import length_rules
from ..text.tokens import special_ids, text_of
from .prompts import Asked
from .settings import GenerationSettings

CHECKED = 8  # tokens that are generated to see which batches a model can be trusted with

# Whether a model holds the tokens [n] after a prompt [tokens] for the likeliest, each after those
# before it.
FirstChoices = Callable[[np.ndarray, np.ndarray], bool]


@dataclass(frozen=True)
class Generated:
    """``ids`` [tokens] after the prompt, without the end-of-text token; ``ended``: it came."""

    prompt: int  # place among the prompts
    sample: int
    ids: np.ndarray
    text: str
    ended: bool


def ends_of_text(model, tokenizer) -> list[int]:
    """Tokens that end a text: the tokenizer's, and of the model's own those that are no piece of
    text.

    Both, because a tuned model ends its turns with another token than its configuration may say; no
    piece of text, because architectures have ids for it by default, which in one's own vocabulary
    are anything.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    no_text = special_ids(tokenizer) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    found = {getattr(tokenizer, "eos_token_id", None)}
    for source in (getattr(model, "generation_config", None), model.config.get_text_config()):
        ends = getattr(source, "eos_token_id", None)
        found.update(
            token
            for token in (ends if isinstance(ends, list | tuple) else [ends])
            if token in no_text
        )
    return sorted(token for token in found if isinstance(token, int) and 0 <= token < rows)


def generate(
    model,
    tokenizer,
    asked: list[Asked],
    settings: GenerationSettings,
    *,
    first_choices: FirstChoices | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Generated]:
    """``settings.samples`` texts for each prompt, in order of prompt and sample; ``progress`` is
    told how many are there.

    first_choices: checks a few tokens first. Some models' batches, or padding before a prompt,
    change what they write (recurrent ones, above all): they are given prompts of one length
    together, or one at a time. The same call gives the same texts on the same machine. Raises
    InputError where the model cannot generate.
    """
    if not (hasattr(model, "generate") and hasattr(model, "generation_config")):
        raise InputError(
            f"model: expected a transformers model that generates, got {type(model).__name__}"
        )
    writer = _Writer(model, tokenizer, settings)
    found: list[Generated] = []
    written: Counter = Counter()
    with torch.random.fork_rng(devices=_cuda(writer.device)), torch.no_grad():
        together = "padded" if first_choices is None else _together(writer, asked, first_choices)
        torch.manual_seed(settings.seed)
        for places, copies in _batches(asked, settings, together):
            texts = writer.write(
                [asked[place].ids for place in places], settings.most, copies=copies
            )
            for number, (ids, ended) in enumerate(texts):
                place = places[number // copies]
                text = text_of(tokenizer, ids, skip_special_tokens=True)
                found.append(Generated(place, written[place], ids, text, ended))
                written[place] += 1
            if progress is not None:
                progress(len(found))
    return sorted(found, key=lambda text: (text.prompt, text.sample))


def _batches(
    asked: list[Asked], settings: GenerationSettings, together: str
) -> Iterator[tuple[list[int], int]]:
    """Places of prompts to be given at once, and how many texts each gets, by length."""
    order = sorted(range(len(asked)), key=lambda place: len(asked[place].ids))
    if together == "alone":
        for place in order:
            for _ in range(settings.samples):
                yield [place], 1
        return
    rows = max(1, settings.batch_size // settings.samples)
    lengths = (lambda place: 0) if together == "padded" else (lambda place: len(asked[place].ids))
    for _, group in groupby(order, lengths):
        places = list(group)
        for begin in range(0, len(places), rows):
            yield places[begin : begin + rows], settings.samples


def _together(writer: _Writer, asked: list[Asked], first_choices: FirstChoices) -> str:
    """ "padded", "equal" or "alone": the largest batches whose greedy tokens are the model's own
    first choices.
    """
    by_length = sorted((prompt.ids for prompt in asked), key=len)
    tokens = min(CHECKED, writer.settings.most)
    longest = len(by_length[-1]) + writer.settings.most
    # A rotary embedding that changes with the longest row's length changes for a shorter one too
    # early.
    rules = length_rules(as_language_model(writer.model))
    one_rule = all(rule.group(len(by_length[0])) == rule.group(longest) for rule in rules)
    for name, prompts in (
        *((("padded", [by_length[0], by_length[-1]]),) if one_rule else ()),
        ("equal", [by_length[-1]] * 2),
        ("alone", [by_length[-1]]),
    ):
        texts = writer.write(prompts, tokens, greedy=True)
        if all(
            first_choices(prompt, ids)
            for prompt, (ids, _) in zip(prompts, texts, strict=True)
            if len(ids)
        ):
            return name
    raise InputError(
        f"model: expected greedy tokens that {type(writer.model).__name__} holds for the likeliest, got others: its generate and "
        "its forward pass disagree"
    )


class _Writer:
    """``generate`` with nothing but the stated settings."""

    def __init__(self, model, tokenizer, settings: GenerationSettings) -> None:
        self.model, self.settings = model, settings
        self.device = next(model.parameters()).device
        self.ends = ends_of_text(model, tokenizer)
        rows = model.get_input_embeddings().weight.shape[0]
        known = [
            token
            for token in (tokenizer.pad_token_id, *self.ends)
            if token is not None and 0 <= token < rows
        ]
        self.padding = known[0] if known else 0
        self.bos = tokenizer.bos_token_id

    def write(
        self, prompts: Sequence[np.ndarray], tokens: int, *, copies: int = 1, greedy: bool = False
    ) -> list[tuple[np.ndarray, bool]]:
        """``copies`` texts after each prompt, as tokens up to the end-of-text token, and whether it
        came.
        """
        longest = max(map(len, prompts))
        ids = np.full((len(prompts), longest), self.padding, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
        given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        with _no_other_settings(
            self.model, self._config(tokens, copies, greedy or self.settings.greedy)
        ):
            try:
                # Probabilities that are no numbers, above all.
                with theirs(
                    f"model: cannot be sampled from by {type(self.model).__name__}.generate"
                ):
                    out = self.model.generate(
                        **{name: tensor.to(self.device) for name, tensor in given.items()}
                    )
            except torch.OutOfMemoryError:
                raise InputError(
                    f"batch_size: {len(prompts) * copies} texts at once do not fit in the memory of {self.device}"
                )
        texts = []
        for row in out[:, longest:].cpu().numpy():
            end = np.flatnonzero(np.isin(row, self.ends))
            texts.append((row[: end[0]] if len(end) else row, len(end) > 0))
        return texts

    def _config(self, tokens: int, copies: int, greedy: bool):
        from transformers import GenerationConfig

        s = self.settings
        sampled: dict[str, Any] = (
            {} if greedy else {"temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k}
        )
        return GenerationConfig(
            max_new_tokens=tokens,
            do_sample=not greedy,
            num_return_sequences=copies,
            eos_token_id=self.ends or None,
            pad_token_id=self.padding,
            bos_token_id=self.bos,
            use_cache=True,
            **sampled,
        )


@contextmanager
def _no_other_settings(model, config):
    """``generate`` fills what a configuration leaves open from the model's own, a repetition
    penalty say: not here.
    """
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def _cuda(device: torch.device) -> list[int]:
    return (
        [torch.cuda.current_device() if device.index is None else device.index]
        if device.type == "cuda"
        else []
    )
