"""The scan of training text as a step of datatrove, Hugging Face's engine for text on many machines
(Slurm, Ray) or processes.

    index = Index(valid)
    LocalPipelineExecutor([JsonlReader(folder), LeakageScan(index, "scans")], tasks=64,
    workers=8).run() scan = merged("scans", index)

Every task writes what it met to a file of its own, and a task that is done is not done again when
the executor is run anew: that is datatrove's. Any other engine can do the same: ``scan_batch`` is a
plain function, ``Scan.merge`` takes its results in any order.
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
    """Scans the documents that pass, which go on as they are; ``folder`` gets one file a task."""

    type = "STATS"
    name = "perplexity leakage"

    def __init__(self, index: Index, folder: str | Path) -> None:
        super().__init__()
        self.index, self.folder = index, Path(folder)

    def run(self, data, rank: int = 0, world_size: int = 1) -> Iterator:
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
    """What all tasks met. Raises InputError where the folder has no scan, or one of another
    index.
    """
    paths, scan = sorted(Path(folder).glob("*.json")), index.scan()
    if not paths:
        raise InputError(f"{folder}: expected scans of LeakageScan, got none")
    for path in paths:
        try:
            other = Scan.from_json(path.read_text(encoding="utf-8"))
        except ValueError:
            raise InputError(
                f"{path}: expected a scan as LeakageScan wrote it, got one that was changed; run its task again"
            )
        if len(other.seen) != len(scan.seen):
            raise InputError(f"{path}: expected a scan of this index, got one of another")
        scan.merge(other)
    return scan
