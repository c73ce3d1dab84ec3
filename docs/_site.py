"""Hook of mkdocs: what documents link to outside of docs/ becomes a part of the site.

Result files and pictures are copied; a link to a source file or to a folder becomes its name.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]+)\]\(\.\./(?P<path>[^)\s#]+)[^)]*\)")


def on_files(files: Files, config) -> Files:
    """Add the benchmarks' results to the site's files."""
    for path in sorted((ROOT / "bench" / "results").iterdir()):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace links that lead out of docs/."""

    def replaced(link: re.Match[str]) -> str:
        if link["path"].startswith("bench/results/"):
            return f"{link['picture']}[{link['text']}]({link['path']})"
        return link["text"]

    return OUTSIDE.sub(replaced, markdown)
