"""Readers of documents: text, JSON, CSV, Parquet, datasets folders, token files, standard input.

Text, JSON and CSV may be compressed. A folder stands for the files in it.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import heapq
import io
import json
import operator
import os
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .. import checks
from ..errors import InputError, check_encoding, check_unicode, each_of_theirs, spelled, theirs
from ..files import STANDARD_INPUT, other_than_file
from .documents import Document, merged_spans

LLM_C_MAGIC = 20240520  # the first of 256 int32 before the tokens of an llm.c file
LLM_C_32_BITS = 7  # the second of them, the version, in files with uint32 tokens
PIECE = 1 << 18  # bytes that are decompressed at a time
# A compressed file is refused if it unpacks to more than both. Text is compressed to a third, logs
# of equal lines to a fiftieth.
UNPACKED = 1 << 30  # bytes
RATIO = 100  # times the file's size


# The parts of a row that can be scored.
SCORES = ("auto", "all", "spans", "completion", "assistant")
_COLUMNS = tuple(
    f"{name}_column"
    for name in ("text", "domain", "id", "prompt", "completion", "messages", "spans")
)


@dataclass(frozen=True)
class ReadOptions:
    """Options for what a file's format does not say.

    Args:
        text_column: Name of the text's column in JSON lines, Parquet and datasets folders.
            Default: "text".
        domain_column: Name of the domain's column. Without the column, the domain is the file's
            stem.
        id_column: Name of the id's column. Without the column, the id is the position.
        split: Split of a datasets folder that has several. Default: None.
        token_dtype: Dtype of .bin files. Default: "uint16".
        split_before: Token that starts a document in .bin and .npy files. Default: None.
        split_after: Token that ends a document in .bin and .npy files. Default: None.
        standard_input: Format of standard input, "txt" (default) or "jsonl".
        score: Part of a row that is scored. "auto" (default): the spans of the text where the row
            has some, else the whole text; without a text the completion after its prompt, else the
            assistant's turns of the messages. "all": the text, or prompt and completion as one.
            "spans", "completion" and "assistant" read these columns alone.
        prompt_column: Name of the column with the context of a completion. Default: "prompt".
        completion_column: Name of the column with the completion. Default: "completion".
        messages_column: Name of the column with a conversation. Default: "messages".
        spans_column: Name of the column with the spans of the text, pairs [begin, end) of
            characters. Default: "spans".
        limit: Number of documents to read, the first ones. Default: None, all.
        sample: Number of documents to choose by the hashes of their contents, which gives the same
            documents in any order of the files. They come in the order of the files, and are held
            in memory. Default: None, all.
    """

    text_column: str = "text"
    domain_column: str = "domain"
    id_column: str = "id"
    split: str | None = None
    token_dtype: str = "uint16"
    split_before: int | None = None
    split_after: int | None = None
    standard_input: str = "txt"
    score: str = "auto"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    messages_column: str = "messages"
    spans_column: str = "spans"
    limit: int | None = None
    sample: int | None = None

    def __post_init__(self) -> None:
        for name in (*_COLUMNS, "token_dtype"):
            checks.text(name, getattr(self, name))
        checks.choice("score", self.score, SCORES)
        for name in ("limit", "sample"):
            checks.optional(checks.integer, name, getattr(self, name), "a whole number", 1)
        if self.limit is not None and self.sample is not None:
            raise InputError(
                f"limit: expected one of limit and sample, got {self.limit} and {self.sample}"
            )
        checks.optional(checks.text, "split", self.split)
        for name in ("split_before", "split_after"):
            checks.optional(checks.integer, name, getattr(self, name), "a token id or None", 0)
        checks.choice("standard_input", self.standard_input, ("txt", "jsonl"))


def read_documents(
    paths: Iterable[str | Path], options: ReadOptions | None = None
) -> Iterator[Document]:
    """Yield the documents of ``paths``, in order.

    Args:
        paths: Names of files; "-" is standard input. The suffix decides the format (``FORMATS``).
        options: Options of the formats. Default: None, ``ReadOptions()``.

    Raises:
        InputError: A file is missing, empty, truncated or not UTF-8; the message names it, and the
            line, row or byte.
    """
    checks.several("paths", paths, "them")
    checks.optional(checks.instance, "options", options, ReadOptions, "ReadOptions or None")
    options = options or ReadOptions()
    documents = _read(paths, options)
    if options.sample is not None:
        return _sample(documents, options.sample)
    return islice(documents, options.limit)


def _sample(documents: Iterable[Document], count: int) -> Iterator[Document]:
    """Yield the ``count`` documents with the smallest hashes, in order."""
    kept = heapq.nsmallest(
        count, enumerate(documents), key=lambda each: (_hash_of(each[1]), each[0])
    )
    yield from (document for _, document in sorted(kept, key=operator.itemgetter(0)))


def _hash_of(document: Document) -> bytes:
    """Return a hash of what a document holds, whatever its name and place."""
    ids = b"" if document.ids is None else np.asarray(document.ids).astype(np.int64).tobytes()
    content = repr((document.text, document.spans, document.messages)).encode()
    return hashlib.sha256(content + ids).digest()


def _read(paths: Iterable[str | Path], options: ReadOptions) -> Iterator[Document]:
    """Yield the documents of checked arguments."""
    for name in paths:
        if str(name) == STANDARD_INPUT:
            read = _read_text if options.standard_input == "txt" else _read_json_lines
            with standard_input() as stream:
                yield from read(stream, Path("stdin"), options)
            continue
        path = Path(name)
        if path.is_dir():
            if any((path / name).is_file() for name in _DATASETS_FILES):
                yield from _read_datasets_folder(path, options)
            else:
                yield from _read(_files_in(path), options)
            continue
        if (other := other_than_file(path)) is not None:
            raise InputError(f"{path}: expected a text file, got {other}{_check(path, other)}")
        suffix, read = _format(path)
        if suffix in _FILES:
            yield from read(path, options)
            continue
        with opened(path) as stream:
            yield from read(stream, path, options)


def _files_in(folder: Path) -> list[Path]:
    """Return the files in a folder and its folders that can be read, in order of their names."""
    # .json files of a folder are often settings, .npy and .bin files weights.
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and _known(path)
        and _format(path)[0] not in (".json", ".bin", ".npy")
    ]
    if not files:
        raise InputError(
            f"{folder}: expected a folder written by datasets' save_to_disk, or one with "
            f".txt, .jsonl, .csv, .tsv or .parquet files, got {_instead(folder)}"
        )
    return files


def _instead(folder: Path) -> str:
    """Return what a folder without files that can be read holds, and what to do."""
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file()]
    if not names:
        return "one without files"
    return (
        f"one with {', '.join(names[:3])}{', ...' * (len(names) > 3)}; give texts the ending .txt"
    )


def _check(path: Path, other: str) -> str:
    """Return advice on a file that is missing: the most similar name beside it, where one is."""
    if other != "no such file":
        return ""
    try:
        close = get_close_matches(path.name, os.listdir(path.parent), 1)
    except OSError:
        return "; check the path"
    return f"; did you mean {path.with_name(close[0])}?" if close else "; check the path"


def _known(path: Path) -> bool:
    """Return whether the name of a file is one of a format that can be read."""
    try:
        _format(path)
    except InputError:
        return False
    return True


@contextmanager
def standard_input() -> Iterator[io.BufferedIOBase]:
    """Yield the stream of standard input; raise InputError where it is closed or unreadable."""
    if sys.stdin is None:
        raise InputError("-: expected standard input, got it closed")
    try:
        # A BufferedReader, which typeshed calls BinaryIO.
        yield sys.stdin.buffer  # type: ignore[misc]
    except OSError as error:
        raise _unreadable("-", error) from error


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """Yield the stream of a file, decompressed where its name ends in .gz or .zst.

    Raises InputError where the compressed data is not whole.
    """
    with _open(path) as stream:
        try:
            yield stream
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(
                f"{path}: expected a whole {path.suffix} file, got a broken or truncated one "
                f"({error})"
            )
        except OSError as error:
            if path.suffix == ".zst":
                raise InputError(
                    f"{path}: expected a whole .zst file, got a broken or truncated one ({error})"
                )
            raise _unreadable(str(path), error) from error


def _unreadable(name: str, error: OSError) -> InputError:
    """Return the error of a failed read; the system's own error names no file."""
    return InputError(f"{name}: cannot be read ({error.strerror or error})")


def _format(path: Path) -> tuple[str, Callable]:
    """Return a file's suffix and the reader of its format."""
    suffixes = path.suffixes
    if (
        suffixes
        and suffixes[-1] in (".gz", ".zst")
        and len(suffixes) > 1
        and suffixes[-2] in _STREAMS
    ):
        return suffixes[-2], _STREAMS[suffixes[-2]]
    last = path.suffix
    if last in FORMATS:
        return last, FORMATS[last]
    raise InputError(
        f"{path}: expected a name that ends in {', '.join(FORMATS)} ({', '.join(_STREAMS)} also "
        f"with .gz or .zst), got {last or 'no suffix'!r}"
    )


def _open(path: Path) -> io.BufferedIOBase:
    """Return the stream of a file, decompressed by its suffix."""
    if path.suffix == ".gz":
        return io.BufferedReader(_Unpacked(gzip.open(path, "rb"), path), PIECE)
    if path.suffix == ".zst":
        return io.BufferedReader(
            _Unpacked(_pyarrow(path).CompressedInputStream(_arrow_file(path), "zstd"), path), PIECE
        )
    return path.open("rb")


def _arrow_file(path: Path):
    """Return Arrow's file of any name: Arrow takes a str as UTF-8 only."""
    return _pyarrow(path).OSFile(os.fsencode(path))


class _Unpacked(io.RawIOBase):
    """Stream of a compressed file's content, limited by the file's size.

    A decompression bomb would fill the memory.
    """

    def __init__(self, stream, path: Path) -> None:
        self.stream, self.path, self.count = stream, path, 0
        self.most = max(UNPACKED, RATIO * path.stat().st_size)

    def readable(self) -> bool:
        """Return True, as streams that are read do."""
        return True

    def readinto(self, buffer) -> int:
        """Read bytes into ``buffer`` and return their number."""
        count = self.stream.readinto(buffer)
        self.count += count
        if self.count > self.most:
            raise InputError(
                f"{self.path}: expected text, got a file that unpacks to more than "
                f"{self.most >> 20:,} MiB, {RATIO} times its size or more; unpack it to read it"
            )
        return count

    def close(self) -> None:
        """Close the stream."""
        self.stream.close()
        super().close()


def _pyarrow(path: Path):
    """Return pyarrow; raise InputError, naming the extra, where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: needs pyarrow; install fused-perplexity[eval]")
    return pyarrow


def decoded(raw: bytes, where: str, offset: int = 0) -> str:
    """Return the text of UTF-8 bytes; raise InputError with the offset of the first wrong byte."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: expected UTF-8, got byte 0x{error.object[error.start]:02x} at offset "
            f"{offset + error.start}"
        )


def _read_text(stream: io.BufferedIOBase, path: Path, options: ReadOptions) -> Iterator[Document]:
    """Yield a text file as one document."""
    # Line endings are not translated: the text in the file is scored.
    raw = stream.read()
    check_encoding(str(path), raw)
    text = decoded(raw, str(path))
    if not text.strip():
        raise InputError(f"{path}: expected text, got an empty file")
    yield Document(spelled(path.name), text, stem(path))


def _read_json_lines(
    stream: io.BufferedIOBase, path: Path, options: ReadOptions
) -> Iterator[Document]:
    """Yield a document for each line."""
    for number, where, record in json_lines(stream, path, options.text_column):
        yield _row(record, path, number, where, options)


def json_lines(
    stream: io.BufferedIOBase, path: Path, needs: str
) -> Iterator[tuple[int, str, dict]]:
    """Yield each line's number, place for messages and object.

    ``needs`` is the column that an error names.
    """
    # Lines end in "\n" only: JSON strings may hold U+2028 and similar characters unescaped.
    empty = True
    for number, raw in enumerate(stream, 1):
        where = f"{path}, line {number}"
        if number == 1:
            check_encoding(where, raw)
        line = decoded(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw, where)
        if not line.strip():
            continue
        empty = False
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # also for long numbers and deep brackets
            raise InputError(f"{where}: expected a JSON object, got broken JSON ({error})")
        if not isinstance(record, dict):
            raise InputError(
                f"{where}: expected an object with a string {needs!r}, got {line[:60]!r}"
            )
        yield number, where, record
    if empty:
        raise InputError(f"{path}: expected text, got an empty file")


def text_in(record: dict, column: str, where: str) -> str:
    """Return the text in a column of a row; raise InputError where there is none."""
    text = record.get(column)
    if not isinstance(text, str):
        names = ", ".join(repr(name) for name in record) or "no column"
        got = type(text).__name__ if column in record else f"only {names}"
        raise InputError(f"{where}: expected a string {column!r}, got {got[:200]}")
    check_unicode(where, text)  # JSON's \ud800: half of a pair
    return text


def document_of(record: Mapping[str, Any], index: int, options: ReadOptions) -> Document:
    """Return the document of a row of a data set.

    Args:
        record: The row, its columns by name.
        index: Position of the row, which is the id without a column for it.
        options: Names of the columns, and the part that is scored.

    Raises:
        InputError: A column is missing or of another type.

    Example:
        >>> row = {"prompt": "the cat", "completion": " sat"}
        >>> document = document_of(row, 0, ReadOptions())
        >>> document.text, document.spans
        ('the cat sat', [(7, 11)])
    """
    document = _row(dict(record), Path("text"), index, f"document {index}", options)
    return (
        document if record.get(options.id_column) is not None else replace(document, id=str(index))
    )


def _row(record: dict, path: Path, number: int, where: str, options: ReadOptions) -> Document:
    """Return the document of a row."""
    text, spans, messages = _content(record, where, options)
    identity, domain = record.get(options.id_column), record.get(options.domain_column)
    for column, name in ((options.id_column, identity), (options.domain_column, domain)):
        if name is not None:
            check_unicode(f"{where}, column {column!r}", str(name))
    return Document(
        f"{spelled(path.name)}:{number}" if identity is None else str(identity),
        text,
        stem(path) if domain is None else str(domain),
        spans=spans,
        messages=messages,
    )


def _content(
    record: dict, where: str, options: ReadOptions
) -> tuple[str, Sequence[tuple[int, int]] | None, list | None]:
    """Return the text of a row, the spans of it that are scored, and its messages."""
    kind = _kind(record, where, options)
    if kind == "assistant":
        messages = _listed(record[options.messages_column])
        if not isinstance(messages, list):
            raise InputError(
                f"{where}: expected a list {options.messages_column!r}, "
                f"got {type(messages).__name__}"
            )
        for message in messages:
            check_unicode(where, str(message))
        return "", None, messages
    if kind == "completion":
        prompt, completion = (
            text_in(record, column, where)
            for column in (options.prompt_column, options.completion_column)
        )
        whole = len(prompt) + len(completion)
        spans = None if options.score == "all" else [(len(prompt), whole)]
        return prompt + completion, spans, None
    text = text_in(record, options.text_column, where)
    given = None if options.score == "all" else _listed(record.get(options.spans_column))
    if given is None:
        if options.score == "spans":
            raise InputError(f"{where}: expected spans in {options.spans_column!r}, got none")
        return text, None, None
    if not isinstance(given, list):
        raise InputError(
            f"{where}: expected a list of [begin, end) {options.spans_column!r}, "
            f"got {type(given).__name__}"
        )
    merged_spans(where, given, len(text))
    return text, given, None


def _kind(columns: Collection[str], where: str, options: ReadOptions) -> str:
    """Return what is read of a row with these columns: "text", "completion" or "assistant".

    Raises:
        InputError: None of these is there.
    """
    pair = {options.prompt_column, options.completion_column}
    if options.score in ("auto", "all") and options.text_column not in columns:
        if pair <= set(columns):
            return "completion"
        if options.messages_column in columns and options.score == "auto":
            return "assistant"
    kind = options.score if options.score in ("completion", "assistant") else "text"
    needed = {
        "text": [options.text_column],
        "completion": sorted(pair),
        "assistant": [options.messages_column],
    }
    if missing := [name for name in needed[kind] if name not in columns]:
        if isinstance(columns, Mapping):  # of a row, whose columns are its own
            names = ", ".join(repr(name) for name in columns)
            expected, got = "string", f"only {names}" if names else "no column"
        else:
            expected, got = "column", ", ".join(columns) or "none"
        expected = f"{where}: expected a {expected} {missing[0]!r}"
        raise InputError(f"{expected}, got {got:.200}{_advice(kind)}")
    return kind


def _advice(kind: str) -> str:
    """Return which option names a column that is not there."""
    option = {"text": "text", "completion": "prompt", "assistant": "messages"}[kind]
    more = " and --completion-column" if kind == "completion" else ""
    return f"; --{option}-column{more} NAME says which one it is"


def _read_json(stream: io.BufferedIOBase, path: Path, options: ReadOptions) -> Iterator[Document]:
    """Yield a document for each item of a JSON list, an object or a text."""
    raw = stream.read()
    check_encoding(str(path), raw)
    try:
        content = json.loads(decoded(raw.removeprefix(b"\xef\xbb\xbf"), str(path)))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: expected a JSON list, got broken JSON ({error}); name a file with an object "
            "a line .jsonl"
        )
    if isinstance(content, dict):  # {"data": [...]}
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else content
    if not isinstance(content, list):
        raise InputError(
            f"{path}: expected a JSON list of objects or texts, got {type(content).__name__}"
        )
    for number, item in enumerate(content, 1):
        where = f"{path}, item {number}"
        record = {options.text_column: item} if isinstance(item, str) else item
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected an object or a text, got {type(item).__name__}")
        yield _row(record, path, number, where, options)
    if not content:
        raise InputError(f"{path}: expected text, got an empty list")


def _read_table(stream: io.BufferedIOBase, path: Path, options: ReadOptions) -> Iterator[Document]:
    """Yield a document for each row of a CSV or TSV file, whose first row names the columns."""
    csv.field_size_limit(1 << 30)  # a cell holds a document
    tabs = ".tsv" in path.suffixes
    # typeshed's protocol has more attributes than a decompressor.
    lines = io.TextIOWrapper(stream, "utf-8-sig", newline="")  # type: ignore[type-var]
    rows = csv.reader(lines, delimiter="\t" if tabs else ",", strict=True)
    header: list[str] | None = None
    number = 0
    while True:
        where = f"{path}, line {rows.line_num + 1}"
        try:
            row = next(rows, None)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise InputError(f"{where} or later: expected UTF-8, got byte 0x{byte:02x}")
        except csv.Error as error:
            raise InputError(f"{where}: expected rows of cells, got a broken row ({error})")
        if row is None:
            break
        if not row:
            continue
        if header is None:
            header = row
            if twice := sorted({name for name in header if header.count(name) > 1}):
                raise InputError(
                    f"{path}: expected one column of a name, got {', '.join(twice)} more than once"
                )
            _kind(header, str(path), options)
            continue
        number += 1
        if len(row) != len(header):
            raise InputError(f"{where}: expected {len(header)} cells, got {len(row)}")
        # An empty cell is no id, no domain and no list, but it may be a prompt.
        texts = (options.text_column, options.prompt_column, options.completion_column)
        record = {
            name: cell for name, cell in zip(header, row, strict=True) if cell or name in texts
        }
        yield _row(record, path, number, where, options)
    lines.detach()
    if not number:
        raise InputError(f"{path}: expected text, got no rows")


def _listed(value: Any) -> Any:
    """Return the list that a cell of a CSV file spells as JSON; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def stem(path: Path) -> str:
    """Return a file's name before its suffixes: wiki.test.jsonl.gz gives wiki.test."""
    name = spelled(path.name)
    for suffix in (".gz", ".zst"):
        name = name.removesuffix(suffix)
    return Path(name).stem


def _read_parquet(path: Path, options: ReadOptions) -> Iterator[Document]:
    """Yield a document for each row of a Parquet file."""
    pyarrow = _pyarrow(path)
    whole = f"{path}: expected a whole Parquet file, got a broken or truncated one"
    # Arrow raises errors of many kinds, and so does the conversion of a cell: text that is not
    # UTF-8, a date out of range.
    with theirs(whole):
        source = _arrow_file(path)
        file = pyarrow.parquet.ParquetFile(source)
    with source, file:
        with theirs(whole):
            names = file.schema_arrow.names
        if {"document", "position", "nll"} <= set(names):
            raise InputError(
                f"{path}: expected documents, got a row a token, as ppl eval --per-token writes"
            )
        _kind(names, str(path), options)
        wanted = dict.fromkeys(getattr(options, column) for column in _COLUMNS)
        columns = [name for name in wanted if name in names]
        if twice := [name for name in columns if names.count(name) > 1]:
            raise InputError(
                f"{path}: expected one column of a name, got {', '.join(twice)} more than once"
            )
        number = 0
        for batch in each_of_theirs(whole, file.iter_batches(batch_size=1024, columns=columns)):
            _check_column_texts(batch, path, number)
            with theirs(whole):
                records = batch.to_pylist()
            for record in records:
                number += 1
                yield _row(record, path, number, f"{path}, row {number}", options)
        if not number:
            raise InputError(f"{path}: expected text, got no rows")


def _check_column_texts(batch, path: Path, before: int) -> None:
    """Raise InputError, naming the row, where a text of the batch is not UTF-8.

    ``before`` is the number of rows before the batch.
    """
    import pyarrow

    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
            continue
        try:
            column.validate(full=True)
        except pyarrow.ArrowInvalid:
            for row, raw in enumerate(column.cast(pyarrow.large_binary()).to_pylist(), before + 1):
                decoded(raw or b"", f"{path}, row {row}, column {name!r}")


def _read_datasets_folder(path: Path, options: ReadOptions) -> Iterator[Document]:
    """Yield a document for each row of a folder that datasets' save_to_disk wrote."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"{path}: needs datasets; install it beside fused-perplexity[eval]")
    broken = f"{path}: expected a datasets folder, got one that cannot be read"
    # FileNotFoundError, ArrowInvalid, or KeyError for its own metadata.
    with theirs(broken):
        loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        if options.split not in loaded:
            raise InputError(
                f"split: expected one of {', '.join(loaded)} of {path}, got {options.split}"
            )
        loaded = loaded[options.split]
    _kind(loaded.column_names, str(path), options)
    if not len(loaded):
        raise InputError(f"{path}: expected text, got no rows")
    for number, record in enumerate(each_of_theirs(broken, loaded), 1):
        yield _row(record, path, number, f"{path}, row {number}", options)


def _read_token_file(path: Path, options: ReadOptions) -> Iterator[Document]:
    """Yield the documents of a file of tokens."""
    if path.suffix == ".npy":
        # Not np.load, which also opens other formats under this name: .npz archives, pickles.
        with theirs(
            f"{path}: expected a whole .npy file, got a broken or truncated one, or another format"
        ):
            tokens: np.ndarray = np.lib.format.open_memmap(path, mode="r")
        if tokens.dtype.kind not in "iu" or tokens.ndim not in (1, 2):
            raise InputError(
                f"{path}: expected integers [tokens] or [documents, tokens], "
                f"got {tokens.dtype} {list(tokens.shape)}"
            )
    else:
        tokens = _memory_map(path, options.token_dtype)
    if not tokens.size:
        raise InputError(f"{path}: expected tokens, got an empty file")
    number = 0
    for row in tokens if tokens.ndim == 2 else [tokens]:
        for piece in _split(row, options.split_before, options.split_after):
            number += 1
            yield Document(f"{spelled(path.name)}:{number}", "", stem(path), piece)


def _memory_map(path: Path, token_dtype: str) -> np.ndarray:
    """Return the tokens of a .bin file, which may have llm.c's header."""
    size, header, begin = path.stat().st_size, np.fromfile(path, "<i4", 3), 0
    if len(header) == 3 and header[0] == LLM_C_MAGIC:
        begin, token_dtype = 1024, "uint32" if header[1] == LLM_C_32_BITS else "uint16"
    dtype = np.dtype(token_dtype).newbyteorder("<")
    if (size - begin) % dtype.itemsize or (
        begin and size - begin != int(header[2]) * dtype.itemsize
    ):
        raise InputError(
            f"{path}: expected whole {token_dtype} tokens, got {size} bytes: truncated, "
            "or another token dtype"
        )
    tokens = np.memmap(path, dtype, "r", offset=begin) if size > begin else np.empty(0, dtype)
    odd = tokens[1:100_001:2]
    if dtype.itemsize == 2 and len(odd) >= 8 and not odd.any():
        raise InputError(
            f"{path}: every second uint16 is 0: these are uint32 tokens (--token-dtype uint32)"
        )
    return tokens


def _split(tokens: np.ndarray, before: int | None, after: int | None) -> Iterator[np.ndarray]:
    """Yield slices of ``tokens`` that start at ``before`` or end with ``after``.

    Without either, all tokens are one slice.
    """
    begin, span = 0, 1 << 24  # tokens at a time: a memory map may be larger than memory
    for offset in range(0, len(tokens), span):
        piece = tokens[offset : offset + span]
        cuts = []
        if before is not None:
            cuts.append(np.flatnonzero(piece == before) + offset)
        if after is not None:
            cuts.append(np.flatnonzero(piece == after) + offset + 1)
        for cut in np.unique(np.concatenate(cuts)).tolist() if cuts else []:
            if begin < cut < len(tokens):
                yield tokens[begin:cut]
                begin = cut
    yield tokens[begin:]


_DATASETS_FILES = ("dataset_info.json", "dataset_dict.json")
_STREAMS = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
}
_FILES = {".parquet": _read_parquet, ".bin": _read_token_file, ".npy": _read_token_file}
FORMATS = _STREAMS | _FILES
