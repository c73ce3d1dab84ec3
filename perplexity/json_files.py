"""JSON that the commands write and read back: RFC 8259, with a version and a command to its name.

What is written is a dataclass; what is read is checked against the same fields by pydantic, which
is imported where a file is read. ``Number`` and its kin say in a field what JSON may hold there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from .errors import InputError, needing
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
    "compare A B C": {"models", "columns"},
    "ask": {"p_yes", "p_no"},
}
REPORTED_AS = {"eval": "--eval", "check-data": "--data", "probe": "--probe"}
SHOWN = 40  # characters of a value in an error
NON_FINITE = ("inf", "-inf", "nan")  # as ``to_json`` writes them


@dataclass(frozen=True)
class JsonNumber:
    """A number of JSON from ``least`` to ``most``: never a bool, nor the text of a finite number.

    Infinity and NaN are read from their names unless ``finite`` or a bound excludes them.
    """

    least: float | None = None
    most: float | None = None
    finite: bool = False

    def __get_pydantic_core_schema__(self, source: type, handler):
        """Return pydantic's schema of the number, an int or a float by the annotated type."""
        from pydantic_core import core_schema

        bounds: Any = {"ge": self.least, "le": self.most}
        bounds = {name: bound for name, bound in bounds.items() if bound is not None}
        if source is int:
            return core_schema.int_schema(strict=True, **bounds)
        number = core_schema.float_schema(strict=True, allow_inf_nan=not self.finite, **bounds)
        return core_schema.no_info_before_validator_function(_unspelled, number)


def _unspelled(value):
    return float(value) if isinstance(value, str) and value in NON_FINITE else value


Number = Annotated[float, JsonNumber()]
Finite = Annotated[float, JsonNumber(finite=True)]
Share = Annotated[float, JsonNumber(0.0, 1.0)]
Whole = Annotated[int, JsonNumber(-(2**63), 2**63 - 1)]
Count = Annotated[int, JsonNumber(0, 2**63 - 1)]

# pydantic's kinds of errors in the words of ours; the others speak for themselves.
_EXPECTED = {
    "dataclass_type": "an object",
    "dict_type": "an object",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "string_type": "a text",
    "too_long": "fewer values",
    "tuple_type": "a list",
}


def read_as(kind: Any, value: object, expected: str) -> Any:
    """Return a value that JSON held as ``kind``; keys that ``kind`` lacks are kept in a TypedDict.

    Args:
        kind: a dataclass, a TypedDict, or a type of such.
        value: what the JSON held, as Python's dicts, lists and scalars.
        expected: how an error begins: the file, and what was expected of it.

    Raises:
        InputError: a field is missing or of another type; the first is named, and what it held.

    Example:
        >>> read_as(list[Number], [1, "inf"], "a.json: expected losses")
        [1.0, inf]
        >>> read_as(dict[str, Count], {"a": "x"}, "a.json: expected counts")
        Traceback (most recent call last):
        perplexity.errors.InputError: a.json: expected counts with a whole number for a, got 'x'
    """
    with needing("perplexity.json_files", "eval"):
        from pydantic import ValidationError
    try:
        return _reader(kind).validate_python(value, extra="allow")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in first["loc"])
    place = place.removeprefix(".") or "the whole"
    if first["type"] == "missing":
        raise InputError(f"{expected} with {place}, got none")
    what = _EXPECTED.get(first["type"], first["msg"].removeprefix("Input should be "))
    raise InputError(f"{expected} with {what} for {place}, got {first['input']!r:.{SHOWN}}")


@cache
def _reader(kind: Any):
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def schema_of(record: Mapping, source: str) -> int:
    """Return the schema version of a JSON record.

    Args:
        record: the JSON object.
        source: how an error names the record, a file or an argument.

    Raises:
        InputError: the version is no whole number from 1, or newer than this program.

    Example:
        >>> schema_of({"loss": 3.0}, "a.json")
        1
    """
    version = record.get("schema_version", 1)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise InputError(
            f"{source}: expected a whole number for schema_version, got {version!r:.{SHOWN}}"
        )
    if version > SCHEMA_VERSION:
        raise InputError(
            f"{source}: expected schema_version {SCHEMA_VERSION} at most, got {version}: "
            "a newer fused-perplexity wrote it; upgrade to read it"
        )
    return version


def model_name(model: Mapping | str | None) -> str:
    """Return the name of a result's ``model``, or its fingerprint where it has no name.

    Args:
        model: the object of schema version 2, the text of version 1, or None.

    Example:
        >>> model_name({"name": "", "fingerprint": "ab12"})
        'model ab12'
    """
    if isinstance(model, Mapping):
        return str(model.get("name") or f"model {model.get('fingerprint')}")
    return str(model or "")


def same_model(a: Mapping, b: Mapping) -> bool | None:
    """Return whether two results are of models with one fingerprint, None where one has none.

    Args:
        a: a result's JSON object.
        b: another one.

    Example:
        >>> same_model({"model": {"fingerprint": "ab"}}, {"model": {"fingerprint": "ab"}})
        True
    """
    fingerprints = [
        side["model"].get("fingerprint") if isinstance(side.get("model"), Mapping) else None
        for side in (a, b)
    ]
    return None if None in fingerprints else fingerprints[0] == fingerprints[1]


def described_result(record: Mapping) -> str | None:
    """Return which command wrote a JSON record and which option of ``ppl report`` takes it.

    Args:
        record: the JSON object.

    Returns:
        A description for an error, or None where no command writes such a record.

    Example:
        >>> described_result({"leaked_fraction": 0.0})
        'a result of ppl check-data --json, which ppl report takes as --data'
    """
    command = next((name for name, keys in KEYS_OF.items() if keys <= record.keys()), None)
    if command is None:
        return None
    takes = (
        f"ppl report takes as {REPORTED_AS[command]}"
        if command in REPORTED_AS
        else "no command reads"
    )
    if command.startswith("compare"):
        takes += ": give the results that it compares"
    return f"a result of ppl {command} --json, which {takes}"


def read_written(path: str | Path, command: str) -> dict:
    """Return the JSON object in a file that ``ppl COMMAND --json`` wrote.

    Args:
        path: the file.
        command: a key of ``KEYS_OF``.

    Raises:
        InputError: the file is no JSON object, another command's, or of a newer version.

    Example:
        >>> read_written("/dev/null", "ask")
        Traceback (most recent call last):
        perplexity.errors.InputError: /dev/null: expected a result file of ppl ask --json, got a...
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
    other = described_result(record)
    if other is not None and not KEYS_OF[command] <= record.keys():
        raise InputError(f"{expected}, got {other}")
    schema_of(record, str(path))
    return record


def parsed(text: str) -> Any:
    """Return the value of JSON text; its integers have 64 bits, since larger ones overflow a float.

    Args:
        text: the whole document.

    Raises:
        ValueError: the text is no JSON, or has a larger integer.

    Example:
        >>> parsed('{"tokens": 3}')
        {'tokens': 3}
    """
    return json.loads(text, parse_int=_integer)


def _integer(digits: str) -> int:
    value = int(digits)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"an integer beyond 64 bits, {digits[:20]}…")
    return value


def to_json(record: dict) -> str:
    """Return a JSON document of RFC 8259 with its ``schema_version``.

    Args:
        record: dicts, lists and scalars; infinite values and NaN become "inf", "-inf" and "nan".

    Example:
        >>> to_json({"loss": math.inf}).split()
        ['{', '"schema_version":', '2,', '"loss":', '"inf"', '}']
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
