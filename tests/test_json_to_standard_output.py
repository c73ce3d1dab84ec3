"""``--json -``: standard output holds the JSON and nothing else, of every command that has it."""

import json

import pytest
from tiny_models import save_small_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("json")
    save_small_model(folder / "model")
    texts = [f"the cat {word} on the mat" for word in ("sat", "lay", "ran", "sat down")]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (folder / "prompts.jsonl").write_text('{"prompt": "the cat"}\n')
    (folder / "question.txt").write_text("{text} good?")
    rows = [f"{step},{4 - step / 100},{4.1 - step / 100}\n" for step in range(1, 60)]
    (folder / "log.csv").write_text("step,train_loss,val_loss\n" + "".join(rows))
    return folder


CASES = {
    "monitor": (["monitor", "log.csv"], "verdict"),
    "monitor, several": (["monitor", "log.csv", "./log.csv"], "runs"),
    "check-data": (
        ["check-data", "--train", "text.jsonl", "--valid", "text.jsonl", "--tokenizer", "model"],
        "leaked_fraction",
    ),
    "probe": (
        ["probe", "model", "prompts.jsonl", "--max-new-tokens", "4", "--samples", "1"],
        "health_score",
    ),
    "ask": (["ask", "model", "text.jsonl", "--template", "question.txt"], "p_yes"),
    "compare, models": (["compare", "model", "model", "text.jsonl"], "kl_divergence"),
    "compare, a tokenizer": (
        ["compare", "model", "model", "text.jsonl", "--tokenizer", "model/tokenizer.json"],
        "kl_divergence",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_standard_output_is_the_json(folder, ppl_here, case):
    arguments, key = CASES[case]
    tables = ppl_here(*arguments, cwd=folder).stdout
    done = ppl_here(*arguments, "--json", "-", cwd=folder)
    assert done.returncode == 0
    assert key in json.loads(done.stdout)
    # The tables are the same ones, but for the seconds that a line may have.
    assert tables.splitlines()[1] in done.stderr.splitlines()
    assert not (folder / "-").exists()


def test_comparing_results_and_publishing(folder, ppl_here, fails):
    for name, protocol in (("a", "sliding"), ("b", "lm-eval")):
        command = ["eval", "model", "text.jsonl", "--protocol", protocol, "--json", f"{name}.json"]
        assert ppl_here(*command, cwd=folder).returncode == 0
    done = ppl_here("compare", "a.json", "b.json", "--json", "-", cwd=folder)
    assert json.loads(done.stdout)["pairs"] == 4 and "perplexity" in done.stderr
    fails(folder, ["compare", "a.json", "b.json", "--json", "-", "--csv"], ["--json", "--csv"])
    fails(folder, ["compare", "a.json", "b.json", "--tokenizer", "model"], ["--tokenizer", "text"])
