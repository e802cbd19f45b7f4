"""Kernels in triton's interpreter, against the reference and against guard pages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("interpret.py")
OPERATIONS = (
    "merge", "strided", "tma", "dora_norm", "dora", "grouped", "nf4", "mxfp4", "fp8", "requantize",
)  # fmt: skip
# a seed whose sample has every variant, and scales of several blocks
SEED = 5
# cases of every operation
SAMPLE = 6
LARGE_SAMPLE = 24


def start(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    # BLAS threads that wait for each other cost more than they bring on products of this size
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def run(*arguments: object) -> dict[str, Any]:
    done = start(*arguments)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout)
    return results


def fails(operation: str, *arguments: object, count: int = SAMPLE) -> bool:
    """Tell whether a sample of an operation has elements beyond their bound."""
    results = run("cases", SEED, count, "--only", operation, *arguments)
    assert len(results) == count
    return any(result["violations"] for result in results.values())


@pytest.fixture(scope="module")
def sample() -> dict[str, Any]:
    return run("cases", SEED, SAMPLE)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_sample_is_within_the_bound_of_its_operation(
    sample: dict[str, Any], operation: str
) -> None:
    results = {name: r for name, r in sample.items() if r["operation"] == operation}
    assert len(results) == SAMPLE
    assert {name: r for name, r in results.items() if r["violations"]} == {}


@pytest.mark.slow
def test_a_larger_sample_is_within_its_bounds() -> None:
    results = run("cases", SEED, LARGE_SAMPLE)
    assert {name: r for name, r in results.items() if r["violations"]} == {}
    assert {r["operation"] for r in results.values()} == set(OPERATIONS)
    assert sum(r["elements"] for r in results.values()) > 3_000_000
    # a bound that nothing comes near would show nothing
    assert max(r["worst"] for r in results.values()) > 0.9


def test_codecs_are_exact_for_every_code() -> None:
    assert run("codecs") == {"nf4": 0, "e4m3": 0, "mxfp4": 0, "e4m3 encoding": 0}


def test_a_cast_that_truncates_is_found() -> None:
    assert fails("merge", "--mutant", "a cast that truncates")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutant", "operation"),
    [
        ("a product rounded to bf16", "merge"),
        ("scaling forgotten", "merge"),
        ("a block's scale from its neighbour", "fp8"),
        ("codes in the other order", "nf4"),
        ("an absmax too early", "nf4"),
    ],
)
def test_a_wrong_kernel_is_found(mutant: str, operation: str) -> None:
    assert fails(operation, "--mutant", mutant, count=LARGE_SAMPLE)


def test_the_interpreter_without_its_patch_is_wrong() -> None:
    assert fails("dora", "--unpatched")


@pytest.mark.slow
def test_no_operation_touches_memory_beyond_its_tensors() -> None:
    assert run("guard")["launches"] > 300


@pytest.mark.parametrize(
    "mutant",
    [
        "store without a mask",
        pytest.param("load without a mask", marks=pytest.mark.slow),
        pytest.param("rows of B without a mask", marks=pytest.mark.slow),
        pytest.param("columns of A without a mask", marks=pytest.mark.slow),
        pytest.param("ranks of A without a mask", marks=pytest.mark.slow),
    ],
)
def test_a_missing_mask_runs_into_a_guard_page(mutant: str) -> None:
    assert start("guard", "--mutant", mutant).returncode == -signal.SIGSEGV
