"""Names and texts of files are shown, in a terminal and on the page: none of them acts."""

import json
from html.parser import HTMLParser

import pytest
from tiny_models import save_small_model

from perplexity.errors import ACTING, visible

ESCAPES = "\x1b[31mred\x1b[0m \x1b]8;;https://evil.example\x07 \x9b2J \u202egpj.exe"
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "javascript:alert(1)",
    "https://evil.example",
    '<a href="https://evil.example">here</a>',
    "[red]x[/red] [link=https://evil.example]x[/link] [/] [bold",
    ":smile: %{x} $x_{$",
    ESCAPES,
]
FILE_NAME = '"><img src=x onerror=alert(1)> [red]x\x1b[31m\u202e.jsonl'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    save_small_model(folder / "model")
    text = "the cat number {} sat on the mat and lay by the door and saw {} dogs"
    rows = [
        {"id": name, "domain": name, "text": text.format(i, 7 * i) + name}
        for i, name in enumerate(HOSTILE)
    ]
    (folder / FILE_NAME).write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = [{"step": i, "train_loss": 5 - i / 100} for i in range(60)]
    (folder / f"run {FILE_NAME}").write_text("".join(json.dumps(row) + "\n" for row in steps))
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "model", FILE_NAME],
        [
            "check-data",
            "--train",
            FILE_NAME,
            "--valid",
            FILE_NAME,
            "--write-clean",
            f"clean {FILE_NAME}",
        ],
        [
            "probe",
            "model",
            FILE_NAME,
            "--samples",
            "1",
            "--max-new-tokens",
            "4",
            "--prompt-tokens",
            "4",
        ],
        ["monitor", f"run {FILE_NAME}"],
        ["report", f"run {FILE_NAME}", "--svg", f"{FILE_NAME}.svg", "--title", ESCAPES],
        ["monitor", f"no {FILE_NAME}"],
        ["monitor", "history", f"--{FILE_NAME}"],
        ["eval", "model", FILE_NAME, "--text-column", ESCAPES],
    ],
)
def test_a_terminal_shows_names(folder, arguments, ppl_here):
    done = ppl_here(*arguments, cwd=folder)
    assert done.returncode in (0, 2)
    # No colour is asked for here: what is left of control characters would be the names' own.
    assert not ACTING.search(done.stdout) and not ACTING.search(done.stderr)
    if arguments[0] == "check-data":
        shown = "".join(done.stdout.split())
        for name in ("[red]x[/red]", "[link=https", ":smile:", "<script>alert(1)", "[31mred"):
            assert name in shown
    if arguments[-1] == f"no {FILE_NAME}":
        assert visible(FILE_NAME) in done.stderr and done.returncode == 2


class Page(HTMLParser):
    """Elements, attributes and the visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements, self.attributes, self.text, self.script = [], [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


def test_a_page_shows_names(folder, tmp_path, monkeypatch, ppl_here):
    """Plotly reads links in the name of a curve, which a probe's file gives to a scorer."""
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "")
    run = [f"run {FILE_NAME}", "--output", tmp_path / "page.html"]
    assert ppl_here("report", *run, cwd=folder).returncode == 0
    plain = Page((tmp_path / "page.html").read_text())
    check = ["--train", FILE_NAME, "--valid", FILE_NAME, "--json", tmp_path / "data.json"]
    small = ["--samples", "1", "--max-new-tokens", "4", "--prompt-tokens", "4"]
    assert ppl_here("check-data", *check, cwd=folder).returncode == 0
    assert (
        ppl_here(
            "eval", "model", FILE_NAME, "--json", tmp_path / "eval.json", cwd=folder
        ).returncode
        == 0
    )
    assert (
        ppl_here(
            "probe", "model", FILE_NAME, *small, "--json", tmp_path / "p.json", cwd=folder
        ).returncode
        == 0
    )
    record = json.loads((tmp_path / "p.json").read_text())
    for name in HOSTILE:
        record["health"]["parts"][name] = {"weight": 10, "score": 0.5, "evidence": name}
        record["notes"].append(name)
    finding = {
        "signal": HOSTILE[0],
        "severity": "warning",
        "evidence": HOSTILE[1],
        "advice": HOSTILE[4],
    }
    record |= {"model": {"name": HOSTILE[1]}, "findings": [finding]}
    probes = []
    for step in (1, 2):
        path = tmp_path / f"probe{step}.json"
        path.write_text(json.dumps(record | {"step": step}))
        probes += ["--probe", path]
    files = ["--eval", tmp_path / "eval.json", "--data", tmp_path / "data.json", *probes]
    done = ppl_here("report", *run, *files, "--title", HOSTILE[0], cwd=folder)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.elements.count("script") == plain.elements.count("script")
    assert not {"a", "img", "iframe", "link", "object"} & set(page.elements)
    assert {name for name, _ in page.attributes} <= {name for name, _ in plain.attributes} | {
        "style",
        "class",
    }
    assert not any(
        "evil" in (value or "") or "alert" in (value or "") for _, value in page.attributes
    )
    for name in HOSTILE[:7]:
        assert name in page.text
    # Of the figures Plotly makes pseudo-HTML: in their names nothing begins an element.
    data = text[text.index('type="application/json">') :]
    figures = json.loads(data[data.index(">") + 1 : data.index("</script>")])
    names = [trace["name"] for figure in figures.values() for trace in figure["data"]]
    assert any("evil" in name for name in names) and not any(
        "<" in name or "%{" in name for name in names
    )
