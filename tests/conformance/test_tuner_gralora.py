"""GraLoRA against PEFT."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import GraloraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from streammerge.adapters.adapter import open_adapter
from streammerge.errors import AdapterError, PlanError

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
TARGETS = ["lin0", "lin1"]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(36, 60)
        self.lin1 = nn.Linear(60, 36, bias=False)


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = Conv1D(60, 36)
        self.lin1 = Conv1D(36, 60)


class Narrow(nn.Module):
    """Blocks of one, two and three rows."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(20, 2)
        self.lin1 = nn.Linear(4, 20)
        self.lin2 = nn.Linear(20, 6)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(130, 310)
        self.lin1 = nn.Linear(310, 130)


def gralora(**options: Any) -> GraloraConfig:
    return GraloraConfig(**{"r": 6, "gralora_k": 2, "target_modules": TARGETS, **options})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hybrid_r": 5},
        {"r": 3, "gralora_k": 3, "alpha": 7},
        # blocks of three rows and six
        {"r": 12, "gralora_k": 12, "hybrid_r": 1},
        {"r": 4, "gralora_k": 1},
    ],
    ids=str,
)
def test_gralora(dtype: torch.dtype, options: dict[str, Any], mill: Any) -> None:
    mill.check(Mlp, gralora(**options), dtype)
    mill.check(Turned, gralora(fan_in_fan_out=True, **options), dtype)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_tiles(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Mlp, gralora(hybrid_r=5), dtype, threads=3)
    mill.check(Mlp, gralora(r=12, gralora_k=12), dtype)
    mill.check(Turned, gralora(hybrid_r=5, fan_in_fan_out=True), dtype, threads=3)
    # blocks of 31 rows and 13, whose edges leave one row in a tile
    mill.check(Wide, gralora(r=40, gralora_k=10, hybrid_r=9), dtype)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_narrow_blocks(dtype: torch.dtype, mill: Any) -> None:
    config = gralora(r=32, hybrid_r=4, target_modules=["lin0", "lin1", "lin2"])
    mill.check(Narrow, config, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_products(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Wide, gralora(r=80, gralora_k=10, hybrid_r=9), dtype)


def test_in_turn(mill: Any) -> None:
    mill.check_in_turn(
        Mlp, torch.bfloat16, gralora(), gralora(hybrid_r=2, bias="gralora_only"), gralora(r=2)
    )


def test_gpt2(workshop: Any, same_bits: Any) -> None:
    base = workshop.base("gpt2", torch.bfloat16)
    config = gralora(target_modules=["c_attn", "c_fc"], init_weights=False, hybrid_r=2)
    adapter = workshop.folder / "adapter"
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(adapter)
    expected, _ = workshop.peft(base, adapter)
    same_bits(workshop.export(base, adapter), expected)


def test_weighted_sum(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    first = mill.adapter(Mlp, gralora(), name="first")
    second = mill.adapter(Mlp, gralora(hybrid_r=2), name="second")
    merged = mill.export(base, first, second, adapter_weights=[0.5, -2.0])
    parts = [mill.peft(Mlp, torch.float32, path) for path in (first, second)]
    for name, before in load_file(base / "model.safetensors").items():
        wanted = before + 0.5 * (parts[0][name] - before) - 2.0 * (parts[1][name] - before)
        torch.testing.assert_close(merged[name], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("end", "change", "message"),
    [
        ("gralora_A", None, "no gralora_A"),
        ("gralora_B_general.weight", None, "no gralora_B_general"),
        ("gralora_B_general.weight", lambda tensor: tensor[1:], "unexpected shape"),
        ("gralora_A", lambda tensor: tensor[1:], "do not belong together"),
        ("gralora_A", lambda tensor: tensor[:, 1:], "shape mismatch"),
        ("gralora_B", lambda tensor: tensor[:, 1:], "do not belong together"),
    ],
)
def test_damaged_adapters(end: str, change: Any, message: str, mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, gralora(hybrid_r=2))
    mill.rewrite(adapter, end, change)
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"r": 4}, "rank"),
        ({"gralora_k": 3}, "gralora_k = 3"),
        ({"gralora_k": 4}, "a divisor of r"),
        # without it the factors of the whole weight have no use
        ({"hybrid_r": 0}, "not used"),
        ({"hybrid_r": -1}, "bad hybrid_r"),
    ],
)
def test_another_configuration(edits: dict[str, Any], message: str, mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, gralora(hybrid_r=2))
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edits}))
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter)


def test_description(mill: Any) -> None:
    adapter = open_adapter(mill.adapter(Mlp, gralora(hybrid_r=2)))
    (module,) = [module for module in adapter.modules if module.module == "lin0"]
    assert adapter.config.tuner.describe(module, adapter.config.settings) == {
        "rank": 6,
        "hybrid_rank": 2,
        "blocks": 2,
        "scaling": 8.0,
        "shape": [60, 36],
        "dtype": "F32",
    }
