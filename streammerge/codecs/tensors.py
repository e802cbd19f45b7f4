"""Bytes as torch tensors, and packed codes as bytes. Imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from streammerge.dtypes import Dtype

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["E2M1", "as_tensor", "bytes_of", "count_below", "decode_e2m1", "exponents", "pack_words",
           "torch_dtype", "unpack_nibbles", "unpack_words"]  # fmt: skip

WORD_BITS = 32
# values compared at a time: they and what comes of them stay in the cache of a core
_COMPARED = 1 << 16

_DTYPES = {
    Dtype.BOOL: torch.bool,
    Dtype.U8: torch.uint8,
    Dtype.I8: torch.int8,
    Dtype.I16: torch.int16,
    Dtype.I32: torch.int32,
    Dtype.I64: torch.int64,
    Dtype.F16: torch.float16,
    Dtype.BF16: torch.bfloat16,
    Dtype.F32: torch.float32,
    Dtype.F64: torch.float64,
    Dtype.F8_E4M3: torch.float8_e4m3fn,
    Dtype.F8_E5M2: torch.float8_e5m2,
    Dtype.F8_E8M0: torch.float8_e8m0fnu,
}

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the sixteen codes of 4-bit floats (OCP MX, E2M1) stand for."""


def torch_dtype(dtype: Dtype) -> torch.dtype:
    """Return torch's name of a stored dtype."""
    return _DTYPES[dtype]


def as_tensor(
    data: Mapping[str, memoryview], role: str, dtype: Dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    """View the bytes of one part as a tensor."""
    # torch wants a writable buffer, though nothing is written
    buffer = data[role]
    flat = torch.frombuffer(
        bytearray(buffer) if buffer.readonly else buffer, dtype=torch.uint8
    ).view(_DTYPES[dtype])
    return flat.reshape(shape)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """View a contiguous tensor as its bytes."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]


def count_below(values: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Return how many of a few bounds are below each value; of NaN all are.

    `torch.bucketize` gives the same in 22 ns a value for 15 bounds, this in 1.3 (one thread of a
    Xeon with AVX-512, torch 2.13.0, numpy 2.4): comparisons of numpy's fill a register.

    Args:
        values: float32.
        bounds: (n,) float32, ascending.

    Returns:
        uint8 in the shape of the values.
    """
    flat = values.contiguous().view(-1).numpy()
    counts = np.full(flat.shape, len(bounds), np.uint8)
    is_below = np.empty(min(_COMPARED, len(flat)), np.bool_)
    limits = bounds.numpy()
    for at in range(0, len(flat), _COMPARED):
        some, found = flat[at : at + _COMPARED], counts[at : at + _COMPARED]
        not_above = is_below[: len(some)]
        for limit in limits:
            np.less_equal(some, limit, out=not_above)
            np.subtract(found, not_above.view(np.uint8), out=found)
    return torch.from_numpy(counts).view(values.shape)


def unpack_nibbles(packed: torch.Tensor, *, high_first: bool) -> torch.Tensor:
    """Return the (..., 2 L) uint8 codes of (..., L) bytes that hold two each."""
    low, high = packed & 15, packed >> 4
    pair = (high, low) if high_first else (low, high)
    return torch.stack(pair, dim=-1).flatten(-2)


def decode_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Return the (..., 2 L) float32 values of (..., L) bytes of two codes, the low one first."""
    return torch.tensor(E2M1)[unpack_nibbles(packed, high_first=False).int()]


def exponents(stored: torch.Tensor) -> torch.Tensor:
    """Return the powers of two in float32 that bytes stand for: 127 is 1, and 255 is inf."""
    return torch.exp2(stored.float() - 127)


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack (M, L) uint8 along L into (M, words) int32; codes that fill up the last word are 0.

    Codes go from the lowest bit of a word on, and may run over into the next.
    """
    lines, length = codes.shape
    words = -(-length * bits // WORD_BITS)
    full = torch.zeros(lines, length + -length % 32, dtype=torch.uint8)
    full[:, :length] = codes
    # eight codes, a byte each, are one int64, whose bits move together at the speed of memory
    wide = full.view(torch.int64)
    if bits < 8:
        for span in (8, 16, 32):
            used = span // 8 * bits
            wide.bitwise_or_(wide >> (span - used)).bitwise_and_(_mask(2 * used, 2 * span))
    packed = wide.unsqueeze(-1).view(torch.uint8)[..., :bits]
    return packed.flatten(1).view(torch.int32)[:, :words].contiguous()


def unpack_words(words: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """Return the (M, length) uint8 codes of (M, words) int32."""
    padded = torch.nn.functional.pad(words, (0, -words.shape[1] % bits))
    parts = padded.contiguous().view(torch.uint8).view(len(words), -1, bits)
    full = torch.zeros(*parts.shape[:2], 8, dtype=torch.uint8)
    full[..., :bits] = parts
    wide = full.view(torch.int64).squeeze(-1)
    if bits < 8:
        for span in (32, 16, 8):
            used = span // 8 * bits
            wide.bitwise_or_(wide << (span - used)).bitwise_and_(_mask(used, span))
    return wide.view(torch.uint8)[:, :length].contiguous()


def _mask(used: int, span: int) -> int:
    """Return 64 bits of which the lowest `used` of every `span` are set."""
    return sum((1 << used) - 1 << place for place in range(0, 64, span))
