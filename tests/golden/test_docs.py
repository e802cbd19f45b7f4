"""Pages that are made from code are up to date."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from streammerge.adapters.support import refusal_table, support_table, update
from streammerge.adapters.tuners import NOT_MERGEABLE, all_tuners

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"


def test_adapters_page_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert update(text) == text, "run: make docs"
    assert support_table() in text
    assert refusal_table() in text


def test_every_kind_is_a_row() -> None:
    rows = support_table().splitlines()[2:]
    assert [row.split("|")[1].strip(" `") for row in rows] == list(all_tuners())
    assert len(refusal_table().splitlines()) == 2 + len(NOT_MERGEABLE)


def test_the_page_is_written_in_place(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- refused: generated -->\nold\n<!-- end -->\nafter\n")
    subprocess.run([sys.executable, "-m", "streammerge.adapters.support", str(page)], check=True)
    assert page.read_text() == (
        f"before\n<!-- refused: generated -->\n{refusal_table()}<!-- end -->\nafter\n"
    )
