"""LoRA's variants that look at a whole weight first stay below the ceiling too."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from streammerge.checkpoint.header import TensorSpec, encode_header
from streammerge.dtypes import Dtype

if TYPE_CHECKING:
    from pathlib import Path

ROWS, COLUMNS = 120_000, 1024


def _write(folder: Path, tensors: dict[str, Any], **config: Any) -> None:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    options = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config}
    (folder / "adapter_config.json").write_text(json.dumps(options))


def test_norms_over_a_vocabulary_take_no_memory(tmp_path: Path, run_cli: Any) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    spec = TensorSpec("model.embed_tokens.weight", Dtype.BF16, (ROWS, COLUMNS))
    head, (offset,) = encode_header([spec])
    with (base / "model.safetensors").open("wb") as file:
        file.write(head)
        # a sparse file: 246 MB of zeros that take no disk
        file.truncate(offset + spec.nbytes)
    (base / "config.json").write_text(
        json.dumps({"model_type": "x", "architectures": ["XForTokenClassification"]})
    )
    key = "base_model.model.model.embed_tokens.lora_"
    factors = {
        f"{key}embedding_A": np.ones((2, ROWS), np.float32),
        f"{key}embedding_B": np.ones((COLUMNS, 2), np.float32),
        # every element becomes 4 / (4 * the root of the number of rows) of the norm
        f"{key}magnitude_vector": np.full(COLUMNS, 3 * ROWS**0.5, np.float32),
    }
    _write(adapter, factors, use_dora=True)
    code, out, err = run_cli(
        "export", f"model_name_or_path={base}", f"adapter_name_or_path={adapter}",
        "max_memory=330MB", f"export_dir={tmp_path / 'out'}", "--json",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    assert report["peak_rss_bytes"] <= report["predicted_peak_bytes"] <= 330 * 10**6
    merged = np.memmap(tmp_path / "out" / "model.safetensors", np.uint16, "r", offset=offset)
    assert merged.size == ROWS * COLUMNS
    # 3.0 in bfloat16, in every element
    assert all((merged[at : at + 10**7] == 0x4040).all() for at in range(0, merged.size, 10**7))


# peak of one decomposition in a process of its own, where nothing was freed before
MEASURE = """
import sys, torch
from streammerge.adapters.tuners.lora_base import ResidualTerm

kind, rows, columns = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
stored = torch.randn(rows, columns).to(torch.bfloat16)

class Weight:
    dtype = torch.bfloat16
    def whole(self):
        return stored.clone()

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))

# what LAPACK and BLAS keep for good, whatever the size
small = torch.randn(400, 400)
torch.linalg.svd(small), torch.linalg.qr(small), small @ small
before = peak()
term = ResidualTerm(kind, 8, 2.0, False)
term.prepare([], Weight())
print(peak() - before, term.work_bytes((rows, columns)))
"""


@pytest.mark.parametrize("shape", [(900, 800), (2400, 300)], ids=str)
@pytest.mark.parametrize("kind", ["pissa", "olora", "kasa"])
def test_a_decomposition_takes_what_is_foreseen(kind: str, shape: tuple[int, int]) -> None:
    command = [sys.executable, "-c", MEASURE, kind, *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    taken, foreseen = map(int, done.stdout.split())
    # and what BLAS keeps for each thread
    assert taken <= foreseen + (4 << 20)
    assert taken >= foreseen / 4
