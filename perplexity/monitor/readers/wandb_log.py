"""Weights & Biases offline runs: protocol buffers in LevelDB's log format."""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from ...errors import InputError, theirs
from ..names import Names
from .cells import Log, Rows


def read_wandb(path: Path, names: Names) -> tuple[str, Log]:
    """Read an offline run.

    Args:
        path: The ``.wandb`` file.
        names: What is read.

    Returns:
        The run's id (its file's name says it) and its log.

    Raises:
        InputError: wandb is absent, or the file is no run of it.
    """
    try:
        from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # protobuf makes it at run time
    except ImportError:
        raise InputError(f"{path}: needs wandb; install it beside fused-perplexity[monitor]")
    log = Log(where="row")
    rows = Rows(names)
    for data in _wandb_records(path, log):
        record = Record()
        with theirs(f"{path}: expected W&B's records, got one that cannot be read"):
            record.ParseFromString(data)
        if record.WhichOneof("record_type") != "history":
            continue
        values = {
            ".".join(item.nested_key) or item.key: _json_number(item.value_json, path)
            for item in record.history.item
        }
        values.setdefault("_step", float(record.history.step.num))
        rows.add(values, len(rows.lines) + 1)
    log.tables.append(rows.table())
    return path.stem.removeprefix("run-"), log


def _json_number(value: str, path: Path):
    """W&B writes what JSON has not as strings."""
    with theirs(f"{path}: expected JSON values, got {value!r:.60}"):
        number = json.loads(value)
    return (
        {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}.get(number, number)
        if isinstance(number, str)
        else number
    )


LOG_BLOCK, LOG_HEADER = 32_768, 7  # bytes; a record's header: checksum (4), length (2), kind (1)
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def _wandb_records(path: Path, log: Log) -> Iterator[bytes]:
    """Records of the log (leveldb/doc/log_format.md); a cut-off end is noted and left out."""
    raw = path.read_bytes()
    if raw[:4] != b":W&B":
        raise InputError(f"{path}: expected a W&B run, got another file")
    place = LOG_HEADER
    parts: list[bytes] = []
    while place + LOG_HEADER <= len(raw):
        left = LOG_BLOCK - place % LOG_BLOCK
        if left < LOG_HEADER:  # too little for a header: zeros up to the next block
            place += left
            continue
        checksum, length, kind = struct.unpack("<IHB", raw[place : place + LOG_HEADER])
        data = raw[place + LOG_HEADER : place + LOG_HEADER + length]
        if (
            len(data) < length
            or kind not in (WHOLE, FIRST, MIDDLE, LAST)
            or zlib.crc32(data, zlib.crc32(bytes([kind]))) != checksum
        ):
            break
        place += LOG_HEADER + length
        parts = [data] if kind in (WHOLE, FIRST) else [*parts, data]
        if kind in (WHOLE, LAST):
            yield b"".join(parts)
    if place < len(raw):
        log.say("the last record has no end (being written, or cut off) and is left out")
