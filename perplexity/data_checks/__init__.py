"""Checks of training and validation text: leakage, sizes, distribution, vocabulary."""

from ..errors import needing
from ..findings import Finding

with needing(__name__, "data"):
    from .checks import DataCheck, check_data
    from .index import Text

__all__ = ["DataCheck", "Finding", "Text", "check_data"]
