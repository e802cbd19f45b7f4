"""Measure what the disk gives: reads, writes, and both at once, which is the floor of a merge.

One line per direction, mode, size of a block and number of threads, in GB/s of the file's bytes; a
move reads and writes each of them. The file is dropped from the page cache before it is read, and
what is written is durable before the clock stops.

    python benchmarks/bench_io.py --size 4GB --blocks 1,4,8,16 --threads 1,2,4
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common import (
    drop_cache,
    median_of,
    new_parser,
    print_table,
    random_values,
    save_plot,
    split_names,
    split_numbers,
    work_folder,
    write_results,
)

from streammerge.config.sizes import parse_bytes
from streammerge.config.tuning import MIB, DiskTuning
from streammerge.engine.floor import FloorResult, move_bytes, read_bytes, write_bytes

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

DIRECTIONS = ("read", "write", "move")
MODES = ("direct", "buffered", "mmap")


@dataclass(frozen=True)
class Setting:
    """One line of the table."""

    direction: str
    mode: str
    block_bytes: int
    threads: int

    @property
    def tuning(self) -> DiskTuning:
        """The setting in the terms of the package."""
        return DiskTuning(
            read_mode=self.mode,
            # there are no mapped writes
            write_mode="direct" if self.mode == "direct" else "buffered",
            block_bytes=self.block_bytes,
            readers=self.threads,
            writers=self.threads,
        )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--size", type=parse_bytes, default=2 * 10**9, help="such as 2GB")
    parser.add_argument("--directions", type=split_names, default=list(DIRECTIONS))
    parser.add_argument("--modes", type=split_names, default=["direct", "buffered"])
    parser.add_argument("--blocks", type=split_numbers, default=[1, 4, 8, 16], help="in MiB")
    parser.add_argument("--threads", type=split_numbers, default=[1, 2, 4])
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    for given, known in ((arguments.directions, DIRECTIONS), (arguments.modes, MODES)):
        if unknown := set(given) - set(known):
            parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(known)}")
    return arguments


def settings_of(arguments: argparse.Namespace) -> list[Setting]:
    """List what is to be measured."""
    every = itertools.product(
        arguments.directions, arguments.modes, arguments.blocks, arguments.threads
    )
    return [
        Setting(direction, mode, block * MIB, threads)
        for direction, mode, block, threads in every
        if (direction, mode) != ("write", "mmap")
    ]


def make_file(path: Path, nbytes: int) -> None:
    """Write a file that is hard to compress."""
    block = random_values(min(32 * MIB, -(-nbytes // 2) * 2), "BF16")
    with path.open("wb") as file:
        for begin in range(0, nbytes, len(block)):
            file.write(block[: nbytes - begin])


def measure(setting: Setting, source: Path, nbytes: int) -> FloorResult:
    """Transfer the file once."""
    drop_cache(source.parent)
    if setting.direction == "read":
        return read_bytes([source], tuning=setting.tuning)
    target = source.parent.parent / "target"
    if setting.direction == "write":
        return write_bytes(target, nbytes=nbytes, tuning=setting.tuning)
    return move_bytes([source], target.with_name("moved"), tuning=setting.tuning, discard=True)


def to_row(setting: Setting, runs: list[FloorResult]) -> dict[str, Any]:
    """Give the runs of a setting as JSON types."""
    rates = [run.nbytes / run.seconds / 1e9 for run in runs]
    return {
        "direction": setting.direction,
        "mode": setting.mode,
        "block_bytes": setting.block_bytes,
        "threads": setting.threads,
        "seconds": [run.seconds for run in runs],
        "gb_per_second": median_of(rates),
        # what a file system made of the mode
        "read_mode": runs[0].read_mode,
        "write_mode": runs[0].write_mode,
    }


def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw a line per direction, mode and number of threads."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        label = f"{row['direction']}, {row['mode']}, {row['threads']} threads"
        point = row["block_bytes"] / MIB, row["gb_per_second"]
        lines.setdefault(label, []).append(point)
    for label, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xlabel="block in MiB", ylabel="GB/s", ylim=(0, None))
    axes.legend(fontsize="x-small")


def main() -> None:
    """Measure every setting in turn, as often as asked for."""
    arguments = parse_arguments()
    settings = settings_of(arguments)
    with work_folder(arguments) as folder:
        source = folder / "source" / "source"
        source.parent.mkdir()
        make_file(source, arguments.size)
        runs: dict[Setting, list[FloorResult]] = {setting: [] for setting in settings}
        for _ in range(arguments.runs):
            for setting in settings:
                runs[setting].append(measure(setting, source, arguments.size))
        rows = [to_row(setting, results) for setting, results in runs.items()]
        write_results(arguments, folder, benchmark="io", nbytes=arguments.size, results=rows)
    print(f"{arguments.size / 1e9:.2f} GB, median of {arguments.runs}, cold")
    print_table(
        ["direction", "mode", "block", "threads", "GB/s"],
        [
            [
                row["direction"],
                row["mode"],
                f"{row['block_bytes'] // MIB} MiB",
                str(row["threads"]),
                f"{row['gb_per_second']:.2f}",
            ]
            for row in rows
        ],
    )
    save_plot(arguments.plot, "Bytes through the disk", lambda axes: draw(axes, rows))


if __name__ == "__main__":
    main()
