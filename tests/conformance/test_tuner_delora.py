"""DeLoRA against PEFT."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import DeloraConfig
from safetensors.torch import load_file
from torch import nn

from streammerge.adapters.adapter import open_adapter
from streammerge.errors import AdapterError, PlanError

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
TARGETS = ["lin0", "lin1"]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(23, 41)
        self.lin1 = nn.Linear(41, 23, bias=False)


def delora(**options: Any) -> DeloraConfig:
    return DeloraConfig(**{"r": 5, "target_modules": TARGETS, **options})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_delora(dtype: torch.dtype, rank: int, mill: Any) -> None:
    mill.check(Mlp, delora(r=rank), dtype)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_tiles(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Mlp, delora(), dtype, threads=3)


def test_patterns(mill: Any) -> None:
    config = delora(rank_pattern={"lin1": 3}, lambda_pattern={"lin0": 2}, bias="delora_only")
    mill.check(Mlp, config, torch.bfloat16)


def test_factors_as_short_as_they_may_count(mill: Any) -> None:
    def shorten(name: str, parameter: nn.Parameter) -> None:
        parameter.mul_(1e-7 if name.endswith("delora_A.default") else 1.3)

    mill.check(Mlp, delora(init_weights=False), torch.float32, change=shorten)


def test_in_turn(mill: Any) -> None:
    mill.check_in_turn(Mlp, torch.bfloat16, delora(), delora(r=2), delora(r=1))


def test_half_precision_adapter_files(mill: Any, same_bits: Any) -> None:
    base = mill.base(Mlp, torch.bfloat16)
    adapter = mill.adapter(Mlp, delora())
    mill.rewrite(adapter, "", lambda tensor: tensor.bfloat16())
    expected = mill.peft(Mlp, torch.bfloat16, adapter)
    same_bits(mill.export(base, adapter), expected)


def test_weighted_sum(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    first, second = (mill.adapter(Mlp, delora(r=n), name=f"adapter{n}") for n in (2, 3))
    merged = mill.export(base, first, second, adapter_weights=[0.5, -2.0])
    parts = [mill.peft(Mlp, torch.float32, path) for path in (first, second)]
    for name, before in load_file(base / "model.safetensors").items():
        wanted = before + 0.5 * (parts[0][name] - before) - 2.0 * (parts[1][name] - before)
        torch.testing.assert_close(merged[name], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("end", "change", "message"),
    [
        ("delora_A", None, "no delora_A"),
        ("delora_lambda", None, "no delora_lambda"),
        ("delora_w_norm", None, "no delora_w_norm"),
        ("delora_w_norm", lambda tensor: tensor[1:], "do not belong together"),
        ("delora_lambda", lambda tensor: tensor.repeat(2), "do not belong together"),
        ("delora_A", lambda tensor: tensor[1:], "do not belong together"),
        ("delora_B", lambda tensor: tensor[1:], "shape mismatch"),
    ],
)
def test_damaged_adapters(end: str, change: Any, message: str, mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, delora())
    mill.rewrite(adapter, end, change)
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter)


def test_another_configuration(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, delora())
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 4}))
    with pytest.raises(AdapterError, match="rank"):
        mill.export(base, adapter)


def test_description(mill: Any) -> None:
    adapter = open_adapter(mill.adapter(Mlp, delora()))
    (module,) = [module for module in adapter.modules if module.module == "lin0"]
    assert adapter.config.tuner.describe(module, adapter.config.settings) == {
        "rank": 5,
        "shape": [41, 23],
        "dtype": "F32",
    }
