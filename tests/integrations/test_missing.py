"""Without its package an integration says in one line which extra brings it."""

import json
import sys

import pytest
from processes import run

# integration -> the packages it needs, by the name of any of them
NEEDS = {
    "transformers": ["transformers"],
    "torchmetrics": ["torchmetrics"],
    "lightning": ["lightning", "pytorch_lightning"],
}
HIDE = """
import importlib, importlib.util, json, sys
import perplexity.integrations.tracking
assert not {"wandb", "tensorboard"} & sys.modules.keys()
hidden = set()
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] in hidden else find(name, package)
)
said = {}
for module, packages in json.loads(sys.argv[1]).items():
    hidden = set(packages)
    try:
        importlib.import_module(f"perplexity.integrations.{module}")
    except ImportError as error:
        said[module] = str(error)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said():
    """What each integration says, all in one process: none of them is imported at last."""
    done = run(sys.executable, "-c", HIDE, json.dumps(NEEDS))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", NEEDS)
def test_the_extra_is_named(said, module):
    """The trackers, which are imported first, need nothing."""
    expected = f"perplexity.integrations.{module}: needs {module}; "
    assert said[module] == expected + "install fused-perplexity[integrations]"
