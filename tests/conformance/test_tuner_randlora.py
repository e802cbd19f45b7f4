"""RandLoRA against PEFT."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import RandLoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from streammerge.adapters.adapter import open_adapter
from streammerge.adapters.tuners.base import Shared
from streammerge.adapters.tuners.randlora import DrawnBases, RandLoraTerm
from streammerge.checkpoint.header import StoredTensor
from streammerge.dtypes import Dtype
from streammerge.errors import AdapterError, PlanError

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


class Net(nn.Module):
    """The largest N and the largest K are those of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(23, 41)
        self.lin1 = nn.Linear(57, 19, bias=False)
        self.conv0 = Conv1D(37, 29)
        self.conv1 = Conv1D(3, 31)


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv1D(24, 24)


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(24, 24)


class Wider(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(23, 42)


class Large(nn.Module):
    """Above the sizes at which the bits of a product are those of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(810, 905)


def config(**options: Any) -> RandLoraConfig:
    targets = ["lin0", "lin1", "conv0", "conv1"]
    return RandLoraConfig(**{"r": 6, "randlora_alpha": 3, "target_modules": targets, **options})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_saved", [True, False])
def test_linear_and_conv1d(is_saved: bool, dtype: torch.dtype, mill: Any, tiny_tiles: None) -> None:
    mill.check(Net, config(save_projection=is_saved, projection_prng_key=12345), dtype)


@pytest.mark.parametrize("is_saved", [True, False])
def test_sizes_and_options(is_saved: bool, mill: Any) -> None:
    for options in (
        {"r": 1, "target_modules": ["lin1"]},
        {"r": 50, "randlora_alpha": 640},
        {"sparse": True, "bias": "randlora_only"},
        {"very_sparse": True, "sparse": True, "projection_prng_key": -1},
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
    ):
        mill.check(Net, config(**options, save_projection=is_saved), torch.bfloat16)
    for square, name in ((Turned, "conv"), (Square, "lin")):
        one = config(target_modules=[name], save_projection=is_saved)
        mill.check(square, one, torch.float16)


def test_sizes_at_which_products_have_no_parts(mill: Any, tiny_tiles: None) -> None:
    mill.check(Large, config(r=32, target_modules=["lin"]), torch.float32, threads=2)


def test_two_adapters_in_turn(mill: Any) -> None:
    second = config(r=4, target_modules=["lin0", "conv1"], save_projection=False, sparse=True)
    mill.check_in_turn(Net, torch.bfloat16, config(), second)


def test_projections_of_an_older_file(mill: Any, same_bits: Any) -> None:
    base = mill.base(Net, torch.bfloat16)
    adapter = mill.adapter(Net, config(), dtype=torch.bfloat16)
    merged = mill.export(base, adapter)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    assert "base_model.model.lin0.randlora_A" in tensors
    ends = ("randlora_A", "randlora_B")
    save_file(
        {
            name: tensor
            for name, tensor in tensors.items()
            if not name.endswith(ends) or name.count(".") == 1
        },
        path,
    )
    same_bits(mill.export(base, adapter), merged)
    save_file(
        {
            name: tensor
            for name, tensor in tensors.items()
            if not name.endswith(ends) or name.count(".") > 1
        },
        path,
    )
    with pytest.raises(AdapterError, match="adapter has no randlora_A"):
        mill.export(base, adapter)


def test_weighted_sum(mill: Any) -> None:
    base = mill.base(Net, torch.float64)
    adapters = [mill.adapter(Net, config(r=rank), name=f"r{rank}") for rank in (5, 7)]
    plain = load_file(base / "model.safetensors")
    apart = [mill.export(base, adapter) for adapter in adapters]
    merged = mill.export(base, *adapters, adapter_weights=[0.5, -2.0])
    for name in ("lin0.weight", "lin1.weight", "conv0.weight"):
        one, two = (alone[name] - plain[name] for alone in apart)
        expected = plain[name] + 0.5 * one - 2.0 * two
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-12)


def test_with_fp32_the_delta_is_not_rounded(mill: Any) -> None:
    base = mill.base(Net, torch.bfloat16)
    adapter = mill.adapter(Net, config(), dtype=torch.bfloat16)
    merged = mill.export(base, adapter, numerics="fp32")
    wide = mill.export(base, adapter, numerics="fp32", infer_dtype="float32")
    for name, tensor in wide.items():
        assert torch.equal(merged[name], tensor.to(torch.bfloat16))
    rounded = mill.peft(Net, torch.bfloat16, adapter)
    assert not torch.equal(merged["lin0.weight"], rounded["lin0.weight"])


def test_another_base(mill: Any) -> None:
    adapter = mill.adapter(Net, config(target_modules=["lin0"]))
    with pytest.raises(AdapterError, match="another base"):
        mill.export(mill.base(Wider, torch.float32), adapter)
    mill.rewrite(adapter, "gamma", lambda tensor: tensor[:, :-1])
    with pytest.raises(PlanError, match="another base"):
        mill.export(mill.base(Net, torch.float32), adapter)


def test_damaged_adapters(mill: Any, edit_config: Any) -> None:
    base = mill.base(Net, torch.float32)
    adapter = mill.adapter(Net, config())
    mill.rewrite(adapter, "randlora_B", None)
    with pytest.raises(AdapterError, match="adapter has no randlora_B"):
        mill.export(base, adapter)
    edit_config(adapter, r=5)
    with pytest.raises(AdapterError, match="rank of the tensors"):
        open_adapter(adapter)
    edit_config(adapter, r=6)
    mill.rewrite(adapter, "lin0.randlora_gamma", lambda tensor: tensor[1:])
    with pytest.raises(AdapterError, match="do not belong together"):
        open_adapter(adapter)
    mill.rewrite(adapter, "lin0.randlora_gamma", None)
    with pytest.raises(AdapterError, match="module has no randlora_gamma"):
        open_adapter(adapter)


def test_description(mill: Any) -> None:
    adapter = open_adapter(mill.adapter(Net, config(target_modules=["lin0"])))
    (module,) = adapter.modules
    tuner, settings = adapter.config.tuner, adapter.config.settings
    described = tuner.describe(module, settings)
    assert described == {"rank": 6, "bases": 4, "scaling": 0.5, "dtype": "F32"}
    assert {tensor.name.rpartition(".")[2] for tensor in tuner.unused(module)} == {
        "randlora_A",
        "randlora_B",
    }
    assert Shared(adapter.shared).tensors.keys() == {"randlora_A", "randlora_B"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["stored", "dense", "sparse"])
def test_memory_is_what_was_planned(kind: str, dtype: torch.dtype, peak_bytes: Any) -> None:
    shape, rank, bases = (1000, 1500), 32, 32
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    shapes = (rank, bases), (bases, 1000), (rank, 1, 1000), (1500, bases, rank)
    stored = [StoredTensor(str(s), Dtype.F32, s, Path("none"), 0) for s in shapes]
    shared: Any = (stored[2], stored[3])
    if kind != "stored":
        sparsity = None if kind == "dense" else 3
        shared = DrawnBases(0, 1000, 1500, rank, sparsity, Dtype.BF16)
    term = RandLoraTerm(False, 1.0, stored[0], stored[1], shared, compute.itemsize)
    weight = SimpleNamespace(shape=shape, dtype=dtype, compute_dtype=compute)
    factors = [torch.randn(s, dtype=compute) for s in shapes[: 4 if kind == "stored" else 2]]
    assert peak_bytes(lambda: term.prepare(factors, weight)) <= term.work_bytes(shape)
