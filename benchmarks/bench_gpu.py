"""Measure a GPU: its kernels against its own memory, and whole merges against PEFT on the GPU.

Kernels: bytes read and written per second of a launch, next to those of a plain copy on the device
in the same run, which no kernel that moves as many bytes beats. Weights are larger than any cache,
and results go to memory of their own, so that every launch does the same.

Merges: each side in a process of its own, from a cold page cache to a durable output. `peft-gpu`
loads the model onto the GPU, merges there, and saves; it needs a model that fits.

    python benchmarks/bench_gpu.py --what kernels,link --ranks 16,64
    python benchmarks/bench_gpu.py --what merges --shape 8B --runs 3
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from common import (
    SHAPES,
    TARGETS,
    Case,
    CaseSpec,
    check_process,
    drop_cache,
    make_case,
    median_of,
    new_parser,
    print_table,
    save_plot,
    split_names,
    split_numbers,
    sync_folder,
    weight_bytes,
    work_folder,
    write_results,
)

from streammerge.backends.gpus import Gpus, find_gpus, missing_driver

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from streammerge.backends.device_merge import Kernels

Row = dict[str, Any]

PARTS = ("kernels", "link", "merges")
SIDES = ("streammerge-gpu", "streammerge-cpu", "peft-gpu")
LINK_BYTES = 256 << 20
LAUNCHES = 20
EXPERTS = 64

PEFT_PROGRAM = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", device_map="cuda")
model = PeftModel.from_pretrained(model, adapter)
model.merge_and_unload().save_pretrained(output, max_shard_size="5GB")
"""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--what", type=split_names, default=list(PARTS))
    parser.add_argument("--rows", type=int, default=8192, help="N of a weight")
    parser.add_argument("--columns", type=int, default=8192, help="K of a weight")
    parser.add_argument("--ranks", type=split_numbers, default=[16, 64, 256])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--shape", choices=SHAPES, default="8B", help="of the merges")
    parser.add_argument("--targets", choices=TARGETS, default="all")
    parser.add_argument("--sides", type=split_names, default=list(SIDES))
    parser.add_argument("--max-memory", default="6GB")
    arguments = parser.parse_args()
    for given, known in ((arguments.what, PARTS), (arguments.sides, SIDES)):
        if unknown := set(given) - set(known):
            parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(known)}")
    return arguments


def open_gpus() -> Gpus:
    """Return the GPUs, or end with a message that says why there is none."""
    found = missing_driver() or find_gpus()
    if isinstance(found, str):
        raise SystemExit(f"bench_gpu needs a GPU: {found}")
    return found


def seconds_of(launch: Callable[[], object], runs: int) -> list[float]:
    """Return the seconds of a launch, several times, each the mean of many in a row."""
    launch()
    found = []
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(LAUNCHES):
            launch()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3 / LAUNCHES)
    return found


def kernel_launches(
    kernels: Kernels, arguments: argparse.Namespace, device: str = "cuda"
) -> Iterator[tuple[Row, int, Callable[[], object]]]:
    """Yield what is launched, the bytes that it reads and writes, and a launch of it."""
    n, k = arguments.rows, arguments.columns

    def values(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return (torch.randn(shape, device=device) * 0.02).to(dtype)

    weight = values(n, k)
    out = torch.empty_like(weight)
    both = 2 * weight.nbytes
    yield {"operation": "copy", "factors": "", "rank": 0}, both, lambda: out.copy_(weight)
    experts, results = (
        list(tensor.view(-1)[: n * k // EXPERTS * EXPERTS].view(EXPERTS, -1, k // 8))
        for tensor in (weight, out)
    )
    rows = experts[0].shape[0]
    for factors in (torch.bfloat16, torch.float32):
        for rank in arguments.ranks:
            named = {"factors": str(factors).removeprefix("torch."), "rank": rank}
            term = (values(rank, k, dtype=factors), values(n, rank, dtype=factors), 2.0)
            yield (
                {"operation": "merge", **named}, both,
                lambda term=term: kernels.merge(weight, [term], out=out),
            )  # fmt: skip
            norms = values(n, dtype=torch.float32)
            # the weight is read twice
            yield (
                {"operation": "dora", **named}, both + weight.nbytes,
                lambda term=term, norms=norms: kernels.dora(weight, [term], norms, out=out),
            )  # fmt: skip
            pair = (values(rank, k // 8, dtype=factors), values(rows, rank, dtype=factors), 2.0)
            yield (
                {"operation": "grouped", **named}, both,
                lambda pair=pair: kernels.grouped(experts, [pair] * EXPERTS, out=results),
            )  # fmt: skip
    merged = values(arguments.ranks[0], k), values(n, arguments.ranks[0])
    yield (
        {"operation": "torch, as PEFT", "factors": "bfloat16", "rank": arguments.ranks[0]}, both,
        lambda: torch.add(weight, (merged[1] @ merged[0]) * 2.0, out=out),
    )  # fmt: skip


def measure_kernels(gpus: Gpus, arguments: argparse.Namespace) -> list[Row]:
    """Time every kernel."""
    if gpus.kernels is None:
        raise SystemExit(f"bench_gpu: {'; '.join(gpus.notes)}")
    return [
        {**named, "bytes": nbytes, "seconds": seconds_of(launch, arguments.runs)}
        for named, nbytes, launch in kernel_launches(gpus.kernels, arguments)
    ]


def measure_link(runs: int) -> list[Row]:
    """Time copies between pinned memory and the device, each way alone and both at once."""
    hosts = [torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    places = [torch.empty(LINK_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]

    def to_device() -> None:
        with torch.cuda.stream(streams[0]):
            places[0].copy_(hosts[0], non_blocking=True)

    def to_host() -> None:
        with torch.cuda.stream(streams[1]):
            hosts[1].copy_(places[1], non_blocking=True)

    rows = []
    for name, ways in (
        ("to the device", [to_device]), ("to the host", [to_host]), ("both", [to_device, to_host])
    ):  # fmt: skip
        seconds = []
        for _ in range(runs + 1):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for way in ways:
                way()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        rows.append({"direction": name, "bytes": LINK_BYTES, "seconds": seconds[1:]})
    return rows


def command_of(side: str, case: Case, output: Path, arguments: argparse.Namespace) -> list[str]:
    """Return the program of a side."""
    base, adapter = str(case.base), str(case.adapter)
    if side == "peft-gpu":
        return [sys.executable, "-c", PEFT_PROGRAM, base, adapter, str(output)]
    device = "cuda" if side == "streammerge-gpu" else "cpu"
    return [
        sys.executable, "-m", "streammerge", "export", f"model_name_or_path={base}",
        f"adapter_name_or_path={adapter}", f"export_dir={output}", f"export_device={device}",
        f"max_memory={arguments.max_memory}",
    ]  # fmt: skip


def measure_merges(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Run the sides in turn, as often as asked for."""
    spec = CaseSpec(SHAPES[arguments.shape], targets=arguments.targets)
    case, output = make_case(folder, spec), folder / "merged"
    rows: list[Row] = [
        {"side": side, "seconds": [], "peak_rss_bytes": []} for side in arguments.sides
    ]
    for _ in range(arguments.runs):
        for row in rows:
            shutil.rmtree(output, ignore_errors=True)
            drop_cache(case.base, case.adapter)
            command = command_of(row["side"], case, output, arguments)
            result = check_process(row["side"], command)
            started = time.perf_counter()
            sync_folder(output)
            row["seconds"].append(result.wall + time.perf_counter() - started)
            row["peak_rss_bytes"].append(result.peak_rss)
            row["bytes"] = weight_bytes(output)
    return rows


def print_kernels(rows: list[Row]) -> None:
    """Print each kernel's rate, and what share it is of the copy's."""
    rates = [row["bytes"] / median_of(row["seconds"]) / 1e9 for row in rows]
    copy = next(rate for row, rate in zip(rows, rates, strict=True) if row["operation"] == "copy")
    print_table(
        ["kernel", "factors", "rank", "ms", "GB/s", "of a copy"],
        [
            [
                row["operation"],
                row["factors"],
                str(row["rank"] or ""),
                f"{median_of(row['seconds']) * 1e3:.3f}",
                f"{rate:.0f}",
                f"{rate / copy:.0%}",
            ]
            for row, rate in zip(rows, rates, strict=True)
        ],
    )


def print_link(rows: list[Row]) -> None:
    """Print the rate of each direction."""
    print_table(
        ["link", "GB/s each way"],
        [
            [row["direction"], f"{row['bytes'] / median_of(row['seconds']) / 1e9:.1f}"]
            for row in rows
        ],
    )


def print_merges(rows: list[Row]) -> None:
    """Print the wall time and memory of each side, and the ratio to the first, run by run."""
    first = rows[0]["seconds"]
    print_table(
        ["merge", "wall", "GB/s", "peak", f"over {rows[0]['side']}"],
        [
            [
                row["side"],
                f"{median_of(row['seconds']):.2f} s",
                f"{row['bytes'] / median_of(row['seconds']) / 1e9:.2f}",
                f"{median_of(row['peak_rss_bytes']) / 1e6:.0f} MB",
                f"{median_of([a / b for a, b in zip(row['seconds'], first, strict=True)]):.2f}",
            ]
            for row in rows
        ],
    )


def draw(axes: Any, rows: list[Row]) -> None:
    """Draw the rate of each kernel over its rank."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        rate = row["bytes"] / median_of(row["seconds"]) / 1e9
        if row["operation"] == "copy":
            axes.axhline(rate, linestyle=":", color="black", label="copy")
        else:
            label = f"{row['operation']}, {row['factors']} factors"
            lines.setdefault(label, []).append((row["rank"], rate))
    for label, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xlabel="rank", ylabel="GB read and written per second")
    axes.set_xscale("log", base=2)
    axes.legend(fontsize="x-small")


def main() -> None:
    """Measure what was asked for."""
    arguments = parse_arguments()
    gpus = open_gpus()
    found: dict[str, list[Row]] = {}
    with work_folder(arguments) as folder:
        print(f"{gpus.runtimes[0].name}, median of {arguments.runs}", flush=True)
        if "kernels" in arguments.what:
            found["kernels"] = measure_kernels(gpus, arguments)
            print_kernels(found["kernels"])
        if "link" in arguments.what:
            found["link"] = measure_link(arguments.runs)
            print_link(found["link"])
        if "merges" in arguments.what:
            found["merges"] = measure_merges(folder, arguments)
            print_merges(found["merges"])
        write_results(
            arguments, folder, benchmark="gpu", gpu=gpus.runtimes[0].name,
            threads=len(os.sched_getaffinity(0)), results=found,
        )  # fmt: skip
    if "kernels" in found:
        save_plot(arguments.plot, "Kernels", lambda axes: draw(axes, found["kernels"]))


if __name__ == "__main__":
    main()
