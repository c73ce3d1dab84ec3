"""Table of the GPU results in docs/performance.md: ``python bench/gpu_report.py``.

It is made from every file of ``make bench-gpu`` in bench/results/. It says where the device code
has changed since the measurement, so run it after a change of device code.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from environment import HERE, RESULTS

from perplexity.kernels.fingerprint import kernels_hash

BEGIN, END = "<!-- make bench-gpu: begin -->", "<!-- make bench-gpu: end -->"
PROVIDERS = ("ours", "ours_fused", "torch", "torch_compile", "torch_linear", "liger", "cce")
TITLES = {
    "linear_nll_forward": "NLL",
    "linear_nll_train": "loss and gradients",
    "token_statistics": "`token_statistics`",
    "linear_kl": "`linear_kl_divergence`",
    "nll_logits": "NLL of logits",
    "nll_logits_train": "their loss and gradient",
}
NOTHING = "They have not been run or timed on a GPU yet: `make bench-gpu` is ready for one."


def measured(folder: Path = RESULTS) -> list[tuple[str, dict]]:
    """Return the names and contents of the files that ``bench/gpu.py`` wrote on a GPU."""
    files = [(path.name, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    return [
        (name, results)
        for name, results in files
        if "ceilings" in results and results["device"] != "cpu"
    ]


def _cell(row: dict | None, unit: float | None) -> str:
    """Return time over ``unit`` milliseconds and temporary MiB, or the error of the row."""
    if row is None:
        return ""
    if row["error"]:
        return row["error"][:24]
    if not unit:  # the row that times are multiples of has failed
        return f"{row['median_ms']:.3f} ms"
    return f"{row['median_ms'] / unit:.2f} ({row['peak_temporary_bytes'] / 2**20:,.0f})"


def table(results: dict, source: str) -> str:
    limits, rows = results["ceilings"], {}
    for row in results["rows"]:
        rows.setdefault((row["case"], row["v"], row["d"] or 0, row["n"]), {})[row["provider"]] = row
    lines = [
        f"{results['device']}, torch {results['torch']}, triton {results['triton']}, "
        f"commit {results['commit']}, from [{source}](../bench/results/{source}): "
        f"product {limits['matmul_tflops']:.0f} TFLOP/s, copy {limits['copy_tb_s']:.2f} TB/s. "
        "Time as a multiple of cuBLAS's products alone (three for training), or for logits of the "
        "time that copy takes for their bytes; in brackets the temporary memory in MiB.",
        "",
    ]
    if results["kernels_hash"] != kernels_hash():
        lines += [
            f"**The device code has changed since this was measured** ({results['kernels_hash']}).",
            "",
        ]
    lines += [
        "| what | N | D | V | products, ms | " + " | ".join(PROVIDERS) + " |",
        "| --- |" + " ---: |" * (4 + len(PROVIDERS)),
    ]
    for (case, v, d, n), of in sorted(
        rows.items(), key=lambda item: (list(TITLES).index(item[0][0]), *item[0][1:])
    ):
        product = of.get("cublas")
        unit = product and product["median_ms"]
        done = next((row for row in of.values() if row["tb_s"]), None)
        if product is None and done:
            unit = done["median_ms"] * done["tb_s"] / limits["copy_tb_s"]
        cells = [_cell(of.get(provider), unit) for provider in PROVIDERS]
        shown = f"{unit:.3f}" if unit else ""
        size = " | ".join(f"{number:,}" if number else "" for number in (n, d, v))
        lines.append(f"| {TITLES[case]} | {size} | {shown} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def section(folder: Path = RESULTS) -> str:
    return "\n\n".join(table(results, name) for name, results in measured(folder)) or NOTHING


def placed(text: str) -> str:
    """Return the document's text with the tables between their two markers."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{section()}\n{END}{rest.split(END)[1]}"


def main() -> None:
    argparse.ArgumentParser(prog="gpu_report", description=__doc__.split("\n\n")[0]).parse_args()
    document = HERE.parent / "docs" / "performance.md"
    document.write_text(placed(document.read_text()))


if __name__ == "__main__":
    main()
