"""Choose the backend for `export_device`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from streammerge.backends.gpus import missing_driver
from streammerge.errors import UnsupportedError

if TYPE_CHECKING:
    from streammerge.backends.base import Backend
    from streammerge.backends.gpus import Gpus
    from streammerge.backends.triton_gpu import GpuBackend
    from streammerge.config.tuning import ComputeTuning
    from streammerge.plan.ops import Numerics

__all__ = ["GpuRoom", "check_device", "no_gpu", "select_backend", "select_gpu_backend"]


@dataclass(frozen=True, slots=True)
class GpuRoom:
    """What bounds the memory that a run takes of each GPU."""

    max_bytes: int
    block_bytes: int
    """Most bytes of a block."""
    factor_bytes: int
    """Most bytes of factors in flight."""


def check_device(device: Literal["cpu", "auto", "cuda"]) -> None:
    """Refuse a device that this machine cannot have. Does not import torch.

    Raises:
        UnsupportedError: The device is `cuda`, and there is no driver.
    """
    if device == "cuda" and (reason := missing_driver()):
        raise no_gpu(reason)


def no_gpu(reason: str) -> UnsupportedError:
    """Say that there is no GPU where one was asked for."""
    return UnsupportedError(
        "export_device: cuda needs a GPU",
        got=reason,
        hint="set export_device: cpu, or auto, which takes a GPU where there is one",
    )


def select_backend(*, numerics: Numerics, scratch_bytes: int, tuning: ComputeTuning) -> Backend:
    """Start the backend of the CPU. Imports torch.

    Args:
        numerics: What a merge rounds, and when.
        scratch_bytes: Most bytes of one product, in each thread that merges.
        tuning: How large a product is, by rank.
    """
    from streammerge.backends.torch_cpu import TorchCpuBackend  # noqa: PLC0415 (keeps `plan` fast)

    return TorchCpuBackend(numerics=numerics, scratch_bytes=scratch_bytes, tuning=tuning)


def select_gpu_backend(
    gpus: Gpus, room: GpuRoom, *, numerics: Numerics, scratch_bytes: int, tuning: ComputeTuning
) -> GpuBackend:
    """Start the backend of GPUs; the other arguments are those of `select_backend`.

    Args:
        gpus: The devices.
        room: The memory of each.
        numerics: What a merge rounds, and when.
        scratch_bytes: Of the CPU, for what no GPU does.
        tuning: Of the CPU.

    Raises:
        MemoryBudgetError: A device has too little memory.
    """
    from streammerge.backends.torch_cpu import TorchCpuBackend  # noqa: PLC0415
    from streammerge.backends.triton_gpu import GpuBackend, fit_ring  # noqa: PLC0415

    free = min(runtime.free_bytes() for runtime in gpus.runtimes)
    memory = fit_ring(
        room=min(room.max_bytes, free),
        block_bytes=room.block_bytes,
        factor_bytes=room.factor_bytes,
    )
    cpu = TorchCpuBackend(numerics=numerics, scratch_bytes=scratch_bytes, tuning=tuning)
    return GpuBackend(
        cpu=cpu, runtimes=gpus.runtimes, kernels=gpus.kernels, memory=memory, numerics=numerics
    )
