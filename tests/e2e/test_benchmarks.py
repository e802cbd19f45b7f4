"""Every benchmark runs at a tiny size, and writes the numbers and the plot that it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MACHINE = {"cores", "cpu", "ram_bytes", "kernel", "file_system", "torch"}


class Bench:
    """Runs benchmarks below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = ""

    def run(self, name: str, *arguments: str) -> dict[str, Any]:
        json_file, plot = self.folder / "numbers.json", self.folder / "plot.svg"
        common = ["--json", json_file, "--plot", plot, "--folder", self.folder / "work"]
        done = subprocess.run(
            [sys.executable, BENCHMARKS / f"bench_{name}.py", *map(str, common), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        self.text = done.stdout
        assert "cores of" in self.text.splitlines()[0]
        assert ET.parse(plot).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        assert not list((self.folder / "work").iterdir())
        numbers: dict[str, Any] = json.loads(json_file.read_text())
        assert numbers["benchmark"] == name
        assert set(numbers["machine"]) == MACHINE
        return numbers


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_io(bench: Bench) -> None:
    numbers = bench.run(
        "io", "--size", "3MB", "--blocks", "1", "--threads", "1,2", "--runs", "2",
        "--modes", "direct,buffered,mmap",
    )  # fmt: skip
    # two numbers of threads; reads and moves in three modes, writes in two
    assert len(numbers["results"]) == 2 * (3 + 3 + 2)
    for row in numbers["results"]:
        assert len(row["seconds"]) == 2
        assert row["gb_per_second"] > 0
        assert {"direction", "mode", "block_bytes", "threads", "read_mode", "write_mode"} < set(row)


def test_kernels(bench: Bench) -> None:
    numbers = bench.run(
        "kernels", "--rows", "96", "--columns", "64", "--ranks", "8,16", "--runs", "2"
    )
    assert numbers["shape"] == [96, 64]
    found = {(row["side"], row["dtype"], row["rank"]) for row in numbers["results"]}
    sides = ("copy", "streammerge", "torch", "peft")
    assert found == {(s, d, r) for s in sides for d in ("BF16", "F16", "F32") for r in (8, 16)}
    assert all(row["gb_per_second"] > 0 for row in numbers["results"])


# PEFT's side imports transformers and loads a model
@pytest.mark.parametrize(
    "sides",
    [
        "streammerge,floor,copy,loop",
        pytest.param("streammerge,floor,copy,peft,loop", marks=pytest.mark.slow),
    ],
)
def test_merge(bench: Bench, sides: str) -> None:
    numbers = bench.run("merge", "--shape", "tiny", "--runs", "1", "--rank", "4", "--sides", sides)
    assert [row["side"] for row in numbers["results"]] == sides.split(",")
    for row in numbers["results"]:
        assert row["output_bytes"] >= numbers["base_bytes"] * 0.9
        assert {"wall_seconds", "cpu_seconds", "peak_rss_bytes", "disk_read_bytes"} < set(row)
    peers = sides.split(",")[2:]
    assert set(numbers["ratios"]) == {
        "streammerge/floor",
        "streammerge/transfer",
        *(f"{peer}/streammerge" for peer in peers),
    }
    assert "the floor's transfer alone" in bench.text


def test_merge_with_some_sides(bench: Bench) -> None:
    numbers = bench.run(
        "merge", "--shape", "tiny", "--runs", "2", "--sides", "floor,copy", "--dtype", "F32",
        "--targets", "attention", "--io", "buffered",
    )  # fmt: skip
    assert numbers["ratios"] == {}
    assert [len(row["runs"]) for row in numbers["results"]] == [2, 2]
    assert numbers["case"]["targets"] == "attention"


def test_scale(bench: Bench) -> None:
    numbers = bench.run("scale", "--shapes", "tiny,tiny", "--rank", "4")
    for row in numbers["results"]:
        assert row["shape"] == "tiny"
        assert row["seconds_per_gb"] > 0
        assert row["peak_rss_bytes"] > 10**7
        assert {"base_bytes", "wall_seconds", "cpu_seconds", "predicted_peak_bytes"} < set(row)


def test_a_plot_without_matplotlib_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ModuleNotFoundError('no matplotlib')\n")
    command = [sys.executable, BENCHMARKS / "bench_io.py", "--plot", tmp_path / "plot.svg"]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        timeout=60,
    )
    assert done.returncode == 1
    assert "pip install 'streammerge[bench]'" in done.stderr
