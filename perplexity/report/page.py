"""The page that reports are made of: templates, figures and the library that draws them."""

from __future__ import annotations

import base64
import datetime
import json
import zlib
from importlib import resources
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import InputError
from ..files import write_text

# RFC 1924's, but for "<" and "&".
RFC_1924 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"
ALPHABET = RFC_1924.replace("<", ".").replace("&", ",")
FROM_RFC_1924 = str.maketrans(RFC_1924, ALPHABET)


def write_page(
    path: str | Path,
    template: str,
    drawn: dict[str, dict],
    *,
    command: str | None = None,
    **values: Any,
) -> None:
    """Write one HTML file that needs no network; every string of ``values`` is escaped.

    Args:
        path: the file, which is written whole or left as it was.
        template: "report.html" or "runs.html".
        drawn: Plotly figures by the id of the element they are drawn in.
        command: what made the page, for its foot.
        values: what the template shows.

    Raises:
        InputError: a package is missing, or the file cannot be written.
    """
    try:
        import jinja2
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise InputError(f"report: needs {error.name}; install fused-perplexity[report]")
    folder = resources.files(__package__)
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
    )
    environment.filters["n"] = lambda value, places=0: (
        "–" if value is None else f"{float(value):,.{places}f}"
    )
    plain = jinja2.utils.markupsafe.Markup
    # The data stand inside <script>, which no text of theirs may end.
    data = json.dumps(drawn, allow_nan=False).replace("<", "\\u003c")
    made = f"Made on {datetime.date.today().isoformat()} with fused-perplexity {__version__}"
    packed = zlib.compress(get_plotlyjs().encode(), 9)
    page = environment.get_template(template).render(
        **values,
        data=plain(data),
        library=plain(base_85(packed)),
        library_bytes=len(packed),
        alphabet=plain(json.dumps(ALPHABET)),
        made=f"{made}: {command}" if command else made,
    )
    write_text(path, page)


def base_85(data: bytes) -> str:
    """Return ``data``, filled up with zeros to whole words of 4 bytes, as 5 letters a word.

    A fifth smaller than base 64 would be, beside which the page has to stay under 2 MB. The letters
    mean nothing in HTML.

    Example:
        >>> base_85(b"page")
        'aA9X.'
    """
    filled = data + bytes(-len(data) % 4)
    return base64.b85encode(filled).decode().translate(FROM_RFC_1924)
