"""Measure the arithmetic of a merge alone, in memory: GB of weights merged per second.

A weight (N, K) gets one adapter's delta. Sides: the package's CPU backend on tiles, torch on the
whole tensor as PEFT computes it (`W += (B @ A) * scaling`), PEFT's own merge of one Linear layer,
and a plain copy of the weight's bytes, which no merge beats. Every side uses all cores.

    python benchmarks/bench_kernels.py --rows 4096 --columns 4096 --runs 7
"""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from common import (
    DTYPES,
    median_of,
    new_parser,
    print_table,
    save_plot,
    split_names,
    split_numbers,
    work_folder,
    write_results,
)

from streammerge.adapters.terms import Factor
from streammerge.backends.base import Tile
from streammerge.backends.torch_cpu import TorchCpuBackend, torch_dtype
from streammerge.checkpoint.header import StoredTensor
from streammerge.config.tuning import MIB
from streammerge.dtypes import Dtype
from streammerge.plan.ops import ApplyTerms, LoraTerm, TensorPlan
from streammerge.plan.tiles import split_rows

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

SIDES = ("copy", "streammerge", "torch", "peft")
SCALING = 2.0


class Merge(NamedTuple):
    """One target and its factors: weight (N, K), A (R, K), B (N, R)."""

    weight: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    threads: int


class Step(NamedTuple):
    """What is timed, and what puts things back before the next time."""

    run: Callable[[], None]
    undo: Callable[[], None] = lambda: None


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--rows", type=int, default=4096, help="N")
    parser.add_argument("--columns", type=int, default=4096, help="K")
    parser.add_argument("--dtypes", type=split_names, default=list(DTYPES))
    parser.add_argument("--ranks", type=split_numbers, default=[8, 16, 64, 256])
    parser.add_argument("--sides", type=split_names, default=list(SIDES))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if unknown := set(arguments.sides) - set(SIDES):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(SIDES)}")
    return arguments


def make_merge(arguments: argparse.Namespace, dtype: str, rank: int) -> Merge:
    """Make a weight and its factors."""
    random = torch.Generator().manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random).mul_(0.02)

    weight = values(arguments.rows, arguments.columns).to(torch_dtype(Dtype(dtype)))
    return Merge(
        weight, values(rank, arguments.columns), values(arguments.rows, rank), arguments.threads
    )


def copy_side(merge: Merge) -> Iterator[Step]:
    """Copy the weight, each thread a part of it."""
    torch.set_num_threads(1)
    parts = merge.weight.chunk(merge.threads)
    places = torch.empty_like(merge.weight).chunk(merge.threads)
    with ThreadPoolExecutor(merge.threads) as pool:
        yield Step(lambda: _exhaust(pool.map(torch.Tensor.copy_, places, parts)))


def streammerge_side(merge: Merge) -> Iterator[Step]:
    """Merge tiles as the pipeline does, each thread one at a time."""
    backend = TorchCpuBackend(numerics="peft")
    target = plan_target(merge)
    stored = target.terms[0].factors
    raw = (bytearray(to_bytes(tensor)) for tensor in (merge.a, merge.b))
    factors = backend.load_factors(target, dict(zip(stored, raw, strict=True)))
    data = memoryview(bytearray(to_bytes(merge.weight)))
    rows, row_bytes = merge.weight.shape[0], len(data) // merge.weight.shape[0]
    tiles = [
        new_tile(target, begin, end, data[begin * row_bytes : end * row_bytes])
        for begin, end in split_rows(0, rows, max(4, 2 * MIB // row_bytes))
    ]
    with ThreadPoolExecutor(merge.threads) as pool:
        yield Step(lambda: _exhaust(pool.map(lambda tile: backend.apply(tile, factors), tiles)))


def new_tile(target: TensorPlan, begin: int, end: int, data: memoryview) -> Tile:
    """Return a tile that is merged where it is."""
    return Tile(target, begin, end, data, output_offset=0, source_offset=0)


def plan_target(merge: Merge) -> TensorPlan:
    """Plan the merge of one tensor that is in no file."""
    dtype = next(d for d in Dtype if d.name in DTYPES and torch_dtype(d) == merge.weight.dtype)

    def stored(name: str, tensor: torch.Tensor, kind: Dtype) -> StoredTensor:
        return StoredTensor(name, kind, tuple(tensor.shape), Path("none"), 0)

    a, b = (Factor(stored(n, t, Dtype.F32)) for n, t in (("a", merge.a), ("b", merge.b)))
    term = LoraTerm(a, b, SCALING, is_transposed=False, rounds_delta=False)
    op = ApplyTerms(dtype, (term,))
    return TensorPlan("w", dtype, stored("w", merge.weight, dtype), op, "merged")


def torch_side(merge: Merge) -> Iterator[Step]:
    """Merge the whole tensor at once."""
    torch.set_num_threads(merge.threads)
    weight = merge.weight.clone()

    def run() -> None:
        weight.add_((merge.b @ merge.a) * SCALING)

    yield Step(run)


def peft_side(merge: Merge) -> Iterator[Step]:
    """Let PEFT merge a layer, and take the delta out again untimed."""
    from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415 (seconds; one side only)

    torch.set_num_threads(merge.threads)
    rows, columns = merge.weight.shape
    linear = torch.nn.Linear(columns, rows, bias=False, dtype=merge.weight.dtype)
    linear.weight.data.copy_(merge.weight)
    rank = len(merge.a)
    config = LoraConfig(r=rank, lora_alpha=int(SCALING * rank), target_modules=["proj"])
    model = inject_adapter_in_model(config, torch.nn.ModuleDict({"proj": linear}))
    layer = model["proj"]
    layer.lora_A["default"].weight.data = merge.a
    layer.lora_B["default"].weight.data = merge.b
    yield Step(layer.merge, layer.unmerge)


def time_side(name: str, merge: Merge, runs: int) -> list[float]:
    """Time one side, after a first run for what is allocated once."""
    side = {"copy": copy_side, "streammerge": streammerge_side, "torch": torch_side}
    seconds = []
    for step in side.get(name, peft_side)(merge):
        for _ in range(runs + 1):
            started = time.perf_counter()
            step.run()
            seconds.append(time.perf_counter() - started)
            step.undo()
    return seconds[1:]


def to_bytes(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor."""
    data: bytes = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return data


def _exhaust(results: Iterator[Any]) -> None:
    for _ in results:
        pass


def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw a line per side and dtype."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        point = row["rank"], row["gb_per_second"]
        lines.setdefault(f"{row['side']}, {row['dtype']}", []).append(point)
    for label, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xlabel="rank", ylabel="GB of weights per second", yscale="log")
    axes.set_xscale("log", base=2)
    axes.legend(fontsize="x-small")


def main() -> None:
    """Time every side on every dtype and rank."""
    arguments = parse_arguments()
    rows = []
    with work_folder(arguments) as folder:
        for dtype, rank in itertools.product(arguments.dtypes, arguments.ranks):
            merge = make_merge(arguments, dtype, rank)
            nbytes = merge.weight.nbytes
            for side in arguments.sides:
                seconds = time_side(side, merge, arguments.runs)
                rate = nbytes / median_of(seconds) / 1e9
                rows.append(
                    {"side": side, "dtype": dtype, "rank": rank, "seconds": seconds,
                     "gb_per_second": rate}
                )  # fmt: skip
        shape = [arguments.rows, arguments.columns]
        write_results(
            arguments, folder, benchmark="kernels", shape=shape, threads=arguments.threads,
            results=rows,
        )  # fmt: skip
    print(f"({shape[0]}, {shape[1]}), {arguments.threads} threads, median of {arguments.runs}")
    print_table(
        ["side", "dtype", "rank", "GB/s"],
        [[r["side"], r["dtype"], str(r["rank"]), f"{r['gb_per_second']:.2f}"] for r in rows],
    )
    save_plot(arguments.plot, "One target in memory", lambda axes: draw(axes, rows))


if __name__ == "__main__":
    main()
