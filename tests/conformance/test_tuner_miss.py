"""MiSS and Bone against PEFT."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import MissConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from streammerge.adapters.adapter import open_adapter
from streammerge.errors import AdapterError, PlanError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
TARGETS = ["lin0", "lin1"]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(24, 40)
        self.lin1 = nn.Linear(40, 24, bias=False)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(23, 41)
        self.lin1 = nn.Linear(41, 23)


class Wide(nn.Module):
    """Blocks of so many rows and columns that BLAS takes them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(72, 108)


def miss(**options: Any) -> MissConfig:
    return MissConfig(**{"r": 8, "target_modules": TARGETS, **options})


def as_bone(adapter: Path) -> None:
    """Give an adapter the names that PEFT had before 0.19."""
    path = adapter / "adapter_model.safetensors"
    tensors = {name.replace("miss_", "bone_"): t for name, t in load_file(path).items()}
    save_file(tensors, path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config = {k: v for k, v in config.items() if k not in {"mini_r", "miss_dropout"}}
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "BONE"}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 7, 8, 23])
def test_balance(dtype: torch.dtype, rank: int, mill: Any) -> None:
    mill.check(Odd, miss(r=rank), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mini(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Mlp, miss(r=7, init_weights="mini", mini_r=4), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 8])
def test_bat(dtype: torch.dtype, rank: int, mill: Any) -> None:
    mill.check(Mlp, miss(r=rank, init_weights="bat"), dtype)


@pytest.mark.parametrize("rank", [9, 12, 36])
def test_bat_with_larger_blocks(rank: int, mill: Any) -> None:
    config = miss(r=rank, init_weights="bat", target_modules=["lin0"])
    mill.check(Wide, config, torch.bfloat16)
    mill.check(Wide, config, torch.float32)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_tiles(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Odd, miss(), dtype, threads=3)
    mill.check(Mlp, miss(init_weights="mini", mini_r=2), dtype)
    # of blocks of seven rows no tile holds one
    mill.check(Mlp, miss(init_weights="bat"), dtype, threads=3)
    mill.check(Wide, miss(r=36, init_weights="bat", target_modules=["lin0"]), dtype)
    mill.check(Wide, miss(r=9, init_weights="bat", target_modules=["lin0"]), dtype)


def test_in_turn(mill: Any) -> None:
    mill.check_in_turn(
        Mlp, torch.bfloat16, miss(r=7), miss(init_weights="bat"), miss(bias="MiSS_only")
    )


def test_llama(workshop: Any, same_bits: Any) -> None:
    base = workshop.base("llama-bias", torch.bfloat16)
    config = miss(
        target_modules=["q_proj", "o_proj", "down_proj"],
        modules_to_save=["lm_head"],
        bias="all",
        init_weights=False,
    )
    adapter = workshop.folder / "adapter"
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(adapter)
    expected, _ = workshop.peft(base, adapter)
    same_bits(workshop.export(base, adapter, export_size="50KB"), expected)


@pytest.mark.parametrize("form", [True, "bat"])
def test_bone(form: bool | str, mill: Any, same_bits: Any) -> None:
    base = mill.base(Mlp, torch.bfloat16)
    adapter = mill.adapter(Mlp, miss(init_weights=form))
    expected = mill.peft(Mlp, torch.bfloat16, adapter)
    as_bone(adapter)
    same_bits(mill.export(base, adapter), expected)


def test_bone_has_no_mini(mill: Any) -> None:
    base = mill.base(Mlp, torch.bfloat16)
    adapter = mill.adapter(Mlp, miss(init_weights="mini", mini_r=4))
    as_bone(adapter)
    with pytest.raises(AdapterError, match="init_weights"):
        mill.export(base, adapter)


def test_weighted_sum(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    first = mill.adapter(Mlp, miss(r=7), name="first")
    second = mill.adapter(Mlp, miss(init_weights="mini", mini_r=4), name="second")
    merged = mill.export(base, first, second, adapter_weights=[0.5, -2.0])
    parts = [mill.peft(Mlp, torch.float32, path) for path in (first, second)]
    for name, before in load_file(base / "model.safetensors").items():
        wanted = before + 0.5 * (parts[0][name] - before) - 2.0 * (parts[1][name] - before)
        torch.testing.assert_close(merged[name], wanted, rtol=0, atol=1e-6)
    third = mill.adapter(Mlp, miss(init_weights="bat"), name="third")
    with pytest.raises(PlanError, match="adapter_weights"):
        mill.export(base, first, third, adapter_weights=[0.5, 0.5])


@pytest.mark.parametrize(
    ("options", "edits", "message"),
    [
        ({}, {"r": 4}, "rank"),
        ({}, {"init_weights": "bat"}, "another shape than its form"),
        ({}, {"init_weights": "mini"}, "another shape than its form"),
        ({}, {"init_weights": "other"}, "bad init_weights"),
        ({"init_weights": "mini", "mini_r": 4}, {"mini_r": 5}, "another shape than its form"),
        ({"init_weights": "bat"}, {"init_weights": True}, "another shape than its form"),
        ({"init_weights": "bat"}, {"r": 4}, "rank"),
    ],
)
def test_configurations_that_do_not_fit(
    options: dict[str, Any], edits: dict[str, Any], message: str, mill: Any
) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, miss(**options))
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edits}))
    with pytest.raises(AdapterError, match=message):
        mill.export(base, adapter)


@pytest.mark.parametrize(
    "options", [{}, {"init_weights": "mini", "mini_r": 4}, {"r": 4, "init_weights": "bat"}]
)
def test_another_base(options: dict[str, Any], mill: Any) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin0 = nn.Linear(7, 42)
            self.lin1 = nn.Linear(42, 7, bias=False)

    base = mill.base(Other, torch.float32)
    with pytest.raises(PlanError, match="shape mismatch"):
        mill.export(base, mill.adapter(Mlp, miss(**options)))


def test_conv1d_is_refused(mill: Any) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin0 = Conv1D(40, 24)
            self.lin1 = Conv1D(24, 40)

    base = mill.base(Turned, torch.float32)
    adapter = mill.adapter(Mlp, miss())
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fan_in_fan_out": True}))
    with pytest.raises(PlanError, match="linear layers"):
        mill.export(base, adapter)


def test_description(mill: Any) -> None:
    adapter = open_adapter(mill.adapter(Mlp, miss(r=4, init_weights="mini", mini_r=2)))
    (module,) = [module for module in adapter.modules if module.module == "lin0"]
    assert adapter.config.tuner.describe(module, adapter.config.settings) == {
        "rank": 4,
        "form": "mini",
        "shape": [4, 2],
        "dtype": "F32",
    }
