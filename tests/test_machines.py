"""Other machines: without the optional packages, and with another default encoding."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from processes import run

ROOT = Path(__file__).parents[1]

# Everything that an extra brings, triton, and numpy, which torch itself works without.
WITHOUT = """
import sys
hidden = {"numpy", "scipy", "triton", "transformers", "tokenizers", "safetensors", "rich",
          "pyarrow", "matplotlib", "plotly", "tensorboard", "xxhash", "sacrebleu", "rouge_score"}

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        absent = name.split(".")[0] in hidden
        return None if absent else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)

import warnings
warnings.simplefilter("ignore")  # torch says that there is no numpy
import torch, perplexity
from perplexity.cli import main

hidden_states, weight = torch.randn(4, 3, requires_grad=True), torch.randn(7, 3)
target = torch.tensor([0, 6, 3, -100])
perplexity.linear_cross_entropy(hidden_states, weight, target).backward()
perplexity.LinearCrossEntropyLoss(3, 7)(hidden_states, target)
perplexity.cross_entropy(hidden_states, torch.zeros(4, dtype=torch.int64))
perplexity.linear_kl_divergence(hidden_states, weight, hidden_states, weight)
statistics = perplexity.token_statistics(hidden_states, weight, target)
metric = perplexity.Perplexity()
metric.update(statistics.nll, target=target)
assert metric.compute()["loss"] > 0

def line(call):
    try:
        call()
    except ImportError as error:
        print(error)

def status(*words):
    try:
        return main(list(words))
    except SystemExit as stopped:
        return stopped.code

line(lambda: perplexity.evaluate)
line(lambda: perplexity.Monitor)
line(lambda: __import__("perplexity.data_checks"))
commands = ["doctor"], ["--help"], ["monitor", "x.csv"], ["eval", "m", "t.txt"]
print([status(*words) for words in commands])

hidden.remove("numpy")  # which the package itself depends on
monitor = perplexity.Monitor(vocabulary_size=50, stop_on="danger")
for step in range(600):
    monitor.log(step, train_loss=1 + 3 * 0.5 ** (step / 100), lr=0.1)
    if step % 50 == 49:
        monitor.log(step, val_loss=1 + 3 * 0.5 ** (step / 100))
print(monitor.diagnose().verdict)
import perplexity.probe
line(lambda: __import__("perplexity.data_checks"))
perplexity.evaluate, perplexity.compare, perplexity.probe.Questioner
"""


def test_without_the_extras():
    """Losses, statistics and metric need torch alone, the monitor numpy; others name an extra."""
    done = run(sys.executable, "-c", WITHOUT)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == [
        "perplexity.evaluate: needs numpy; install fused-perplexity[eval]",
        "perplexity.Monitor: needs numpy; install fused-perplexity[monitor]",
        "perplexity.data_checks: needs numpy; install fused-perplexity[data]",
    ]
    assert "self-check ok" in done.stdout and "usage: ppl" in done.stdout
    assert lines[-3:] == [
        "[0, 0, 2, 2]",
        "healthy",
        "perplexity.data_checks: needs xxhash; install fused-perplexity[data]",
    ]
    assert done.stderr.splitlines() == [
        "ppl monitor: needs rich, pyarrow; install fused-perplexity[monitor]",
        "ppl eval: needs transformers, rich, scipy; install fused-perplexity[eval]",
    ]


@pytest.mark.parametrize("folder", ["perplexity", "kernels"])
def test_text_files_are_utf_8_on_every_system(folder):
    """Without an encoding Windows reads a file in its own code page: Greek is an error there."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and _opens_text(call):
                found.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert found == []


def _opens_text(call: ast.Call) -> bool:
    """Return whether a call opens a text file in the system's own encoding."""
    owner, name = getattr(call.func, "value", None), getattr(call.func, "attr", None)
    name = name or getattr(call.func, "id", None)
    if name not in ("open", "read_text", "write_text", "fdopen"):
        return False
    if ast.unparse(owner) in ("os", "gzip") if owner is not None else name == "write_text":
        return False  # bytes; and the function of that name, which is a text file's writer here
    modes = [ast.unparse(part) for part in call.args]
    binary = name == "open" and any("b" in mode for mode in modes if mode[0] in "'\"")
    return not binary and all(keyword.arg != "encoding" for keyword in call.keywords)


def test_text_without_an_encoding_is_found():
    calls = {
        "path.read_text()": True,
        "open(path)": True,
        "path.open('a', buffering=1)": True,
        "open(path, 'rb')": False,
        "path.write_text(text, encoding='utf-8')": False,
        "gzip.open(path, 'rb')": False,
        "os.open(os.devnull, os.O_WRONLY)": False,
    }
    for code, expected in calls.items():
        assert _opens_text(ast.parse(code, mode="eval").body) is expected, code


def test_the_extras_bring_what_commands_need():
    """Each module that a command needs is in the extra of its error, by the package's metadata."""
    brought = _brought()
    asked = 0
    for path in sorted((ROOT / "perplexity" / "cli").glob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "needs":
                for keyword in call.keywords:
                    modules = {
                        node.value
                        for node in ast.walk(keyword.value)
                        if isinstance(node, ast.Constant)
                    }
                    assert {name.replace("_", "-") for name in modules} <= brought[keyword.arg], (
                        path.name,
                        keyword.arg,
                    )
                    asked += len(modules)
    assert asked > 20


def _brought() -> dict[str, set[str]]:
    """Return the distributions of every extra, those of the extras that it names among them."""
    direct: dict[str, set[str]] = {}
    for line in importlib.metadata.requires("fused-perplexity"):
        wanted, _, marker = line.partition(";")
        if (extra := re.search(r"extra == ['\"](.+?)['\"]", marker)) is not None:
            direct.setdefault(extra[1], set()).add(wanted.strip())
    brought = {}
    for extra in direct:
        left, brought[extra] = [extra], set()
        while left:
            for wanted in direct[left.pop()]:
                if wanted.startswith("fused-perplexity["):
                    left += re.search(r"\[(.+)\]", wanted)[1].split(",")
                else:
                    brought[extra].add(re.match(r"[\w-]+", wanted)[0])
    return brought


def test_the_kernels_import_torch_and_triton_alone():
    """``kernels/`` is below everything else: nothing of perplexity, no extra."""
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        depth = len(path.relative_to(ROOT).parts) - 1
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= depth, (path.name, node.lineno)
                names = [] if node.level else [node.module]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.split(".")[0] in allowed, (path.name, name)
