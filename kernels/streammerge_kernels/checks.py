"""What launchers demand of their arguments, and the form in which kernels take the factors.

Shapes: N out_features, K in_features, R rank. A kernel believes every pointer, shape and stride
that it is given, so whatever is wrong has to be found here.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from triton import knobs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streammerge_kernels.reference import Term

__all__ = [
    "Factors",
    "InputPrecision",
    "check_no_partial_overlap",
    "check_tensor",
    "on_device_of",
    "pack_factors",
    "rank_of",
    "widest_dtype",
]

InputPrecision = Literal["ieee", "bf16x6", "bf16x3"]
"""How fp32 factors are multiplied: in fp32, or as 6 or 3 products of bf16 pieces on tensor cores.

16-bit factors are multiplied exactly, whatever is asked for.
"""

WIDE = (torch.bfloat16, torch.float16, torch.float32)

# 256 rows of a tile then stay within 32-bit offsets
LARGEST_STRIDE = 2**23


@dataclass(frozen=True, slots=True)
class Factors:
    """The terms of a weight, one behind the other."""

    a: torch.Tensor
    """(R, K), R the sum of all ranks, with padding if there are several terms."""
    b: torch.Tensor
    """(N, R), of the dtype of `a`."""
    scaling: float
    """Of the only term; 1.0 if there are several."""
    scalings: torch.Tensor | None
    """Of several terms: fp32, one for every BLOCK_R of R."""

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    *,
    dtypes: tuple[torch.dtype, ...] = WIDE,
    device: torch.device | None = None,
) -> None:
    """Check a tensor's dtype, shape, device and strides.

    Args:
        name: What the error calls it.
        tensor: The tensor.
        shape: What its shape has to be.
        dtypes: What its dtype may be.
        device: Where it has to be. None: wherever kernels can run.

    Raises:
        TypeError: It has another dtype.
        ValueError: Shape, device or strides do not fit.
    """
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype) for dtype in dtypes)
        msg = f"{name}: expected one of {names}, got {tensor.dtype}"
        raise TypeError(msg)
    if tuple(tensor.shape) != shape:
        msg = f"{name}: expected shape {shape}, got {tuple(tensor.shape)}"
        raise ValueError(msg)
    if device is None and tensor.device.type == "cpu" and not knobs.runtime.interpret:
        msg = f"{name}: expected a tensor on a GPU, got one on the CPU"
        raise ValueError(msg)
    if device is not None and tensor.device != device:
        msg = f"{name}: expected device {device}, got {tensor.device}"
        raise ValueError(msg)
    _check_strides(name, tensor)


def _check_strides(name: str, tensor: torch.Tensor) -> None:
    """Check that the last dimension is contiguous, and that a tile is within 32-bit offsets."""
    if tensor.ndim == 0 or tensor.numel() == 0:
        return
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        msg = f"{name}: expected stride 1 in the last dimension, got {tensor.stride(-1)}"
        raise ValueError(msg)
    if tensor.ndim == 2 and tensor.shape[0] > 1:
        stride = tensor.stride(0)
        if not tensor.shape[1] <= stride <= LARGEST_STRIDE:
            msg = (
                f"{name}: expected rows that do not overlap and are at most 2^23 elements apart, "
                f"got {tensor.shape[1]} elements with a stride of {stride}"
            )
            raise ValueError(msg)


def check_no_partial_overlap(out: torch.Tensor, weight: torch.Tensor) -> None:
    """Check that `out` is the weight itself or shares no memory with it.

    Raises:
        ValueError: A program could overwrite what another has yet to read.
    """
    same_place = out.data_ptr() == weight.data_ptr()
    same_layout = out.dtype == weight.dtype and out.stride() == weight.stride()
    if (same_place and same_layout) or out.device.type == "meta":
        return
    begin, end = _extent(out)
    other_begin, other_end = _extent(weight)
    if begin < other_end and other_begin < end:
        msg = "out: expected the weight itself, or memory of its own; got memory that both share"
        raise ValueError(msg)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the addresses between which a tensor lies."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in dims)
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def rank_of(terms: Sequence[Term]) -> int:
    """Add up the ranks of terms, which need not have been checked for anything else.

    Raises:
        ValueError: There is no term, or one without a rank.
    """
    if not terms:
        msg = "terms: expected at least one, got none; a weight without terms is copied, not merged"
        raise ValueError(msg)
    for index, (a, _, _) in enumerate(terms):
        if a.ndim != 2 or a.shape[0] == 0:
            msg = f"terms[{index}]: expected A of shape (R, K) with R > 0, got {tuple(a.shape)}"
            raise ValueError(msg)
    return sum(a.shape[0] for a, _, _ in terms)


def widest_dtype(terms: Sequence[Term]) -> torch.dtype:
    """Return the narrowest dtype that holds all factors exactly."""
    dtype = terms[0][0].dtype
    for a, b, _ in terms:
        dtype = torch.promote_types(dtype, torch.promote_types(a.dtype, b.dtype))
    return dtype


def pack_factors(
    terms: Sequence[Term], shape: tuple[int, int], block_r: int, device: torch.device
) -> Factors:
    """Check the terms of a weight and lay them one behind the other.

    One term of one dtype is passed on as it is; several are copied.

    Args:
        terms: One or more of A (R, K), B (N, R) and a scaling.
        shape: (N, K).
        block_r: BLOCK_R of the kernel, to a multiple of which each of several ranks is padded.
        device: Where the weight is.

    Returns:
        The terms as a kernel takes them.

    Raises:
        TypeError: A factor has no dtype that kernels take.
        ValueError: There is no term, or a factor does not fit the weight.
    """
    rank_of(terms)
    n, k = shape
    for index, (a, b, _) in enumerate(terms):
        rank = a.shape[0]
        check_tensor(f"terms[{index}]: A", a, (rank, k), device=device)
        check_tensor(f"terms[{index}]: B", b, (n, rank), device=device)
    dtype = widest_dtype(terms)
    if len(terms) == 1:
        a, b, scaling = terms[0]
        return Factors(a.to(dtype), b.to(dtype), float(scaling), None)
    blocks = [-(-a.shape[0] // block_r) for a, _, _ in terms]
    packed_a = torch.zeros((sum(blocks) * block_r, k), dtype=dtype, device=device)
    packed_b = torch.zeros((n, sum(blocks) * block_r), dtype=dtype, device=device)
    scalings: list[float] = []
    for (a, b, scaling), count in zip(terms, blocks, strict=True):
        first, rank = len(scalings) * block_r, a.shape[0]
        packed_a[first : first + rank] = a
        packed_b[:, first : first + rank] = b
        scalings += [float(scaling)] * count
    per_block = torch.tensor(scalings, dtype=torch.float32, device=device)
    return Factors(packed_a, packed_b, 1.0, per_block)


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Make a tensor's GPU the current one, on which triton launches whatever its arguments are."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return nullcontext()
