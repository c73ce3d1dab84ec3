"""The scan of training text as a step of datatrove.

datatrove is Hugging Face's engine for text over many processes or machines (Slurm, Ray)::

    index = Index(valid)
    steps = [JsonlReader(folder), LeakageScan(index, "scans")]
    LocalPipelineExecutor(steps, tasks=64, workers=8).run()
    scan = merged("scans", index)

Every task writes what it met to a file of its own. datatrove skips a finished task when the
executor is run again. Any other engine can do the same: ``scan_batch`` is a plain function, and
``Scan.merge`` takes its results in any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

try:
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    raise ImportError(
        f"{__name__}: needs {error.name}; install fused-perplexity[datatrove]", name=error.name
    ) from None

from ..errors import InputError
from ..files import write_text
from .index import Index, Scan, Text, groups, scan_batch


class LeakageScan(PipelineStep):
    """A step that scans the documents that pass and hands them on as they are.

    Args:
        index: the validation side.
        folder: where each task writes one file.
    """

    type = "STATS"
    name = "perplexity leakage"

    def __init__(self, index: Index, folder: str | Path) -> None:
        super().__init__()
        self.index, self.folder = index, Path(folder)

    def run(self, data, rank: int = 0, world_size: int = 1) -> Iterator:
        """Yield the documents of task ``rank``, and write what was met in them at their end."""
        scan = self.index.scan()
        for group in groups(data):
            with self.track_time():
                texts = [
                    Text(str(one.id), one.text, str(one.metadata.get("domain", "text")))
                    for one in group
                ]
                scan.merge(scan_batch(self.index, texts))
            yield from group
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / f"{rank:05d}.json", scan.to_json())


def merged(folder: str | Path, index: Index) -> Scan:
    """Return what all tasks met in training text.

    Args:
        folder: where ``LeakageScan`` wrote.
        index: the validation side that it was given.

    Raises:
        InputError: the folder has no scan, a changed one, or one of another index.
    """
    paths, scan = sorted(Path(folder).glob("*.json")), index.scan()
    if not paths:
        raise InputError(f"{folder}: expected scans of LeakageScan, got none")
    for path in paths:
        try:
            other = Scan.from_json(path.read_text(encoding="utf-8"))
        except ValueError:
            raise InputError(
                f"{path}: expected a scan as LeakageScan wrote it, got one that was changed; run "
                "its task again"
            )
        if len(other.seen) != len(scan.seen):
            raise InputError(f"{path}: expected a scan of this index, got one of another")
        scan.merge(other)
    return scan
