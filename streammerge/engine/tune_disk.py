"""Measure how files on one disk are read and written best."""

from __future__ import annotations

import os
import statistics
import tempfile
from contextlib import suppress
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from streammerge.checkpoint.mounts import mount_of
from streammerge.checkpoint.writer import require_space, writing
from streammerge.config.tuning import MIB, DiskTuning
from streammerge.engine.floor import move_bytes, read_bytes, write_bytes
from streammerge.engine.machine import BUFFERED, default_disk
from streammerge.engine.tune_choice import prefer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = ["drop_pages", "measure_disk"]

_BLOCKS = (MIB, 4 * MIB, 8 * MIB, 16 * MIB)
_THREADS = (1, 2, 4)
_QUICK_BLOCKS, _QUICK_THREADS = (4 * MIB, 8 * MIB), (1, 2)
_RUNS = 3
# of the default and the best in turn, in the end
_LAST_RUNS = 5
# settings that come this close to the best in their first run are measured again
_CONTENDING = 0.85

_Mode = Literal["direct", "buffered"]
_Modes = tuple[_Mode, _Mode]
_Way = Literal["read", "write", "both"]
_WAYS: tuple[_Way, ...] = ("read", "write", "both")


def measure_disk(
    folder: Path, *, sample_bytes: int, quick: bool, progress: Callable[[str], None]
) -> tuple[DiskTuning, dict[str, Any]]:
    """Find the best way to read and write in a folder.

    What counts is reading and writing at the same time, as a merge does. A temporary file of the
    sample's size and copies of it come and go in the folder.

    Args:
        folder: Where to measure.
        sample_bytes: Bytes that are read and written per measurement.
        quick: Whether to measure once, and fewer settings.
        progress: Told in a line what was measured.

    Returns:
        The setting that was chosen, and the measurements as JSON types.

    Raises:
        DiskSpaceError: The folder's disk is too full.
        ResourceError: The folder cannot be written.
    """
    require_space(
        folder, needed=2 * sample_bytes, purpose="to measure", hint="choose a smaller --size"
    )
    mount, runs = mount_of(folder), 1 if quick else _RUNS
    with writing(folder):
        place = tempfile.TemporaryDirectory(prefix=".streammerge-tune-", dir=folder)
    with place as name:
        bench = _Bench(Path(name), sample_bytes)
        space = _Space(bench.modes, quick=quick, sample_bytes=sample_bytes)
        default = default_disk(mount)
        if (default.read_mode, default.write_mode) not in space.modes:
            default = BUFFERED
        grid = list(dict.fromkeys([default, *space.grid()]))
        for setting in grid:
            bench.measure(_WAYS, [setting], runs=1)
            progress(f"{folder}: {_describe(setting)}: {bench.speeds(setting)}")
        chosen = _contest(bench, space, grid, runs=runs)
        progress(f"{folder}: chosen: {_describe(chosen)}: {bench.speeds(chosen)}")
    return chosen, {
        "folder": str(folder),
        "fs_type": mount.fs_type,
        "sample_bytes": sample_bytes,
        "settings": [
            {**bench.describe(setting), "is_chosen": setting == chosen}
            for setting in dict.fromkeys([*grid, chosen])
        ],
    }


def _contest(bench: _Bench, space: _Space, grid: list[DiskTuning], *, runs: int) -> DiskTuning:
    """Measure the best settings again, and mixes of them; the first one is the default."""
    default = grid[0]
    enough = _CONTENDING * max(bench.rate("both", setting) for setting in grid)
    close = [setting for setting in grid if bench.rate("both", setting) >= enough]
    contenders = list(dict.fromkeys([default, *close]))
    bench.measure(_WAYS, contenders, runs=runs)
    mixed = space.around(_choose(bench, contenders, default))
    contenders = list(dict.fromkeys([*contenders, *mixed]))
    bench.measure(("both",), contenders, runs=runs)
    best = _choose(bench, contenders, default)
    # the best of many owes something to luck: it has to win once more
    bench.forget([default, best])
    bench.measure(("both",), [default, best], runs=_LAST_RUNS)
    chosen = _choose(bench, [default, best], default)
    bench.measure(_WAYS, [default, chosen], runs=1)
    return chosen


def drop_pages(paths: Iterable[Path]) -> None:
    """Drop files from the page cache, so that the next read comes from the disk."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            # pages that are not on the disk yet would stay
            with suppress(OSError):
                os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


class _Bench:
    """Measurements in one folder."""

    def __init__(self, folder: Path, sample_bytes: int) -> None:
        self._source, self._written = folder / "sample", folder / "written"
        self._copies = folder / "copies"
        self._sample_bytes = sample_bytes
        self._seconds: dict[tuple[object, ...], list[float]] = {}
        direct = DiskTuning()
        made = write_bytes(self._source, nbytes=sample_bytes, tuning=direct, discard=False)
        seen = read_bytes([self._source], tuning=direct)
        # the file system may have refused
        to_read: list[_Mode] = (
            ["direct", "buffered"] if seen.read_mode == "direct" else ["buffered"]
        )
        is_direct = made.write_mode == "direct"
        to_write: list[_Mode] = ["direct", "buffered"] if is_direct else ["buffered"]
        self.modes: list[_Modes] = list(product(to_read, to_write))

    def measure(self, ways: Sequence[_Way], settings: Sequence[DiskTuning], *, runs: int) -> None:
        """Measure settings in turn, until each has that many runs."""
        for run in range(1, runs + 1):
            for setting, way in product(settings, ways):
                seconds = self._seconds.setdefault(_key(way, setting), [])
                if len(seconds) < run:
                    seconds.append(self._run(way, setting))

    def forget(self, settings: Sequence[DiskTuning]) -> None:
        """Drop what was measured of reading and writing at once."""
        for setting in settings:
            self._seconds.pop(_key("both", setting), None)

    def rate(self, way: _Way, setting: DiskTuning) -> float:
        """Return the median speed in GB/s."""
        seconds = statistics.median(self._seconds[_key(way, setting)])
        return self._sample_bytes / seconds / 10**9

    def speeds(self, setting: DiskTuning) -> str:
        """Describe the speed of a setting."""
        return ", ".join(f"{way} {self.rate(way, setting):.2f}" for way in _WAYS) + " GB/s"

    def describe(self, setting: DiskTuning) -> dict[str, Any]:
        """Give a setting and its speed as JSON types."""
        rates = {f"{way}_gbps": round(self.rate(way, setting), 3) for way in _WAYS}
        return {**asdict(setting), **rates}

    def _run(self, way: _Way, setting: DiskTuning) -> float:
        if way == "write":
            return write_bytes(self._written, nbytes=self._sample_bytes, tuning=setting).seconds
        drop_pages([self._source])
        if way == "read":
            return read_bytes([self._source], tuning=setting).seconds
        return move_bytes([self._source], self._copies, tuning=setting, discard=True).seconds


class _Space:
    """The settings that are worth a measurement."""

    def __init__(self, modes: list[_Modes], *, quick: bool, sample_bytes: int) -> None:
        self.modes = modes
        self._blocks = _QUICK_BLOCKS if quick else _BLOCKS
        self._threads = _QUICK_THREADS if quick else _THREADS
        self._sample_bytes = sample_bytes

    def grid(self) -> Iterator[DiskTuning]:
        """Yield settings that are the same for reading and writing."""
        alike = dict.fromkeys([self.modes[0], self.modes[-1]])
        for modes, block, threads in product(alike, self._blocks, self._threads):
            # each thread shall have something to do
            if block * threads <= self._sample_bytes:
                yield _setting(modes, block, threads, threads)

    def around(self, setting: DiskTuning) -> Iterator[DiskTuning]:
        """Yield settings that differ in the modes, or in the threads, of reading and writing."""
        block = setting.block_bytes
        for modes in self.modes:
            yield _setting(modes, block, setting.readers, setting.writers)
        own = next(m for m in self.modes if m == (setting.read_mode, setting.write_mode))
        for readers, writers in product(self._threads, repeat=2):
            yield _setting(own, block, readers, writers)


def _setting(modes: _Modes, block_bytes: int, readers: int, writers: int) -> DiskTuning:
    # a merge writes the pages of a buffered file in their order, from one thread
    return DiskTuning(*modes, block_bytes, readers, writers if modes[1] == "direct" else 1)


def _key(way: _Way, setting: DiskTuning) -> tuple[object, ...]:
    """Name a measurement by what it depends on."""
    if way == "read":
        return way, setting.read_mode, setting.block_bytes, setting.readers
    if way == "write":
        return way, setting.write_mode, setting.block_bytes, setting.writers
    return way, setting


def _choose(bench: _Bench, settings: list[DiskTuning], default: DiskTuning) -> DiskTuning:
    rates = {setting: bench.rate("both", setting) for setting in settings}
    return prefer(rates, default=default, cost=lambda s: s.block_bytes * (s.readers + s.writers))


def _describe(setting: DiskTuning) -> str:
    modes = dict.fromkeys([setting.read_mode, setting.write_mode])
    return (
        f"{' and '.join(modes)}, {setting.block_bytes // MIB} MiB, "
        f"{setting.readers} reading, {setting.writers} writing"
    )
