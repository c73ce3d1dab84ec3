"""The README: its Python runs in its order, its commands parse, and its links and claims exist."""

import re
import shlex
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def test_it_is_short():
    assert len(README.splitlines()) <= 160


def test_its_python_runs(tmp_path, monkeypatch, capsys):
    """What a reader has already, a model, its tokenizer and a loop's functions, stands before."""
    from tiny_models import TEXTS, build_model, build_tokenizer
    from transformers import Trainer, TrainingArguments

    monkeypatch.chdir(tmp_path)
    tokenizer = build_tokenizer(bos=True)
    model = build_model(len(tokenizer))
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"][:8]])
    names = dict(
        model=model,
        tokenizer=tokenizer,
        ids=ids,
        labels=ids,
        hidden=model.model(ids).last_hidden_state,
        lm_head=model.lm_head,
        teacher_hidden=torch.randn(1, 8, 16),
        teacher_head=torch.randn(len(tokenizer), 16),
        steps=1200,
        training_step=lambda model: 3.0,
        validation_loss=lambda model: 3.1,
        trainer=Trainer(
            model, TrainingArguments(str(tmp_path / "out"), report_to=[], use_cpu=True)
        ),
    )
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["result"].perplexity > 1
    assert torch.isfinite(names["kl"]).all() and names["entropy"].requires_grad
    assert capsys.readouterr().out.splitlines()[-1] in ("healthy", "watch")
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) >= 1200


def test_its_commands_parse():
    from perplexity.cli import _parser

    commands = re.findall(r"^\$ ppl (.*)$", README, re.M)
    assert len(commands) >= 4
    for command in commands:
        words = shlex.split(command)
        assert _parser(words[0]).parse_args(words).command == words[0]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path) if path else document
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            slugs = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in headings]
            assert anchor in slugs, target


def test_the_site_has_every_page_and_every_export():
    import perplexity

    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name in navigation, page.name
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    for name, module in perplexity._MODULES.items():
        assert f"\n::: perplexity.{module}.{name}\n" in reference, name


def test_every_cell_of_the_feature_table_names_a_test():
    document = ROOT / "docs" / "comparison.md"
    rows = document.read_text(encoding="utf-8").split("## Features")[1].split("\n## ")[0]
    rows = [row for row in rows.split("| --- |")[-1].splitlines()[1:] if row.startswith("|")]
    assert len(rows) >= 25
    for row in rows:
        link = re.search(r'\]\(([\w/.-]+)(?: "(\w+)")?\)', row.split("|")[2])
        assert link, row
        source = (document.parent / link[1]).read_text(encoding="utf-8")
        assert link[2] is None or f"def {link[2]}(" in source, row
        assert link[2] or not link[1].endswith(".py"), row
