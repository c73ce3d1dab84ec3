"""The weights of a checkpoint: all of them read, or an error that names the missing ones."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import InputError

NAMED = 5  # most weights that a message names; it also has their number
ADAPTERS, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read_model(name: str | Path, dtype: str, options: dict):
    """Read a transformers causal model with every weight from its files.

    transformers initialises missing weights at random and says so in a warning. Such a model would
    be evaluated as if it were the checkpoint.

    Args:
        name: Folder, or name in the Hugging Face cache or on the hub.
        dtype: As in ``from_pretrained``.
        options: Further keywords of ``from_pretrained``.

    Returns:
        The model on the CPU, and notes on weights that its files hold and it does not use.

    Raises:
        InputError: Weights are missing or have another shape than the configuration asks for.
        Exception: Whatever transformers raises for files that it cannot read.
    """
    adapters = _adapters(name, options)
    if adapters is None:
        return _read(name, dtype, options)
    # ``from_pretrained`` reports on the adapters only: the weights below them are read first.
    options = dict(options)
    # The adapters' own revision, not the base's.
    own = {key: options.pop(key) for key in ("revision",) if key in options}
    with _base(name, adapters) as base:
        base_revision = (
            {}
            if Path(name).is_dir() or not adapters.get("revision")
            else {"revision": adapters["revision"]}
        )
        model, notes = _read(base, dtype, options | base_revision)
    model.config._name_or_path = str(name)
    report = model.load_adapter(str(name), dtype=model.dtype, **own)
    return model, notes + _checked("the adapters", vars(report) if report else {})


def _read(name: str | Path, dtype: str, options: dict):
    """Return a model without adapters, and the notes on its weights."""
    # Different shapes are ignored there, since transformers' own error does not name the weights.
    model, report = _class(name, options).from_pretrained(
        name,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )
    return model, _checked(type(model).__name__, report)


def _class(name: str | Path, options: dict):
    """Return the automatic class that reads a model: a causal one, or one that reads images, too.

    Raises InputError where transformers has no class for the kind of model that continues a text.
    """
    import transformers

    places = {
        key: options[key]
        for key in ("local_files_only", "trust_remote_code", "revision")
        if key in options
    }
    config = transformers.AutoConfig.from_pretrained(name, **places)
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return transformers.AutoModelForCausalLM
    classes = [transformers.AutoModelForCausalLM]
    if not getattr(config, "is_encoder_decoder", False):
        multimodal = (
            getattr(transformers, f"AutoModelFor{kind}", None)
            for kind in ("ImageTextToText", "MultimodalLM")
        )
        classes += [auto for auto in multimodal if auto is not None]
    mapped: dict[Any, Any] = {auto: auto._model_mapping.get(type(config), None) for auto in classes}
    readers = {
        auto: model if isinstance(model, tuple) else (model,)
        for auto, model in mapped.items()
        if model
    }
    named = config.architectures or [type(config).__name__]
    # Where several classes read the checkpoint, take the class that wrote it: the weights have its
    # names.
    for auto, models in readers.items():
        if any(model.__name__ in named for model in models):
            return auto
    if readers:
        return next(iter(readers))
    raise InputError(
        f"expected a causal language model, got {', '.join(named)} (model_type "
        f"{config.model_type!r}), for which transformers has no class that reads a text from left "
        "to right: take a decoder-only model"
    )


def _checked(architecture: str, report: dict) -> list[str]:
    """Return notes on unexpected weights; raise InputError for missing or mis-shaped ones.

    ``report`` is transformers' loading info. Weights that the configuration ties to others, and
    those that the architecture derives, are not in it.
    """
    wrong = []
    if missing := report.get("missing_keys"):
        wrong.append(f"{_named(missing)} missing")
    if mismatched := report.get("mismatched_keys"):
        shapes = (
            f"{key} {list(shape)} instead of {list(expected)}"
            for key, shape, expected in sorted(mismatched, key=str)
        )
        wrong.append(f"{_named(list(shapes))} of another shape")
    wrong += list(report.get("error_msgs") or ())
    if wrong:
        raise InputError(
            f"expected every weight of {architecture} in the checkpoint, got {'; '.join(wrong)}: "
            "transformers would fill these weights with random values"
        )
    unexpected = report.get("unexpected_keys")
    if not unexpected:
        return []
    return [
        f"the checkpoint holds {_named(unexpected)} that {architecture} does not use under its "
        "config.json: check that the two belong together"
    ]


def _named(keys: Collection[str]) -> str:
    """Return the number of ``keys`` and the first few, as in "2 weights (a, b)"."""
    first = ", ".join(sorted(keys)[:NAMED])
    more = f", and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return f"{len(keys)} weight{'' if len(keys) == 1 else 's'} ({first}{more})"


def _adapters(name: str | Path, options: dict) -> dict | None:
    """Return the configuration of PEFT's adapters at ``name``; None where there are none."""
    folder = Path(name)
    if find_spec("peft") is None:
        if (folder / ADAPTERS).is_file():
            raise InputError(
                f"expected peft to be installed, which reads the adapters of {ADAPTERS}, got none"
            )
        return None
    from transformers.utils import find_adapter_config_file

    only = {
        "local_files_only": options.get("local_files_only", False),
        "revision": options.get("revision"),
    }
    file = find_adapter_config_file(str(name), **only)
    if file is None:
        return None
    if folder.is_dir() and not (folder / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"expected the adapters' weights in {ADAPTER_WEIGHTS}, got no such file")
    return json.loads(Path(file).read_text(encoding="utf-8"))


@contextmanager
def _base(name: str | Path, adapters: dict) -> Iterator[str | Path]:
    """Yield a folder or name of the model below the adapters.

    A folder that holds both is shown without its adapters, through links: ``from_pretrained``
    would load them, too.
    """
    if not Path(name).is_dir():
        yield adapters["base_model_name_or_path"]
        return
    with tempfile.TemporaryDirectory() as bare:
        for entry in Path(name).iterdir():
            if not entry.name.startswith("adapter_"):
                os.symlink(entry.resolve(), Path(bare) / entry.name)
        yield bare
