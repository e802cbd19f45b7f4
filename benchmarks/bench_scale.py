"""Show how time and memory grow with the size of the model: time with its bytes, memory not at all.

Bases are shaped like real models of 1B to 70B parameters, but sparse: weights are read as zeros and
take no disk, and each finished shard is deleted. Everything else is what an export does, so that a
machine with room for two shards can rehearse a merge of 141 GB. Each runs in a process of its own.

    python benchmarks/bench_scale.py --shapes 1B,8B,32B,70B --max-memory 1GB
"""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

from common import (
    DTYPES,
    SHAPES,
    TARGETS,
    CaseSpec,
    check_process,
    drop_cache,
    last_json,
    make_case,
    new_parser,
    print_table,
    save_plot,
    split_names,
    work_folder,
    write_results,
)

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

REHEARSE_PROGRAM = """
import json, sys
from streammerge.config import parse_config
from streammerge.engine.export import rehearse
print(json.dumps(rehearse(parse_config(json.loads(sys.argv[1]))).to_dict()))
"""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--shapes", type=split_names, default=["1B", "8B", "32B", "70B"])
    parser.add_argument("--dtype", choices=DTYPES, default="BF16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", choices=TARGETS, default="all")
    parser.add_argument("--max-memory", default="1GB")
    parser.add_argument("--io", choices=("auto", "direct", "buffered", "mmap"), default="auto")
    arguments = parser.parse_args()
    if unknown := set(arguments.shapes) - set(SHAPES):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(SHAPES)}")
    return arguments


def rehearse_shape(folder: Path, spec: CaseSpec, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rehearse the merge of one base, and delete it."""
    case = make_case(folder, spec)
    drop_cache(case.adapter)
    config = {
        "model_name_or_path": str(case.base),
        "adapter_name_or_path": str(case.adapter),
        "export_dir": str(folder / "merged"),
        "max_memory": arguments.max_memory,
        "io": arguments.io,
    }
    command = [sys.executable, "-c", REHEARSE_PROGRAM, json.dumps(config)]
    result = check_process(spec.shape.name, command)
    report = last_json(result.output)
    shutil.rmtree(folder)
    return {
        "shape": spec.shape.name,
        "base_bytes": case.base_bytes,
        "adapter_bytes": case.adapter_bytes,
        "wall_seconds": result.wall,
        "cpu_seconds": result.cpu,
        "peak_rss_bytes": result.peak_rss,
        "disk_written_bytes": result.written_bytes,
        "seconds": report["seconds"],
        "seconds_per_gb": report["seconds"] / case.base_bytes * 1e9,
        "predicted_peak_bytes": report["predicted_peak_bytes"],
    }


def print_row(row: dict[str, Any]) -> None:
    """Print one rehearsal as soon as it is over."""
    print(f"{row['shape']}: {row['seconds']:.1f} s", flush=True)


def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw time and peak memory over the size of the base."""
    sizes = [row["base_bytes"] / 1e9 for row in rows]
    (time,) = axes.plot(sizes, [row["seconds"] for row in rows], "o-", label="time")
    axes.set(xlabel="base in GB", ylabel="seconds", xlim=(0, None), ylim=(0, None))
    memory = axes.twinx()
    peaks = [row["peak_rss_bytes"] / 1e6 for row in rows]
    (peak,) = memory.plot(sizes, peaks, "s--", color="tab:red", label="peak memory")
    memory.set(ylabel="peak resident memory in MB", ylim=(0, 1.25 * max(peaks)))
    axes.legend(handles=[time, peak], loc="lower right")


def main() -> None:
    """Rehearse one shape after the other."""
    arguments = parse_arguments()
    rows = []
    with work_folder(arguments) as folder:
        for name in arguments.shapes:
            spec = CaseSpec(
                SHAPES[name], arguments.dtype, arguments.rank, arguments.targets, is_sparse=True
            )
            rows.append(rehearse_shape(folder / name, spec, arguments))
            print_row(rows[-1])
        settings = {**spec.settings(), "shape": arguments.shapes}
        write_results(
            arguments, folder, benchmark="scale", case=settings, max_memory=arguments.max_memory,
            io=arguments.io, results=rows,
        )  # fmt: skip
    print_table(
        ["shape", "base", "seconds", "s/GB", "CPU", "peak"],
        [
            [
                row["shape"],
                f"{row['base_bytes'] / 1e9:.2f} GB",
                f"{row['seconds']:.2f}",
                f"{row['seconds_per_gb']:.3f}",
                f"{row['cpu_seconds']:.1f} s",
                f"{row['peak_rss_bytes'] / 1e6:.0f} MB",
            ]
            for row in rows
        ],
    )
    save_plot(arguments.plot, "Sparse bases, rehearsed", lambda axes: draw(axes, rows))


if __name__ == "__main__":
    main()
