"""The ceiling holds for fused experts, of which a layer has gigabytes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from streammerge.checkpoint.header import TensorSpec, encode_header
from streammerge.dtypes import Dtype

if TYPE_CHECKING:
    from pathlib import Path

EXPERTS, ROWS, COLUMNS, RANK = 64, 4096, 4096, 8
NAME = "model.layers.0.mlp.experts.gate_up_proj"
KEY = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"


def write_adapter(folder: Path, rank: int) -> None:
    """Let the delta of expert e be e + 1 in every element."""
    folder.mkdir()
    numbers = np.repeat(np.arange(1, EXPERTS + 1, dtype=np.float32), rank)
    factors = {
        KEY.format("A"): np.repeat(numbers[:, None], COLUMNS, axis=1),
        KEY.format("B"): np.ones((ROWS, EXPERTS * rank), np.float32),
    }
    save_file(factors, folder / "adapter_model.safetensors")
    options = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 1,
        "target_parameters": ["experts.gate_up_proj"],
        "peft_version": "0.21.2",
    }
    (folder / "adapter_config.json").write_text(json.dumps(options))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "ceiling"),
    [
        (RANK, 600),
        # the factors of all experts take 2 x 134 MB, those of one 2 x 2 MB
        (16 * RANK, 450),
    ],
)
def test_fused_experts_larger_than_the_ceiling(
    rank: int, ceiling: int, tmp_path: Path, run_cli: Any
) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    base.mkdir()
    write_adapter(adapter, rank)
    spec = TensorSpec(NAME, Dtype.BF16, (EXPERTS, ROWS, COLUMNS))
    head, (offset,) = encode_header([spec])
    with (base / "model.safetensors").open("wb") as file:
        file.write(head)
        # a sparse file: 2.1 GB of zeros that take no disk
        file.truncate(offset + spec.nbytes)
    (base / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    code, out, err = run_cli(
        "export",
        f"model_name_or_path={base}",
        f"adapter_name_or_path={adapter}",
        f"export_dir={output}",
        f"max_memory={ceiling}MB",
        "--json",
    )
    assert code == 0, err
    report = json.loads(out)
    assert report["peak_rss_bytes"] <= report["predicted_peak_bytes"] <= ceiling * 10**6
    assert spec.nbytes > 2 * 10**9
    # the upper half of an F32 number, which is exact in bfloat16
    bits = (np.arange(1, EXPERTS + 1, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    merged = np.memmap(output / "model.safetensors", np.uint16, "r", offset=offset)
    assert merged.size == EXPERTS * ROWS * COLUMNS
    for expert, wanted in zip(merged.reshape(EXPERTS, -1), bits, strict=True):
        assert (expert == wanted).all()
