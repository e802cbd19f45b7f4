"""Measure how large a product is best.

The product of a few rows is added to them while it is still in the cache. Too large a product is
read from memory again; too small a one costs calls, for which threads wait on the interpreter's
lock. Therefore as many threads are measured as merge.
"""

from __future__ import annotations

import mmap
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from math import prod
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING, Any

import numpy as np

from streammerge.adapters.terms import Factor
from streammerge.backends.base import Tile
from streammerge.checkpoint.header import StoredTensor
from streammerge.config.tuning import KIB, MIB, ComputeTuning
from streammerge.dtypes import Dtype
from streammerge.engine.tune_choice import prefer
from streammerge.plan.ops import ApplyTerms, LoraTerm, TensorPlan

if TYPE_CHECKING:
    from collections.abc import Callable

    from streammerge.backends.base import Backend, TargetFactors

__all__ = ["measure_compute", "measure_cpu"]

_DTYPES = (Dtype.BF16, Dtype.F16, Dtype.F32)
_RANKS = (16, 64, 256)
# ranges of ranks with a size of their own
_HIGHEST_RANKS = (64, 1 << 30)
_SCRATCH_BYTES = (256 * KIB, 512 * KIB, MIB, 2 * MIB, 4 * MIB)
_COLUMNS = 4096
_TILE_BYTES = 8 * MIB
# of each thread: so many that a tile is not in the cache any more when its turn comes again
_TILES = 3
# more would need gigabytes of tiles on a large machine
_MOST_THREADS = 8
_RUNS = 3

_Cell = tuple[Dtype, int, int]


def measure_compute(
    *, quick: bool, progress: Callable[[str], None]
) -> tuple[ComputeTuning, list[dict[str, Any]]]:
    """Find the best size of a product, for low and for high ranks. Imports torch.

    Args:
        quick: Whether to measure once.
        progress: Told in a line what was measured.

    Returns:
        The sizes that were chosen, and the measurements as JSON types: GB/s of weights, over all
        threads.
    """
    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    rates: dict[_Cell, float] = {}
    for dtype, rank in product(_DTYPES, _RANKS):
        found = _measure(dtype, rank, threads=threads, runs=1 if quick else _RUNS)
        rates |= {(dtype, rank, size): rate for size, rate in found.items()}
        shown = ", ".join(f"{size // KIB} KiB {rate:.2f}" for size, rate in found.items())
        progress(f"merge {dtype.value}, rank {rank}: {shown} GB/s")
    tuning = _choose(rates)
    return tuning, [
        {
            "dtype": dtype.value,
            "rank": rank,
            "threads": threads,
            "scratch_bytes": size,
            "gbps": round(rate, 3),
            "is_chosen": size == tuning.scratch_for(rank),
        }
        for (dtype, rank, size), rate in rates.items()
    ]


def measure_cpu(threads: int, tuning: ComputeTuning) -> float:
    """Return the GB/s of BF16 weights that threads merge with an adapter of a usual rank."""
    rank = _RANKS[0]
    size = tuning.scratch_for(rank)
    return _measure(Dtype.BF16, rank, threads=min(_MOST_THREADS, threads), runs=1, sizes=(size,))[
        size
    ]


def _choose(rates: dict[_Cell, float]) -> ComputeTuning:
    """Choose a size per range of ranks; each dtype and rank in it counts the same."""
    default = ComputeTuning()
    buckets, above = [], 0
    for highest in _HIGHEST_RANKS:
        ranks = [rank for rank in _RANKS if above < rank <= highest]
        means = {
            size: statistics.geometric_mean(
                rates[dtype, rank, size] for dtype, rank in product(_DTYPES, ranks)
            )
            for size in _SCRATCH_BYTES
        }
        usual = default.scratch_for(max(ranks))
        buckets.append((highest, prefer(means, default=usual, cost=int)))
        above = highest
    return ComputeTuning(tuple(buckets))


def _measure(
    dtype: Dtype,
    rank: int,
    *,
    threads: int,
    runs: int,
    sizes: tuple[int, ...] = _SCRATCH_BYTES,
) -> dict[int, float]:
    """Return GB/s for each size of a product, the median of runs in turn."""
    from streammerge.backends.torch_cpu import TorchCpuBackend  # noqa: PLC0415 (a second)

    target, raw = _target(dtype, rank)
    tiles = [_tiles(target, seed) for seed in range(threads)]
    backends = {
        size: TorchCpuBackend(numerics="peft", tuning=ComputeTuning(((1 << 30, size),)))
        for size in sizes
    }
    seconds: dict[int, list[float]] = {size: [] for size in backends}
    with ThreadPoolExecutor(threads) as pool:
        for run, (size, backend) in product(range(runs + 1), backends.items()):
            taken = _apply(pool, backend, backend.load_factors(target, raw), tiles)
            # the first time, scratch is allocated
            if run:
                seconds[size].append(taken)
    nbytes = sum(len(tile.buffer) for own in tiles for tile in own)
    return {size: nbytes / statistics.median(taken) / 10**9 for size, taken in seconds.items()}


def _apply(
    pool: ThreadPoolExecutor, backend: Backend, factors: TargetFactors, tiles: list[list[Tile]]
) -> float:
    """Merge each list of tiles in a thread of its own, and return the seconds."""
    starting = Barrier(len(tiles) + 1)

    def merge(own: list[Tile]) -> None:
        starting.wait()
        for _ in backend.apply_block((tile, factors) for tile in own):
            pass

    working = [pool.submit(merge, own) for own in tiles]
    starting.wait()
    started = time.perf_counter()
    for future in working:
        future.result()
    return time.perf_counter() - started


def _target(dtype: Dtype, rank: int) -> tuple[TensorPlan, dict[StoredTensor, bytearray]]:
    """Return a weight that fills a tile, with an adapter of that rank, and its factors' bytes."""
    nowhere = Path("tune")
    rows = _TILE_BYTES // dtype.nbytes(_COLUMNS)
    shapes = {"a": (rank, _COLUMNS), "b": (rows, rank)}
    random = np.random.default_rng(0)
    parts = {
        name: StoredTensor(name, Dtype.F32, shape, nowhere, 0) for name, shape in shapes.items()
    }
    # so small that the sums stay in the range of F16, however often they grow
    raw = {
        part: bytearray(
            (random.standard_normal(prod(part.shape), dtype=np.float32) * 1e-3).tobytes()
        )
        for part in parts.values()
    }
    term = LoraTerm(
        Factor(parts["a"]), Factor(parts["b"]), 2.0, is_transposed=False, rounds_delta=False
    )
    source = StoredTensor("weight", dtype, (rows, _COLUMNS), nowhere, 0)
    return TensorPlan("weight", dtype, source, ApplyTerms(dtype, (term,)), "merged"), raw


def _tiles(target: TensorPlan, seed: int) -> list[Tile]:
    """Return whole tiles of the target, each with weights of its own."""
    random = np.random.default_rng(seed)
    tiles = []
    for _ in range(_TILES):
        values = random.standard_normal(prod(target.shape), dtype=np.float32)
        buffer = memoryview(mmap.mmap(-1, target.nbytes))
        buffer[:] = _encode(values, target.dtype)
        tiles.append(Tile(target, 0, target.shape[0], buffer, 0, 0))
    return tiles


def _encode(values: np.ndarray[Any, np.dtype[np.float32]], dtype: Dtype) -> bytes:
    if dtype is Dtype.BF16:
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return (values.astype(np.float16) if dtype is Dtype.F16 else values).tobytes()
