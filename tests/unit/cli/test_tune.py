"""The commands that measure: what they print, and what they do with a profile."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from streammerge.checkpoint.writer import require_space
from streammerge.cli.app import app
from streammerge.config.profile import MachineProfile, load_profile, save_profile
from streammerge.config.tuning import MIB, ComputeTuning, DiskTuning
from streammerge.errors import DiskSpaceError

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

OLD = MachineProfile(disks={"9:9 /old": DiskTuning()}, created="2020-01-01")
SETTING = {
    "read_mode": "direct",
    "write_mode": "buffered",
    "block_bytes": 4 * MIB,
    "readers": 2,
    "writers": 1,
    "read_gbps": 3.25,
    "write_gbps": 1.5,
    "both_gbps": 1.125,
}
MEASURED = MachineProfile(
    disks={"8:1 /": DiskTuning("direct", "buffered", 4 * MIB, 2, 1)},
    compute=ComputeTuning(),
    measurements={
        "disks": {
            "8:1 /": {
                "folder": "/data",
                "fs_type": "xfs",
                "sample_bytes": 10**9,
                "settings": [
                    {**SETTING, "is_chosen": True},
                    {**SETTING, "block_bytes": MIB, "is_chosen": False},
                ],
            }
        },
        "compute": [
            {
                "dtype": "BF16",
                "rank": 16,
                "threads": 2,
                "scratch_bytes": size,
                "gbps": rate,
                "is_chosen": mark,
            }
            for size, rate, mark in ((MIB >> 1, 1.25, True), (MIB, 1.0, False))
        ],
    },
    created="2026-01-01",
)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Answer at once, and keep what was asked for."""
    calls: list[Any] = []

    def tune(folders: Any, *, sample_bytes: int, quick: bool, progress: Any) -> MachineProfile:
        calls.append((list(map(str, folders)), sample_bytes, quick))
        progress("measuring")
        return MEASURED

    monkeypatch.setattr("streammerge.engine.tune.tune", tune)
    return calls


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "profile.json"
    monkeypatch.setenv("STREAMMERGE_PROFILE", str(path))
    return path


def test_tables_and_the_place_of_the_profile(asked: list[Any], profile: Path) -> None:
    result = invoke("tune")
    assert result.exit_code == 0, result.output
    assert asked == [(["."], 10**9, False)]
    assert result.stderr == "measuring\n"
    lines = [line.split() for line in result.stdout.splitlines()]
    chosen = ["*", "direct", "buffered", "4", "MiB", "2", "1", "3.25", "1.50", "1.12"]
    assert chosen in lines
    assert [*chosen[1:3], "1", *chosen[4:]] in lines
    assert ["dtype", "rank", "0.5", "MiB", "1", "MiB"] in lines
    assert ["BF16", "16", "1.25*", "1.00"] in lines
    assert "/data (xfs)" in result.stdout
    assert f"written to  {profile}" in result.stdout
    assert load_profile() == (MEASURED, None)


def test_json_and_options(asked: list[Any], profile: Path, tmp_path: Path) -> None:
    result = invoke("tune", tmp_path, "other", "--size", "64MiB", "--quick", "--json")
    assert result.exit_code == 0, result.output
    assert asked == [([str(tmp_path), "other"], 64 * MIB, True)]
    assert json.loads(result.stdout) == {"written_to": str(profile), **MEASURED.to_dict()}


def test_other_disks_of_an_older_profile_are_kept(asked: list[Any], profile: Path) -> None:
    save_profile(OLD)
    assert invoke("tune").exit_code == 0
    found, _ = load_profile()
    assert found.disks == {**OLD.disks, **MEASURED.disks}
    assert found.created == MEASURED.created


def test_without_a_profile_nothing_is_written(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMMERGE_PROFILE", "")
    assert "nowhere" in invoke("tune").stdout
    assert json.loads(invoke("tune", "--json").stdout)["written_to"] is None


def test_faults(asked: list[Any], profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke("tune", "--size", "lots")
    assert result.exit_code == 2
    assert "--size" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not asked

    def fail(*_: object, **__: object) -> None:
        raise DiskSpaceError("odd")

    monkeypatch.setattr("streammerge.engine.tune.tune", fail)
    result = invoke("tune", "--json")
    assert result.exit_code == 4
    assert json.loads(result.stdout)["error"] == "DiskSpaceError"
    assert not profile.exists()


@pytest.mark.parametrize("command", ["tune", "bench"])
def test_help(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.fixture
def config(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    path = tmp_path / "export.yaml"
    path.write_text(
        f"model_name_or_path: {folders[0]}\nadapter_name_or_path: {folders[1]}\n"
        f"export_dir: {tmp_path / 'out' / 'merged'}\n"
    )
    return path


def test_bench_compares_with_the_floor(config: Path, profile: Path, tmp_path: Path) -> None:
    before = sorted(entry.name for entry in tmp_path.iterdir())
    result = invoke("bench", config, "--runs", "2", "--json", "threads=1")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert len(report["runs_seconds"]) == len(report["floor_runs_seconds"]) == 2
    assert report["ratio"] == pytest.approx(report["seconds"] / report["floor_seconds"])
    assert report["floor_bytes"] == (tmp_path / "base" / "model.safetensors").stat().st_size
    assert report["threads"]["compute"] == 1
    assert report["binding"] in report["busy_seconds"]
    assert report["peak_rss_bytes"] > 10**7
    assert "torch" in report["machine"]
    assert len(result.stderr.splitlines()) == 4
    # nothing is published, and nothing left
    assert not (tmp_path / "out" / "merged").exists()
    left = sorted(entry.name for entry in tmp_path.iterdir() if entry.name != "out")
    assert left == before
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_bench_as_a_person_reads_it(config: Path, profile: Path) -> None:
    result = invoke("bench", config, "--runs", "1")
    assert result.exit_code == 0, result.output
    for word in ("machine", "export", "a plain copy", "times the floor", "peak", "bound by"):
        assert word in result.stdout


def test_bench_needs_room_for_the_floor(
    config: Path, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def require(place: Path, *, needed: int, **options: Any) -> None:
        require_space(place, needed=needed + 10**18, **options)

    monkeypatch.setattr("streammerge.engine.bench.require_space", require)
    result = invoke("bench", config, "--runs", "1", "--json")
    assert result.exit_code == 4
    assert "floor" in result.stderr
