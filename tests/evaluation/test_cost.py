"""An evaluation takes an eighth of the memory of ``model(input_ids, labels=input_ids)``; its time
is `make bench`'s to tell.
"""

import os
import sys
from pathlib import Path

import pytest
from processes import run


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.slow
def test_peak_memory():
    script = Path(__file__).parents[2] / "bench" / "support" / "evaluation_cost.py"
    # A fixed threshold: freed blocks go back to the system, and the figure is the call's, not the
    # allocator's history.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    found = {}
    for provider in ("ours", "alone", "plain"):
        done = run(sys.executable, script, provider, "large-head", 2, env=environment)
        assert done.returncode == 0, done.stderr
        found[provider] = [float(word) for word in done.stdout.split()[-5:]]
    assert found["ours"][2] == pytest.approx(found["alone"][2], rel=1e-6)
    assert found["ours"][0] <= found["plain"][0] / 8
