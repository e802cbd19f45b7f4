"""A weight that is rounded to NF4 on the way has the ceiling of any other."""

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

ROWS, COLUMNS = 16_384, 16_384
# bfloat16
ONE, MINUS_TWO = 0x3F80, 0xC000
NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.slow
def test_a_weight_larger_than_the_ceiling_is_rounded_and_merged_below_it(
    tmp_path: Path, run_cli: Any
) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    base.mkdir()
    adapter.mkdir()
    spec = TensorSpec(NAME, Dtype.BF16, (ROWS, COLUMNS))
    head, (offset,) = encode_header([spec])
    # one weight in each half of a row, whose blocks have another absmax
    row = np.full(COLUMNS, ONE, np.uint16)
    row[COLUMNS // 2 :] = MINUS_TWO
    with (base / "model.safetensors").open("wb") as file:
        file.write(head)
        file.seek(offset)
        for _ in range(ROWS // 256):
            file.write(np.tile(row, 256).tobytes())
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    factors = {
        f"{key}A.weight": np.ones((2, COLUMNS), np.float32),
        f"{key}B.weight": np.ones((ROWS, 2), np.float32),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]})
    )
    code, out, err = run_cli(
        "export", f"model_name_or_path={base}", f"adapter_name_or_path={adapter}",
        f"export_dir={output}", "qlora_base=dequantized-nf4", "max_memory=480MB", "--json",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    assert report["peak_rss_bytes"] <= report["predicted_peak_bytes"] <= 480 * 10**6 < spec.nbytes
    # absmax less its mean is -1/2 and 1/2, a scale of 1/2 each and codes of -1 and 1: what is
    # decoded is what was encoded, and the delta is 2
    merged = np.memmap(output / "model.safetensors", np.uint16, "r", offset=offset)
    wanted = np.full(COLUMNS, 0x4040, np.uint16)
    wanted[COLUMNS // 2 :] = 0
    for at in range(0, ROWS, 1024):
        rows = merged[at * COLUMNS : (at + 1024) * COLUMNS].reshape(1024, COLUMNS)
        assert (rows == wanted).all()


def test_the_plan_says_what_rounding_takes(tmp_path: Path, run_cli: Any) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    spec = TensorSpec(NAME, Dtype.BF16, (ROWS, COLUMNS))
    head, (offset,) = encode_header([spec])
    with (base / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(offset + spec.nbytes)
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file(
        {
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.ones(
                (2, COLUMNS), np.float32
            ),
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": np.ones(
                (ROWS, 2), np.float32
            ),
        },
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    least = {}
    for kind in ("original", "dequantized-nf4"):
        code, out, err = run_cli(
            "plan", f"model_name_or_path={base}", f"adapter_name_or_path={adapter}",
            f"export_dir={tmp_path / 'out'}", f"qlora_base={kind}", "--json",
        )  # fmt: skip
        assert code == 0, err
        plan = json.loads(out)
        least[kind] = plan["least_memory_bytes"]
        assert (plan["bytes_read"] > 2 * spec.nbytes) == (kind != "original")
    blocks = ROWS * COLUMNS // 64
    # absmax of one weight twice in float32, and that of a few more as codes
    assert least["dequantized-nf4"] - least["original"] > 8 * blocks + 4 * blocks
    code, _, err = run_cli(
        "plan", f"model_name_or_path={base}", f"adapter_name_or_path={adapter}",
        f"export_dir={tmp_path / 'out'}", "qlora_base=dequantized-nf4", "max_memory=340MB",
    )  # fmt: skip
    assert code == 4
    assert "max_memory is too small" in err
