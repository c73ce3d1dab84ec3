"""A small model trained by Lightning: what the callback logs is of all tokens."""

import math

import pytest
import torch
import torch.nn.functional as F

pl = pytest.importorskip("lightning.pytorch")

from perplexity import Monitor, linear_cross_entropy, token_nll  # noqa: E402
from perplexity.errors import InputError  # noqa: E402
from perplexity.integrations.lightning import PerplexityCallback  # noqa: E402

VOCABULARY = 50


class Model(pl.LightningModule):
    def __init__(self, gives: str):
        super().__init__()
        torch.manual_seed(0)
        self.gives = gives
        self.embedding, self.head = (
            torch.nn.Embedding(VOCABULARY, 16),
            torch.nn.Linear(16, VOCABULARY, bias=False),
        )

    skips = more = False

    def training_step(self, batch, batch_index):
        tokens, labels = batch
        if self.skips and batch_index % 2:
            return None
        loss = linear_cross_entropy(self.embedding(tokens), self.head.weight, labels)
        return {"loss": loss + 5.0, "token_loss": loss.detach()} if self.more else loss

    def validation_step(self, batch, _):
        tokens, labels = batch
        if self.gives == "nll":
            return {
                "nll": token_nll(self.embedding(tokens), self.head.weight, labels)[labels != -100]
            }
        if self.gives in ("target", "unsaid"):
            nll = token_nll(self.embedding(tokens), self.head.weight, labels)
            return {"nll": nll} | ({"target": labels} if self.gives == "target" else {})
        loss = linear_cross_entropy(self.embedding(tokens), self.head.weight, labels)
        return {"loss": loss, "tokens": (labels != -100).sum()} if self.gives == "mean" else loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def data(count, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (count, 12), generator=generator)
    labels = (tokens * 7 + 3) % VOCABULARY
    for row in range(count):
        labels[row, : row * 11 // count] = -100
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens, labels), batch_size=2)


def fit(model, callback, tmp_path, **options):
    run = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )
    run.fit(model, data(16, 0), data(9, 1))
    return run


@pytest.mark.parametrize("gives", ["nll", "target", "mean"])
def test_perplexity_of_all_tokens(gives, tmp_path):
    model, callback = Model(gives), PerplexityCallback()
    run = fit(model, callback, tmp_path, accumulate_grad_batches=2)
    tokens, labels = data(9, 1).dataset.tensors
    logits = model.head(model.embedding(tokens)).flatten(0, 1)
    loss = F.cross_entropy(logits.double(), labels.flatten()).item()
    assert run.callback_metrics["val_loss_token"].item() == pytest.approx(loss, rel=1e-5)
    assert run.callback_metrics["val_perplexity"].item() == pytest.approx(math.exp(loss), rel=1e-5)
    digest = callback.monitor.digest
    assert len(digest.evaluations) == 2 and digest.evaluations[-1].loss == pytest.approx(
        loss, rel=1e-5
    )
    assert run.callback_metrics["train_perplexity"] < 2 * VOCABULARY


def test_the_monitor_stops_it(tmp_path):
    model = Model("mean")
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    run = fit(
        model, PerplexityCallback(Monitor(stop_on="non-finite")), tmp_path, num_sanity_val_steps=0
    )
    assert run.global_step < 16 and run.should_stop


def test_batches_that_are_skipped(tmp_path):
    model, callback = Model("mean"), PerplexityCallback()
    model.skips = True
    fit(model, callback, tmp_path)
    assert len(callback.monitor.digest.evaluations) == 2


def test_a_step_that_does_not_say_how_many_tokens(tmp_path):
    with pytest.raises(ValueError, match='validation_step: expected a dict with "nll"'):
        fit(Model("neither"), PerplexityCallback(), tmp_path)


def test_ignored_labels_are_not_counted(tmp_path):
    with pytest.raises(InputError, match='"nll" of validation_step: expected target= or mask='):
        fit(Model("unsaid"), PerplexityCallback(), tmp_path)


def test_a_training_loss_with_other_terms(tmp_path):
    """The perplexity was exp of the router's loss as well."""
    plain, model = PerplexityCallback(), Model("mean")
    expected = fit(model, plain, tmp_path).callback_metrics["train_perplexity"]
    model = Model("mean")
    model.more = True
    found = fit(model, PerplexityCallback(), tmp_path).callback_metrics["train_perplexity"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-5) and found < 2 * VOCABULARY
