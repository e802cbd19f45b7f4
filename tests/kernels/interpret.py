"""Run cases in triton's interpreter, and print what came of them as JSON.

A program of its own: whether triton interprets is decided when it is imported, and its library
cannot be compiled in the same process any more.

    python interpret.py cases SEED COUNT    so many cases of every operation
    python interpret.py codecs              every code of every format
    python interpret.py guard               against guard pages
    ... --only NAME                         of one operation
    ... --mutant NAME                       with one line of a kernel changed
    ... --unpatched                         with the interpreter as it is
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import itertools
import json
import mmap
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

os.environ["TRITON_INTERPRET"] = "1"

import interpreter_patch
import torch

PAGE = mmap.PAGESIZE

# module, what is there, what the mutant has
CUT = """

@triton.jit
def cut(values):
    bits = values.to(tl.uint32, bitcast=True) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)
"""
MUTANTS = {
    "store without a mask": (
        "merge",
        "        total.to(out.dtype.element_ty),\n        mask=mask,",
        "        total.to(out.dtype.element_ty),",
    ),
    "load without a mask": (
        "merge",
        "        mask=mask,\n        other=0.0,\n        evict",
        "        evict",
    ),
    "rows of B without a mask": ("tile", "mask=mask_b, other=0.0", "mask=None"),
    "columns of A without a mask": ("tile", "mask=mask_a, other=0.0", "mask=None"),
    "ranks of A without a mask": ("tile", "mask_a = mask_a & (ranks < RANK)[:, None]", "pass"),
    "a cast that truncates": (
        "merge",
        "total.to(out.dtype.element_ty)",
        "cut(total).to(out.dtype.element_ty)",
    ),
    "a product rounded to bf16": (
        "tile",
        "    return total\n",
        "    return total.to(tl.bfloat16).to(tl.float32)\n",
    ),
    "scaling forgotten": ("tile", "total = scaling * total", "total = 1.0 * total"),
    "a block's scale from its neighbour": ("fp8", "first_column // SIZE)", "first_row // SIZE)"),
    "codes in the other order": (
        "nf4",
        "tl.interleave(first, second)",
        "tl.interleave(second, first)",
    ),
    "an absmax too early": (
        "nf4",
        "absmax + element // BLOCK_SIZE",
        "absmax + element // BLOCK_SIZE * 0",
    ),
}


def load_mutant(name: str) -> None:
    """Put a changed copy of a module in the place of the original, before anything imports it."""
    module, old, new = MUTANTS[name]
    spec = importlib.util.find_spec(f"streammerge_kernels.{module}")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text()
    assert source.count(old) == 1, f"the mutant {name!r} has to follow the kernel"
    folder = Path(tempfile.mkdtemp())
    path = folder / f"{module}.py"
    path.write_text(source.replace(old, new) + CUT)
    changed = importlib.util.spec_from_file_location(spec.name, path)
    assert changed is not None
    assert changed.loader is not None
    sys.modules[spec.name] = importlib.util.module_from_spec(changed)
    changed.loader.exec_module(sys.modules[spec.name])


def run_cases(seed: int, count: int, only: str | None) -> dict[str, Any]:
    import cases

    results = {}
    for operation in [only] if only else cases.OPERATIONS:
        run = cases.OPERATIONS[operation]
        for case in cases.sample(operation, seed, count):
            comparison = run(case, lambda tensor: tensor)
            results[case.name] = {
                "operation": operation,
                "elements": comparison.got.numel(),
                "violations": comparison.violations,
                "worst": comparison.worst,
            }
    return results


def run_codecs() -> dict[str, int]:
    import cases

    wrong = cases.check_decoding(lambda tensor: tensor)
    return {**wrong, "e4m3 encoding": cases.check_e4m3_encoding(lambda tensor: tensor)}


class GuardPages:
    """Puts tensors so that their first or last byte is next to a page that must not be touched."""

    def __init__(self, *, is_front: bool) -> None:
        self._is_front = is_front
        self._maps: list[mmap.mmap] = []

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.numel() * tensor.element_size()
        pages = -(-size // PAGE)
        area = mmap.mmap(-1, (pages + 2) * PAGE)
        self._maps.append(area)
        address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        for offset in (0, (pages + 1) * PAGE):
            failed = ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + offset), PAGE, 0)
            assert not failed
        offset = PAGE if self._is_front else (pages + 1) * PAGE - size
        flat = torch.frombuffer(area, dtype=torch.uint8, count=size, offset=offset)
        return flat.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def guarded_cases() -> Iterator[tuple[Any, bool]]:
    """Yield cases, and whether the guarded page is in front of their tensors."""
    import cases

    shapes = {
        "nf4": [(5, 18), (65, 130)],
        "mxfp4": [(5, 32), (65, 160)],
        "tma": [(1, 8), (65, 136)],
    }
    for operation in cases.OPERATIONS:
        # a tensor that ends where a page does need not begin where TMA can address it
        sides = (True,) if operation == "tma" else (False, True)
        for shape, rank, variant, is_front in itertools.product(
            shapes.get(operation, [(1, 2), (5, 18), (65, 130), (129, 66)]),
            (8, 40) if operation == "tma" else (4, 20, 64),
            cases.VARIANTS.get(operation, ("",)),
            sides,
        ):
            dtype = cases.BF16
            yield cases.Case(operation, shape, (rank,), dtype, dtype, variant), is_front


def run_guarded() -> dict[str, int]:
    import cases

    launches = 0
    for case, is_front in guarded_cases():
        comparison = cases.OPERATIONS[case.operation](case, GuardPages(is_front=is_front))
        assert not comparison.violations, case.name
        launches += 1
    return {"launches": launches}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("cases", "codecs", "guard"))
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("count", type=int, nargs="?", default=0)
    parser.add_argument("--only")
    parser.add_argument("--mutant", choices=MUTANTS)
    parser.add_argument("--unpatched", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.unpatched:
        interpreter_patch.apply()
    if arguments.mutant:
        load_mutant(arguments.mutant)
    if arguments.what == "cases":
        result: dict[str, Any] = run_cases(arguments.seed, arguments.count, arguments.only)
    else:
        result = {"codecs": run_codecs, "guard": run_guarded}[arguments.what]()
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
