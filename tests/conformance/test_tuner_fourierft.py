"""FourierFT against PEFT."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import FourierFTConfig
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from streammerge.adapters.adapter import open_adapter
from streammerge.adapters.tuners.fourierft import FourierTerm
from streammerge.checkpoint.header import StoredTensor
from streammerge.dtypes import Dtype
from streammerge.errors import AdapterError, PlanError

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(23, 41)
        self.lin1 = nn.Linear(57, 3, bias=False)
        self.conv0 = Conv1D(37, 29)
        self.conv1 = Conv1D(3, 31)


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv1D(24, 24)


class Large(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(520, 377)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(3, 4)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Net(), Net()])
        self.lin0 = nn.Linear(9, 8)


def config(**options: Any) -> FourierFTConfig:
    targets = ["lin0", "lin1", "conv0", "conv1"]
    return FourierFTConfig(**{"n_frequency": 30, "target_modules": targets, **options})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_and_conv1d(dtype: torch.dtype, mill: Any, tiny_tiles: None) -> None:
    mill.check(Net, config(), dtype)


def test_sizes_and_options(mill: Any) -> None:
    for options in (
        {"n_frequency": 1, "target_modules": ["lin1"]},
        {"n_frequency": 57 * 3, "target_modules": ["lin1"], "random_loc_seed": 0},
        {"scaling": 2.5, "random_loc_seed": 2**40, "bias": "all"},
        {"scaling": 300, "random_loc_seed": -3, "init_weights": True},
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
    ):
        mill.check(Net, config(**options), torch.bfloat16)
    mill.check(Square, config(target_modules=["conv"]), torch.float16)


def test_sizes_at_which_transforms_use_threads(mill: Any) -> None:
    large = config(n_frequency=5000, target_modules=["lin"])
    mill.check(Large, large, torch.float32, threads=2)


def test_patterns_of_frequencies(mill: Any) -> None:
    # a pattern has a dot before it, unless it is the whole path
    patterns = {r"layers\.1\.lin0": 7, "lin0": 11, "conv.": 13, "layers.0.lin1": 5}
    options = {"n_frequency_pattern": patterns, "target_modules": ["lin0", "lin1", "conv0"]}
    mill.check(Deep, config(**options), torch.bfloat16)
    adapter = open_adapter(mill.folder / "adapter")
    found = {m.module: m.tensors["fourierft_spectrum"].shape[0] for m in adapter.modules}
    assert found == {
        "lin0": 11,
        "layers.0.lin0": 11,
        "layers.0.lin1": 5,
        "layers.0.conv0": 13,
        "layers.1.lin0": 11,
        "layers.1.lin1": 30,
        "layers.1.conv0": 13,
    }


def test_two_adapters_in_turn(mill: Any) -> None:
    second = config(n_frequency=9, target_modules=["lin0", "conv1"], random_loc_seed=5)
    mill.check_in_turn(Net, torch.bfloat16, config(), second)


def test_weighted_sum(mill: Any) -> None:
    base = mill.base(Net, torch.float64)
    adapters = [mill.adapter(Net, config(n_frequency=n), name=f"n{n}") for n in (20, 40)]
    plain = load_file(base / "model.safetensors")
    apart = [mill.export(base, adapter) for adapter in adapters]
    merged = mill.export(base, *adapters, adapter_weights=[0.5, -2.0])
    for name in ("lin0.weight", "conv0.weight"):
        one, two = (alone[name] - plain[name] for alone in apart)
        # powers of two, so that float32 gives the same numbers
        expected = plain[name] + 0.5 * one - 2.0 * two
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-12)


def test_another_base(mill: Any) -> None:
    adapter = mill.adapter(Net, config(target_modules=["lin0"]))
    with pytest.raises(PlanError, match="another base"):
        mill.export(mill.base(Small, torch.float32), adapter)


def test_damaged_adapters(mill: Any, edit_config: Any) -> None:
    adapter = mill.adapter(Net, config())
    edit_config(adapter, n_frequency=31)
    with pytest.raises(AdapterError, match="n_frequency = 31"):
        open_adapter(adapter)
    edit_config(adapter, n_frequency=30, random_loc_seed=None)
    with pytest.raises(AdapterError, match="bad random_loc_seed"):
        open_adapter(adapter)
    edit_config(adapter, random_loc_seed=1, n_frequency_pattern={"lin0": 0})
    with pytest.raises(AdapterError, match="bad lin0"):
        open_adapter(adapter)
    edit_config(adapter, n_frequency_pattern={})
    mill.rewrite(adapter, "lin0.fourierft_spectrum", lambda tensor: tensor[None])
    with pytest.raises(AdapterError, match="spectrum"):
        open_adapter(adapter)


def test_description(mill: Any) -> None:
    adapter = open_adapter(mill.adapter(Net, config(target_modules=["lin0"])))
    (module,) = adapter.modules
    described = adapter.config.tuner.describe(module, adapter.config.settings)
    assert described == {"entries": 30, "scaling": 150.0, "dtype": "F32"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_memory_is_what_was_planned(dtype: torch.dtype, peak_bytes: Any) -> None:
    shape, count = (1009, 1500), 3000
    stored = StoredTensor("spectrum", Dtype.F32, (count,), Path("none"), 0)
    term = FourierTerm(False, stored, 150.0, 777)
    weight = SimpleNamespace(shape=shape, dtype=dtype, compute_dtype=dtype)
    factor = torch.randn(count, dtype=dtype)
    assert peak_bytes(lambda: term.prepare([factor], weight)) <= term.work_bytes(shape)
