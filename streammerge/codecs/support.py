"""The table of stored formats, as docs/codecs.md shows it: made from the registry.

`python -m streammerge.codecs.support docs/codecs.md` brings the file up to date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from streammerge.codecs.registry import all_codecs

__all__ = ["format_table", "update"]

_SECTION = re.compile(r"(<!-- formats: generated -->\n).*?(<!-- end -->)", re.DOTALL)


def format_table() -> str:
    """Return the formats as a Markdown table."""
    lines = [
        "| format | selected by | tensors of a weight | written | bits of | remarks |",
        "|---|---|---|---|---|---|",
    ]
    for codec in all_codecs():
        cells = (
            codec.title,
            f"`{codec.selector}`",
            ", ".join(f"`{name}`" for name in codec.stored.split(", ")),
            "yes" if codec.encodes else "no",
            codec.reference,
            codec.remarks.replace("|", "\\|"),
        )
        lines.append(f"| {' | '.join(cells)} |".replace("  |", " |"))
    return "\n".join(lines) + "\n"


def update(text: str) -> str:
    """Return a page with its table made anew."""
    return _SECTION.sub(lambda match: match[1] + format_table() + match[2], text)


if __name__ == "__main__":
    for page in map(Path, sys.argv[1:]):
        page.write_text(update(page.read_text(encoding="utf-8")), encoding="utf-8")
