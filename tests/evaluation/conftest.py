import pytest
from tiny_models import build_model, build_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer(bos=True)


@pytest.fixture(scope="session")
def model(tokenizer):
    return build_model(len(tokenizer) + 3)
