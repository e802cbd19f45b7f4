"""The ceiling holds for the whole process, whatever the size of a tensor."""

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

ROWS, COLUMNS = 100_000, 2048


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # 0 + 1 * 2 in every element
        ("plain", 2.0),
        # and each column of them scaled to a norm of one, which is known after a look at all of it
        ("dora", 2 / (2 * ROWS**0.5)),
    ],
)
def test_a_tensor_larger_than_the_ceiling_is_merged_below_it(
    kind: str, expected: float, tmp_path: Path, run_cli: Any
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    spec = TensorSpec("model.embed_tokens.weight", Dtype.BF16, (ROWS, COLUMNS))
    offset = write_zeros(base / "model.safetensors", spec)
    (base / "config.json").write_text(
        json.dumps({"model_type": "x", "architectures": ["XForTokenClassification"]})
    )
    key = "base_model.model.model.embed_tokens.lora_"
    factors = {
        f"{key}embedding_A": np.ones((2, ROWS), np.float32),
        f"{key}embedding_B": np.ones((COLUMNS, 2), np.float32),
    }
    if kind == "dora":
        factors[f"{key}magnitude_vector"] = np.ones(COLUMNS, np.float32)
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_dora": kind == "dora"})
    )
    report = export(run_cli, base, adapter, tmp_path / "out", max_memory=360)
    assert report["peak_rss_bytes"] <= report["predicted_peak_bytes"] <= 360 * 10**6 < spec.nbytes
    assert_all(tmp_path / "out" / "model.safetensors", offset, ROWS * COLUMNS, expected)


def test_experts_in_one_tensor_larger_than_the_ceiling_are_merged_below_it(
    tmp_path: Path, run_cli: Any
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    count, out, into, rank = 64, 2048, 1536, 4
    spec = TensorSpec("model.layers.0.mlp.experts.down_proj", Dtype.BF16, (count, out, into))
    offset = write_zeros(base / "model.safetensors", spec)
    (base / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    key = "base_model.model.model.layers.0.mlp.experts.lora_"
    # expert e has its rows of A, and of B every column whose number leaves e
    b = np.tile(np.arange(count, dtype=np.float32), (out, rank))
    factors = {f"{key}A.weight": np.ones((count * rank, into), np.float32), f"{key}B.weight": b}
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": rank,
                "lora_alpha": rank,
                "target_parameters": ["mlp.experts.down_proj"],
                "peft_version": "0.19.1",
            }
        )
    )
    report = export(run_cli, base, adapter, tmp_path / "out", max_memory=340)
    assert report["peak_rss_bytes"] <= report["predicted_peak_bytes"] <= 340 * 10**6 < spec.nbytes
    for expert in range(count):
        at = offset + expert * out * into * 2
        assert_all(tmp_path / "out" / "model.safetensors", at, out * into, expert * rank)


def write_zeros(path: Path, spec: TensorSpec) -> int:
    """Write a sparse file of zeros that takes no disk; return where they begin."""
    head, (offset,) = encode_header([spec])
    with path.open("wb") as file:
        file.write(head)
        file.truncate(offset + spec.nbytes)
    return offset


def export(
    run_cli: Any, base: Path, adapter: Path, output: Path, *, max_memory: int
) -> dict[str, Any]:
    arguments = [
        f"model_name_or_path={base}",
        f"adapter_name_or_path={adapter}",
        f"max_memory={max_memory}MB",
    ]
    code, out, err = run_cli("export", *arguments, f"export_dir={output}", "--json")
    assert code == 0, err
    report: dict[str, Any] = json.loads(out)
    return report


def assert_all(path: Path, offset: int, count: int, value: float) -> None:
    """Every element has a value, rounded to bfloat16."""
    expected = np.float32(value).view(np.uint32)
    # to the nearest, ties to even
    rounded = (int(expected) + 0x7FFF + ((int(expected) >> 16) & 1)) >> 16
    merged = np.memmap(path, np.uint16, "r", offset=offset, shape=(count,))
    assert all((merged[at : at + 10**7] == rounded).all() for at in range(0, count, 10**7))
