"""LoHa on linear layers and convolutions, against PEFT."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoHaConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from streammerge.adapters.adapter import open_adapter
from streammerge.errors import AdapterError, PlanError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
TARGETS = ["lin0", "lin1", "conv1", "conv2", "point1", "point2", "grouped"]


class Mixed(nn.Module):
    """Layers of odd shapes, each kind that PEFT has LoHa for."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(23, 41)
        self.lin1 = nn.Linear(41, 5, bias=False)
        self.conv1 = nn.Conv1d(7, 13, 3)
        self.conv2 = nn.Conv2d(6, 11, (3, 2))
        self.point1 = nn.Conv1d(9, 10, 1)
        self.point2 = nn.Conv2d(9, 10, 1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4)
        self.rest = nn.Linear(4, 4)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(12, 20)


@pytest.mark.parametrize("effective", [False, True], ids=["flat", "tucker"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_layers(dtype: torch.dtype, effective: bool, mill: Any) -> None:
    config = LoHaConfig(target_modules=TARGETS, r=5, alpha=7, use_effective_conv2d=effective)
    mill.check(Mixed, config, dtype)


@pytest.mark.parametrize("effective", [False, True], ids=["flat", "tucker"])
def test_bits_do_not_depend_on_tiles(effective: bool, mill: Any, four_rows: list[int]) -> None:
    config = LoHaConfig(target_modules=TARGETS, r=4, alpha=3, use_effective_conv2d=effective)
    mill.check(Mixed, config, torch.bfloat16)
    assert 4 in four_rows
    assert max(four_rows) < 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tucker_form_by_rows(dtype: torch.dtype, mill: Any, four_rows: list[int]) -> None:
    """Smaller convolutions are computed whole."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(8, 41, 3), nn.Conv1d(22, 66, 3))

    config = LoHaConfig(target_modules=["0", "1"], r=24, use_effective_conv2d=True)
    mill.check(build, config, dtype)
    assert max(four_rows) < 8


def test_ranks_and_alphas_by_pattern(mill: Any) -> None:
    config = LoHaConfig(
        target_modules=TARGETS,
        r=8,
        alpha=1,
        rank_pattern={"lin0": 3, "conv.": 6},
        alpha_pattern={"lin1": 5, "^conv2": 9},
        use_effective_conv2d=True,
        rank_dropout=0.3,
        module_dropout=0.1,
    )
    mill.check(Mixed, config, torch.bfloat16)


@pytest.mark.parametrize("shape", [(1, 7), (2, 9), (3, 6), (33, 1), (40, 2), (33, 3), (4, 4)])
def test_narrow_layers(shape: tuple[int, int], mill: Any, four_rows: list[int]) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(shape[1], shape[0]))

    # large deltas of single precision show how they were summed up
    mill.check(build, LoHaConfig(target_modules=["0"], r=3, alpha=3000), torch.float32)


@pytest.mark.parametrize(
    ("rows", "channels", "kernel", "rank"),
    [(4, 1, 3, 16), (5, 3, 5, 3), (13, 2, 3, 5), (33, 1, 3, 3), (8, 5, 3, 3), (33, 2, 3, 16)],
)
def test_small_convolutions(rows: int, channels: int, kernel: int, rank: int, mill: Any) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv1d(channels, rows, kernel))

    config = LoHaConfig(target_modules=["0"], r=rank, alpha=9000, use_effective_conv2d=True)
    mill.check(build, config, torch.float32)


def test_half_precision_file(mill: Any, same_bits: Any) -> None:
    base = mill.base(Small, torch.bfloat16)
    adapter = mill.adapter(Small, LoHaConfig(target_modules=["lin0"]))
    change(adapter, lambda name, tensor: tensor.to(torch.float16))
    expected = mill.peft(Small, torch.bfloat16, adapter)
    same_bits(mill.export(base, adapter), expected)


def test_two_adapters_in_turn(mill: Any, same_bits: Any) -> None:
    base = mill.base(Mixed, torch.bfloat16)
    config = functools.partial(LoHaConfig, target_modules=TARGETS)
    first = mill.adapter(Mixed, config(r=2), name="first")
    second = mill.adapter(Mixed, config(r=3, use_effective_conv2d=True), name="second")
    expected = mill.peft(Mixed, torch.bfloat16, first, second)
    same_bits(mill.export(base, first, second), expected)


def test_weights_of_adapters(mill: Any) -> None:
    base = mill.base(Small, torch.float32)
    adapter = mill.adapter(Small, LoHaConfig(target_modules=["lin0"], r=4, alpha=6))
    half = mill.export(base, adapter, adapter_weights=[0.5])["lin0.weight"]
    start = load_file(base / "model.safetensors")["lin0.weight"].double()
    parts = load_file(adapter / "adapter_model.safetensors")
    a1, b1, a2, b2 = (
        parts[f"base_model.model.lin0.hada_{name}"].double()
        for name in ("w1_a", "w1_b", "w2_a", "w2_b")
    )
    delta = (a1 @ b1) * (a2 @ b2) * 1.5
    assert delta.abs().max() > 1e-3
    torch.testing.assert_close(half.double(), start + 0.5 * delta, rtol=0, atol=1e-6)


def test_one_rounding_with_fp32_numerics(mill: Any) -> None:
    base = mill.base(Small, torch.bfloat16)
    adapters = [
        mill.adapter(Small, LoHaConfig(target_modules=["lin0"]), name=name)
        for name in ("first", "second")
    ]
    merged = mill.export(base, *adapters, numerics="fp32")["lin0.weight"]
    expected = mill.peft(lambda: mill.model(Small, torch.bfloat16), torch.float32, *adapters)
    assert torch.equal(merged, expected["lin0.weight"].to(torch.bfloat16))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda name, tensor: None if name.endswith("w2_b") else tensor, "no hada_w2_b"),
        (lambda name, tensor: tensor[:, :6] if name.endswith("w1_b") else tensor, "shape"),
        (lambda name, tensor: tensor[:, :5] if name.endswith("w1_a") else tensor, "rank"),
        (lambda name, tensor: tensor[:3] if name.endswith("w2_b") else tensor, "shape"),
    ],
    ids=["missing", "narrow", "rank", "other rank"],
)
def test_damaged_adapter(edit: Any, message: str, mill: Any) -> None:
    base = mill.base(Small, torch.float32)
    adapter = mill.adapter(Small, LoHaConfig(target_modules=["lin0"]))
    change(adapter, edit)
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter)


def test_another_base(mill: Any) -> None:
    adapter = mill.adapter(Small, LoHaConfig(target_modules=["lin0"]))
    base = mill.base(Mixed, torch.float32)
    with pytest.raises(AdapterError, match="another base"):
        mill.export(base, adapter)


def test_factors_of_a_convolution_on_a_linear_layer(mill: Any) -> None:
    config = LoHaConfig(target_modules=["conv2"], use_effective_conv2d=True)
    adapter = mill.adapter(Mixed, config)
    base = mill.base(Mixed, torch.float32)
    change(adapter, lambda name, tensor: tensor, rename=lambda name: name.replace("conv2", "lin0"))
    with pytest.raises(PlanError, match="shape mismatch"):
        mill.export(base, adapter)


def test_weight_that_is_stored_transposed(mill: Any) -> None:
    def build() -> nn.Module:
        model = nn.Module()
        model.lin0 = Conv1D(12, 20)
        return model

    adapter = mill.adapter(Small, LoHaConfig(target_modules=["lin0"]))
    base = mill.base(build, torch.float32)
    with pytest.raises(PlanError, match="transposed"):
        mill.export(base, adapter)


def test_description(mill: Any) -> None:
    config = LoHaConfig(target_modules=TARGETS, r=4, alpha=6, use_effective_conv2d=True)
    adapter = open_adapter(mill.adapter(Mixed, config))
    tuner, settings = adapter.config.tuner, adapter.config.settings
    said = {m.module: tuner.describe(m, settings) for m in adapter.modules}
    assert said["lin0"] == {"rank": 4, "scaling": 1.5, "shape": [41, 23], "dtype": "F32"}
    assert said["conv2"]["shape"] == [11, 36]
    assert said["conv1"]["shape"] == [13, 21]


def change(
    adapter: Path,
    edit: Callable[[str, torch.Tensor], torch.Tensor | None],
    rename: Callable[[str], str] = str,
) -> None:
    path = adapter / "adapter_model.safetensors"
    edited = {rename(name): edit(name, tensor) for name, tensor in load_file(path).items()}
    kept = {name: tensor.contiguous() for name, tensor in edited.items() if tensor is not None}
    save_file(kept, path)
