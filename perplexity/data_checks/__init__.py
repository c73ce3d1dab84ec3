"""Checks of training and validation text: leakage, splits, vocabulary, tokenizer."""

from .checks import DataCheck, check_data
from .findings import Finding
from .index import Text

__all__ = ["DataCheck", "Finding", "Text", "check_data"]
