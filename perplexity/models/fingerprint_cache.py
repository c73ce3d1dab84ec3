"""A cache of models' fingerprints, by the path, size and times of their files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..errors import InputError
from ..files import write_text

# Changes when fingerprints hash something else.
FORMAT = 1
# Files younger than this are not cached: two changes within a tick of the file system's clock look
# like one.
SETTLED = 2.0  # seconds


def files_key(name: str | Path, dtype: str, revision: str | None = None) -> str | None:
    """Return a key of the files of a model folder, or of a name in Hugging Face's cache.

    The key has path, size, inode, and the times of the last change of content and of status, which
    no tool sets back. It also has the dtype and the versions of the libraries that read the files.

    Returns:
        The key; None where there is no such folder, or a file changed a moment ago.
    """
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(str(name), "config.json", revision=revision)
        if not isinstance(config, str):
            return None
        folder = Path(config).parent
    files = []
    try:
        for entry in sorted(folder.iterdir()):
            if entry.is_file():
                s = entry.stat()
                if time.time() - s.st_ctime < SETTLED:
                    return None
                files.append(
                    (entry.name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
                )
    except OSError:
        return None
    versions = [installed(package) for package in ("torch", "transformers", "peft")]
    key = json.dumps([FORMAT, str(folder.resolve()), files, dtype, versions])
    return hashlib.sha256(key.encode()).hexdigest()


def installed(package: str) -> str | None:
    """Return the version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class FingerprintCache:
    """An entry of the cache in the user's cache folder; an unusable folder is no error."""

    def __init__(self, key: str) -> None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.path = Path(base) / "fused-perplexity" / "models" / key

    def read(self) -> str | None:
        """Return the fingerprint; None where there is no entry, or the entry is damaged."""
        with suppress(OSError, UnicodeDecodeError):
            value = self.path.read_text(encoding="utf-8")
            if re.fullmatch(r"[0-9a-f]{16}", value):
                return value
        return None

    def write(self, value: str) -> None:
        """Store ``value``; readers see the whole entry or none."""
        with suppress(OSError, InputError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, value)
