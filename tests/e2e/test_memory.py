"""The ceiling holds for the whole process, whatever the size of a tensor."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from streammerge.checkpoint.header import TensorSpec, encode_header
from streammerge.dtypes import Dtype

if TYPE_CHECKING:
    from pathlib import Path

ROWS, COLUMNS = 100_000, 2048


def test_a_tensor_larger_than_the_ceiling_is_merged_below_it(tmp_path: Path, run_cli: Any) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    spec = TensorSpec("model.embed_tokens.weight", Dtype.BF16, (ROWS, COLUMNS))
    head, (offset,) = encode_header([spec])
    with (base / "model.safetensors").open("wb") as file:
        file.write(head)
        # a sparse file: 410 MB of zeros that take no disk
        file.truncate(offset + spec.nbytes)
    (base / "config.json").write_text(
        json.dumps({"model_type": "x", "architectures": ["XForTokenClassification"]})
    )
    key = "base_model.model.model.embed_tokens.lora_embedding_"
    factors = {f"{key}A": np.ones((2, ROWS), np.float32), f"{key}B": np.ones((COLUMNS, 2), "f4")}
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    )
    arguments = [
        f"model_name_or_path={base}",
        f"adapter_name_or_path={adapter}",
        "max_memory=360MB",
    ]
    code, out, err = run_cli("export", *arguments, f"export_dir={tmp_path / 'out'}", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["peak_rss_bytes"] <= report["predicted_peak_bytes"] <= 360 * 10**6 < spec.nbytes
    merged = np.memmap(tmp_path / "out" / "model.safetensors", np.uint16, "r", offset=offset)
    assert merged.size == ROWS * COLUMNS
    # 2.0 in bfloat16, in every element
    assert all((merged[at : at + 10**7] == 0x4000).all() for at in range(0, merged.size, 10**7))
