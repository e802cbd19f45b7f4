"""Compile a kernel for a GPU that is not there, and count what is in the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
# of one block, in bytes; triton compiles beyond it, and the launch fails
SHARED_MEMORY = {
    "sm_80": 166_912,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
    "gfx950": 163_840,
}
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, slots=True)
class MachineCode:
    """What a compiled kernel does, by instruction."""

    spills: int
    stack_bytes: int
    shared_bytes: int
    wide_loads: int
    """Of 128 bits, from global memory."""
    loads: int
    wide_stores: int
    stores: int
    bulk_copies: int
    """By TMA."""
    tensor_core: int
    """Any instruction of tensor or matrix cores."""
    wgmma: int
    tcgen05: int


def compile_for(
    target: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    *,
    is_aligned: bool = True,
) -> MachineCode:
    """Compile as a launch would whose pointers and sizes are all multiples of 16, or none."""
    options = {name: constants[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    constants = {name: constants.get(name) for name in kernel.arg_names if name not in types}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if is_aligned and re.match(r"\*|i32|i64", signature[name])
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if target.startswith("sm"):
        return _read_sass(compiled.asm["cubin"], compiled.metadata.shared)
    return _read_amdgcn(compiled.asm["amdgcn"], compiled.metadata.shared)


def _run(tool: str, flag: str, cubin: bytes) -> str:
    # the tools do not read a pipe
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [BIN / tool, flag, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read_sass(cubin: bytes, shared_bytes: int) -> MachineCode:
    usage = _run("cuobjdump", "--dump-resource-usage", cubin)
    stack = re.search(r"STACK:(\d+)", usage)
    assert stack
    listing = _run("nvdisasm", "-c", cubin)
    instruction = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)"
    names = re.findall(instruction, listing, re.MULTILINE)
    assert len(names) > 50, "the listing is not what it was when this was written"

    def count(pattern: str) -> int:
        return sum(bool(re.match(pattern, name)) for name in names)

    return MachineCode(
        spills=count(r"(STL|LDL)\b"),
        stack_bytes=int(stack[1]),
        shared_bytes=shared_bytes,
        wide_loads=count(r"LDG(STS)?\b.*\.128"),
        loads=count(r"LDG(STS)?\b"),
        wide_stores=count(r"STG\b.*\.128"),
        stores=count(r"STG\b"),
        bulk_copies=count(r"UTMA(LDG|STG)\b"),
        tensor_core=count(r"(HMMA|QMMA|IMMA|DMMA|HGMMA|QGMMA)\b|UTC\w*MMA"),
        wgmma=count(r"(HGMMA|QGMMA)\b"),
        tcgen05=count(r"UTC\w*MMA"),
    )


def _read_amdgcn(listing: str, shared_bytes: int) -> MachineCode:
    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", listing)
        assert found
        return int(found[1])

    def count(pattern: str) -> int:
        return len(re.findall(rf"^\s+{pattern}", listing, re.MULTILINE))

    return MachineCode(
        spills=value("vgpr_spill_count") + value("sgpr_spill_count"),
        stack_bytes=value("private_segment_fixed_size"),
        shared_bytes=shared_bytes,
        wide_loads=count(r"(global|buffer)_load_dwordx4"),
        loads=count(r"(global|buffer)_load"),
        wide_stores=count(r"(global|buffer)_store_dwordx4"),
        stores=count(r"(global|buffer)_store"),
        bulk_copies=0,
        tensor_core=count(r"v_mfma"),
        wgmma=0,
        tcgen05=0,
    )
