"""Look at a pickle before it is loaded: only what state dicts are made of, and no deep nesting.

The unpickler of `torch_bin` runs no code of the file, but the machine below it can still be made
to allocate tens of GB (a memo index) or to overflow the C stack (hashing a tuple nested a million
deep).
This pass walks the opcodes without running them and keeps the nesting depth of what they would
build.
"""

from __future__ import annotations

import pickletools
from pickle import UnpicklingError

__all__ = ["check_pickle"]

# a state dict nests mapping > tensor > storage > shape
MAX_DEPTH = 16
_ATOMS = frozenset(
    """
    GLOBAL NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE
    EMPTY_TUPLE EMPTY_DICT EMPTY_LIST
    """.split()
)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NEW_FROM_MARK = frozenset({"TUPLE", "DICT", "LIST"})
_TO_MARK = frozenset({*_NEW_FROM_MARK, "SETITEMS", "APPENDS"})
_FIXED = {
    "REDUCE": 2,
    "BUILD": 2,
    "SETITEM": 3,
    "APPEND": 2,
    "BINPERSID": 1,
    "STACK_GLOBAL": 2,
    **_TUPLES,
}


def check_pickle(raw: bytes) -> None:
    """Walk a pickle's opcodes.

    Raises:
        UnpicklingError: It holds what no state dict holds, is nested too deep, or is not a pickle.
    """
    stack: list[int | None] = []  # depth of each object; None is a mark
    memo: dict[int, int] = {}
    try:
        for opcode, argument, _ in pickletools.genops(raw):
            if opcode.name in {"PROTO", "FRAME", "STOP"}:
                continue
            _step(opcode.name, argument, stack, memo, limit=len(raw))
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        msg = f"its pickle is malformed ({error})"
        raise UnpicklingError(msg) from error


def _step(
    name: str, argument: object, stack: list[int | None], memo: dict[int, int], *, limit: int
) -> None:
    """Do to the depths what an opcode would do to the objects."""
    if name in _ATOMS:
        stack.append(0)
    elif name == "MARK":
        stack.append(None)
    elif name in {"BINPUT", "LONG_BINPUT", "MEMOIZE"}:
        key = len(memo) if name == "MEMOIZE" else argument
        if not isinstance(key, int) or key > limit:
            msg = "its pickle has a memo index beyond its size"
            raise UnpicklingError(msg)
        memo[key] = _depth(stack[-1:])
    elif name in {"BINGET", "LONG_BINGET"}:
        assert isinstance(argument, int)
        stack.append(memo[argument])
    elif name in _FIXED or name in _TO_MARK:
        _build(name, stack)
    else:
        msg = f"its pickle uses {name}, which no state dict needs"
        raise UnpicklingError(msg)


def _build(name: str, stack: list[int | None]) -> None:
    """Replace the objects that an opcode takes by the one that it makes."""
    if name in _TO_MARK:
        taken = []
        while (top := stack.pop()) is not None:
            taken.append(top)
        if name not in _NEW_FROM_MARK:
            # what is filled lies below the mark
            taken.append(_depth([stack.pop()]) - 1)
    else:
        count = _FIXED[name]
        taken = [_depth([item]) for item in stack[-count:]]
        if len(taken) < count:
            raise IndexError("stack is empty")
        del stack[-count:]
    depth = 1 + max(taken, default=0)
    if depth > MAX_DEPTH:
        msg = "its pickle is nested too deep"
        raise UnpicklingError(msg)
    stack.append(depth)


def _depth(items: list[int | None]) -> int:
    if not items or items[0] is None:
        raise IndexError("an object is missing")
    return items[0]
