"""The benchmark of GPUs, where there is none: its options, its message, and its tables."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stand_ins import ExactKernels

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KERNELS = [
    {"operation": "copy", "factors": "", "rank": 0, "bytes": 2 * 10**9, "seconds": [0.001] * 3},
    {"operation": "merge", "factors": "bfloat16", "rank": 16, "bytes": 2 * 10**9,
     "seconds": [0.0025, 0.00125, 0.001]},
]  # fmt: skip
MERGES = [
    {"side": "streammerge-gpu", "bytes": 16 * 10**9, "seconds": [4.0, 8.0, 4.0],
     "peak_rss_bytes": [10**9] * 3},
    {"side": "peft-gpu", "bytes": 16 * 10**9, "seconds": [12.0, 16.0, 4.0],
     "peak_rss_bytes": [2 * 10**9] * 3},
]  # fmt: skip


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("bench_gpu")


def lines(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_kernels_are_shown_next_to_a_copy(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bench.print_kernels(KERNELS)
    assert lines(capsys)[1:] == [
        ["copy", "1.000", "2000", "100%"],
        ["merge", "bfloat16", "16", "1.250", "1600", "80%"],
    ]


def test_the_link_is_shown_by_direction(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bench.print_link([{"direction": "both", "bytes": 10**9, "seconds": [0.05, 0.04, 0.03]}])
    assert lines(capsys)[1] == ["both", "25.0"]


def test_merges_are_compared_run_by_run(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bench.print_merges(MERGES)
    assert lines(capsys)[1:] == [
        ["streammerge-gpu", "4.00", "s", "4.00", "1000", "MB", "1.00"],
        ["peft-gpu", "12.00", "s", "1.33", "2000", "MB", "2.00"],
    ]


def test_options(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--what", "link,kernels", "--ranks", "8,32"])
    arguments = bench.parse_arguments()
    assert arguments.what == ["link", "kernels"]
    assert arguments.ranks == [8, 32]
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--what", "dreams"])
    with pytest.raises(SystemExit):
        bench.parse_arguments()


def test_every_kernel_can_be_launched_as_it_is_measured(bench: Any) -> None:
    kernels = ExactKernels()
    arguments = SimpleNamespace(rows=64, columns=128, ranks=[4])
    measured = []
    for named, nbytes, launch in bench.kernel_launches(kernels.launchers(), arguments, "cpu"):
        launch()
        measured.append((named["operation"], nbytes // (64 * 128 * 2)))
    kinds = [("merge", 2), ("dora", 3), ("grouped", 2)]
    assert measured == [("copy", 2), *kinds, *kinds, ("torch, as PEFT", 2)]
    assert kernels.calls == {"merge": 2, "dora": 2, "grouped": 2}
    assert kernels.most_grouped == bench.EXPERTS


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "bench_gpu.py", "--json", tmp_path / "numbers.json"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("bench_gpu needs a GPU: ")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "numbers.json").exists()
