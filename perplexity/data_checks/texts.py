"""From files to the texts that are checked.

Documents are read as the evaluation reads them, long text files in pieces; either is cut into
paragraphs or lines where asked for.
"""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from ..errors import InputError, check_encoding, spelled
from ..files import STANDARD_INPUT
from ..text.documents import Document, check_ids
from ..text.readers import ReadOptions, opened, read_documents, stem
from ..text.tokens import text_of as decoded
from .index import Text

PIECE = 4 << 20  # bytes of a text file read at a time
BLANK = r"\n[ \t\r]*\n\s*"  # between paragraphs


def unit_of(unit: str, valid: list[str], standard_input: str) -> str:
    """Return what texts are cut into: "document", "paragraph" or "line".

    Args:
        unit: one of these, or "auto": paragraphs where all of validation is one text file, which
            has no documents, and else documents.
        valid: paths of validation, "-" for standard input.
        standard_input: format of standard input.

    Example:
        >>> unit_of("auto", ["valid.jsonl"], "txt")
        'document'
    """
    if unit != "auto":
        return unit
    one = len(valid) == 1 and (
        _is_text(valid[0]) or (valid[0] == STANDARD_INPUT and standard_input == "txt")
    )
    return "paragraph" if one else "document"


def _is_text(path: str) -> bool:
    name = str(path).removesuffix(".gz").removesuffix(".zst")
    return name.endswith(".txt") and Path(path).is_file()


def read_texts(
    paths: Iterable[str], options: ReadOptions, unit: str = "document", tokenizer=None
) -> Iterator[Text]:
    """Yield the texts of files, cut by ``unit``.

    A text file is read in pieces, whatever its size.

    Args:
        paths: files and folders, "-" for standard input.
        options: how files are read.
        unit: "document" (default), "paragraph" or "line": those of a document D that are not blank
            are D#1, D#2, ...
        tokenizer: what decodes token files (.bin, .npy); default None: such files are refused.

    Raises:
        InputError: a file cannot be read.
    """
    paths = [str(path) for path in paths]
    names = Counter(Path(path).name for path in paths)
    for path in paths:
        whole = path != STANDARD_INPUT and _is_text(path)
        texts = cut(_pieces(Path(path)) if whole else _documents(path, options, tokenizer), unit)
        if names[Path(path).name] == 1:
            yield from texts
            continue
        name = spelled(Path(path).name)  # shared by several files, whose paths tell them apart
        for text in texts:
            yield (
                replace(text, id=spelled(path) + text.id.removeprefix(name))
                if text.id.startswith(name)
                else text
            )


def _documents(path: str, options: ReadOptions, tokenizer) -> Iterator[Text]:
    for document in read_documents([path], options):
        if document.ids is not None and tokenizer is None:
            raise InputError(
                f"{path}: expected a text, got tokens; --tokenizer says what they stand for"
            )
        yield text_of(document, tokenizer)


def text_of(document: Document, tokenizer) -> Text:
    """Return a document as a text, its tokens decoded.

    Args:
        document: a text, or token ids.
        tokenizer: what decodes ids; None for texts.

    Raises:
        InputError: an id is beyond the tokenizer's entries.
    """
    text = document.plain_text
    if document.ids is not None:
        check_ids(document, document.ids, len(tokenizer), "the tokenizer's entries")
        text = decoded(tokenizer, document.ids, skip_special_tokens=True)
    return Text(document.id, text, document.domain)


def _pieces(path: Path) -> Iterator[Text]:
    """Yield a text file in pieces that end with a paragraph, else with a line, else with a word."""
    decoder, rest, read = codecs.getincrementaldecoder("utf-8")(), "", 0
    with opened(path) as stream:
        raw = stream.read(PIECE)
        check_encoding(str(path), raw)
        while True:
            following = stream.read(PIECE)
            try:
                rest += decoder.decode(raw, final=not following)
            except UnicodeDecodeError as error:
                offset = read + error.start - (len(error.object) - len(raw))
                raise InputError(
                    f"{path}: expected UTF-8, got byte 0x{error.object[error.start]:02x} at offset "
                    f"{offset}"
                )
            read += len(raw)
            if not following:
                break
            end = next(
                (place for mark in ("\n\n", "\n", " ") if (place := rest.rfind(mark)) > 0),
                len(rest),
            )
            yield Text(spelled(path.name), rest[:end], stem(path), last=False)
            raw, rest = following, rest[end:]
    if read == 0 or (read <= PIECE and not rest.strip()):
        raise InputError(f"{path}: expected text, got an empty file")
    yield Text(spelled(path.name), rest, stem(path))


def cut(texts: Iterable[Text], unit: str) -> Iterator[Text]:
    """Yield texts cut by ``unit``: those of a document D that are not blank are D#1, D#2, ...

    Args:
        texts: documents, whole or in pieces.
        unit: "document", "paragraph" or "line".

    Example:
        >>> [text.id for text in cut([Text("a", "one\\n\\ntwo")], "paragraph")]
        ['a#1', 'a#2']
    """
    if unit == "document":
        yield from texts
        return
    split = re.compile(BLANK).split if unit == "paragraph" else str.splitlines
    number, of = 0, None
    for text in texts:
        number = number if text.id == of else 0
        for part in split(text.text):
            if part.strip():
                number += 1
                yield Text(f"{text.id}#{number}", part, text.domain)
        of = None if text.last else text.id


def whole(texts: Iterable[Text]) -> Iterator[Text]:
    """Yield documents whose pieces are joined: validation, the small side, is held whole.

    Args:
        texts: documents and pieces of documents, in order.

    Example:
        >>> [text.text for text in whole([Text("a", "one ", last=False), Text("a", "two")])]
        ['one two']
    """
    parts: list[Text] = []
    for text in texts:
        parts.append(text)
        if text.last:
            yield (
                text
                if len(parts) == 1
                else Text(text.id, "".join(part.text for part in parts), text.domain)
            )
            parts = []
