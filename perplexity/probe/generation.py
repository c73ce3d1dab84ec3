"""Generation of texts by transformers' ``generate``, under the stated settings alone."""

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
from ..wording import counted
from .prompts import Asked
from .settings import GenerationSettings

CHECKED = 8  # tokens generated to find the batches that do not change a model's texts

# Takes a prompt [tokens] and the greedy tokens [n] after it; returns whether the model's forward
# pass holds each of them most probable after those before it.
FirstChoices = Callable[[np.ndarray, np.ndarray], bool]


@dataclass(frozen=True)
class Generated:
    """Generated text.

    Attributes:
        prompt: Place of the prompt among the prompts.
        sample: Place of the text among the prompt's texts.
        ids: Token ids after the prompt [tokens], without the end-of-text token.
        text: The text.
        ended: Whether the end-of-text token was generated.
    """

    prompt: int
    sample: int
    ids: np.ndarray
    text: str
    ended: bool


def ends_of_text(model, tokenizer) -> list[int]:
    """Return the ids of the tokens that end a text: the tokenizer's EOS and those of the model.

    A tuned model may end its turns with another token than the tokenizer's EOS. An id in the
    model's configuration counts only where the tokenizer has a special token there: the
    configuration of an architecture has default ids, which may be any text in a user's vocabulary.

    Args:
        model: A transformers model.
        tokenizer: Its tokenizer.

    Returns:
        Sorted ids below the number of the model's input embeddings.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    no_text = special_ids(tokenizer) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    tokens = {getattr(tokenizer, "eos_token_id", None)}
    for source in (getattr(model, "generation_config", None), model.config.get_text_config()):
        ends = getattr(source, "eos_token_id", None)
        tokens.update(
            token
            for token in (ends if isinstance(ends, list | tuple) else [ends])
            if token in no_text
        )
    return sorted(token for token in tokens if isinstance(token, int) and 0 <= token < rows)


def generate(
    model,
    tokenizer,
    asked: list[Asked],
    settings: GenerationSettings,
    *,
    first_choices: FirstChoices | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Generated]:
    """Generate texts for prompts; the same call gives the same texts on the same machine.

    Batches, or padding before a prompt, change the texts of some models, above all of recurrent
    ones. ``first_choices`` finds such models by a few greedy tokens. Their prompts are batched by
    equal length, or run one at a time.

    Args:
        model: A transformers model.
        tokenizer: Its tokenizer.
        asked: The prompts.
        settings: Of the generation: ``samples`` texts for each prompt.
        first_choices: The check of a few greedy tokens; None trusts padded batches.
        progress: Called with the number of texts that are done.

    Returns:
        The texts in the order of prompts and samples.

    Raises:
        InputError: The model cannot generate, or runs out of memory.
    """
    if not (hasattr(model, "generate") and hasattr(model, "generation_config")):
        raise InputError(
            f"model: expected a transformers model that generates, got {type(model).__name__}"
        )
    writer = _Writer(model, tokenizer, settings)
    generated: list[Generated] = []
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
                generated.append(Generated(place, written[place], ids, text, ended))
                written[place] += 1
            if progress is not None:
                progress(len(generated))
    return sorted(generated, key=lambda text: (text.prompt, text.sample))


def _batches(
    asked: list[Asked], settings: GenerationSettings, together: str
) -> Iterator[tuple[list[int], int]]:
    """Yield batches by length: the places of prompts, and the number of texts for each of them."""
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
    """Return the kind of the largest batches that do not change the model's greedy tokens.

    The kinds are "padded", "equal" (prompts of one length) and "alone".

    Raises:
        InputError: Greedy tokens of a prompt alone are not the first choices of the forward pass.
    """
    by_length = sorted((prompt.ids for prompt in asked), key=len)
    tokens = min(CHECKED, writer.settings.most)
    longest = len(by_length[-1]) + writer.settings.most
    # In a padded batch a rotary embedding that depends on the longest row's length changes too
    # early for the shorter rows.
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
        f"model: expected greedy tokens that {type(writer.model).__name__} holds for the "
        "likeliest, got others: its generate and its forward pass disagree"
    )


class _Writer:
    """Writer of texts: the model's ``generate`` with nothing but the stated settings."""

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
        """Generate ``copies`` texts after each prompt.

        Returns:
            The tokens of each text up to the end-of-text token, and whether that was generated.
        """
        longest = max(map(len, prompts))
        ids = np.full((len(prompts), longest), self.padding, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        with _no_other_settings(
            self.model, self._config(tokens, copies, greedy or self.settings.greedy)
        ):
            try:
                # Most often the model's probabilities are NaN.
                with theirs(
                    f"model: cannot be sampled from by {type(self.model).__name__}.generate"
                ):
                    out = self.model.generate(
                        **{name: tensor.to(self.device) for name, tensor in inputs.items()}
                    )
            except torch.OutOfMemoryError:
                raise InputError(
                    f"batch_size: {counted(len(prompts) * copies, 'text')} at once: more than fits in "
                    f"the memory of {self.device}"
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
    """Replace the model's generation settings within the ``with`` block.

    ``generate`` takes every setting that a call leaves open, such as a repetition penalty, from the
    model's own.
    """
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def _cuda(device: torch.device) -> list[int]:
    """Return the number of a CUDA device in a list, empty for any other device."""
    return (
        [torch.cuda.current_device() if device.index is None else device.index]
        if device.type == "cuda"
        else []
    )
