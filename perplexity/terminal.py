"""A rich console for text of anyone's: file names, ids and documents are shown, they do not act."""

from __future__ import annotations

import rich.console
from rich.segment import Segment

from .errors import ACTING


class Console(rich.console.Console):
    """rich's console without its markup and emoji codes, and without control characters of the text
    itself.

    An id "[red]" is shown as it is, and of "\\x1b[31m" what a terminal would not act on: "[31m".
    The console's own colours and movements of the cursor are control codes apart from the text, and
    stay.
    """

    def __init__(self, **options) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(self, renderable, options=None):
        for segment in super().render(renderable, options):
            if segment.control is None and ACTING.search(segment.text):
                segment = Segment(ACTING.sub("", segment.text), segment.style)
            yield segment
