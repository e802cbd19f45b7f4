"""Every benchmark runs at a tiny size, and writes the numbers and the plot that it promises."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

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


@pytest.mark.slow
def test_quantize_measures_every_width_of_its_own_sides_and_leaves_others_out(
    bench: Bench, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    numbers = bench.run(
        "quantize", "--shape", "tiny", "--layers", "1", "--bits", "4,2", "--group-size", "32",
        "--sides", "gptq,awq,gptqmodel-gptq", "--nsamples", "4", "--maxlen", "32",
        "--text", str(text), "--windows", "2", "--window-tokens", "32",
    )  # fmt: skip
    found = [(row["side"], row["bits"]) for row in numbers["results"]]
    assert found == [("gptq", 4), ("awq", 4), ("gptq", 2)]
    for row in numbers["results"]:
        assert row["peak_rss_bytes"] > 10**8
        assert 0 < row["layer_seconds"] < row["wall_seconds"]
        assert row["perplexity"] > 1
    assert numbers["perplexity_unquantized"] > 1


@pytest.mark.slow
def test_quantize_measures_memory_over_the_number_of_layers(bench: Bench) -> None:
    numbers = bench.run(
        "quantize", "--shape", "tiny", "--layers", "1,3", "--group-size", "32",
        "--sides", "rtn", "--nsamples", "4", "--maxlen", "32",
    )  # fmt: skip
    assert [row["layers"] for row in numbers["results"]] == [1, 3]
    assert numbers["perplexity_unquantized"] is None
    assert "perplexity" not in numbers["results"][0]


def test_codes_are_decoded_alike_in_the_layout_of_every_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    decoded = importlib.import_module("perplexity").decoded
    random = np.random.default_rng(1)
    codes = random.integers(0, 16, (16, 64), dtype=np.uint8)
    zeros = random.integers(1, 16, (16, 2), dtype=np.int32)
    scales = random.uniform(0.01, 0.1, (16, 2)).astype(np.float16)
    expected = (codes.reshape(16, 2, 32) - zeros[..., None].astype(np.float32)) * scales[..., None]
    bias = np.arange(16, dtype=np.float32)

    def words(values: Any) -> Any:
        """Put eight neighbours of the last axis into a word, lowest bits first."""
        places = np.arange(0, 32, 4, dtype=np.uint32)
        eights = values.astype(np.uint32).reshape(*values.shape[:-1], -1, 8) << places
        return np.bitwise_or.reduce(eights, axis=-1).view(np.int32)

    order = [0, 2, 4, 6, 1, 3, 5, 7]
    layouts: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "gptq": (
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"},
            {
                "qweight": words(codes).T, "qzeros": words(zeros.T - 1), "scales": scales.T,
                "g_idx": np.arange(64, dtype=np.int32) // 32,
            },
        ),
        "awq": (
            {"quant_method": "awq", "bits": 4, "group_size": 32},
            {
                "qweight": words(codes.T.reshape(64, 2, 8)[..., order].reshape(64, 16)),
                "qzeros": words(zeros.T.reshape(2, 2, 8)[..., order].reshape(2, 16)),
                "scales": scales.T,
            },
        ),
        "compressed-tensors": (
            {"quant_method": "compressed-tensors"},
            {
                "weight_packed": words(codes), "weight_scale": scales,
                "weight_zero_point": words(zeros.T).T, "weight_shape": np.array([16, 64]),
            },
        ),
    }  # fmt: skip
    for name, (section, tensors) in layouts.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"quantization_config": section}))
        stored = {f"a.{end}": np.ascontiguousarray(value) for end, value in tensors.items()}
        save_file({**stored, "a.bias": bias}, folder / "model.safetensors")
        found = decoded(folder)
        assert set(found) == {"a.weight", "a.bias"}
        np.testing.assert_allclose(found["a.weight"], expected.reshape(16, 64), rtol=1e-6)
        np.testing.assert_array_equal(found["a.bias"], bias)
