"""Measure a GPU's link against the CPU, and its kernels with several shapes of tiles."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from streammerge.backends.device_merge import RANKS, shape_key
from streammerge.backends.gpus import find_gpus, kernel_errors, missing_driver
from streammerge.config.profile import MachineProfile
from streammerge.config.tuning import MIB, ComputeTuning, GpuTuning, KernelShape
from streammerge.engine.tune_choice import prefer
from streammerge.engine.tune_compute import measure_cpu
from streammerge.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from streammerge.backends.device_merge import Kernels
    from streammerge.backends.streams import Runtime

__all__ = ["measure_rates", "tune_gpus"]

_LINK_BYTES = 64 * MIB
_LINK_RUNS = 4
Operation = Literal["merge", "dora", "grouped"]
_OPERATIONS: tuple[Operation, ...] = ("merge", "dora", "grouped")
# N, K and how many weights
_SIZES: dict[Operation, tuple[int, int, int]] = {
    "merge": (4096, 4096, 1),
    "dora": (4096, 4096, 1),
    "grouped": (512, 2048, 32),
}
_LAUNCHES = 20
_RUNS = 3


def measure_rates(
    runtime: Runtime, *, threads: int, compute: ComputeTuning | None = None
) -> GpuTuning:
    """Measure what decides whether a merge of weights on the disk goes through a GPU.

    Args:
        runtime: The device.
        threads: Threads that would merge on the CPU.
        compute: How these are tuned.
    """
    return GpuTuning(
        link_gbps=round(_measure_link(runtime), 3),
        cpu_gbps=round(measure_cpu(threads, compute or ComputeTuning()), 3),
    )


def tune_gpus(
    *,
    threads: int,
    compute: ComputeTuning | None = None,
    quick: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> MachineProfile:
    """Measure every kind of GPU of this machine. Imports torch.

    Args:
        threads: Threads that would merge on the CPU.
        compute: How these are tuned.
        quick: Whether to leave the shapes of tiles as they are.
        progress: Told in a line what was measured.

    Returns:
        What was found; it is not saved.

    Raises:
        UnsupportedError: There is no GPU.
    """
    found = missing_driver() or find_gpus()
    if isinstance(found, str):
        raise UnsupportedError("there is no GPU to measure", got=found, hint="leave --gpu out")
    gpus: dict[str, GpuTuning] = {}
    cells: list[dict[str, Any]] = []
    for note in found.notes:
        progress(note)
    for runtime in found.runtimes:
        name = runtime.name
        if name in gpus:
            continue
        rates = measure_rates(runtime, threads=threads, compute=compute)
        progress(f"{name}: link {rates.link_gbps:.2f} GB/s, CPU {rates.cpu_gbps:.2f} GB/s")
        shapes: dict[str, KernelShape] = {}
        if found.kernels is not None and not quick:
            shapes, measured = _choose_shapes(runtime, found.kernels, progress)
            cells += [{"gpu": name, **cell} for cell in measured]
        gpus[name] = GpuTuning(rates.link_gbps, rates.cpu_gbps, shapes)
    return MachineProfile(
        gpus=gpus,
        measurements={"gpus": cells},
        created=datetime.now(timezone.utc).date().isoformat(),
    )


def _measure_link(runtime: Runtime) -> float:
    """Return the GB/s at which bytes go to a device while as many come back."""
    given, taken = runtime.host(_LINK_BYTES), runtime.host(_LINK_BYTES)
    inside, outside = runtime.device(_LINK_BYTES), runtime.device(_LINK_BYTES)
    streams = runtime.stream("in"), runtime.stream("out")
    events = runtime.event("in"), runtime.event("out")

    def move() -> float:
        started = time.perf_counter()
        runtime.copy(streams[0], inside, given)
        runtime.copy(streams[1], taken, outside)
        for stream, event in zip(streams, events, strict=True):
            runtime.record(stream, event)
        for event in events:
            runtime.synchronize(event)
        return time.perf_counter() - started

    move()
    return _LINK_BYTES / min(move() for _ in range(_LINK_RUNS)) / 10**9


@dataclass(frozen=True, slots=True)
class _Trial:
    """Weights of one kind on a device, and the factors that are merged into them."""

    operation: Operation
    weights: list[torch.Tensor]
    a: torch.Tensor
    b: torch.Tensor
    magnitude: torch.Tensor
    out: list[torch.Tensor]
    """Memory of its own, so that each launch does the same."""

    def launch(self, kernels: Kernels) -> None:
        """Merge once."""
        term, config = (self.a, self.b, 1.0), kernels.shape(self.operation, self.a)
        if self.operation == "grouped":
            kernels.grouped(self.weights, [term] * len(self.weights), out=self.out, config=config)
            return
        (weight,), (out,) = self.weights, self.out
        if self.operation == "dora":
            kernels.dora(weight, [term], self.magnitude, out=out, config=config)
        else:
            kernels.merge(weight, [term], out=out, config=config)

    @property
    def nbytes(self) -> int:
        """Bytes that are read and written."""
        return 2 * sum(weight.nbytes for weight in self.weights)


def _choose_shapes(
    runtime: Runtime, kernels: Kernels, progress: Callable[[str], None]
) -> tuple[dict[str, KernelShape], list[dict[str, Any]]]:
    """Return the shapes that are faster than the kernels' own, and all measurements."""
    import torch  # noqa: PLC0415 (a second)

    chosen: dict[str, KernelShape] = {}
    cells = []
    dtypes = torch.bfloat16, torch.float32
    for operation, dtype, rank in product(_OPERATIONS, dtypes, RANKS):
        key = shape_key(operation, dtype, rank)
        trial = _trial(runtime, operation, dtype, rank)
        rates: dict[KernelShape | None, float] = {}
        for shape in (None, *_candidates(rank, is_half=dtype is torch.bfloat16)):
            shaped = kernels if shape is None else kernels.with_shapes({key: shape})
            rate = _measure_launch(runtime, trial, shaped)
            if rate is not None:
                rates[shape] = rate
        if not rates:
            progress(f"{runtime.name}: {key}: no shape can be launched")
            continue
        best = prefer(rates, default=None, cost=lambda _: 0)
        if best is not None:
            chosen[key] = best
        progress(f"{runtime.name}: {key}: {rates[best]:.0f} GB/s, {_shown(best)}")
        cells += [
            {
                "kernel": key,
                "shape": None if shape is None else asdict(shape),
                "gbps": round(rate, 1),
                "is_chosen": shape == best,
            }
            for shape, rate in rates.items()
        ]
    return chosen, cells


def _shown(shape: KernelShape | None) -> str:
    if shape is None:
        return "the kernel's own shape"
    return f"{shape.block_n} x {shape.block_k}, {shape.num_warps} warps"


def _candidates(rank: int, *, is_half: bool) -> list[KernelShape]:
    """Return shapes worth a try; those that do not fit a device are left out when it refuses."""
    block_r = min(64, rank) if is_half else 16
    sides = ((64, 64), (64, 128), (128, 128), (64, 256)) if is_half else ((32, 64), (64, 64))
    return [
        KernelShape(block_n, block_k, block_r, num_warps, num_stages)
        for (block_n, block_k), num_warps, num_stages in product(sides, (4, 8), (2, 3))
    ]


def _trial(runtime: Runtime, operation: Operation, dtype: torch.dtype, rank: int) -> _Trial:
    import torch  # noqa: PLC0415

    rows, columns, count = _SIZES[operation]
    stream, event = runtime.stream("in"), runtime.event("there")
    weights, out = (
        [
            runtime.device(2 * rows * columns).view(torch.bfloat16).view(rows, columns)
            for _ in range(count)
        ]
        for _ in range(2)
    )
    random = torch.Generator().manual_seed(0)
    a, b, magnitude, values = (
        runtime.upload(stream, (0.01 * torch.randn(shape, generator=random)).to(kind))
        for shape, kind in (
            ((rank, columns), dtype),
            ((rows, rank), dtype),
            ((rows,), torch.float32),
            ((rows, columns), torch.bfloat16),
        )
    )
    for weight in weights:
        runtime.copy(stream, weight, values)
    runtime.record(stream, event)
    runtime.synchronize(event)
    return _Trial(operation, weights, a, b, magnitude, out)


def _measure_launch(runtime: Runtime, trial: _Trial, kernels: Kernels) -> float | None:
    """Return the GB/s of a launch, the best of some runs; None if the device refuses it."""
    stream, event = runtime.stream("compute"), runtime.event("done")

    def run(launches: int) -> float:
        started = time.perf_counter()
        for _ in range(launches):
            runtime.launch(stream, lambda: trial.launch(kernels))
        runtime.record(stream, event)
        runtime.synchronize(event)
        return time.perf_counter() - started

    try:
        # compiles
        run(1)
    except kernel_errors():
        return None
    return trial.nbytes * _LAUNCHES / min(run(_LAUNCHES) for _ in range(_RUNS)) / 10**9
