"""A document to evaluate: its text, or its tokens where somebody else cut it into them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Document:
    """``ids``: the tokens of a pre-tokenised document; ``text`` is then what they decode to, filled in by ``evaluate``."""

    id: str
    text: str
    domain: str = "text"
    ids: np.ndarray | None = None

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.text.encode())

    @property
    def words(self) -> int:
        """Words as lm-evaluation-harness counts them: pieces between runs of white space."""
        return len(re.split(r"\s+", self.text)) if self.text else 0
