"""A rich console for untrusted text: file names, ids and documents are shown and do not act."""

from __future__ import annotations

import rich.console
from rich.segment import Segment

from .errors import ACTING


class Console(rich.console.Console):
    """rich's console without markup, emoji codes and control characters of the text.

    An id "[red]" is shown as it is. Of "\\x1b[31m" the part is shown that a terminal does not act
    on: "[31m". The console's own colours and cursor movements are control codes apart from the
    text, and stay.
    """

    def __init__(self, **options) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(self, renderable, options=None):
        """Yield the segments of ``renderable`` without the control characters of its text."""
        for segment in super().render(renderable, options):
            if segment.control is None and ACTING.search(segment.text):
                segment = Segment(ACTING.sub("", segment.text), segment.style)
            yield segment
