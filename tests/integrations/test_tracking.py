"""What TensorBoard and W&B have on disk afterwards, read back by their own readers."""

import math

import pytest

from perplexity import Monitor
from perplexity.integrations.tracking import TensorBoardTracker, WandbTracker, scalars
from perplexity.monitor import Finding


def test_losses_and_perplexities_side_by_side():
    assert scalars({"train_loss": 2.0, "val_loss": None, "lr": 0.1}) == {
        "train/loss": 2.0,
        "train/perplexity": math.exp(2.0),
        "train/learning_rate": 0.1,
    }
    assert scalars({"val_loss": 1e4})["eval/perplexity"] == math.inf
    assert scalars({"train_loss": 0.0}) == {"train/loss": 0.0}  # a NaN was logged as 0
    with pytest.raises(ValueError, match="log: expected measures of train_loss"):
        scalars({"loss": 1.0})


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    from perplexity.monitor import read_history

    with SummaryWriter(str(tmp_path)) as writer:
        tracker = TensorBoardTracker(writer)
        monitor = Monitor(on_finding=tracker.finding, stop_on="danger")
        for step in range(1, 4):
            tracker.log(
                step, train_loss=3.0 / step, val_loss=3.5 / step if step == 3 else None, lr=0.1
            )
            monitor.log(step, train_loss=math.nan if step == 3 else 3.0 / step)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"train/loss", "train/perplexity", "eval/loss", "eval/perplexity"} <= set(
        events.Tags()["scalars"]
    )
    assert [event.value for event in events.Scalars("train/perplexity")] == pytest.approx(
        [math.exp(3 / s) for s in (1, 2, 3)]
    )
    text = events.Tensors("findings/non-finite/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.startswith("**danger**")
    history = read_history(tmp_path)  # the monitor reads what the tracker wrote
    assert history.arrays()[0].tolist() == [1, 2, 3] and len(history.digest().evaluations) == 1


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from perplexity.monitor import read_history

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(dir=str(tmp_path), project="p")
    alerts = []
    monkeypatch.setattr(run, "alert", lambda **given: alerts.append(given), raising=False)
    tracker = WandbTracker(run)
    for step in range(1, 4):
        tracker.log(step, train_loss=3.0 / step, val_loss=3.5 / step)
    tracker.finding(Finding("spike", "danger", "a jump", "look", first_step=2.0, last_step=2.0))
    tracker.finding(Finding("restart", "info", "again", "nothing", first_step=2.0, last_step=2.0))
    run.finish()
    wandb.teardown()
    assert alerts == [dict(title="spike", text="a jump. look", level="ERROR")]
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    history = read_history(path)
    assert history.arrays()[0].tolist() == [1, 2, 3] and history.digest().evaluations[
        -1
    ].loss == pytest.approx(3.5 / 3)
