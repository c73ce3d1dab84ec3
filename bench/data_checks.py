"""Time and memory of ``ppl check-data``: ``python bench/data_checks.py``.

It is run on 10, 100 and 1,000 MB of training text: lines of the standard library's sources in
random order. A tenth of a percent of the documents are copies of validation documents. The results
go to bench/results/cpu-<name>-data-checks.json. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path

from environment import RESULTS, SUPPORT, commit, cpu_name, now, slug, version, write
from monitor import peak_mib

sys.path.insert(0, str(SUPPORT))
from corpus import documentation, sources

SIZES = (10, 100, 1000)  # MB
DOCUMENT = 3000  # bytes, or a little more
LEAKED = 0.001  # share of the documents


def generate(path: Path, megabytes: int, valid: list[str]) -> int:
    """Write JSON lines of training text; return how many validation documents are among them."""
    generator, lines = random.Random(megabytes), []
    for text in sources():
        lines += [line.strip() for line in re.split(r"\n", text) if len(line) > 30]
    written, leaked = 0, set()
    with path.open("w") as file:
        while written < megabytes * 1_000_000:
            if generator.random() < LEAKED:
                text = valid[place := generator.randrange(len(valid))]
                leaked.add(place)
            else:
                text, size = [], 0
                for line in generator.choices(lines, k=DOCUMENT // 30):
                    text.append(line)
                    size += len(line)
                    if size > DOCUMENT:
                        break
                text = "\n".join(text)
            written += file.write(json.dumps({"text": text}) + "\n")
    return len(leaked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=RESULTS / f"cpu-{slug(cpu_name())}-data-checks.json"
    )
    parser.add_argument("--megabytes", type=int, nargs="+", default=SIZES)
    options = parser.parse_args()
    valid, rows = documentation(), []
    with tempfile.TemporaryDirectory() as folder:
        valid_path, out = Path(folder) / "valid.jsonl", Path(folder) / "out.json"
        valid_path.write_text("".join(json.dumps({"text": text}) + "\n" for text in valid))
        for megabytes in options.megabytes:
            path = Path(folder) / "train.jsonl"
            leaked = generate(path, megabytes, valid)
            for workers in (1, 2):
                command = ["check-data", "--train", str(path), "--valid", str(valid_path)]
                begin = time.perf_counter()
                mib = peak_mib(*command, "--workers", str(workers), "--json", str(out))
                seconds = time.perf_counter() - begin
                check, megabytes_read = json.loads(out.read_text()), path.stat().st_size / 1e6
                rows.append(
                    dict(
                        megabytes=megabytes_read,
                        workers=workers,
                        seconds=seconds,
                        megabytes_a_second=megabytes_read / seconds,
                        peak_mib=mib,
                        documents=check["documents"],
                        seeded=leaked,
                        exact_duplicates=check["exact_duplicates"],
                        near_duplicates=check["near_duplicates"],
                    )
                )
                print(rows[-1], flush=True)
    results = dict(
        device=cpu_name(),
        command="python bench/data_checks.py",
        date=now(),
        commit=commit(),
        xxhash=version("xxhash"),
        numpy=version("numpy"),
        rows=rows,
    )
    write(results, options.out)


if __name__ == "__main__":
    main()
