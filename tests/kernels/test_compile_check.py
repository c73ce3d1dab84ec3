"""The ahead-of-time compile check: a covering set for every target, and a gate that can fail."""

import functools
import itertools
import os
import sys
from pathlib import Path

import processes
import pytest
import torch

pytest.importorskip("triton")
from perplexity.kernels import compile_check
from perplexity.kernels.compile_check import (
    FEATURES,
    KINDS,
    RELATIVES,
    TARGETS,
    Case,
    Compiled,
    cases,
    valid_cases,
)
from perplexity.kernels.dispatch import Rule
from perplexity.kernels.fingerprint import kernels_hash
from perplexity.kernels.gpu import linear_kl, linear_nll, linear_statistics, nll
from perplexity.kernels.gpu.launch import recording

KERNELS = {
    "linear_nll": {"scale_kernel", "partials_kernel", "merge_kernel", "logit_gradient_kernel"},
    "linear_statistics": {"target_logit_kernel", "partials_kernel", "merge_kernel"},
    "linear_kl": {"kl_partials_kernel", "kl_gradient_kernel"},
    "nll": {"nll_kernel", "nll_grad_kernel"},
}
ALL_KERNELS = set().union(*KERNELS.values())
DOCUMENT = Path(__file__).parents[2] / "docs" / "compile-check.md"


def run(*arguments):
    """In a process of its own: kernels are interpreted in this one."""
    base = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # The whole check is half an hour's work on two cores.
    command = (sys.executable, "-m", "perplexity.kernels.compile_check", *arguments)
    return processes.run(*command, env=base, timeout=10 * processes.HANG)


@functools.cache
def chosen(extent):
    return tuple(cases(extent))


def table(text):
    """(kernel, target) of every row."""
    rows = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| ")]
    return {(kernel.strip("| "), target) for kernel, target in rows}


@pytest.mark.parametrize(
    ("target", "extent", "operations"),
    [
        *(
            pytest.param(target, "quick", KERNELS, id=f"{target}-quick", marks=pytest.mark.slow)
            for target in TARGETS
        ),
        # The copy engine's kernels, every feature. No change of the others goes without a check
        # either: test_the_committed_table_is_of_this_device_code.
        pytest.param("sm_90", "least", ("linear_nll", "nll"), id="sm_90-least"),
    ],
)
def test_a_covering_set_compiles_for_every_target(target, extent, operations):
    done = run(f"--{extent}", "--target", target, "--operations", *operations)
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = set().union(*(KERNELS[operation] for operation in operations))
    assert {(kernel, target) for kernel in compiled} <= table(done.stdout)


def values(case):
    """What a case is made of, its operation's features present or absent among them."""
    features = {name: name in case.features for name in FEATURES[case.operation]}
    return set(
        {"target": case.target, "dtype": case.dtype, "layout": case.layout, **features}.items()
    )


def of_kinds(part, operation=None):
    return [case for case in part if case.target in KINDS and operation in (None, case.operation)]


@pytest.mark.parametrize("operation", FEATURES)
def test_the_covering_set_has_every_pair(operation):
    """Any two values that some valid case has together, some quick case has together."""
    valid, quick = (
        [values(case) for case in of_kinds(part, operation)]
        for part in (valid_cases(), chosen("quick"))
    )
    for pair in itertools.combinations(sorted(set().union(*valid), key=str), 2):
        assert any(map(set(pair).issubset, quick)) == any(map(set(pair).issubset, valid)), pair


def test_the_quick_set_has_what_takes_most_of_each_relative():
    """The largest tiles, which take the shared memory, and the most registers a logit."""
    quick = chosen("quick")
    for target, operation in itertools.product(RELATIVES, FEATURES):
        here = [
            (case.dtype, case.layout, len(case.features))
            for case in quick
            if (case.target, case.operation) == (target, operation)
        ]
        assert sorted(here) == [
            ("bfloat16", "aligned", 0),
            ("float32", "odd", len(FEATURES[operation])),
        ]


def test_the_quick_set_is_part_of_the_full_one():
    assert set(chosen("quick")) < set(chosen("full")) <= set(valid_cases())


def test_the_least_set_has_every_value():
    least = chosen("least")
    assert set(least) <= set(valid_cases())
    assert set().union(*map(values, least)) == set().union(*map(values, of_kinds(valid_cases())))


def test_the_committed_table_is_of_this_device_code():
    text = DOCUMENT.read_text()
    assert kernels_hash() in text, (
        "docs/compile-check.md is of other kernels: run `make compile-check`"
    )
    assert {(kernel, target) for kernel in ALL_KERNELS for target in TARGETS} <= table(text)


@pytest.mark.slow
def test_every_feature_set_compiles_for_every_target():
    done = run()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"spilled_bytes": 4}, "spills 4 bytes"),
        ({"shared_bytes": 228 << 10}, "shared memory"),
        ({"matrix_instructions": 0}, "without"),
        ({"matrix_instructions": 0, "multiplies": False}, None),
    ],
)
def test_the_gate_can_fail(target, changes, words):
    good = dict(
        registers=128,
        spilled_bytes=0,
        shared_bytes=TARGETS[target].facts.shared_kib << 10,
        matrix_instructions=8,
        multiplies=True,
    )
    row = Compiled(
        "kernel",
        case=Case("nll", target, "float16", "aligned", frozenset()),
        compilation="",
        **(good | changes),
    )
    failures = row.failures()
    assert (failures == []) if words is None else (len(failures) == 1 and words in failures[0])


@pytest.mark.parametrize(
    ("rule", "fused"),
    [
        (Rule(), True),
        (Rule(logit_scale=0.5), False),
        (Rule(softcap=30.0), False),
    ],
)
def test_a_logit_that_is_a_product_is_not_fused(rule, fused):
    """Rounded in the maximum and not in the difference from it, it makes NLLs below 0."""
    hidden, weight = torch.empty(64, 32, device="meta"), torch.empty(96, 32, device="meta")
    target, row = torch.empty(64, device="meta", dtype=torch.int64), torch.empty(64, device="meta")
    head = hidden, weight, None
    with recording(TARGETS["sm_90"]) as recorded:
        linear_nll.partials(*head, target, None, rule)
        linear_statistics.target_logit(*head, target, rule)
        linear_kl.linear_kl(head, head, rule, Rule())
        nll.nll_grad(row.expand(5, 64), row, hidden, target, None, rule)
    assert [launch.options["enable_fp_fusion"] for launch in recorded] == [fused] * 4


def test_interpreted_kernels_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(compile_check, "INTERPRETED", True)
    assert compile_check.main(["--quick"]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_another_triton_than_expected_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(compile_check, "INTERPRETED", False)
    assert compile_check.main(["--quick", "--expect-triton", "0.0.0"]) == 2
    assert "expected triton 0.0.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "programs"),
    [
        ("sm_90", 254, 147_480, 8, 1),
        ("sm_90", 128, 0, 8, 2),
        ("sm_90", 64, 0, 8, 4),
        ("sm_90", 32, 0, 4, 16),  # 64 warps
        ("sm_90", 32, 100 << 10, 4, 2),
        ("sm_80", 32, 82 << 10, 4, 1),
        ("gfx942", 118, 16_384, 8, 2),
        ("gfx942", 64, 40_000, 4, 1),
    ],
)
def test_programs_a_multiprocessor_has_room_for(target, registers, shared, warps, programs):
    from perplexity.kernels.compile_check import programs_a_multiprocessor

    assert programs_a_multiprocessor(target, registers, shared, warps) == programs
