"""Make triton's interpreter compute what a GPU computes, for the dtypes where it does not.

The interpreter of triton 3.9 holds bf16 and FP8 in unsigned integers, and much of its arithmetic
works on those: a cast to bf16 cuts off the lower half, `tl.dot` multiplies bit patterns, a carry in
a cast to FP8 is lost. `apply` replaces the five private functions concerned; kernels stay as they
are. `test_interpreter_patch.py` fails when an upgrade changes one of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

FLOATS = {
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
UNSIGNED = {
    1: (np.uint8, torch.uint8),
    2: (np.uint16, torch.uint16),
    4: (np.uint32, torch.uint32),
    8: (np.uint64, torch.uint64),
}
LARGEST_FP8 = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
# numpy has them; what it lacks is held in unsigned integers
IN_NUMPY = (tl.float16, tl.float32, tl.float64)
BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def _to_torch(data: Any, dtype: Any) -> torch.Tensor:
    bits, _ = UNSIGNED[dtype.primitive_bitwidth // 8]
    return torch.from_numpy(np.ascontiguousarray(data).view(bits)).view(FLOATS[dtype])


def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    """Cast, to nearest, ties to even; FP8 saturates. Bit patterns in, bit patterns out."""
    if rounding is not None and rounding == interpreter._ir.ROUNDING_MODE.RTZ:
        raise NotImplementedError("a cast that truncates")
    values = _to_torch(data, source)
    values = values if source is tl.float64 else values.float()
    if target in LARGEST_FP8 and source not in LARGEST_FP8:
        limit = LARGEST_FP8[target]
        values = torch.where(values.isnan(), values, values.clamp(-limit, limit))
    _, bits = UNSIGNED[target.primitive_bitwidth // 8]
    return values.to(FLOATS[target]).view(bits).numpy().reshape(np.shape(data))


def _widen(handle: Any) -> Any:
    """Return the values of a bf16 or FP8 handle in fp32, and of others as they are."""
    dtype = handle.dtype.scalar
    if dtype not in FLOATS or dtype in IN_NUMPY:
        return handle.data
    return _to_torch(handle.data, dtype).float().numpy().reshape(np.shape(handle.data))


def _handle(values: Any, dtype: Any) -> Any:
    """Round fp32 values into a handle."""
    data = convert_float(np.asarray(values, np.float32), tl.float32, dtype, None)
    return interpreter.TensorHandle(data.view(interpreter._get_np_dtype(dtype)), dtype)


def _pieces(values: Any) -> tuple[Any, Any, Any]:
    """Split fp32 into the three bf16 pieces that bf16x3 and bf16x6 multiply."""
    rest = torch.from_numpy(np.ascontiguousarray(values))
    pieces = []
    for _ in range(3):
        pieces.append(rest.bfloat16().float())
        rest = rest - pieces[-1]
    first, second, third = (piece.numpy() for piece in pieces)
    return first, second, third


def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, _limit: Any) -> Any:
    """Multiply in fp32 what the tensor cores are given."""
    left, right = _widen(a), _widen(b)
    precisions = interpreter._ir.INPUT_PRECISION
    is_fp32 = a.dtype.scalar == tl.float32
    if is_fp32 and input_precision in (precisions.TF32, precisions.TF32x3):
        raise NotImplementedError("no kernel asks for tf32")
    if is_fp32 and input_precision in (precisions.BF16x3, precisions.BF16x6):
        lefts, rights = _pieces(left), _pieces(right)
        pairs = [(1, 0), (0, 1), (0, 0)]
        if input_precision == precisions.BF16x6:
            pairs = [(1, 1), (0, 2), (2, 0), *pairs]
        total = d.data
        for i, j in pairs:
            total = total + np.matmul(lefts[i], rights[j], dtype=np.float32)
        return interpreter.TensorHandle(total, d.dtype.scalar)
    product = np.matmul(left, right, dtype=d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def apply() -> None:
    """Replace the functions, once and for the whole process."""
    builder = interpreter.InterpreterBuilder
    cast, binary, unary = builder.cast_impl, builder.binary_op, builder.unary_op

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        old, new = source.dtype.scalar, dtype.scalar
        if old == new or tl.bfloat16 not in (old, new):
            return cast(self, source, dtype)
        if old in FLOATS and new in FLOATS:
            data = convert_float(source.data, old, new, None)
            return interpreter.TensorHandle(data.view(interpreter._get_np_dtype(new)), new)
        if new == tl.bfloat16:
            return _handle(source.data, new)
        return interpreter.TensorHandle(_widen(source).astype(interpreter._get_np_dtype(new)), new)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if left.dtype.scalar != tl.bfloat16 or op in BITWISE:
            return binary(self, left, right, op)
        result = op(_widen(left), _widen(right))
        if result.dtype == np.bool_:
            return interpreter.TensorHandle(result, tl.int1)
        return _handle(result, tl.bfloat16)

    def unary_op(self: Any, argument: Any, op: Any) -> Any:
        if argument.dtype.scalar != tl.bfloat16:
            return unary(self, argument, op)
        return _handle(op(_widen(argument)), tl.bfloat16)

    interpreter._convert_float = convert_float
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options,
        allowed_dot_input_precisions=("ieee", "bf16x3", "bf16x6"),
    )
    builder.cast_impl, builder.binary_op, builder.unary_op = cast_impl, binary_op, unary_op
    builder.create_dot = create_dot
