"""Prompts and their references: read from files, then turned into tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import InputError, check_encoding, check_unicode, spelled, theirs
from ..files import STANDARD_INPUT, other_than_file
from ..text.readers import (
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

LEAST_REFERENCE = 16  # a document that leaves fewer tokens for a reference is skipped


@dataclass(frozen=True)
class Prompt:
    """Prompt for a model to continue.

    Attributes:
        id: Name of the prompt in results.
        text: The prompt, or a whole document.
        references: Good continuations; the first is scored by the model.
        document: The text is a document: its first tokens are the prompt, the next the reference.

    Example:
        >>> Prompt("capital", "The capital of France is", references=("Paris.",)).document
        False
    """

    id: str
    text: str
    references: tuple[str, ...] = ()
    document: bool = False


@dataclass(frozen=True)
class Asked:
    """Prompt as the model reads it.

    Attributes:
        prompt: The prompt that this one is made from.
        text: The prompt's text.
        ids: Token ids of the prompt [tokens].
        reference: Token ids of the reference that is scored [tokens]; empty without one.
        references: All references as texts.
        shortened: The prompt's beginning is left out.
        cut: The end of ``reference`` is left out.
    """

    prompt: Prompt
    text: str
    ids: np.ndarray
    reference: np.ndarray
    references: tuple[str, ...]
    shortened: bool
    cut: bool


def read_prompts(
    path: str | Path,
    options: ReadOptions | None = None,
    *,
    prompt_column: str = "prompt",
    reference_column: str = "reference",
) -> Iterator[Prompt]:
    """Read the prompts of a file.

    A line of .txt is a prompt. An object of .jsonl is a prompt where it has ``prompt_column``, else
    a document to cut. Every other format that ``ppl eval`` reads holds documents.

    Args:
        path: The file or datasets folder; "-" reads standard input.
        options: Column names and formats; None takes the defaults of ``ReadOptions``.
        prompt_column: Key of the prompt in .jsonl, "prompt" by default.
        reference_column: Key of a text or a list of texts in .jsonl, "reference" by default.

    Returns:
        An iterator over the prompts, in the order of the file.

    Raises:
        InputError: The file or a line cannot be read; the message names file and line.

    Example:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "prompts.txt")
        >>> with open(path, "w") as file:
        ...     _ = file.write("Once upon a time\\nThe sea\\n")
        >>> [(prompt.id, prompt.text) for prompt in read_prompts(path)]
        [('prompts.txt:1', 'Once upon a time'), ('prompts.txt:2', 'The sea')]
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
    """Yield a prompt for each line of text that is not blank."""
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
    """Yield a prompt for each object of JSON lines."""
    for number, where, record in json_lines(stream, path, prompt_column):
        named = record.get(options.id_column)
        name = f"{spelled(path.name)}:{number}" if named is None else str(named)
        check_unicode(f"{where}, column {options.id_column!r}", name)
        if prompt_column not in record and isinstance(record.get(options.text_column), str):
            yield Prompt(name, text_in(record, options.text_column, where), document=True)
            continue
        texts = record.get(reference_column)
        texts = [] if texts is None else [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(
                f"{where}: expected a text or a list of texts in {reference_column!r}, "
                f"got {texts!r:.60}"
            )
        references = tuple(
            text_in({reference_column: text}, reference_column, where) for text in texts
        )
        yield Prompt(
            name,
            text_in(record, prompt_column, where),
            tuple(text for text in references if text.strip()),
        )


def checked_prompt(place: int, prompt: Prompt | str) -> Prompt:
    """Return a prompt without its blank references; a string becomes a prompt.

    Args:
        place: Place among the prompts, the id of a string.
        prompt: The prompt.

    Raises:
        InputError: It is no prompt, or one of its texts is no Unicode text.
    """
    prompt = Prompt(str(place), prompt) if isinstance(prompt, str) else prompt
    if not isinstance(prompt, Prompt):
        raise InputError(
            f"prompts: expected strings or Prompts, got {type(prompt).__name__} at {place}"
        )
    if not isinstance(prompt.references, tuple | list):
        raise InputError(
            f"prompt {prompt.id}: expected references as a tuple, "
            f"got {type(prompt.references).__name__}"
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
    """Return at most ``most`` prompts, evenly spaced over all of them.

    Example:
        >>> [prompt.id for prompt in spread([Prompt(str(id), "") for id in range(9)], 3)]
        ['0', '4', '8']
    """
    if len(prompts) <= most:
        return list(prompts)
    return [
        prompts[place]
        for place in np.linspace(0, len(prompts) - 1, most).round().astype(int).tolist()
    ]


def tokenize(
    tokenizer, prompts: Iterable[Prompt], settings: GenerationSettings, context_length: int | None
) -> tuple[list[Asked], int]:
    """Tokenise prompts and their references, behind BOS where the tokenizer has one.

    A prompt too long for the context and ``max_new_tokens`` loses its beginning. A reference longer
    than ``max_new_tokens`` loses its end. A space is put between prompt and reference where neither
    has white space there, as lm-evaluation-harness does.

    Args:
        tokenizer: The model's tokenizer.
        prompts: The prompts.
        settings: Of the generation.
        context_length: The most tokens that the model reads; None: any number.

    Returns:
        The prompts as the model reads them, and the number of documents too short to cut.

    Raises:
        InputError: A prompt has no tokens, a document is to be a chat message, or the context has
            no room for a prompt.
    """
    room = None if context_length is None else context_length - settings.most
    if context_length is not None and room is not None and room < 1:
        raise InputError(
            f"max_new_tokens: expected at most {context_length - 1}, "
            f"the model's context of {context_length} and a prompt, got {settings.max_new_tokens}"
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
    """Return the last ``room`` tokens, BOS kept, and whether tokens were left out."""
    if room is None or len(ids) <= room:
        return ids, False
    bos = ids[:1] if _starts_with_bos(tokenizer, ids) and room > 1 else ids[:0]
    return np.concatenate([bos, ids[len(ids) - room + len(bos) :]]), True


def _chat(tokenizer, text: str, room: int | None) -> tuple[np.ndarray, bool]:
    """Return the tokens of a chat message, and whether the beginning of its text was left out.

    The chat template writes BOS itself, and is never shortened.
    """
    ids, kept = plain(tokenizer, chat_text(tokenizer, text)), None
    while room is not None and len(ids) > room:
        kept = plain(tokenizer, text) if kept is None else kept
        if not len(kept):
            raise InputError(
                "max_new_tokens: expected room for the chat template, "
                f"got {len(ids)} tokens of it, and {room} left"
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
    """Return the tokens of a text behind one BOS, where the tokenizer has BOS."""
    ids, bos = plain(tokenizer, text), tokenizer.bos_token_id
    return ids if bos is None or _starts_with_bos(tokenizer, ids) else np.concatenate([[bos], ids])


def chat_text(tokenizer, text: str) -> str:
    """Return a text as a user's message in the chat template, up to the beginning of the answer.

    Raises:
        InputError: The tokenizer has no chat template, or the template fails.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("chat: expected a tokenizer with a chat template, got one without")
    message = [{"role": "user", "content": text}]
    with theirs("chat: expected a chat template that takes a user's message, got one that fails"):
        return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def plain(tokenizer, text: str) -> np.ndarray:
    """Return the tokens of a text, without special tokens around it."""
    return token_ids(tokenizer, [text])[0]


def _continuation(tokenizer, text: str, ids: np.ndarray, reference: str) -> np.ndarray:
    """Return the tokens of a reference after the prompt's ``ids``, with a space where needed."""
    apart = bool(text) and not text[-1].isspace() and not reference[0].isspace()
    reference = " " + reference if apart else reference
    return following(ids, encode(tokenizer, text + reference), plain(tokenizer, reference))


def following(ids: np.ndarray, whole: np.ndarray, alone: np.ndarray) -> np.ndarray:
    """Return the tokens of a text that follows a prompt.

    Args:
        ids: Tokens of the prompt.
        whole: Tokens of prompt and text together.
        alone: Tokens of the text alone.

    Returns:
        The rest of ``whole`` after ``ids``, where ``whole`` begins with them; else ``alone``.

    Example:
        >>> following(np.array([1, 2]), np.array([1, 2, 3]), np.array([4]))
        array([3])
        >>> following(np.array([1, 2]), np.array([1, 5]), np.array([4]))
        array([4])
    """
    begins = len(whole) > len(ids) and np.array_equal(whole[: len(ids)], ids)
    return whole[len(ids) :] if begins else alone
