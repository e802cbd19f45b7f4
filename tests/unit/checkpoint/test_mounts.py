"""Which mount a path is on: the table's own rules, and agreement with the kernel."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from streammerge.checkpoint import mounts
from streammerge.checkpoint.mounts import Mount, allows_direct, mount_of

if TYPE_CHECKING:
    from collections.abc import Callable


def device_of(path: Path) -> str:
    number = path.stat().st_dev
    return f"{os.major(number)}:{os.minor(number)}"


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace the kernel's table by lines of device, point and type, or by raw lines."""

    def replace(*entries: tuple[str, object, str] | bytes) -> None:
        lines = [
            entry
            if isinstance(entry, bytes)
            else f"30 1 {entry[0]} / {entry[1]} rw,relatime shared:1 - {entry[2]} src rw".encode()
            for entry in entries
        ]
        path = tmp_path / "mountinfo"
        path.write_bytes(b"\n".join(lines) + b"\n")
        monkeypatch.setattr(mounts, "_TABLE", path)

    return replace


@pytest.mark.parametrize("path", ["/", "/proc/self/status", "/dev/null", "/tmp"])
def test_the_kernels_own_table(path: str) -> None:
    found = mount_of(Path(path))
    assert found.fs_type != "unknown"
    assert Path(path).resolve().is_relative_to(found.point)
    if found.fs_type not in {"btrfs", "overlay"}:
        assert found.device == device_of(Path(path))
    assert mount_of(Path("/proc/self")).fs_type == "proc"


def test_a_path_that_does_not_exist_is_on_its_parents_disk(tmp_path: Path) -> None:
    assert mount_of(tmp_path / "not" / "there" / "yet") == mount_of(tmp_path)


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc")
    assert mount_of(tmp_path / "link" / "self").point == Path("/proc")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert mount_of(tmp_path / "loop") == mount_of(tmp_path)


def test_what_is_no_path(tmp_path: Path) -> None:
    assert mount_of(tmp_path / "a\0b") == mount_of(tmp_path)


def test_the_longest_point_that_contains_the_path(
    table: Callable[..., None], tmp_path: Path
) -> None:
    here = device_of(tmp_path)
    (tmp_path / "ab").mkdir()
    table((here, "/", "ext4"), (here, tmp_path, "xfs"), (here, tmp_path / "a", "btrfs"))
    # a name that begins alike is another folder
    assert mount_of(tmp_path / "ab") == Mount(here, tmp_path, "xfs")


def test_of_two_at_one_point_the_later_is_seen(table: Callable[..., None], tmp_path: Path) -> None:
    here = device_of(tmp_path)
    table((here, tmp_path, "xfs"), (here, tmp_path, "ext4"))
    assert mount_of(tmp_path).fs_type == "ext4"


def test_a_hidden_mount_is_passed_over(table: Callable[..., None], tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    table(("9:9", inner, "nfs"), (device_of(tmp_path), tmp_path, "xfs"))
    assert mount_of(inner) == Mount(device_of(tmp_path), tmp_path, "xfs")


def test_a_subvolume_with_a_device_of_its_own(table: Callable[..., None], tmp_path: Path) -> None:
    table(("9:1", "/", "ext4"), ("9:2", tmp_path, "btrfs"))
    assert mount_of(tmp_path) == Mount("9:2", tmp_path, "btrfs")


def test_escapes_are_decoded(table: Callable[..., None], tmp_path: Path) -> None:
    point = tmp_path / "a b\tc\\d"
    point.mkdir()
    written = str(point).replace("\\", r"\134").replace(" ", r"\040").replace("\t", r"\011")
    table((device_of(tmp_path), written, "xfs"))
    assert mount_of(point) == Mount(device_of(tmp_path), point, "xfs")


def test_names_that_are_no_utf8(table: Callable[..., None], tmp_path: Path) -> None:
    point = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    point.mkdir()
    table(b"30 1 9:9 / " + os.fsencode(point) + b" rw - fuse.sshfs src rw")
    assert mount_of(point) == Mount("9:9", point, "fuse.sshfs")


def test_lines_of_another_form_are_left_out(table: Callable[..., None], tmp_path: Path) -> None:
    table((device_of(tmp_path), "/", "ext4"), b"", b"1 2 3", b"30 1 9:9 / / rw shared:1 -")
    assert mount_of(tmp_path).fs_type == "ext4"


@pytest.mark.parametrize("content", [None, b""])
def test_without_a_table_the_type_is_unknown(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mountinfo"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(mounts, "_TABLE", path)
    found = mount_of(tmp_path)
    assert found == Mount(device_of(tmp_path), Path("/"), "unknown")
    assert not allows_direct(found)


def test_nothing_can_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "_device", lambda path: None)
    assert mount_of(tmp_path).point == Path("/")


@pytest.mark.parametrize(
    ("kind", "allowed"),
    [
        *((kind, True) for kind in ("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "overlay")),
        *((kind, False) for kind in ("nfs", "nfs4", "cifs", "fuse", "fuse.sshfs", "fuseblk")),
        *((kind, False) for kind in ("9p", "tmpfs", "zfs", "lustre", "virtiofs", "unknown")),
    ],
)
def test_where_direct_transfers_are_known_to_be_good(kind: str, allowed: bool) -> None:
    assert allows_direct(Mount("8:1", Path("/"), kind)) is allowed
