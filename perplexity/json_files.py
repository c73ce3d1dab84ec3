"""JSON that the commands write and read back: RFC 8259, with a version, and which command wrote
it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from .errors import InputError
from .files import other_than_file

# Of every JSON that is written. 2: ``model`` is an object, fingerprints are of whole weights, bytes
# and words are those of the scored text. Files without the key are version 1.
SCHEMA_VERSION = 2
# What only one command's --json has, and where ``ppl report`` takes the file.
KEYS_OF = {
    "eval": {"loss", "per_document"},
    "check-data": {"leaked_fraction"},
    "probe": {"generation", "health_score"},
    "monitor": {"health_score", "best_val_step"},
    "compare": {"model_a", "model_b"},
    "ask": {"p_yes", "p_no"},
}
REPORTED_AS = {"eval": "--eval", "check-data": "--data", "probe": "--probe"}


def schema_of(record: Mapping, source: str) -> int:
    """Return the version of a JSON that was read from ``source``; InputError where it is newer than
    this program.
    """
    found = record.get("schema_version", 1)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise InputError(f"{source}: expected a whole number for schema_version, got {found!r:.40}")
    if found > SCHEMA_VERSION:
        raise InputError(
            f"{source}: expected schema_version {SCHEMA_VERSION} at most, got {found}: a newer fused-perplexity wrote it; "
            "upgrade to read it"
        )
    return found


def model_name(model: Mapping | str | None) -> str:
    """Return the name in a result's ``model``, which version 1 has as a text; its fingerprint where
    it has none.
    """
    if isinstance(model, Mapping):
        return str(model.get("name") or f"model {model.get('fingerprint')}")
    return str(model or "")


def same_model(a: Mapping, b: Mapping) -> bool | None:
    """Return whether two results are of models with one fingerprint; None where one does not
    say.
    """
    known = [
        side["model"].get("fingerprint") if isinstance(side.get("model"), Mapping) else None
        for side in (a, b)
    ]
    return None if None in known else known[0] == known[1]


def described_result(record: Mapping) -> str | None:
    """Return which command wrote a JSON, and where a report takes it; None where it is of no
    command.
    """
    command = next((name for name, keys in KEYS_OF.items() if keys <= record.keys()), None)
    if command is None:
        return None
    takes = (
        f"ppl report takes as {REPORTED_AS[command]}"
        if command in REPORTED_AS
        else "no command reads"
    )
    return f"a result of ppl {command} --json, which {takes}"


def read_written(path: str | Path, command: str) -> dict:
    """Return what ``ppl COMMAND --json`` wrote; InputError where the file is none, or another
    command's.
    """
    expected = f"{path}: expected a result file of ppl {command} --json"
    if (other := other_than_file(path)) in ("a device", "a disk"):  # has no end; a pipe has one
        raise InputError(f"{expected}, got {other}")
    try:
        raw = Path(path).read_bytes()
        record = parsed(raw.decode("utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{expected}, got no such file")
    except IsADirectoryError:
        hint = "; two models need TEXT to compare on" if command == "eval" else ""
        raise InputError(f"{expected}, got a folder{hint}")
    except OSError as error:
        raise InputError(f"{expected}, got one that cannot be read ({error.strerror})")
    except (ValueError, RecursionError) as error:  # JSON's own errors and Unicode's are ValueErrors
        table = raw.startswith(b"PAR1")
        got = (
            "a Parquet table; --json writes the numbers"
            if table
            else f"one that is not JSON ({error})"
        )
        raise InputError(f"{expected}, got {got}")
    if not isinstance(record, dict):
        raise InputError(f"{expected}, got no object")
    found = described_result(record)
    if found is not None and not KEYS_OF[command] <= record.keys():
        raise InputError(f"{expected}, got {found}")
    schema_of(record, str(path))
    return record


def parsed(text: str):
    """Return what JSON text holds; ValueError for an integer beyond 64 bits, which overflows a
    float further on.
    """
    return json.loads(text, parse_int=_integer)


def _integer(digits: str) -> int:
    value = int(digits)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"an integer beyond 64 bits, {digits[:20]}…")
    return value


def to_json(record: dict) -> str:
    """Return a JSON document of RFC 8259, which has no infinity ("inf" and "nan" are strings), with
    its ``schema_version``.
    """
    return json.dumps(
        {"schema_version": SCHEMA_VERSION} | _finite(record), indent=1, allow_nan=False
    )


def _finite(value):
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
