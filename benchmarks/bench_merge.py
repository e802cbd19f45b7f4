"""Compare whole merges: streammerge, the floor, a plain copy, PEFT, and a loop over shards.

Every side runs in a process of its own, in turn; base and adapter are dropped from the page cache
before, and the output is durable before the clock stops. Wall time, CPU time and peak resident
memory are those of the process, imports included. The floor reads and writes the base's weights
with no arithmetic: `transfer` is its time without the start of the process. Ratios are taken per
run, and then their median.

    python benchmarks/bench_merge.py --shape 2GB --runs 5
    python benchmarks/bench_merge.py --shape 8B --dtype F16 --rank 64 --sides streammerge,floor
"""

from __future__ import annotations

import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

from common import (
    DTYPES,
    SHAPES,
    TARGETS,
    Case,
    CaseSpec,
    check_process,
    drop_cache,
    last_json,
    make_case,
    median_of,
    new_parser,
    print_table,
    save_plot,
    split_names,
    sync_folder,
    weight_bytes,
    work_folder,
    write_results,
)

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

Run = dict[str, float]

FLOOR_PROGRAM = """
import dataclasses, json, sys
from pathlib import Path
from streammerge.config.tuning import DiskTuning
from streammerge.engine.floor import move_bytes
base, output, io = sys.argv[1:]
tuning = DiskTuning()
if io != "auto":
    write = "direct" if io == "direct" else "buffered"
    tuning = dataclasses.replace(tuning, read_mode=io, write_mode=write)
shards = sorted(Path(base).glob("*.safetensors"))
print(json.dumps(dataclasses.asdict(move_bytes(shards, Path(output), tuning=tuning))))
"""

PEFT_PROGRAM = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
model = PeftModel.from_pretrained(model, adapter)
model.merge_and_unload().save_pretrained(output, max_shard_size="5GB")
"""

# what one writes by hand: a shard at a time in memory
LOOP_PROGRAM = """
import json, shutil, sys
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import load_file, save_file
base, adapter, output = map(Path, sys.argv[1:])
output.mkdir()
config = json.loads((adapter / "adapter_config.json").read_text())
scaling = config["lora_alpha"] / config["r"]
factors = load_file(adapter / "adapter_model.safetensors")
for path in base.iterdir():
    if path.suffix != ".safetensors":
        shutil.copy(path, output)
        continue
    merged = {}
    with safe_open(path, framework="pt") as shard:
        for name in shard.keys():
            merged[name] = shard.get_tensor(name)
            key = "base_model.model." + name.removesuffix("weight") + "lora_{}.weight"
            if key.format("A") in factors:
                merged[name] += (factors[key.format("B")] @ factors[key.format("A")]) * scaling
    save_file(merged, output / path.name, metadata={"format": "pt"})
"""

SIDES = ("streammerge", "floor", "copy", "peft", "loop")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="2GB")
    parser.add_argument("--dtype", choices=DTYPES, default="BF16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", choices=TARGETS, default="all")
    parser.add_argument("--sides", type=split_names, default=list(SIDES))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--max-memory", default="800MB")
    parser.add_argument(
        "--io", choices=("auto", "direct", "buffered", "mmap"), default="auto",
        help="how streammerge and the floor use the disk",
    )  # fmt: skip
    arguments = parser.parse_args()
    if unknown := set(arguments.sides) - set(SIDES):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(SIDES)}")
    return arguments


def command_of(side: str, case: Case, output: Path, arguments: argparse.Namespace) -> list[str]:
    """Return the program of a side."""
    base, adapter = str(case.base), str(case.adapter)
    python = [sys.executable, "-c"]
    commands = {
        "streammerge": [
            sys.executable, "-m", "streammerge", "export", f"model_name_or_path={base}",
            f"adapter_name_or_path={adapter}", f"export_dir={output}",
            f"max_memory={arguments.max_memory}", f"io={arguments.io}",
        ],
        "floor": [*python, FLOOR_PROGRAM, base, str(output), arguments.io],
        "copy": ["cp", "-r", base, str(output)],
        "peft": [*python, PEFT_PROGRAM, base, adapter, str(output)],
        "loop": [*python, LOOP_PROGRAM, base, adapter, str(output)],
    }  # fmt: skip
    return commands[side]


def run_side(side: str, case: Case, output: Path, arguments: argparse.Namespace) -> Run:
    """Merge once, from a cold cache to a durable output."""
    shutil.rmtree(output, ignore_errors=True)
    drop_cache(case.base, case.adapter)
    result = check_process(side, command_of(side, case, output, arguments))
    # most sides leave their output in the page cache
    started = time.perf_counter()
    sync_folder(output)
    run = {
        "wall_seconds": result.wall + time.perf_counter() - started,
        "cpu_seconds": result.cpu,
        "peak_rss_bytes": result.peak_rss,
        "disk_read_bytes": result.read_bytes,
        "disk_written_bytes": result.written_bytes,
        "output_bytes": weight_bytes(output),
    }
    if side == "floor":
        run["transfer_seconds"] = last_json(result.output)["seconds"]
    return run


def ratios_of(runs: dict[str, list[Run]]) -> dict[str, float]:
    """Compare sides run by run; a ratio is the median of those of the runs."""
    walls = {side: [run["wall_seconds"] for run in found] for side, found in runs.items()}
    if "floor" in runs:
        walls["transfer"] = [run["transfer_seconds"] for run in runs["floor"]]
    ours = walls.get("streammerge", [])
    pairs = {f"streammerge/{side}": (ours, walls.get(side)) for side in ("floor", "transfer")}
    pairs |= {f"{side}/streammerge": (walls.get(side), ours) for side in ("copy", "peft", "loop")}
    return {
        name: median_of([a / b for a, b in zip(above, below, strict=True)])
        for name, (above, below) in pairs.items()
        if above and below
    }


def to_row(side: str, runs: list[Run]) -> dict[str, Any]:
    """Give the runs of a side, and their medians, as JSON types."""
    medians = {key: median_of([run[key] for run in runs]) for key in runs[0]}
    return {"side": side, **medians, "runs": runs}


def print_results(rows: list[dict[str, Any]], ratios: dict[str, float]) -> None:
    """Print medians and ratios."""
    print_table(
        ["side", "wall", "CPU", "peak", "disk read", "disk written"],
        [
            [
                row["side"],
                f"{row['wall_seconds']:.2f} s",
                f"{row['cpu_seconds']:.2f} s",
                f"{row['peak_rss_bytes'] / 1e6:.0f} MB",
                f"{row['disk_read_bytes'] / 1e9:.2f} GB",
                f"{row['disk_written_bytes'] / 1e9:.2f} GB",
            ]
            for row in rows
        ],
    )
    for row in rows:
        if "transfer_seconds" in row:
            print(f"the floor's transfer alone: {row['transfer_seconds']:.2f} s")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")


def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw the wall time of every run over the median of its side."""
    names = [row["side"] for row in rows]
    axes.bar(names, [row["wall_seconds"] for row in rows], alpha=0.6)
    for row in rows:
        walls = [run["wall_seconds"] for run in row["runs"]]
        axes.plot([row["side"]] * len(walls), walls, "k.", markersize=4)
    axes.set(ylabel="wall time in seconds")


def main() -> None:
    """Run the sides in turn, as often as asked for."""
    arguments = parse_arguments()
    spec = CaseSpec(SHAPES[arguments.shape], arguments.dtype, arguments.rank, arguments.targets)
    with work_folder(arguments) as folder:
        case, output = make_case(folder, spec), folder / "merged"
        title = f"{case.base_bytes / 1e9:.2f} GB {spec.dtype} base, rank {spec.rank}"
        title += f" on {spec.targets} linear layers"
        print(f"{title}; median of {arguments.runs}, cold cache", flush=True)
        runs: dict[str, list[Run]] = {side: [] for side in arguments.sides}
        for _ in range(arguments.runs):
            for side, found in runs.items():
                found.append(run_side(side, case, output, arguments))
        rows, ratios = [to_row(side, found) for side, found in runs.items()], ratios_of(runs)
        write_results(
            arguments, folder, benchmark="merge", case=spec.settings(),
            max_memory=arguments.max_memory, io=arguments.io, base_bytes=case.base_bytes,
            adapter_bytes=case.adapter_bytes, results=rows, ratios=ratios,
        )  # fmt: skip
    print_results(rows, ratios)
    save_plot(arguments.plot, title, lambda axes: draw(axes, rows))


if __name__ == "__main__":
    main()
