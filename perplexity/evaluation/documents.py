"""A document to evaluate: its text, or its tokens where somebody else cut it into them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Document:
    """``ids``: the tokens of a pre-tokenised document; ``text`` is then what they decode to, filled in by ``evaluate``."""

    id: str
    text: str
    domain: str = "text"
    ids: np.ndarray | None = None

    @cached_property
    def bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.text.encode())

    @cached_property
    def words(self) -> int:
        """Words as lm-evaluation-harness counts them: pieces between runs of white space."""
        return len(re.split(r"\s+", self.text)) if self.text else 0

    @property
    def size(self) -> int:
        """Bytes of text, or tokens where it comes as tokens: what there is to do, for a progress bar."""
        return self.bytes if self.ids is None else len(self.ids)
