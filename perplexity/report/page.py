"""The page that reports are made of: templates, figures and the library that draws them."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import write_text


def write_page(path: str | Path, template: str, drawn: dict[str, dict], **values: Any) -> None:
    """Write one HTML file that needs no network; every string of ``values`` is escaped.

    Args:
        path: the file, which is written whole or left as it was.
        template: "report.html" or "runs.html".
        drawn: Plotly figures by the id of the element they are drawn in.
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
    library = get_plotlyjs().replace("</script", "<\\/script")
    page = environment.get_template(template)
    write_text(path, page.render(**values, data=plain(data), library=plain(library)))
