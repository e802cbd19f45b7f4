"""Uni-LoRA against PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, UniLoraConfig
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from streammerge.adapters.adapter import open_adapter
from streammerge.errors import AdapterError, PlanError

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.zeta = nn.Linear(23, 41)
        self.lin1 = nn.Linear(57, 3, bias=False)
        self.conv1 = Conv1D(37, 29)
        self.conv0 = Conv1D(3, 31)


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv1D(24, 24)


class Wider(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.zeta = nn.Linear(24, 41)


def config(**options: Any) -> UniLoraConfig:
    plain = {
        "r": 5,
        "theta_d_length": 101,
        "target_modules": ["zeta", "lin1", "conv1", "conv0"],
        "save_indices": True,
        "init_theta_d_bound": 0.5,
    }
    return UniLoraConfig(**{**plain, **options})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_and_conv1d(dtype: torch.dtype, mill: Any, tiny_tiles: None) -> None:
    mill.check(Net, config(), dtype)


def test_sizes_and_options(mill: Any) -> None:
    for options in (
        {"r": 1, "theta_d_length": 7},
        {"r": 30, "theta_d_length": 5000, "bias": "all"},
        {"proj_seed": 7, "bias": "unilora_only"},
        {"target_modules": ["zeta"], "modules_to_save": ["lin1"]},
    ):
        mill.check(Net, config(**options), torch.bfloat16)
    mill.check(Square, config(target_modules=["conv"]), torch.float16)


def test_two_adapters_in_turn(mill: Any) -> None:
    second = config(r=3, target_modules=["zeta", "conv0"], theta_d_length=50)
    mill.check_in_turn(Net, torch.bfloat16, config(), second)


def test_an_adapter_of_another_dtype(mill: Any, same_bits: Any) -> None:
    base = mill.base(Net, torch.float16)
    adapter = mill.adapter(Net, config())
    same_bits(mill.export(base, adapter), mill.peft(Net, torch.float16, adapter))


def test_weighted_sum(mill: Any) -> None:
    base = mill.base(Net, torch.float64)
    adapters = [mill.adapter(Net, config(r=rank), name=f"r{rank}") for rank in (2, 3)]
    plain = load_file(base / "model.safetensors")
    apart = [mill.export(base, adapter) for adapter in adapters]
    merged = mill.export(base, *adapters, adapter_weights=[0.5, -2.0])
    for name in ("zeta.weight", "conv1.weight"):
        one, two = (alone[name] - plain[name] for alone in apart)
        expected = plain[name] + 0.5 * one - 2.0 * two
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-12)


def test_without_indices(mill: Any, edit_config: Any, same_bits: Any) -> None:
    base = mill.base(Net, torch.bfloat16)
    adapter = mill.adapter(Net, config(save_indices=False), dtype=torch.bfloat16)
    assert list(load_file(adapter / "adapter_model.safetensors")) == ["base_model.unilora_theta_d"]
    with pytest.raises(AdapterError, match="saved without its indices"):
        mill.export(base, adapter)
    assert not (mill.folder / "merged").exists()
    # the way out that the message names
    expected = mill.peft(Net, torch.bfloat16, adapter)
    edit_config(adapter, save_indices=True)
    again = mill.folder / "again"
    PeftModel.from_pretrained(mill.model(Net, torch.bfloat16), adapter).save_pretrained(again)
    same_bits(mill.export(base, again), expected)


def test_another_base(mill: Any) -> None:
    adapter = mill.adapter(Net, config(target_modules=["zeta"]))
    with pytest.raises(PlanError, match="another base"):
        mill.export(mill.base(Wider, torch.float32), adapter)


def test_indices_out_of_range(mill: Any) -> None:
    base = mill.base(Net, torch.float32)
    adapter = mill.adapter(Net, config())
    mill.rewrite(adapter, "zeta.unilora_indices_B", lambda tensor: tensor - 1)
    with pytest.raises(AdapterError, match="expected 0 to 100"):
        mill.export(base, adapter)
    assert not (mill.folder / "merged").exists()


def test_damaged_adapters(mill: Any, edit_config: Any) -> None:
    base = mill.base(Net, torch.float32)
    adapter = mill.adapter(Net, config())
    edit_config(adapter, theta_d_length=100)
    with pytest.raises(AdapterError, match="unexpected shape"):
        mill.export(base, adapter)
    mill.rewrite(adapter, "unilora_theta_d", None)
    with pytest.raises(AdapterError, match="adapter has no unilora_theta_d"):
        mill.export(base, adapter)
    edit_config(adapter, r=4)
    with pytest.raises(AdapterError, match="rank of the tensors"):
        open_adapter(adapter)
    edit_config(adapter, r=5)
    mill.rewrite(adapter, "zeta.unilora_indices_A", torch.Tensor.float)
    with pytest.raises(AdapterError, match="whole numbers for indices"):
        open_adapter(adapter)
    mill.rewrite(adapter, "zeta.unilora_scales_A", lambda tensor: tensor[1:])
    with pytest.raises(AdapterError, match="do not belong together"):
        open_adapter(adapter)
    mill.rewrite(adapter, "zeta.unilora_scales_A", None)
    with pytest.raises(AdapterError, match="module has no unilora_scales_A"):
        open_adapter(adapter)


def test_description(mill: Any) -> None:
    adapter = open_adapter(mill.adapter(Net, config(target_modules=["zeta"])))
    (module,) = adapter.modules
    described = adapter.config.tuner.describe(module, adapter.config.settings)
    assert described == {"rank": 5, "theta_d_length": 101, "shape": [41, 23], "dtype": "F32"}
