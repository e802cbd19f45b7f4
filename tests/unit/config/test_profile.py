"""The machine profile: a round trip, and nothing in the file that could stop a merge."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from streammerge.config.profile import (
    MachineProfile,
    load_profile,
    profile_path,
    save_profile,
)
from streammerge.config.tuning import MIB, ComputeTuning, DiskTuning
from streammerge.errors import ConfigError

DISK = DiskTuning("direct", "buffered", 4 * MIB, 1, 4)
PROFILE = MachineProfile(
    disks={"8:1 /": DISK, "0:5 /a b": DiskTuning()},
    compute=ComputeTuning(((64, MIB), (1 << 30, 4 * MIB))),
    measurements={"disks": {"8:1 /": {"gbps": 1.5}}, "compute": []},
    created="2026-01-31",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "machine.json"


def write(path: Path, **changes: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**PROFILE.to_dict(), **changes}))


def test_round_trip(path: Path) -> None:
    assert save_profile(PROFILE, path) == path
    assert load_profile(path) == (PROFILE, None)
    assert [entry.name for entry in path.parent.iterdir()] == ["machine.json"]
    save_profile(MachineProfile(created="2026-02-01"), path)
    assert load_profile(path) == (MachineProfile(created="2026-02-01"), None)


def test_a_missing_file_is_an_empty_profile(path: Path) -> None:
    assert load_profile(path) == (MachineProfile(), None)


def test_the_place_of_the_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("STREAMMERGE_PROFILE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert profile_path() == tmp_path / "streammerge" / "machine.json"
    monkeypatch.setenv("HOME", "/home/somebody")
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert profile_path() == Path("/home/somebody/.cache/streammerge/machine.json")
    monkeypatch.setenv("STREAMMERGE_PROFILE", "other.json")
    assert profile_path() == Path("other.json")


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError

    monkeypatch.delenv("STREAMMERGE_PROFILE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    assert profile_path() is None


def test_no_profile_if_the_variable_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMMERGE_PROFILE", "")
    assert load_profile() == (MachineProfile(), None)
    assert save_profile(PROFILE) is None


def test_the_variable_names_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMMERGE_PROFILE", str(path))
    assert save_profile(PROFILE) == path
    assert load_profile() == (PROFILE, None)


def test_keys_that_are_left_out_are_empty(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"version": 1}')
    assert load_profile(path) == (MachineProfile(), None)


def disk(**changes: Any) -> dict[str, Any]:
    return {"disks": {"8:1 /": {**PROFILE.to_dict()["disks"]["8:1 /"], **changes}}}


def scratch(*pairs: Any) -> dict[str, Any]:
    return {"compute": {"scratch_bytes": list(pairs)}}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"version": 2}, "version"),
        ({"version": "1"}, "version"),
        ({"version": True}, "version"),
        ({"created": 5}, "created"),
        ({"created": "yesterday"}, "isoformat"),
        ({"disks": []}, "disks is no JSON object"),
        ({"disks": {"8:1 /": 1}}, "8:1 / is no JSON object"),
        ({"disks": {"8:1 /": {}}}, "other keys"),
        ({"measurements": 1}, "measurements"),
        (disk(colour="red"), "other keys"),
        (disk(read_mode="telepathy"), "read_mode"),
        (disk(read_mode=["direct"]), "read_mode"),
        (disk(write_mode="mmap"), "write_mode"),
        (disk(block_bytes=MIB + 512), "block_bytes .* steps of 4096"),
        (disk(block_bytes=32 << 10), "block_bytes"),
        (disk(block_bytes=512 * MIB), "block_bytes"),
        (disk(block_bytes=1e6), "block_bytes"),
        (disk(readers=0), "readers"),
        (disk(readers=True), "readers"),
        (disk(writers=17), "writers .* 1 .. 16"),
        (disk(writers="2"), "writers"),
        ({"compute": 1}, "compute is no JSON object"),
        ({"compute": {}}, "scratch_bytes"),
        ({"compute": {"scratch_bytes": [[1 << 30, MIB]], "more": 1}}, "scratch_bytes"),
        ({"compute": {"scratch_bytes": 1}}, "scratch_bytes"),
        (scratch(), "scratch_bytes"),
        (scratch(1), "pairs"),
        (scratch([1, 2, 3]), "pairs"),
        (scratch([64, MIB]), "does not end"),
        (scratch([1 << 30, 1]), "a size"),
        (scratch([1 << 30, None]), "a size"),
        (scratch([-1, MIB], [1 << 30, MIB]), "a rank"),
        (scratch([64, MIB], [64, MIB], [1 << 30, MIB]), "a rank"),
    ],
)
def test_what_cannot_be_used_is_left_aside_with_a_note(
    changes: dict[str, Any], why: str, path: Path
) -> None:
    write(path, **changes)
    profile, note = load_profile(path)
    assert profile == MachineProfile()
    assert note is not None
    assert re.search(why, note)
    assert str(path) in note
    assert "streammerge tune" in note
    assert note.isprintable()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"\xff\xfe\x00", "JSON"),
        (b"[]", "no JSON object"),
        (b"[" * 100_000, "JSON|recursion"),
        (b" " * (5 << 20), "sensible size"),
    ],
)
def test_damaged_files(content: bytes, why: str, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    profile, note = load_profile(path)
    assert profile == MachineProfile()
    assert note is not None
    assert re.search(why, note)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "loop", "."):
        profile, note = load_profile(tmp_path / name)
        assert profile == MachineProfile()
        assert note


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="STREAMMERGE_PROFILE"):
        save_profile(PROFILE, tmp_path / "file" / "machine.json")


def test_a_failed_write_keeps_the_old_profile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_profile(PROFILE, path)

    def fail(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ConfigError, match="No space"):
        save_profile(MachineProfile(), path)
    assert load_profile(path) == (PROFILE, None)
    assert len(list(path.parent.iterdir())) == 1


def test_a_new_profile_keeps_what_only_the_old_one_knows() -> None:
    new = MachineProfile(
        disks={"8:1 /": DiskTuning()},
        measurements={"disks": {"8:1 /": {"gbps": 2.0}, "8:2 /b": {}}},
        created="2026-03-01",
    )
    both = new.over(PROFILE)
    assert both.disks == {"8:1 /": DiskTuning(), "0:5 /a b": DiskTuning()}
    assert both.compute == PROFILE.compute
    assert both.measurements == {"disks": {"8:1 /": {"gbps": 2.0}, "8:2 /b": {}}, "compute": []}
    assert both.created == "2026-03-01"
    assert new.over(MachineProfile()) == new
