"""Choose the backend for `export_device`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from streammerge.errors import UnsupportedError

if TYPE_CHECKING:
    from streammerge.backends.base import Backend
    from streammerge.config.tuning import ComputeTuning
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


def select_backend(*, numerics: Numerics, scratch_bytes: int, tuning: ComputeTuning) -> Backend:
    """Start the backend. Imports torch.

    Args:
        numerics: What a merge rounds, and when.
        scratch_bytes: Most bytes of one product, in each thread that merges.
        tuning: How large a product is, by rank.
    """
    from streammerge.backends.torch_cpu import TorchCpuBackend  # noqa: PLC0415 (keeps `plan` fast)

    return TorchCpuBackend(numerics=numerics, scratch_bytes=scratch_bytes, tuning=tuning)
