"""The table of what is supported, as docs/adapters.md shows it: made from the registry.

`python -m streammerge.adapters.support docs/adapters.md` brings the file up to date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from streammerge.adapters.tuners import NOT_MERGEABLE, all_tuners

__all__ = ["refusal_table", "support_table", "update"]

_SECTION = re.compile(r"(<!-- (?P<name>\w+): generated -->\n).*?(<!-- end -->)", re.DOTALL)


def support_table() -> str:
    """Return the kinds that can be merged, as a Markdown table."""
    lines = ["| `peft_type` | | merged weight | weighted sums | remarks |", "|---|---|---|---|---|"]
    for name, tuner in all_tuners().items():
        cells = (
            f"`{name}`",
            tuner.title,
            f"`{_escape(tuner.formula)}`",
            "yes" if tuner.is_additive else "no",
            _escape(tuner.remarks),
        )
        lines.append(f"| {' | '.join(cells)} |".replace("  |", " |"))
    return "\n".join(lines) + "\n"


def refusal_table() -> str:
    """Return the kinds that have no merged form, as a Markdown table."""
    lines = ["| `peft_type` | why |", "|---|---|"]
    lines += [f"| `{name}` | {_escape(reason)} |" for name, reason in NOT_MERGEABLE.items()]
    return "\n".join(lines) + "\n"


def update(text: str) -> str:
    """Return a page with its generated sections made anew."""
    tables = {"supported": support_table(), "refused": refusal_table()}
    return _SECTION.sub(lambda match: match[1] + tables[match["name"]] + match[3], text)


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    for page in map(Path, sys.argv[1:]):
        page.write_text(update(page.read_text(encoding="utf-8")), encoding="utf-8")
