"""What an export asks of the memory before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from streammerge.engine import export as export_module
from streammerge.errors import MemoryBudgetError

if TYPE_CHECKING:
    from pathlib import Path


def settings(folders: tuple[Path, Path], output: Path, max_memory: str) -> dict[str, object]:
    base, adapter = folders
    return {
        "model_name_or_path": str(base),
        "adapter_name_or_path": str(adapter),
        "export_dir": str(output),
        "max_memory": max_memory,
    }


def test_a_torch_larger_than_foreseen_ends_the_run(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = iter([10**8])
    monkeypatch.setattr(export_module, "rss_bytes", lambda: next(held, 10**10))
    with pytest.raises(MemoryBudgetError, match="torch takes more memory"):
        export_module.export(settings(folders, tmp_path / "out", "4GB"))
    assert not (tmp_path / "out").exists()


def test_under_a_low_ceiling_the_buffers_fit_what_torch_leaves(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # too low to have room for any torch, and so it is loaded before the buffers are sized
    held = iter([10**8])
    monkeypatch.setattr(export_module, "rss_bytes", lambda: next(held, 3 * 10**8))
    report = export_module.export(settings(folders, tmp_path / "out", "640MB"))
    assert 3 * 10**8 < report.predicted_peak_bytes <= 640 * 10**6
