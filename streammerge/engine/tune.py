"""Measure how this machine reads, writes and merges best, for the runs that follow."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from streammerge.config.profile import MachineProfile
from streammerge.config.tuning import MIB
from streammerge.engine.machine import disk_key
from streammerge.engine.tune_compute import measure_compute
from streammerge.engine.tune_disk import measure_disk
from streammerge.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from streammerge.config.tuning import DiskTuning

__all__ = ["MIN_SAMPLE_BYTES", "tune"]

MIN_SAMPLE_BYTES = MIB


def tune(
    folders: Sequence[Path],
    *,
    sample_bytes: int,
    quick: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> MachineProfile:
    """Measure the disks of some folders, and the arithmetic. Imports torch.

    Args:
        folders: Folders on the disks to measure; of two on one disk, the first one is used.
        sample_bytes: Bytes that are read and written per measurement; each folder needs twice as
            much for a while.
        quick: Whether to measure once instead of three times, and fewer settings.
        progress: Told in a line what was measured.

    Returns:
        What was found; it is not saved.

    Raises:
        ConfigError: A folder does not exist, or the sample is too small.
        DiskSpaceError: A disk is too full.
        ResourceError: A folder cannot be written.
    """
    if sample_bytes < MIN_SAMPLE_BYTES:
        raise ConfigError(
            "the sample is too small to measure anything",
            expected=f"at least {MIN_SAMPLE_BYTES} bytes",
            got=sample_bytes,
        )
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError("the folder to measure does not exist", where=folder)
    disks: dict[str, DiskTuning] = {}
    measured: dict[str, Any] = {}
    for folder in folders:
        key = disk_key(folder)
        if key not in disks:
            disks[key], measured[key] = measure_disk(
                folder.resolve(), sample_bytes=sample_bytes, quick=quick, progress=progress
            )
    compute, cells = measure_compute(quick=quick, progress=progress)
    return MachineProfile(
        disks=disks,
        compute=compute,
        measurements={"disks": measured, "compute": cells},
        created=datetime.now(timezone.utc).date().isoformat(),
    )
