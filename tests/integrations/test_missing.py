"""Without its package an integration says in one line which extra brings it."""

import sys

import pytest
from processes import run

HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] in {hidden!r} else find(name, package)
)
try:
    import perplexity.integrations.{module}
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("module", "hidden", "named"),
    [
        ("transformers", ["transformers"], "transformers"),
        ("torchmetrics", ["torchmetrics"], "torchmetrics"),
        ("lightning", ["lightning", "pytorch_lightning"], "lightning"),
    ],
)
def test_the_extra_is_named(module, hidden, named):
    done = run(sys.executable, "-c", HIDE.format(module=module, hidden=hidden))
    said = (
        f"perplexity.integrations.{module}: needs {named}; install fused-perplexity[integrations]\n"
    )
    assert (done.stdout, done.returncode) == (said, 0), done.stderr


def test_trackers_need_nothing():
    code = "import perplexity.integrations.tracking, sys; "
    code += "assert not {'wandb', 'tensorboard'} & sys.modules.keys()"
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
