"""Which mounted file system a path is on."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Mount", "allows_direct", "mount_of"]

UNKNOWN = "unknown"
_TABLE = Path("/proc/self/mountinfo")
# the table writes a space as \040, and so on for what would break a line
_ESCAPE = re.compile(rb"\\([0-3][0-7]{2})")
# local, and known to take direct transfers; overlay passes them on to the layer below. Network and
# FUSE file systems, and those that live in memory, refuse them, emulate them, or are slower for it.
_DIRECT = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "overlay"})


@dataclass(frozen=True, slots=True)
class Mount:
    """A mounted file system."""

    device: str
    """`major:minor`."""
    point: Path
    """Where it is mounted."""
    fs_type: str
    """As the kernel names it, such as `ext4`; `unknown` where the kernel does not say."""


def mount_of(path: Path) -> Mount:
    """Find the file system that a path is on, or would be on if it existed.

    Args:
        path: Any path; for one that does not exist, its nearest parent that does counts.

    Returns:
        The mount; its type is `unknown` where the table of mounts cannot be read.
    """
    place, device = _nearest(path)
    found: tuple[tuple[bool, int], Mount] | None = None
    for mount in _mounts():
        if not place.is_relative_to(mount.point):
            continue
        # a mount that another one hides has a device that is not the path's; btrfs shows a device
        # of its own per subvolume, so that no mount may have it
        rank = (mount.device == device, len(mount.point.parts))
        # of two at one point, the later one is seen
        if found is None or rank >= found[0]:
            found = rank, mount
    return found[1] if found else Mount(device, Path("/"), UNKNOWN)


def allows_direct(mount: Mount) -> bool:
    """Return whether transfers past the page cache are known to be good there."""
    return mount.fs_type in _DIRECT


def _nearest(path: Path) -> tuple[Path, str]:
    """Return the path, or its nearest parent that exists, resolved, and its device."""
    try:
        place = path.expanduser().resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, no home, no path at all
        place = path.absolute()
    for candidate in (place, *place.parents):
        device = _device(candidate)
        if device is not None:
            return candidate, device
    return Path("/"), "0:0"


def _device(path: Path) -> str | None:
    try:
        number = path.stat().st_dev
    except (OSError, ValueError):
        return None
    return f"{os.major(number)}:{os.minor(number)}"


def _mounts() -> Iterator[Mount]:
    """Yield the table in the order of mounting; lines of another form are left out."""
    try:
        lines = _TABLE.read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        # id parent major:minor root point options [optional ...] - type source super-options
        fields = line.split(b" ")
        try:
            kind = fields[fields.index(b"-", 6) + 1]
        except (ValueError, IndexError):
            continue
        point = os.fsdecode(_ESCAPE.sub(lambda m: bytes([int(m[1], 8)]), fields[4]))
        yield Mount(fields[2].decode("ascii", "replace"), Path(point), os.fsdecode(kind))
