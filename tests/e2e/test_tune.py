"""Tuning from the command line, and an export that uses what was measured."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from streammerge.config.profile import load_profile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.e2e.conftest import Case


def test_a_profile_is_written_and_used(
    case: Case, run_cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    folder, path = tmp_path / "disk", tmp_path / "cache" / "machine.json"
    folder.mkdir()
    environment = {**os.environ, "STREAMMERGE_PROFILE": str(path)}
    code, out, errors = run_cli(
        "tune", folder, "--size", "4MB", "--quick", "--json", env=environment
    )
    assert code == 0, errors
    assert not list(folder.iterdir())
    profile, note = load_profile(path)
    assert note is None
    assert json.loads(out) == {"written_to": str(path), **profile.to_dict()}
    assert len(profile.disks) == 1
    assert profile.compute is not None

    code, out, errors = run_cli("plan", case.config, "--json", env=environment)
    assert code == 0, errors
    plan, (disk,) = json.loads(out), profile.disks.values()
    assert (plan["read_mode"], plan["write_mode"]) == (disk.read_mode, disk.write_mode)

    code, _, errors = run_cli("export", case.config, env=environment)
    assert code == 0, errors


def test_a_damaged_profile_is_a_note_and_no_more(
    case: Case, run_cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    path = tmp_path / "machine.json"
    path.write_text("{")
    code, out, errors = run_cli(
        "plan", case.config, "--json", env={**os.environ, "STREAMMERGE_PROFILE": str(path)}
    )
    assert code == 0, errors
    assert any(str(path) in note for note in json.loads(out)["notes"])
