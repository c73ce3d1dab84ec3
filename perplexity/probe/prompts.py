"""What a model is asked to continue, and what good continuations would be: from files, then as
tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import InputError, check_encoding, check_unicode, spelled, theirs
from ..files import other_than_file
from ..text.readers import (
    STANDARD_INPUT,
    ReadOptions,
    decoded,
    json_lines,
    opened,
    read_documents,
    standard_input,
    text_in,
)
from ..text.tokens import text_of, token_ids
from .settings import GenerationSettings

# tokens that are left of a document for a reference; a shorter one is passed over
LEAST_REFERENCE = 16


@dataclass(frozen=True)
class Prompt:
    """``references``: good continuations, the first of which is scored. ``document``: the text is a
    whole one, whose first tokens are the prompt and whose next are the reference."""

    id: str
    text: str
    references: tuple[str, ...] = ()
    document: bool = False


@dataclass(frozen=True)
class Asked:
    """A prompt as the model reads it: ``text``, ``ids`` [tokens]; ``reference`` [tokens] to score,
    ``references`` as texts.
    """

    prompt: Prompt
    text: str
    ids: np.ndarray
    reference: np.ndarray
    references: tuple[str, ...]
    shortened: bool  # the prompt's beginning is left out
    cut: bool  # the reference's end is


def read_prompts(
    path: str | Path,
    options: ReadOptions | None = None,
    *,
    prompt_column: str = "prompt",
    reference_column: str = "reference",
) -> Iterator[Prompt]:
    """Prompts of a file: of .txt each line, of .jsonl each object with ``prompt_column`` (and a
    text or a list of texts in ``reference_column``); an object without, and every other format that
    ``ppl eval`` reads, is a document to cut.

    Raises InputError that names file and line.
    """
    options = options or ReadOptions()
    name = str(path)
    if name == STANDARD_INPUT:
        read = _lines if options.standard_input == "txt" else _objects
        with standard_input() as stream:
            yield from read(stream, Path("stdin"), options, prompt_column, reference_column)
        return
    file = Path(path)
    kind = name.removesuffix(".gz").removesuffix(".zst")
    if kind.endswith((".txt", ".jsonl")) and not file.is_dir():
        if (other := other_than_file(file)) is not None:
            raise InputError(f"{file}: expected a file of prompts, got {other}")
        with opened(file) as stream:
            read = _lines if kind.endswith(".txt") else _objects
            yield from read(stream, file, options, prompt_column, reference_column)
        return
    for document in read_documents([file], options):
        if document.ids is not None:
            raise InputError(f"{file}: expected text to cut prompts from, got tokens")
        yield Prompt(document.id, document.text, document=True)


def _lines(
    stream, path: Path, options: ReadOptions, prompt_column: str, reference_column: str
) -> Iterator[Prompt]:
    empty = True
    for number, raw in enumerate(stream, 1):
        if number == 1:
            check_encoding(f"{path}, line 1", raw)
        line = decoded(
            raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw, f"{path}, line {number}"
        )
        line = line.rstrip("\r\n")
        if line.strip():
            empty = False
            yield Prompt(f"{spelled(path.name)}:{number}", line)
    if empty:
        raise InputError(f"{path}: expected prompts, got an empty file")


def _objects(
    stream, path: Path, options: ReadOptions, prompt_column: str, reference_column: str
) -> Iterator[Prompt]:
    for number, where, record in json_lines(stream, path, prompt_column):
        named = record.get(options.id_column)
        name = f"{spelled(path.name)}:{number}" if named is None else str(named)
        check_unicode(f"{where}, column {options.id_column!r}", name)
        if prompt_column not in record and isinstance(record.get(options.text_column), str):
            yield Prompt(name, text_in(record, options.text_column, where), document=True)
            continue
        found = record.get(reference_column)
        found = [] if found is None else [found] if isinstance(found, str) else found
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise InputError(
                f"{where}: expected a text or a list of texts in {reference_column!r}, got {found!r:.60}"
            )
        references = tuple(
            text_in({reference_column: text}, reference_column, where) for text in found
        )
        yield Prompt(
            name,
            text_in(record, prompt_column, where),
            tuple(text for text in references if text.strip()),
        )


def checked_prompt(place: int, prompt: Prompt | str) -> Prompt:
    """``prompt`` with references that are not blank; InputError naming it unless all of it is
    Unicode text.
    """
    prompt = Prompt(str(place), prompt) if isinstance(prompt, str) else prompt
    if not isinstance(prompt, Prompt):
        raise InputError(
            f"prompts: expected strings or Prompts, got {type(prompt).__name__} at {place}"
        )
    if not isinstance(prompt.references, tuple | list):
        raise InputError(
            f"prompt {prompt.id}: expected references as a tuple, got {type(prompt.references).__name__}"
        )
    for text in (prompt.text, *prompt.references):
        if not isinstance(text, str):
            raise InputError(f"prompt {prompt.id}: expected text, got {type(text).__name__}")
        check_unicode(f"prompt {prompt.id}", text)
    return replace(
        prompt,
        id=str(prompt.id),
        references=tuple(text for text in prompt.references if text.strip()),
    )


def spread(prompts: Sequence[Prompt], most: int) -> list[Prompt]:
    """At most ``most`` of them, evenly over the file."""
    if len(prompts) <= most:
        return list(prompts)
    return [
        prompts[place]
        for place in np.linspace(0, len(prompts) - 1, most).round().astype(int).tolist()
    ]


def tokenize(
    tokenizer, prompts: Iterable[Prompt], settings: GenerationSettings, context_length: int | None
) -> tuple[list[Asked], int]:
    """The prompts as tokens, behind the tokenizer's BOS where it has one, and how many documents
    were too short to cut.

    A prompt that leaves no room for ``max_new_tokens`` loses its beginning, a reference that is
    longer its end. Where neither a prompt's end nor its reference's beginning is white space, a
    space is put between them, as lm-evaluation-harness does.
    """
    room = None if context_length is None else context_length - settings.most
    if context_length is not None and room is not None and room < 1:
        raise InputError(
            f"max_new_tokens: expected at most {context_length - 1}, the model's context of {context_length} and a prompt, "
            f"got {settings.max_new_tokens}"
        )
    asked, short = [], 0
    for prompt in prompts:
        text, references = prompt.text, prompt.references
        if prompt.document:
            if settings.chat:
                raise InputError(
                    f"prompt {prompt.id}: expected a prompt for --chat, got a document to cut"
                )
            ids = encode(tokenizer, text)
            begin = min(len(ids), settings.prompt_tokens + int(_starts_with_bos(tokenizer, ids)))
            ids, reference = ids[:begin], ids[begin:]
            if len(reference) < LEAST_REFERENCE:
                short += 1
                continue
            text = text_of(tokenizer, ids, skip_special_tokens=True)
            scored = reference[: settings.max_new_tokens]
            references = (text_of(tokenizer, scored, skip_special_tokens=True),)
            ids, shortened = _shortened(tokenizer, ids, room)
        elif settings.chat:
            ids, shortened = _chat(tokenizer, text, room)
            reference = plain(tokenizer, references[0]) if references else np.empty(0, np.int64)
        else:
            ids = encode(tokenizer, text)
            reference = (
                _continuation(tokenizer, text, ids, references[0])
                if references
                else np.empty(0, np.int64)
            )
            ids, shortened = _shortened(tokenizer, ids, room)
        if not len(ids):
            raise InputError(f"prompt {prompt.id}: expected at least one token, got none")
        scored = reference[: settings.max_new_tokens]
        asked.append(
            Asked(prompt, text, ids, scored, references, shortened, len(scored) < len(reference))
        )
    return asked, short


def _shortened(tokenizer, ids: np.ndarray, room: int | None) -> tuple[np.ndarray, bool]:
    """The last ``room`` tokens, behind BOS where it was there."""
    if room is None or len(ids) <= room:
        return ids, False
    bos = ids[:1] if _starts_with_bos(tokenizer, ids) and room > 1 else ids[:0]
    return np.concatenate([bos, ids[len(ids) - room + len(bos) :]]), True


def _chat(tokenizer, text: str, room: int | None) -> tuple[np.ndarray, bool]:
    """A user's message in the template, which puts BOS where it belongs; one too long loses its
    beginning, not the template.
    """
    ids, kept = plain(tokenizer, chat_text(tokenizer, text)), None
    while room is not None and len(ids) > room:
        kept = plain(tokenizer, text) if kept is None else kept
        if not len(kept):
            raise InputError(
                f"max_new_tokens: expected room for the chat template, got {len(ids)} tokens of it, and {room} left"
            )
        kept = kept[len(ids) - room :]
        ids = plain(tokenizer, chat_text(tokenizer, text_of(tokenizer, kept)))
    return ids, kept is not None


def _starts_with_bos(tokenizer, ids: np.ndarray) -> bool:
    return (
        len(ids) > 0
        and tokenizer.bos_token_id is not None
        and int(ids[0]) == tokenizer.bos_token_id
    )


def encode(tokenizer, text: str) -> np.ndarray:
    """Tokens of ``text`` behind BOS, never two."""
    ids, bos = plain(tokenizer, text), tokenizer.bos_token_id
    return ids if bos is None or _starts_with_bos(tokenizer, ids) else np.concatenate([[bos], ids])


def chat_text(tokenizer, text: str) -> str:
    """``text`` as a user's message in the tokenizer's chat template, up to where the answer begins;
    InputError without one.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("chat: expected a tokenizer with a chat template, got one without")
    message = [{"role": "user", "content": text}]
    with theirs("chat: expected a chat template that takes a user's message, got one that fails"):
        return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def plain(tokenizer, text: str) -> np.ndarray:
    """Tokens of ``text`` and nothing else."""
    return token_ids(tokenizer, [text])[0]


def _continuation(tokenizer, text: str, ids: np.ndarray, reference: str) -> np.ndarray:
    """Tokens of ``reference`` after the prompt ``ids``: those that follow them in the whole, where
    it begins with them.
    """
    apart = bool(text) and not text[-1].isspace() and not reference[0].isspace()
    reference = " " + reference if apart else reference
    return following(ids, encode(tokenizer, text + reference), plain(tokenizer, reference))


def following(ids: np.ndarray, whole: np.ndarray, alone: np.ndarray) -> np.ndarray:
    """Tokens of a text after a prompt's ``ids``: what follows them in the ``whole``, where it
    begins with them, else its own.
    """
    begins = len(whole) > len(ids) and np.array_equal(whole[: len(ids)], ids)
    return whole[len(ids) :] if begins else alone
