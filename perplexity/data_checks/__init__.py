"""Checks of training and validation text: leakage, splits, vocabulary, tokenizer."""

from ..findings import Finding
from .checks import DataCheck, check_data
from .index import Text

__all__ = ["DataCheck", "Finding", "Text", "check_data"]
