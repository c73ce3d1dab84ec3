"""Every kind of history gives the same diagnosis; what is broken is named, what is repaired is
said.
"""

import json
import math

import numpy as np
import pytest

from perplexity.errors import InputError
from perplexity.monitor import History, diagnose, read_history

STEPS = 400


def rows(seed: int = 0) -> list[dict]:
    generator = np.random.default_rng(seed)
    found = []
    for step in range(1, STEPS + 1):
        loss = 3 + 5 * step**-0.4
        row = {
            "step": step,
            "train_loss": round(loss + 0.05 * generator.normal(), 5),
            "lr": 1e-3 * (1 - step / STEPS),
        }
        if step % 20 == 0:
            row["val_loss"] = round(loss + 0.02, 5)
        found.append(row)
    return found


def write(folder, kind: str, of: list[dict]):
    path = folder / kind
    if kind.endswith(".csv"):
        lines = ["step,train_loss,val_loss,lr,note"]
        lines += [
            f"{r['step']},{r['train_loss']},{r.get('val_loss', '')},{r['lr']},a word" for r in of
        ]
        path.write_text("\n".join(lines) + "\n")
    elif kind.endswith(".jsonl"):
        path.write_text("".join(json.dumps(r) + "\n" for r in of))
    elif kind == "trainer_state.json":
        log = []
        for r in of:
            log.append(
                {"step": r["step"], "loss": r["train_loss"], "learning_rate": r["lr"], "epoch": 0.1}
            )
            if "val_loss" in r:
                log.append({"step": r["step"], "eval_loss": r["val_loss"], "eval_runtime": 2.0})
        path.write_text(json.dumps({"log_history": log, "global_step": STEPS}))
    elif kind in ("tensorboard", "lightning"):
        from torch.utils.tensorboard import SummaryWriter

        train, val = (
            ("train/loss", "eval/loss") if kind == "tensorboard" else ("train_loss", "val_loss")
        )
        with SummaryWriter(str(path)) as writer:
            for place, r in enumerate(of):
                writer.add_scalar(train, r["train_loss"], r["step"], walltime=1000.0 + place)
                if "val_loss" in r:
                    writer.add_scalar(val, r["val_loss"], r["step"], walltime=1000.0 + place)
    elif kind == "wandb":
        wandb = pytest.importorskip("wandb")
        run = wandb.init(
            project="p",
            mode="offline",
            dir=str(folder),
            settings=wandb.Settings(silent=True, console="off"),
        )
        for r in of:
            run.log(
                {"train/loss": r["train_loss"]}
                | ({"eval/loss": r["val_loss"]} if "val_loss" in r else {}),
                step=r["step"],
            )
        run.finish()
        wandb.teardown()  # its service process writes on after finish
        (path,) = folder.rglob("*.wandb")
    return path


@pytest.mark.parametrize(
    "kind", ["a.csv", "a.jsonl", "trainer_state.json", "tensorboard", "lightning", "wandb"]
)
def test_every_kind_of_history_says_the_same(tmp_path, kind):
    history = read_history(write(tmp_path, kind, rows()))
    steps, losses = history.arrays()
    assert steps.tolist() == list(range(1, STEPS + 1))
    # TensorBoard keeps float32.
    assert losses == pytest.approx([r["train_loss"] for r in rows()], rel=1e-6)
    at, _ = history.of("val_loss")
    assert at.tolist() == list(range(20, STEPS + 1, 20))
    found = diagnose(history.digest())
    assert found.verdict == "healthy" and found.evaluations == 20 and found.points == STEPS
    assert found.best_val_step == 400


def test_units(tmp_path):
    plain = diagnose(read_history(write(tmp_path, "a.jsonl", rows())).digest())
    for unit, change in (("bits", lambda x: x / math.log(2)), ("perplexity", math.exp)):
        changed = [
            r | {k: change(r[k]) for k in ("train_loss", "val_loss") if k in r} for r in rows()
        ]
        for kind in ("b.jsonl", "b.csv"):
            found = diagnose(read_history(write(tmp_path, kind, changed), unit=unit).digest())
            assert found.val_loss == pytest.approx(plain.val_loss, rel=1e-9)
            assert found.train_loss == pytest.approx(plain.train_loss, rel=1e-9)


def test_names_of_ones_own(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"it": 1, "ce": 3.0, "dev": 3.5}\n' * 3)
    history = read_history(path, tags={"step": "it", "train_loss": "ce", "val_loss": "dev"})
    assert (
        history.arrays()[1].tolist() == [3.0] * 3
        and history.of("val_loss")[1].tolist() == [3.5] * 3
    )
    with pytest.raises(InputError, match="tag: expected one of step, train_loss"):
        read_history(path, tags={"loss": "ce"})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "a.csv: expected a history, got an empty file"),
        (
            "a.csv",
            "a,b\n1,2\n",
            "a.csv: expected a training loss or a validation loss, got none .names seen: a, b.; --tag",
        ),
        (
            "a.csv",
            "step,train_loss\n1,\n2,abc\n",
            "a.csv, line 3: expected a number for train_loss, got 'abc'",
        ),
        ("a.csv", "step,train_loss\n1,2,3\n", "a.csv, line 2: expected 2 cells, got 3"),
        (
            "a.csv",
            "step,train_loss\n",
            "a.csv: expected a training loss or a validation loss, got none",
        ),
        (
            "a.jsonl",
            '{"step":\n{"step": 1, "train_loss": 3}\n',
            "a.jsonl, line 1: expected a JSON object, got broken JSON",
        ),
        (
            "a.jsonl",
            '{"step": 1, "train_loss": "x"}\n',
            "a.jsonl, line 1: expected a number for train_loss, got 'x'",
        ),
        ("a.jsonl", "[1]\n", "a.jsonl, line 1: expected a JSON object"),
        ("trainer_state.json", "{}", "expected rows, a log_history or lists of losses"),
        (
            "trainer_state.json",
            '{"log_history": [3]}',
            "expected rows, a log_history or lists of losses",
        ),
        ("a.txt", "x\n", "expected a training history, got text without a loss .*--pattern"),
        ("a.log", "a word\nand more\n", "expected a training history, got text without a loss"),
        ("a.wandb", "this is no run of theirs", "a.wandb: expected a W&B run"),
    ],
)
def test_broken_histories_are_named(tmp_path, name, text, message):
    if name.endswith(".wandb"):
        pytest.importorskip("wandb")
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_history(tmp_path / name)


def test_what_is_absent(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_history(tmp_path / "absent.csv")
    with pytest.raises(InputError, match="expected TensorBoard event files"):
        read_history(tmp_path)
    with pytest.raises(InputError, match="unit: expected one of nats"):
        read_history(tmp_path / "a.csv", unit="bans")


@pytest.mark.parametrize("kind", ["a.csv", "a.jsonl"])
def test_a_line_being_written_is_left_out_and_said(tmp_path, kind):
    path = write(tmp_path, kind, rows())
    path.write_bytes(path.read_bytes()[:-9])
    history = read_history(path)
    assert len(history.train_step) == STEPS - 1
    assert "the last line has no end" in history.notes[0]


@pytest.mark.parametrize("kind", ["a.csv", "a.jsonl"])
def test_rows_in_no_order_are_sorted_and_said(tmp_path, kind):
    mixed = [rows()[place] for place in np.random.default_rng(1).permutation(STEPS)]
    history = read_history(write(tmp_path, kind, mixed))
    assert "sorted by step" in history.notes[0]
    found, plain = (
        diagnose(history.digest()),
        diagnose(read_history(write(tmp_path, "b.jsonl", rows())).digest()),
    )
    assert (found.verdict, found.val_loss, found.train_loss) == (
        plain.verdict,
        plain.val_loss,
        plain.train_loss,
    )


def test_an_empty_cell_is_no_measurement_and_nan_is_one(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("step,train_loss,val_loss\n1,3.0,\n2,nan,\n3,,3.1\n4,2.9,inf\n")
    history = read_history(path)
    found = diagnose(history.digest())
    assert found.points == 2 and found.evaluations == 1
    told = {
        f.numbers["measure"]: f.numbers["count"] for f in found.findings if f.signal == "non-finite"
    }
    assert told == {"train_loss": 1, "val_loss": 1}
    assert found.verdict == "unhealthy"


@pytest.mark.parametrize("fill", ["nan", "inf"])
def test_a_history_of_nothing_but_nan(tmp_path, fill):
    path = tmp_path / "a.csv"
    path.write_text("step,train_loss\n" + "".join(f"{step},{fill}\n" for step in range(300)))
    found = diagnose(read_history(path).digest())
    assert found.verdict == "unhealthy" and found.findings[0].first_step == 0
    json.loads(found.to_json())


def test_duplicated_rows_change_no_verdict(tmp_path):
    twice = [r for r in rows() for _ in range(2)]
    assert diagnose(read_history(write(tmp_path, "a.csv", twice)).digest()).verdict == "healthy"


def test_a_restart_replaces_what_came_after_it(tmp_path):
    again = rows()[:300] + rows(1)[200:]
    found = diagnose(read_history(write(tmp_path, "a.csv", again)).digest())
    restart = next(f for f in found.findings if f.signal == "restart")
    assert (restart.first_step, restart.last_step) == (201, 300)
    assert found.verdict == "healthy" and found.evaluations == 20


def test_two_runs_in_one_file(tmp_path):
    found = diagnose(read_history(write(tmp_path, "a.csv", rows() + rows(1))).digest())
    restart = next(f for f in found.findings if f.signal == "restart")
    assert "the run began anew" in restart.evidence
    assert found.verdict == "healthy" and found.evaluations == 20 and found.points == STEPS


def test_many_points_at_once_are_the_points_one_by_one():
    """The fast path over whole blocks gives the state that ``train`` gives, spikes, NaN and steps
    back included.
    """
    from perplexity.monitor.digest import Digest

    generator = np.random.default_rng(0)
    for case in range(20):
        count = int(generator.integers(1, 3000))
        steps = np.arange(count, dtype=float)
        losses = 3 + 2 * (steps + 1) ** -0.3 + 0.05 * generator.normal(size=count)
        for _ in range(int(generator.integers(0, 4))):
            at = int(generator.integers(0, count))
            losses[at : at + int(generator.integers(1, 80))] += generator.choice([1.0, 3.0, np.nan])
        if case % 3 == 0 and count > 600:
            steps[500:] -= 100
        one, many = Digest(), Digest()
        for step, loss in zip(steps.tolist(), losses.tolist(), strict=True):
            one.train(step, loss)
        cut = int(generator.integers(0, count))
        many.train_many(steps[:cut], losses[:cut])
        many.train_many(steps[cut:], losses[cut:])
        assert many.points == one.points and many.last_step == one.last_step
        assert [s.__dict__ for s in many.spikes] == [pytest.approx(s.__dict__) for s in one.spikes]
        assert [b.count for b in many.all_blocks()] == [b.count for b in one.all_blocks()]
        assert [b.total for b in many.all_blocks()] == pytest.approx(
            [b.total for b in one.all_blocks()]
        )
        assert list(many._recent) == list(one._recent)
        assert many.non_finite == one.non_finite


def test_state_is_bounded():
    from perplexity.monitor.digest import MOST_BLOCKS, Digest

    digest = Digest()
    count = 400_000
    steps = np.arange(count, dtype=float)
    digest.train_many(steps, 3 + 0.05 * np.sin(steps))
    assert len(digest.blocks) <= MOST_BLOCKS and digest.points == count
    assert sum(block.count for block in digest.all_blocks()) == count
    assert digest.blocks[0].first == 0 and digest.blocks[-1].last == count - 1


def test_rows_logged_apart_are_one_step():
    history = History()
    for step in range(1, 400):
        history.add(step, {"train_loss": 3.0})
        if step % 20 == 0:
            history.add(step, {"val_loss": 3.0})
    assert not [f for f in diagnose(history.digest()).findings if f.signal == "restart"]


def test_transformers_summary_of_the_whole_run_is_no_point(tmp_path):
    path = write(tmp_path, "trainer_state.json", rows())
    record = json.loads(path.read_text())
    record["log_history"].append({"step": STEPS, "train_loss": 4.5, "train_runtime": 60.0})
    path.write_text(json.dumps(record))
    history = read_history(path)
    assert len(history.train_step) == STEPS and "train_runtime" in history.notes[0]


def test_json_lines_at_once_are_the_lines_one_by_one(tmp_path, monkeypatch):
    """Arrow's reader gives what Python's gives: NaN, null, integers, measures under two names, rows
    of other things.
    """
    from perplexity.monitor.readers import json_text

    lines = []
    for step in range(900):
        other = {"x": [1, {"y": 2}]} if step % 2 else {}
        lines.append(json.dumps({"step": step, "loss": 3 + step % 7, "lr": 0.1} | other))
    lines += [
        '{"step": 900, "loss": NaN, "val_loss": -Infinity}',
        '{"note": "no step"}',
        "",
        '{"_step": 901, "eval_loss": 2}',
    ]
    lines += [
        '{"step": 902, "train_loss": 1.5, "loss": 2.5, "eval_loss": null}',
        '{"loss": 3, "step": null}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    at_once = read_history(tmp_path / "a.jsonl")
    monkeypatch.setattr(json_text, "json_table", lambda raw: None)
    one_by_one = read_history(tmp_path / "a.jsonl")
    assert at_once.arrays()[0].tolist() == one_by_one.arrays()[0].tolist() == [*range(901), 902]
    assert np.array_equal(at_once.arrays()[1], one_by_one.arrays()[1], equal_nan=True)
    assert at_once.arrays()[1][-1] == 1.5
    assert at_once.events == one_by_one.events and at_once.notes == one_by_one.notes
    assert at_once.notes == [
        "rows hold train_loss under more than one name: the first is read (--tag train_loss=NAME chooses)",
        "rows without a step are left out",
    ]


def test_two_columns_of_one_measure_are_said(tmp_path):
    (tmp_path / "a.csv").write_text("step,loss,train_loss\n1,9,3\n2,9,3\n")
    history = read_history(tmp_path / "a.csv")
    assert history.arrays()[1].tolist() == [3.0, 3.0]
    assert "train_loss under more than one name" in history.notes[0]
    assert read_history(tmp_path / "a.csv", tags={"train_loss": "loss"}).arrays()[1].tolist() == [
        9.0,
        9.0,
    ]


def test_rows_without_a_step_are_said(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"loss": 9}\n{"step": 1, "loss": 3}\n')
    assert read_history(path).notes == ["rows without a step are left out"]
    path.write_text('{"loss": 9}\n{"loss": 8}\n')
    history = read_history(path)
    assert history.arrays()[0].tolist() == [1, 2]
    assert history.notes == ["no step was logged: rows with a loss are numbered"]


@pytest.mark.parametrize("text", ['{"step": NaN, "loss": 3}', '{"step": 1e400, "loss": 3}'])
def test_steps_that_are_none(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(text + "\n")
    with pytest.raises(InputError, match="a.jsonl, line 1: expected a finite step"):
        read_history(tmp_path / "a.jsonl")


def test_losses_beyond_all_measure_and_one_step_for_all(tmp_path, recwarn):
    path = tmp_path / "a.csv"
    path.write_text(
        "step,train_loss,val_loss\n" + "".join(f"{i},1e308,1e308\n" for i in range(300))
    )
    assert diagnose(read_history(path).digest()).verdict == "unhealthy"
    path.write_text("step,train_loss,val_loss\n" + "5,3,3\n" * 600)
    diagnose(read_history(path).digest())
    path.write_text(
        "step,val_loss\n" + "".join(f"{i},{'nan' if i == 7 else 3}\n" for i in range(20))
    )
    found = diagnose(read_history(path).digest())
    assert (found.first_step, found.last_step) == (0, 19)
    json.loads(found.to_json())
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


@pytest.mark.parametrize(
    ("writers", "expected"),
    [
        ({"train": "loss", "val": "loss"}, (2.0, 7.0)),
        ({"train": "loss", "test": "loss"}, (2.0, 7.0)),
        ({"run1/train": "loss", "run1/dev": "loss"}, (2.0, 7.0)),
        ({"loss_train": "loss", "loss_val": "loss"}, (2.0, 7.0)),  # what add_scalars makes
        (
            {"a/train": "loss", "b/train": "loss"},
            "expected one run, got 2: a, b; --run NAME chooses one",
        ),
        ({"a": "loss", "b": "loss"}, "expected one run, got 2: a, b"),
    ],
)
def test_tensorboard_folders_say_which_loss_it_is(tmp_path, writers, expected):
    """Before, two writers with one tag were one curve of alternating losses."""
    from torch.utils.tensorboard import SummaryWriter

    for place, (folder, tag) in enumerate(writers.items()):
        with SummaryWriter(str(tmp_path / folder)) as writer:
            for step in range(5):
                writer.add_scalar(tag, (2.0, 7.0)[place], step)
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            read_history(tmp_path)
        return
    history = read_history(tmp_path)
    assert set(history.arrays()[1]) == {expected[0]} and set(history.of("val_loss")[1]) == {
        expected[1]
    }


def test_tensorboard_says_what_it_lost_and_keeps_what_was_replaced(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "a")) as writer:
        for step in range(200):
            writer.add_scalar("train/loss", 3.0, step, walltime=1000.0 + step)
    # as PyTorch tells to after a crash
    with SummaryWriter(str(tmp_path / "a"), purge_step=150) as writer:
        for step in range(150, 300):
            writer.add_scalar("train/loss", 3.0, step, walltime=2000.0 + step)
    history = read_history(tmp_path / "a")
    assert len(history.train_step) == 350 and history.digest().restarts_seen == 1
    (first, _) = sorted((tmp_path / "a").iterdir(), key=lambda file: -file.stat().st_size)
    raw = bytearray(first.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    first.write_bytes(raw)
    assert "left out" in read_history(tmp_path / "a").notes[0]
    first.write_bytes(raw[: len(raw) // 3])
    assert "a last record without an end" in read_history(tmp_path / "a").notes[0]


@pytest.mark.parametrize(
    "order", ["swapped pairs", "a few swaps", "by sevens", "evaluations alone"]
)
def test_rows_a_little_out_of_order_are_all_kept(tmp_path, order):
    steps = list(range(2000))
    if order == "swapped pairs":
        for place in range(0, 2000, 10):
            steps[place], steps[place + 1] = steps[place + 1], steps[place]
    elif order == "a few swaps":
        for place in (100, 500, 900):
            steps[place], steps[place + 1] = steps[place + 1], steps[place]
    elif order == "by sevens":
        steps = [place * 7 % 100 for place in range(100)]
    else:
        steps = np.random.default_rng(0).permutation(100).tolist()
    name = "val_loss" if order == "evaluations alone" else "train_loss"
    path = tmp_path / "a.csv"
    path.write_text(f"step,{name}\n" + "".join(f"{step},3.0\n" for step in steps))
    history = read_history(path)
    digest = history.digest()
    assert "sorted by step" in history.notes[0] and digest.restarts_seen == 0
    assert max(digest.points, len(digest.evaluations)) == len(steps)


def test_a_restart_between_the_old_steps_is_one(tmp_path):
    path = tmp_path / "a.csv"
    steps = [*range(0, 1000, 10), *range(505, 1500, 10)]
    path.write_text("step,train_loss\n" + "".join(f"{step},3.0\n" for step in steps))
    assert read_history(path).digest().restarts_seen == 1


def test_what_is_logged_beside_an_evaluation_belongs_to_its_step(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = []
    for step in (100, 200, 300):
        rows += [
            {"step": step, "val_loss": 3.0},
            {"step": step, "train_eval_loss": step / 100, "eval_seconds": 10.0},
        ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    digest = read_history(path).digest()
    assert [e.near for e in digest.evaluations] == [1.0, 2.0, 3.0]
    assert digest.evaluation_seconds == 30


def test_steps_of_the_trainer_in_a_wandb_run(tmp_path):
    """transformers' callback logs train/global_step and no step=; W&B's own count is another."""
    wandb = pytest.importorskip("wandb")
    run = wandb.init(
        project="p",
        mode="offline",
        dir=str(tmp_path),
        settings=wandb.Settings(silent=True, console="off"),
    )
    for step in range(100, 1000, 100):
        run.log({"train/loss": 3.0, "train/learning_rate": 0.1, "train/global_step": step})
        run.log({"eval/loss": 3.1, "train/global_step": step})
    run.log({"train/learning_rate": 0.05, "train/global_step": 1000})
    run.finish()
    wandb.teardown()
    (path,) = tmp_path.rglob("*.wandb")
    history = read_history(path)
    assert (
        history.arrays()[0].tolist()
        == history.of("val_loss")[0].tolist()
        == list(range(100, 1000, 100))
    )
    assert history.of("lr")[0][-1] == 1000


@pytest.mark.parametrize("kind", ["a.csv", "a.jsonl", "trainer_state.json", "tensorboard"])
def test_a_tag_that_is_nowhere(tmp_path, kind):
    path = write(tmp_path, kind, rows())
    with pytest.raises(
        InputError, match="tag: expected a name that .* logs for val_loss, got 'typo'"
    ):
        read_history(path, tags={"val_loss": "typo"})


@pytest.mark.parametrize(
    ("text", "unit", "message"),
    [
        ('{"step": 1, "loss": true}', "nats", "expected a number for loss, got True"),
        (
            '{"step": 1, "loss": 0}',
            "perplexity",
            "expected perplexities above 0 for loss, got 0",
        ),
    ],
)
def test_values_that_are_no_losses(tmp_path, text, unit, message):
    (tmp_path / "a.jsonl").write_text(text + "\n")
    with pytest.raises(InputError, match=message):
        read_history(tmp_path / "a.jsonl", unit=unit)
    if unit == "perplexity":
        (tmp_path / "a.csv").write_text("step,loss\n1,5\n2,-3\n")
        history = read_history(tmp_path / "a.csv", unit=unit)
        assert history.arrays()[1].tolist() == [pytest.approx(math.log(5))]
        assert "above 0 for loss, got -3; 1 cell left out" in history.notes[0]
