"""Choose the backend for `export_device`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from streammerge.errors import UnsupportedError

if TYPE_CHECKING:
    from streammerge.backends.base import Backend
    from streammerge.plan.ops import Numerics

__all__ = ["check_device", "select_backend"]


def check_device(device: Literal["cpu", "auto", "cuda"]) -> None:
    """Refuse a device that no backend drives.

    Raises:
        UnsupportedError: The device is `cuda`.
    """
    if device == "cuda":
        raise UnsupportedError(
            "export_device: cuda has no backend in this version",
            hint="set export_device: cpu or auto; a merge is bound by the disk, not by arithmetic",
        )


def select_backend(*, numerics: Numerics, threads: int, scratch_bytes: int) -> Backend:
    """Start the backend. Imports torch."""
    from streammerge.backends.torch_cpu import TorchCpuBackend  # noqa: PLC0415 (keeps `plan` fast)

    return TorchCpuBackend(numerics=numerics, threads=threads, scratch_bytes=scratch_bytes)
