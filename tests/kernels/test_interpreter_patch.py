"""What `interpreter_patch` replaces is what it was written for."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import pytest
from triton.runtime import interpreter

BUILDER = interpreter.InterpreterBuilder
# SHA-256 of the source in triton 3.9.0
REPLACED: dict[str, tuple[Any, str]] = {
    "_convert_float": (interpreter._convert_float, "65dc886a93b2ce3d"),
    "cast_impl": (BUILDER.cast_impl, "b221bbb796645a4e"),
    "binary_op": (BUILDER.binary_op, "ca085f65855c0fa4"),
    "unary_op": (BUILDER.unary_op, "fae9670ade6d8cb2"),
    "create_dot": (BUILDER.create_dot, "7d5da68ca4b33412"),
    "InterpreterOptions": (interpreter.InterpreterOptions, "942c1a93071739ca"),
}


@pytest.mark.parametrize("name", REPLACED)
def test_a_replaced_function_is_that_of_triton_3_9(name: str) -> None:
    function, expected = REPLACED[name]
    got = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
    assert got[:16] == expected, f"compare interpreter_patch with the new {name} of triton"
