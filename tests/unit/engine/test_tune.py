"""Tuning: what is chosen from given speeds, and that nothing is left behind."""

from __future__ import annotations

import shutil
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from streammerge.config.tuning import KIB, MIB, ComputeTuning, DiskTuning
from streammerge.engine import tune_compute, tune_disk
from streammerge.engine.floor import FloorResult
from streammerge.engine.machine import disk_key
from streammerge.engine.tune import tune
from streammerge.engine.tune_choice import prefer
from streammerge.engine.tune_disk import drop_pages, measure_disk
from streammerge.errors import ConfigError, DiskSpaceError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

USUAL = (ComputeTuning().scratch_for(64), ComputeTuning().scratch_for(256))
BUFFERED = DiskTuning("buffered", "buffered", 8 * MIB, 1, 1)


class Stand(NamedTuple):
    """A disk whose speeds are given."""

    use: Callable[..., None]
    calls: list[tuple[str, DiskTuning]]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Stand:
    calls: list[tuple[str, DiskTuning]] = []

    def use(speed: Callable[[DiskTuning], float], *, kind: str = "ext4", refuses: str = "") -> None:
        def result(way: str, tuning: DiskTuning) -> FloorResult:
            calls.append((way, tuning))
            modes: list[Any] = [
                "buffered" if side in refuses else mode
                for side, mode in (("read", tuning.read_mode), ("write", tuning.write_mode))
            ]
            return FloorResult(1, 1 / speed(tuning), *modes)

        def write(path: Path, *, tuning: DiskTuning, **_: object) -> FloorResult:
            path.write_bytes(b"x")
            return result("write", tuning)

        def read(_: object, *, tuning: DiskTuning) -> FloorResult:
            return result("read", tuning)

        def move(_: object, __: object, *, tuning: DiskTuning, **___: object) -> FloorResult:
            return result("both", tuning)

        mount = tune_disk.mount_of
        monkeypatch.setattr(tune_disk, "write_bytes", write)
        monkeypatch.setattr(tune_disk, "read_bytes", read)
        monkeypatch.setattr(tune_disk, "move_bytes", move)
        monkeypatch.setattr(
            tune_disk,
            "mount_of",
            lambda path: type(mount(path))("8:1", mount(path).point, kind),
        )

    return Stand(use, calls)


def measure(
    folder: Path, *, quick: bool = False, nbytes: int = 10**9
) -> tuple[DiskTuning, dict[str, Any]]:
    lines: list[str] = []
    chosen, found = measure_disk(folder, sample_bytes=nbytes, quick=quick, progress=lines.append)
    assert "chosen" in lines[-1]
    assert all(str(folder) in line for line in lines)
    assert not list(folder.iterdir())
    return chosen, found


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**13, "total": 10**13})
    )


def test_of_equals_the_default_is_taken() -> None:
    rates = {1: 9.6, 2: 10.0, 3: 9.7}
    assert prefer(rates, default=1, cost=int) == 1
    assert prefer(rates, default=9, cost=int) == 1
    assert prefer({**rates, 4: 20.0}, default=1, cost=int) == 4
    assert prefer({1: 1.0, 2: 1.0, 3: 1.02}, default=9, cost=lambda _: 1) == 3


@pytest.mark.parametrize(
    ("kind", "default"), [("ext4", DiskTuning()), ("nfs4", BUFFERED), ("fuse.sshfs", BUFFERED)]
)
def test_where_nothing_makes_a_difference_the_default_stays(
    kind: str, default: DiskTuning, disk: Stand, tmp_path: Path
) -> None:
    disk.use(lambda _: 1.0, kind=kind)
    chosen, found = measure(tmp_path)
    assert chosen == default
    assert found["fs_type"] == kind
    (marked,) = [s for s in found["settings"] if s["is_chosen"]]
    assert (marked["block_bytes"], marked["both_gbps"]) == (8 * MIB, 1.0)


def test_every_setting_is_measured(disk: Stand, tmp_path: Path) -> None:
    disk.use(lambda _: 1.0)
    _, found = measure(tmp_path)
    seen = {
        (s["read_mode"], s["write_mode"], s["block_bytes"], s["readers"], s["writers"])
        for s in found["settings"]
    }
    for block in (MIB, 4 * MIB, 8 * MIB, 16 * MIB):
        for threads in (1, 2, 4):
            assert ("direct", "direct", block, threads, threads) in seen
            # pages are written in their order
            assert ("buffered", "buffered", block, threads, 1) in seen
    assert len(seen) == 24
    for way in ("read", "write", "both"):
        assert len([call for call in disk.calls if call == (way, DiskTuning())]) >= 3


@pytest.mark.parametrize(
    "best",
    [
        DiskTuning("direct", "direct", MIB, 4, 4),
        DiskTuning("buffered", "buffered", 16 * MIB, 2, 1),
        DiskTuning("buffered", "direct", 8 * MIB, 2, 2),
        DiskTuning("direct", "direct", 8 * MIB, 1, 4),
    ],
    ids=str,
)
def test_what_is_much_faster_is_chosen(best: DiskTuning, disk: Stand, tmp_path: Path) -> None:
    disk.use(lambda tuning: 2.0 if tuning == best else 1.0)
    chosen, found = measure(tmp_path)
    assert chosen == best
    (marked,) = [s for s in found["settings"] if s["is_chosen"]]
    assert (marked["block_bytes"], marked["both_gbps"]) == (best.block_bytes, 2.0)


def test_among_equals_the_one_with_the_least_memory(disk: Stand, tmp_path: Path) -> None:
    disk.use(lambda tuning: 2.0 if tuning.block_bytes == 4 * MIB else 1.0)
    chosen, _ = measure(tmp_path)
    assert (chosen.block_bytes, chosen.readers, chosen.writers) == (4 * MIB, 1, 1)


def test_what_was_fast_by_luck_has_to_win_again(disk: Stand, tmp_path: Path) -> None:
    lucky, runs = DiskTuning("direct", "direct", MIB, 1, 1), count()
    # its first three runs of each way
    disk.use(lambda tuning: 2.0 if tuning == lucky and next(runs) < 9 else 1.0)
    assert measure(tmp_path)[0] == DiskTuning()


@pytest.mark.parametrize(
    ("refuses", "modes"),
    [
        ("read", {("buffered", "direct"), ("buffered", "buffered")}),
        ("write", {("direct", "buffered"), ("buffered", "buffered")}),
        ("read write", {("buffered", "buffered")}),
    ],
)
def test_what_the_file_system_refuses_is_not_chosen(
    refuses: str, modes: set[tuple[str, str]], disk: Stand, tmp_path: Path
) -> None:
    disk.use(lambda _: 1.0, refuses=refuses)
    chosen, found = measure(tmp_path, quick=True)
    assert chosen == BUFFERED
    assert {(s["read_mode"], s["write_mode"]) for s in found["settings"]} == modes


def test_quick_measures_less(disk: Stand, tmp_path: Path) -> None:
    disk.use(lambda _: 1.0)
    assert len(measure(tmp_path, quick=True)[1]["settings"]) == 8
    assert len([call for call in disk.calls if call[0] == "write"]) < 10


def test_no_thread_is_without_a_block(disk: Stand, tmp_path: Path) -> None:
    disk.use(lambda _: 1.0)
    _, found = measure(tmp_path, nbytes=5 * MIB)
    for setting in found["settings"]:
        threads = max(setting["readers"], setting["writers"])
        is_default = setting["block_bytes"] == 8 * MIB
        assert setting["block_bytes"] * threads <= 5 * MIB or is_default


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9}))
    with pytest.raises(DiskSpaceError, match=r"2\.06 GB free"):
        measure(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tune_disk.tempfile, "TemporaryDirectory", fail)
    with pytest.raises(ResourceError, match="Permission denied"):
        measure(tmp_path)


@pytest.mark.parametrize("fault", [KeyboardInterrupt, ResourceError("odd")])
def test_the_sample_is_removed_whatever_happens(
    fault: BaseException, disk: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise fault

    disk.use(lambda _: 1.0)
    monkeypatch.setattr(tune_disk, "move_bytes", fail)
    with pytest.raises((KeyboardInterrupt, ResourceError)):
        measure(tmp_path)
    assert not list(tmp_path.iterdir())


def test_dropped_pages_leave_the_file_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc" * 5000)
    drop_pages([tmp_path / "file"])
    assert (tmp_path / "file").read_bytes() == b"abc" * 5000


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_compute, "_COLUMNS", 64)
    monkeypatch.setattr(tune_compute, "_TILE_BYTES", 16 * KIB)


@pytest.mark.usefixtures("_small_tiles")
def test_a_small_sample_gives_a_whole_profile(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    lines: list[str] = []
    profile = tune(
        [tmp_path, tmp_path / "inner"], sample_bytes=2 * MIB, quick=True, progress=lines.append
    )
    # both are on one disk
    assert list(profile.disks) == list(profile.measurements["disks"]) == [disk_key(tmp_path)]
    assert profile.compute is not None
    assert [highest for highest, _ in profile.compute.scratch_bytes] == [64, 1 << 30]
    cells = profile.measurements["compute"]
    assert {cell["dtype"] for cell in cells} == {"BF16", "F16", "F32"}
    assert {cell["rank"] for cell in cells} == {16, 64, 256}
    assert len(cells) == 45
    assert sum(cell["is_chosen"] for cell in cells) == 9
    assert all(cell["gbps"] > 0 for cell in cells)
    assert len(lines) >= 10
    assert [entry.name for entry in tmp_path.iterdir()] == ["inner"]


@pytest.mark.parametrize(
    ("fastest", "expected"),
    [
        ({}, USUAL),
        ({16: MIB, 64: MIB}, (MIB, USUAL[1])),
        ({256: 256 * KIB}, (USUAL[0], 256 * KIB)),
        # the ranks of a range count the same, so that these two are as good
        ({16: 2 * MIB, 64: 256 * KIB}, (256 * KIB, USUAL[1])),
    ],
    ids=str,
)
def test_the_size_of_a_product_by_rank(
    fastest: dict[int, int], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def given(_: object, rank: int, **__: object) -> dict[int, float]:
        sizes = tune_compute._SCRATCH_BYTES
        return {size: 1.5 if size == fastest.get(rank) else 1.0 for size in sizes}

    monkeypatch.setattr(tune_compute, "_measure", given)
    tuning, cells = tune_compute.measure_compute(quick=False, progress=lambda _: None)
    assert tuning == ComputeTuning(((64, expected[0]), (1 << 30, expected[1])))
    for cell in cells:
        is_chosen = cell["scratch_bytes"] == expected[cell["rank"] > 64]
        assert cell["is_chosen"] is is_chosen


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too small"):
        tune([tmp_path], sample_bytes=1000)
    with pytest.raises(ConfigError, match="does not exist"):
        tune([tmp_path / "absent"], sample_bytes=MIB)
