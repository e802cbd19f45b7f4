"""TinyLoRA against PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, TinyLoraConfig
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from streammerge.adapters.adapter import open_adapter
from streammerge.errors import AdapterError, PlanError

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


class Net(nn.Module):
    """Not in the order of the alphabet, nor in that of a file."""

    def __init__(self) -> None:
        super().__init__()
        self.zeta = nn.Linear(23, 41)
        self.emb = nn.Embedding(31, 22)
        self.conv1 = Conv1D(37, 29)
        self.lin1 = nn.Linear(57, 3, bias=False)
        self.conv0 = Conv1D(3, 30)
        self.alpha = nn.Linear(12, 13)


class Tied(nn.Module):
    """An embedding beside layers that are stored transposed, and nothing that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(31, 22)
        self.conv = Conv1D(24, 24)


class Wider(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.zeta = nn.Linear(24, 41)


TARGETS = [name for name, _ in Net().named_children()]


def config(**options: Any) -> TinyLoraConfig:
    return TinyLoraConfig(**{"r": 4, "u": 9, "target_modules": TARGETS, **options})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_layers(dtype: torch.dtype, mill: Any, tiny_tiles: None) -> None:
    mill.check(Net, config(), dtype)


@pytest.mark.parametrize("tying", [0.2, 0.5, 0.7, 1.0])
def test_groups_of_layers(tying: float, mill: Any) -> None:
    mill.check(Net, config(weight_tying=tying), torch.bfloat16)


def test_sizes_and_options(mill: Any) -> None:
    for options in (
        {"r": 1, "u": 40},
        {"r": 30, "u": 3},
        {"projection_seed": 2**40, "bias": "all", "init_weights": "uniform"},
        {"target_modules": ["zeta"], "modules_to_save": ["lin1"]},
        {"target_modules": ["zeta"], "save_projection": False},
        {"target_modules": ["emb"], "save_projection": False},
        {"target_modules": ["conv0"], "save_projection": False, "weight_tying": 1.0},
    ):
        mill.check(Net, config(**options), torch.bfloat16)
    mill.check(Tied, config(target_modules=["emb", "conv"]), torch.bfloat16)


def test_two_adapters_in_turn(mill: Any) -> None:
    second = config(target_modules=["zeta", "conv0", "emb"], weight_tying=0.4, projection_seed=1)
    mill.check_in_turn(Net, torch.bfloat16, config(), second)


def test_an_adapter_of_another_dtype(mill: Any, same_bits: Any) -> None:
    adapter = mill.adapter(Net, config(), dtype=torch.float16)
    same_bits(
        mill.export(mill.base(Net, torch.float32), adapter),
        mill.peft(Net, torch.float32, adapter),
    )


def test_weighted_sum(mill: Any) -> None:
    base = mill.base(Net, torch.float64)
    adapters = [mill.adapter(Net, config(r=rank), name=f"r{rank}") for rank in (2, 3)]
    plain = load_file(base / "model.safetensors")
    apart = [mill.export(base, adapter) for adapter in adapters]
    merged = mill.export(base, *adapters, adapter_weights=[0.5, -2.0])
    for name in ("zeta.weight", "conv1.weight", "emb.weight"):
        one, two = (alone[name] - plain[name] for alone in apart)
        expected = plain[name] + 0.5 * one - 2.0 * two
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-12)


def test_without_projections(mill: Any, edit_config: Any, same_bits: Any) -> None:
    base = mill.base(Net, torch.bfloat16)
    adapter = mill.adapter(Net, config(save_projection=False), dtype=torch.bfloat16)
    with pytest.raises(AdapterError, match="saved without its projections"):
        mill.export(base, adapter)
    assert not (mill.folder / "merged").exists()
    # the way out that the message names
    expected = mill.peft(Net, torch.bfloat16, adapter)
    edit_config(adapter, save_projection=True)
    again = mill.folder / "again"
    PeftModel.from_pretrained(mill.model(Net, torch.bfloat16), adapter).save_pretrained(again)
    same_bits(mill.export(base, again), expected)


def test_projections_that_do_not_say_whose_they_are(mill: Any, edit_config: Any) -> None:
    base = mill.base(Net, torch.float32)
    adapter = mill.adapter(Net, config())
    edit_config(adapter, projection_seed=43)
    # the numbers are shifted by one, and the first layer's is not found
    with pytest.raises(AdapterError, match="that of no layer"):
        mill.export(base, adapter)
    edit_config(adapter, projection_seed=42)
    mill.rewrite(adapter, "zeta.tinylora_P", lambda tensor: tensor + 1)
    with pytest.raises(AdapterError, match="that of no layer"):
        mill.export(base, adapter)
    # of so many single numbers in BF16 some are alike
    many = {"target_modules": "all-linear", "r": 1, "u": 1, "projection_seed": 0}

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(300)])

    adapter = mill.adapter(Many, config(**many), dtype=torch.bfloat16, name="many")
    with pytest.raises(AdapterError, match="that of several layers"):
        mill.export(mill.base(Many, torch.bfloat16), adapter)


def test_another_base(mill: Any) -> None:
    adapter = mill.adapter(Net, config(target_modules=["zeta"]))
    with pytest.raises(PlanError, match="another base"):
        mill.export(mill.base(Wider, torch.float32), adapter)


def test_damaged_adapters(mill: Any, edit_config: Any) -> None:
    base = mill.base(Net, torch.float32)
    adapter = mill.adapter(Net, config())
    edit_config(adapter, weight_tying=0.5)
    with pytest.raises(AdapterError, match="vectors of more layers"):
        mill.export(base, adapter)
    edit_config(adapter, weight_tying=0.0)
    mill.rewrite(adapter, "tinylora_v.4", None)
    with pytest.raises(AdapterError, match=r"adapter has no tinylora_v\.4"):
        mill.export(base, adapter)
    for edits, message in (
        ({"weight_tying": 1.5}, "from 0 to 1"),
        ({"weight_tying": 0.0, "r": 5}, "r = 5"),
        ({"r": 4, "u": 8}, "unexpected shape"),
        ({"u": 9, "projection_seed": 1.5}, "bad projection_seed"),
    ):
        edit_config(adapter, **edits)
        with pytest.raises(AdapterError, match=message):
            open_adapter(adapter)
    edit_config(adapter, projection_seed=42)
    mill.rewrite(adapter, "zeta.tinylora_B", None)
    with pytest.raises(AdapterError, match="module has no tinylora_B"):
        open_adapter(adapter)


def test_description(mill: Any) -> None:
    adapter = open_adapter(mill.adapter(Net, config(target_modules=["zeta"])))
    (module,) = adapter.modules
    described = adapter.config.tuner.describe(module, adapter.config.settings)
    assert described == {"rank": 4, "u": 9, "shape": [41, 23], "dtype": "F32"}
