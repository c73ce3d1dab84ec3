"""Trained models: the trap is found in the looping and the memorising one, not the healthy one."""

import pytest
from trained import KINDS, trained

from perplexity.probe import GenerationSettings, probe

SETTINGS = GenerationSettings(max_new_tokens=64)


def check(kind: str, seed: int):
    model, tokenizer, prompts = trained(kind, seed)
    found = probe(model, tokenizer, prompts, settings=SETTINGS)
    signals = [finding.signal for finding in found.findings]
    losses = found.perplexity
    # by its perplexity alone each looks good
    assert losses["reference_loss"] < losses["unigram_loss"]
    if kind == "healthy":
        assert signals == [] and found.verdict == "healthy"
        # Of these parts alone perplexity is weighed; sound texts take next to nothing from it.
        parts = found.health["parts"]
        assert parts["generation"]["score"] > 0.9
        assert found.health_score > 0.9 * 100 * parts["perplexity"]["score"] > 0
        for name in ("repetition", "same_prompt", "other_prompts", "copied"):
            assert found.generation[name] < 0.05, name
        assert losses["self_loss"] == pytest.approx(losses["reference_loss"], rel=0.25)
        return
    trap = found.findings[0]
    assert (trap.signal, trap.severity, found.verdict) == (
        "low-perplexity-trap",
        "danger",
        "unhealthy",
    )
    assert found.health_score <= 30
    if kind == "loop":
        assert "repetition" in trap.numbers["because"] and found.generation["looping"] > 0.8
    else:  # it repeats nothing within a text: the same passages come again and again
        assert "copied-reference" in trap.numbers["because"] and "repetition" not in signals
        assert losses["reference_loss"] < 0.1


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] if kind == "loop" else []) for kind in KINDS],
)
def test_the_trap(kind):
    check(kind, 0)
    if kind == "healthy":
        model, tokenizer, prompts = trained(kind, 0)
        for how in (dict(temperature=0, samples=1), dict(temperature=0.7), dict(top_p=0.9)):
            found = probe(
                model, tokenizer, prompts, settings=GenerationSettings(max_new_tokens=64, **how)
            )
            assert found.verdict != "unhealthy", how


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 10))
@pytest.mark.parametrize("kind", KINDS)
def test_the_trap_over_seeds(kind, seed):
    check(kind, seed)
