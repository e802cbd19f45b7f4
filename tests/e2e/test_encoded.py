"""Exports as codes: below the ceiling, and the same bytes after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

from streammerge.checkpoint.header import TensorSpec, encode_header
from streammerge.dtypes import Dtype

if TYPE_CHECKING:
    from pathlib import Path

SIDE, LAYERS, CEILING = 4096, 9, 400
NF4 = "export_quantization_method=nf4"
SMALL_SHARDS = "export_size=0.000009"


def write_base(folder: Path) -> list[TensorSpec]:
    """Write 300 MB of weights between 0.5 and 2, the same in every layer."""
    folder.mkdir()
    specs = [
        TensorSpec(f"model.layers.{n}.self_attn.q_proj.weight", Dtype.BF16, (SIDE, SIDE))
        for n in range(LAYERS)
    ]
    head, _ = encode_header(specs)
    random = np.random.default_rng(0)
    values = random.integers(0x3F00, 0x4000, SIDE * SIDE, dtype=np.uint16)
    values |= random.integers(0, 2, SIDE * SIDE, dtype=np.uint16) << 15
    with (folder / "model.safetensors").open("wb") as file:
        file.write(head)
        for _ in specs:
            file.write(values.data)
    config = {"model_type": "llama", "num_hidden_layers": LAYERS, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    return specs


def write_adapter(folder: Path) -> None:
    """Write an adapter whose delta is 0.5 in every element of every layer."""
    folder.mkdir()
    factors = {}
    for n in range(LAYERS):
        key = f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_"
        factors[f"{key}A.weight"] = np.full((2, SIDE), 0.5, np.float32)
        factors[f"{key}B.weight"] = np.full((SIDE, 2), 0.5, np.float32)
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]})
    )


def test_codes_with_quantized_scales_are_made_below_the_ceiling(
    tmp_path: Path, run_cli: Any
) -> None:
    specs = write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter")
    arguments = [
        f"model_name_or_path={tmp_path / 'base'}", f"adapter_name_or_path={tmp_path / 'adapter'}",
        f"export_dir={tmp_path / 'out'}", NF4, "threads=1",
    ]  # fmt: skip
    code, out, err = run_cli("export", *arguments, f"max_memory={CEILING}MB", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["peak_rss_bytes"] <= report["predicted_peak_bytes"] <= CEILING * 10**6
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert report["bytes_written"] == written
    # a code of 4 bits, one of 8 for the scale of 64, and a few KB of tables for each weight
    values = LAYERS * SIDE * SIDE
    assert 0 < written - values * (4 + 8 / 64) / 8 < LAYERS * 2**15
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    first = tensors[specs[0].name]
    assert first.shape == (SIDE * SIDE // 2, 1)
    # the same weights and the same deltas in every layer
    assert all(np.array_equal(tensors[spec.name], first) for spec in specs[1:])
    # the largest of a block of 64 is coded as the end of the table: 0 or 15
    nibbles = np.stack([first[:, 0] >> 4, first[:, 0] & 15], axis=1).reshape(-1, 64)
    assert ((nibbles == 15) | (nibbles == 0)).any(axis=1).all()


def test_a_killed_run_goes_on_to_the_same_bytes(case: Any, run_cli: Any, tmp_path: Path) -> None:
    program = tmp_path / "slow.py"
    program.write_text(
        "import sys, time\n"
        "import streammerge.engine.export as export\n"
        "real = export._Run.on_shard\n"
        "def slow(self, shard, nbytes, digest):\n"
        "    real(self, shard, nbytes, digest)\n"
        "    print('shard', flush=True)\n"
        "    time.sleep(30)\n"
        "export._Run.on_shard = slow\n"
        "from streammerge.cli.app import main\n"
        "sys.argv[0] = 'streammerge'\n"
        "main()\n"
    )
    command = [sys.executable, str(program), "export", str(case.config), NF4, SMALL_SHARDS]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "shard"
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert not case.output.exists()
    fresh = case.output.with_name("fresh")
    code, out, err = run_cli("export", case.config, NF4, SMALL_SHARDS, "--json")
    assert code == 0, err
    assert json.loads(out)["resumed_shards"] >= 1
    code, out, err = run_cli("export", case.config, NF4, SMALL_SHARDS, f"export_dir={fresh}")
    assert code == 0, err
    names = {path.name for path in fresh.iterdir()}
    assert names == {path.name for path in case.output.iterdir()}
    for name in names:
        assert (case.output / name).read_bytes() == (fresh / name).read_bytes()


def test_a_plan_says_how_much_is_written(case: Any, run_cli: Any) -> None:
    code, out, err = run_cli("plan", case.config, NF4, "--json")
    assert code == 0, err
    planned = json.loads(out)
    code, out, err = run_cli("export", case.config, NF4, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert planned["bytes_written"] == report["bytes_written"]
    written = sum(path.stat().st_size for path in case.output.glob("*.safetensors"))
    assert report["bytes_written"] == written
