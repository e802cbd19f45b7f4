"""Exports whose kernels are triton's own, in its interpreter, against those on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import merges
import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import load_file, save_file

import streammerge

if TYPE_CHECKING:
    from collections.abc import Callable

PROGRAM = Path(__file__).with_name("interpreted.py")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
NF4 = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16",
}  # fmt: skip


def nf4(build: merges.Builder) -> merges.Merge:
    """A base whose linears are codes, which the CPU decodes on their way."""
    merge = merges.lora(build, BF16)
    path = Path(merge.settings["model_name_or_path"])
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        weight = tensors.pop(name)
        codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        tensors[name] = codes
        tensors |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": NF4}))
    return merge


CASES: dict[str, Callable[[merges.Builder], merges.Merge]] = {
    "bf16": lambda b: merges.lora(b, BF16),
    "fp16 of rank 20": lambda b: merges.lora(b, F16, 20),
    "fp32": lambda b: merges.lora(b, F32),
    "bf16 factors": lambda b: merges.lora(b, BF16, factors=BF16),
    "several in turn": lambda b: merges.several(b, "peft"),
    "several at once": lambda b: merges.several(b, "fp32"),
    "dora": lambda b: merges.dora(b, BF16),
    "dora fp32": lambda b: merges.dora(b, F32),
    "experts": lambda b: merges.experts(b, BF16),
    "single experts": merges.single_experts,
    "conv1d": merges.conv1d,
    "embedding": merges.embedding,
    "nf4": nf4,
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Export every case on the CPU, and all of them in one program on the devices."""
    folder = tmp_path_factory.mktemp("interpreted")
    made = {}
    for case, make in CASES.items():
        inputs = folder / case.replace(" ", "-")
        inputs.mkdir()
        made[case] = make(merges.Builder(inputs / "inputs"))
        cpu = {**made[case].on(inputs / "cpu", "cpu"), "max_memory": "4GB"}
        streammerge.export(cpu)
    wanted = [
        {**merge.on(folder / case.replace(" ", "-") / "gpu", "cuda"), "threads": 4}
        for case, merge in made.items()
    ]
    file = folder / "wanted.json"
    file.write_text(json.dumps(wanted))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(file)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    notes = dict(zip(CASES, json.loads(done.stdout), strict=True))
    return {"folder": folder, "made": made, "notes": notes}


@pytest.mark.parametrize("case", CASES)
def test_an_export_with_kernels_is_within_a_unit_of_the_cpu(
    case: str, exported: dict[str, Any]
) -> None:
    folder = exported["folder"] / case.replace(" ", "-")
    base = merges.load_folder(folder / "inputs" / "base")
    cpu, gpu = (merges.load_folder(folder / device) for device in ("cpu", "gpu"))
    if case == "nf4":
        # what its codes stand for is not stored; what passes through is
        base = {name: base.get(name, tensor) for name, tensor in decoded(folder).items()}
    exported["made"][case].check(base, cpu, gpu)
    assert any("by kernels" in note for note in exported["notes"][case])


def decoded(folder: Path) -> merges.Tensors:
    """Return what a quantized base stands for."""
    output = folder / "decoded"
    streammerge.export({
        "model_name_or_path": str(folder / "inputs" / "base"), "export_dir": str(output),
        "allow_dequantize": True, "max_memory": "4GB",
    })  # fmt: skip
    return merges.load_folder(output)
