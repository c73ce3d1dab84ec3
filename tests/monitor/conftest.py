import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def training_curves():
    """Files of real healthy runs, where the environment names their folder (continuous integration
    does).
    """
    folder = os.environ.get("PERPLEXITY_TRAINING_CURVES")
    if not folder:
        pytest.skip("PERPLEXITY_TRAINING_CURVES names no folder")
    files = sorted(Path(folder).glob("*.csv"))
    assert len(files) == 8, folder
    return files
