"""Peak memory of one row: ``python bench/memory.py CASE PROVIDER DTYPE N V [D]``.

It prints the bytes by which a call raises the high-water mark of resident memory in this process,
and the bytes of the call's results. Linux only.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))

from cpu_cases import Row
from peak_memory import high_water, reset_high_water


def main(case: str, provider: str, dtype: str, n: str, v: str, d: str | None = None) -> None:
    row = Row("", case, provider, int(n), int(v), int(d) if d else None, dtype)
    # A tiny call loads libraries and starts threads. What is compiled takes a call of the same
    # shape.
    small = (
        row
        if provider in ("torch_compile", "cce")
        else Row("", case, provider, 64, 600, row.d, dtype)
    )
    function = row.function()
    inputs = row.inputs()
    function(*(inputs if small is row else small.inputs()))
    reset_high_water()
    before = high_water()
    result = function(*inputs)
    results = result if isinstance(result, tuple) else (result,)
    kept = sum(tensor.numel() * tensor.element_size() for tensor in results if tensor is not None)
    print(high_water() - before, kept)


if __name__ == "__main__":
    main(*sys.argv[1:])
