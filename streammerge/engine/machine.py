"""How a run uses this machine: what the user asked for, what was measured, what is good anyway."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from streammerge.checkpoint.mounts import allows_direct, mount_of
from streammerge.config.profile import load_profile
from streammerge.config.tuning import ComputeTuning, DiskTuning, IoChoice
from streammerge.plan.memory import RunShape

if TYPE_CHECKING:
    from pathlib import Path

    from streammerge.checkpoint.mounts import Mount
    from streammerge.config import ExportConfig
    from streammerge.config.profile import MachineProfile

__all__ = ["BUFFERED", "choose_io", "default_disk", "disk_key"]

# read-ahead and write-behind see to it that one thread each way keeps a disk busy
BUFFERED = DiskTuning(read_mode="buffered", write_mode="buffered", readers=1, writers=1)


def disk_key(path: Path) -> str:
    """Name the disk that a path is on, as the machine profile does."""
    mount = mount_of(path)
    return f"{mount.device} {mount.point}"


def choose_io(
    config: ExportConfig, *, base: Path, output: Path
) -> tuple[IoChoice, RunShape, tuple[str, ...]]:
    """Decide how files are read and written, and with how many threads.

    Args:
        config: What the user asked for.
        base: Folder that is read.
        output: Folder that is written; it need not exist.

    Returns:
        The choice, the threads and buffers that it wants, and what a user should be told.
    """
    profile, note = load_profile()
    source, target = _disk(profile, base), _disk(profile, output)
    if config.io == "direct":
        source, target = replace(source, read_mode="direct"), replace(target, write_mode="direct")
    elif config.io == "buffered":
        source = target = BUFFERED
    elif config.io == "mmap":
        source = replace(BUFFERED, read_mode="mmap")
    is_direct = target.write_mode == "direct" and not config.export_legacy_format
    io = IoChoice(
        read_mode=source.read_mode,
        write_mode="direct" if is_direct else "buffered",
        readers=source.readers,
        # pages of a buffered file, and the members of an archive, are written in their order
        writers=target.writers if is_direct else 1,
        digest=config.digest,
    )
    shape = RunShape(
        workers=config.threads,
        readers=io.readers,
        writers=io.writers,
        block_bytes=max(source.block_bytes, target.block_bytes),
        compute=profile.compute or ComputeTuning(),
    )
    return io, shape, (note,) if note else ()


def default_disk(mount: Mount) -> DiskTuning:
    """Return how files are handled on a disk that was not measured."""
    return DiskTuning() if allows_direct(mount) else BUFFERED


def _disk(profile: MachineProfile, path: Path) -> DiskTuning:
    measured = profile.disks.get(disk_key(path))
    if measured is not None:
        return measured
    return default_disk(mount_of(path))
