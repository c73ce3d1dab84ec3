"""Calibration from token statistics, against full logits and torchmetrics' calibration error."""

import numpy as np
import pytest
import torch
from tiny_models import TEXTS

import perplexity
from perplexity import evaluate
from perplexity.calibration import CalibrationBins
from perplexity.evaluation import Document

DOCUMENTS = [Document(f"d{i}", text * (2 * i + 1)) for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_confidence_is_the_largest_probability(backend, device):
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 16, device=device), 2 * torch.randn(131, 16, device=device)
    target = torch.randint(0, 131, (37,), device=device)
    target[[3, 20]] = -100
    rule = {"softcap": 9.0, "logit_scale": 0.7, "backend": backend}
    statistics, confidence = perplexity.token_statistics(
        hidden, weight, target, with_confidence=True, **rule
    )
    z = 9.0 * torch.tanh(0.7 * (hidden.double() @ weight.double().T) / 9.0)
    largest = z.softmax(-1).amax(-1).masked_fill(target == -100, 0)
    torch.testing.assert_close(confidence.double(), largest, rtol=1e-5, atol=0)
    for one, other in zip(
        statistics, perplexity.token_statistics(hidden, weight, target, **rule), strict=True
    ):
        assert torch.equal(one, other)


def test_the_bins_are_torchmetrics(device):
    """A head of 40 entries, sharp enough that confidences reach every bin."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(5000, 8), torch.randn(40, 8) * torch.rand(40, 1) * 2
    z = (hidden @ weight.T) * (3 * torch.rand(5000, 1))
    target = torch.distributions.Categorical(logits=0.6 * z).sample()
    p = z.softmax(-1)
    log_p = z.log_softmax(-1)
    bins = CalibrationBins()
    values = torch.stack(
        [
            -log_p.gather(1, target[:, None])[:, 0],
            -(p * log_p).sum(-1),
            torch.zeros(5000),
            z.argmax(-1).float(),
            p.amax(-1),
        ]
    ).numpy()
    for part in np.array_split(np.arange(5000), 7):  # in any pieces
        bins.add(target.numpy()[part], values[:, part])
    got = bins.summary()
    from torchmetrics.functional.classification import multiclass_calibration_error

    expected = multiclass_calibration_error(p, target, num_classes=40, n_bins=15, norm="l1")
    assert got["ece"] == pytest.approx(expected.item(), rel=1e-4) and got["ece"] > 0.05
    assert got["accuracy"] == pytest.approx((z.argmax(-1) == target).double().mean().item())
    assert got["confidence"] == pytest.approx(p.amax(-1).double().mean().item(), rel=1e-5)
    assert got["loss"] - got["entropy"] > 0.1  # surer than it is right
    assert (
        sum(row["tokens"] for row in got["bins"])
        == sum(row["tokens"] for row in got["entropy_bins"])
        == 5000
    )
    # Of a model that is right as often as it is sure: the targets drawn from its own probabilities.
    target = torch.distributions.Categorical(logits=z).sample()
    bins, values[0] = CalibrationBins(), -log_p.gather(1, target[:, None])[:, 0].numpy()
    bins.add(target.numpy(), values)
    own = bins.summary()
    assert own["ece"] < 0.03 and abs(own["loss"] - own["entropy"]) < 0.05


def test_evaluate_measures_it_in_the_same_pass(model, tokenizer, tmp_path):
    plain = evaluate(model, tokenizer, DOCUMENTS)
    assert plain.calibration is None
    got = evaluate(model, tokenizer, DOCUMENTS, calibration=True, journal=tmp_path)
    c = got.calibration
    assert got.loss == pytest.approx(plain.loss, rel=1e-6) and c["loss"] == pytest.approx(
        got.loss, rel=1e-9
    )
    assert c["tokens"] == got.tokens
    rows = [
        torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]]) for text in TEXTS
    ]
    assert max(row.shape[1] for row in rows) <= 64  # one window each
    short = evaluate(model, tokenizer, TEXTS, calibration=True).calibration
    p, right = [], []
    with torch.no_grad():
        for row in rows:
            found = model(row).logits[0, :-1].double().softmax(-1)
            p.append(found)
            right.append(row[0, 1:])
    p, right = torch.cat(p), torch.cat(right)
    assert short["accuracy"] == pytest.approx((p.argmax(-1) == right).double().mean().item())
    assert short["confidence"] == pytest.approx(p.amax(-1).mean().item(), rel=1e-5)
    assert short["entropy"] == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-5)
    from torchmetrics.functional.classification import multiclass_calibration_error

    ece = multiclass_calibration_error(p, right, num_classes=p.shape[1], n_bins=15, norm="l1")
    assert short["ece"] == pytest.approx(ece.item(), rel=1e-4)
    # Read back from the journal: the same.
    assert (
        evaluate(model, tokenizer, DOCUMENTS, calibration=True, journal=tmp_path).calibration == c
    )


def test_a_token_without_a_loss_is_left_out():
    bins = CalibrationBins()
    values = np.array(
        [[1.0, np.nan, np.inf], [1.0, np.nan, 2.0], [0, -1, 4], [3, -1, 2], [0.5, 0.0, 0.4]],
        np.float32,
    )
    bins.add(np.array([3, 1, 1]), values)
    assert bins.summary()["tokens"] == 1 and bins.summary()["accuracy"] == 1.0
    assert CalibrationBins().summary() is None
