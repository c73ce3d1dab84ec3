"""Sweep over transformers' causal families: its committed results, and a draw that is run again."""

import json
import os
import random
import sys
from pathlib import Path

import processes
import pytest

BENCH = Path(__file__).parents[2] / "bench"
RESULTS = json.loads((BENCH / "results" / "families.json").read_text())
COMPARED = ("evaluate", "fused")


@pytest.fixture
def families(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import families

    yield families
    sys.modules.pop("families", None)


def outcomes(rows):
    return {row["family"]: [row.get(name, {}).get("outcome") for name in COMPARED] for row in rows}


def test_the_table_is_of_the_results(families):
    assert (BENCH.parent / "docs" / "families.md").read_text() == families.table(RESULTS)


def test_no_family_is_wrong():
    found = list(outcomes(RESULTS["rows"]).values())
    evaluated, fused = zip(*found, strict=True)
    assert not {"wrong", "crashed"} & {*evaluated, *fused}
    assert evaluated.count("equal") >= 112 and fused.count("equal") >= 105


def test_a_table_shows_every_outcome(families):
    rows = [
        dict(
            family="a",
            architecture="A",
            built=None,
            evaluate=dict(outcome="equal", difference=1.6e-8),
        )
        | dict(fused=dict(outcome="wrong", difference=0.1, message="loss: 1, expected 2")),
        dict(family="b", architecture="B", built="ValueError: a | b"),
    ]
    text = families.table(dict(torch="t", transformers="u", rows=rows))
    assert (
        "| a | A | 2e-08 | wrong: loss: 1, expected 2 |" in text
        and "| b | B | ValueError: a \\| b |" in text
    )
    assert "| `use_fused_loss` | 0 | 0 | 0 | 0 | 1 |" in text


@pytest.mark.parametrize("family", ["bert", "ClvpForCausalLM", "inkling_text", "llama4_text"])
def test_what_lies_between_body_and_head(families, family):
    """A dense layer and a norm, a norm alone, a factor, and a body that the class does not name."""
    model = families.build(family)
    for compare in (families.compare_evaluate, families.compare_fused):
        assert families.outcome(compare, model)["outcome"] == "equal"


@pytest.mark.slow
def test_a_draw_of_families(tmp_path):
    import torch
    import transformers

    seed = random.randrange(1 << 30)
    print("seed", seed)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    options = ("--draw", 12, "--seed", seed, "--out", tmp_path / "found.json")
    done = processes.run(sys.executable, BENCH / "families.py", *options, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = outcomes(json.loads((tmp_path / "found.json").read_text())["rows"])
    assert len(found) == 12
    if (torch.__version__, transformers.__version__) == (RESULTS["torch"], RESULTS["transformers"]):
        committed = outcomes(RESULTS["rows"])
        assert found == {family: committed[family] for family in found}
