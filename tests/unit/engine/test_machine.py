"""How files are read and written: what is asked for, what was measured, what is good anyway."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from streammerge.checkpoint.mounts import Mount
from streammerge.config import ExportConfig, parse_config
from streammerge.config.profile import MachineProfile, save_profile
from streammerge.config.tuning import MIB, ComputeTuning, DiskTuning
from streammerge.engine import machine
from streammerge.engine.machine import choose_io, disk_key
from streammerge.plan.memory import RunShape

if TYPE_CHECKING:
    from collections.abc import Callable

IN, OUT = Path("/in/base"), Path("/out/merged")
MOUNTS = {"in": "8:1 /in", "out": "8:2 /out"}
MEASURED = DiskTuning("mmap", "direct", block_bytes=3 * MIB, readers=5, writers=6)


@pytest.fixture(autouse=True)
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "machine.json"
    monkeypatch.setenv("STREAMMERGE_PROFILE", str(path))
    return path


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Two disks, with the file systems that are named."""

    def mount(source: str = "ext4", target: str = "ext4") -> None:
        found = {"in": Mount("8:1", Path("/in"), source), "out": Mount("8:2", Path("/out"), target)}
        monkeypatch.setattr(machine, "mount_of", lambda path: found[path.parts[1]])

    mount()
    return mount


def config(**options: Any) -> ExportConfig:
    return parse_config({"model_name_or_path": str(IN), "export_dir": str(OUT), **options})


def choose(**options: Any) -> tuple[str, str, int, int]:
    io, shape, notes = choose_io(config(**options), base=IN, output=OUT)
    assert (shape.readers, shape.writers) == (io.readers, io.writers)
    assert notes == ()
    return io.read_mode, io.write_mode, io.readers, io.writers


@pytest.mark.parametrize(
    ("io", "expected"),
    [
        ("auto", ("direct", "direct", 2, 2)),
        ("direct", ("direct", "direct", 2, 2)),
        ("buffered", ("buffered", "buffered", 1, 1)),
        ("mmap", ("mmap", "direct", 1, 2)),
    ],
)
def test_without_a_profile(
    io: str, expected: tuple[str, str, int, int], mounted: Callable[..., None]
) -> None:
    assert choose(io=io) == expected


@pytest.mark.parametrize(
    ("io", "expected"),
    [
        ("auto", ("buffered", "buffered", 1, 1)),
        ("direct", ("direct", "direct", 1, 1)),
        ("buffered", ("buffered", "buffered", 1, 1)),
        ("mmap", ("mmap", "buffered", 1, 1)),
    ],
)
@pytest.mark.parametrize("fs_type", ["tmpfs", "nfs4", "fuse.sshfs", "unknown"])
def test_where_direct_transfers_are_not_known_to_work(
    fs_type: str, io: str, expected: tuple[str, str, int, int], mounted: Callable[..., None]
) -> None:
    mounted(fs_type, fs_type)
    assert choose(io=io) == expected


def test_each_disk_is_judged_alone(mounted: Callable[..., None]) -> None:
    mounted("nfs4", "xfs")
    assert choose() == ("buffered", "direct", 1, 2)
    mounted("xfs", "nfs4")
    assert choose() == ("direct", "buffered", 2, 1)


@pytest.mark.parametrize(
    ("io", "expected"),
    [
        ("auto", ("mmap", "direct", 5, 2)),
        ("direct", ("direct", "direct", 5, 2)),
        ("buffered", ("buffered", "buffered", 1, 1)),
        ("mmap", ("mmap", "direct", 1, 2)),
    ],
)
def test_what_was_measured_on_the_disk_that_is_read(
    io: str, expected: tuple[str, str, int, int], mounted: Callable[..., None]
) -> None:
    save_profile(MachineProfile({MOUNTS["in"]: MEASURED}))
    assert choose(io=io) == expected


def test_what_was_measured_on_the_disk_that_is_written(mounted: Callable[..., None]) -> None:
    save_profile(MachineProfile({MOUNTS["out"]: MEASURED}))
    mounted("nfs4", "nfs4")
    assert choose() == ("buffered", "direct", 1, 6)
    # what was measured counts more than what is known of the file system
    save_profile(MachineProfile({MOUNTS["out"]: DiskTuning(write_mode="buffered", writers=4)}))
    mounted("ext4", "ext4")
    assert choose() == ("direct", "buffered", 2, 1)


def test_the_measurements_of_another_disk_do_not_count(mounted: Callable[..., None]) -> None:
    save_profile(MachineProfile({"8:9 /in": MEASURED, "8:1 /elsewhere": MEASURED}))
    assert choose() == ("direct", "direct", 2, 2)


@pytest.mark.parametrize("io", ["auto", "direct", "buffered", "mmap"])
def test_archives_are_written_in_order_by_one_thread(io: str, mounted: Callable[..., None]) -> None:
    save_profile(MachineProfile({MOUNTS["out"]: MEASURED}))
    assert choose(io=io, export_legacy_format=True)[1::2] == ("buffered", 1)


def test_blocks_are_those_of_the_disk_that_wants_more(mounted: Callable[..., None]) -> None:
    for source, target, expected in ((3, 5, 5), (6, 1, 6)):
        save_profile(
            MachineProfile(
                {
                    MOUNTS["in"]: DiskTuning(block_bytes=source * MIB),
                    MOUNTS["out"]: DiskTuning(block_bytes=target * MIB),
                }
            )
        )
        assert choose_io(config(), base=IN, output=OUT)[1].block_bytes == expected * MIB


def test_threads_digest_and_products(mounted: Callable[..., None]) -> None:
    io, shape, _ = choose_io(config(threads=7, digest="sha256"), base=IN, output=OUT)
    assert io.digest == "sha256"
    assert shape == RunShape(7, 2, 2, DiskTuning().block_bytes, ComputeTuning())
    compute = ComputeTuning(((16, MIB), (1 << 30, 2 * MIB)))
    save_profile(MachineProfile(compute=compute))
    assert choose_io(config(), base=IN, output=OUT)[1].compute == compute


def test_a_profile_that_cannot_be_used_is_a_note(
    profile: Path, mounted: Callable[..., None]
) -> None:
    profile.write_text("{")
    io, _, notes = choose_io(config(), base=IN, output=OUT)
    assert (io.read_mode, io.write_mode) == ("direct", "direct")
    (note,) = notes
    assert str(profile) in note


def test_a_disk_is_its_device_and_where_it_is_mounted(mounted: Callable[..., None]) -> None:
    assert disk_key(IN) == MOUNTS["in"]
    assert disk_key(OUT) == MOUNTS["out"]
