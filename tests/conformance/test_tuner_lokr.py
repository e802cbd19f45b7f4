"""LoKr on linear layers and convolutions, against PEFT."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoKrConfig
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
TARGETS = ["lin0", "lin1", "prime", "conv1", "conv2", "point1", "point2", "grouped"]
# which factors are whole depends on the rank
OPTIONS: dict[str, dict[str, Any]] = {
    "whole": {"r": 64},
    "product": {"r": 2},
    "both products": {"r": 1, "decompose_both": True},
    "factor": {"r": 2, "decompose_factor": 2},
    "left of one": {"r": 3, "decompose_factor": 1},
    "tucker": {"r": 2, "use_effective_conv2d": True},
    "lycoris": {"r": 2, "alpha": 3, "init_weights": "lycoris", "rank_dropout_scale": True},
}


class Mixed(nn.Module):
    """Layers of odd shapes, each kind that PEFT has LoKr for."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(24, 42)
        self.lin1 = nn.Linear(42, 10, bias=False)
        self.prime = nn.Linear(13, 17)
        self.conv1 = nn.Conv1d(12, 20, 3)
        self.conv2 = nn.Conv2d(12, 18, (3, 2))
        self.point1 = nn.Conv1d(12, 15, 1)
        self.point2 = nn.Conv2d(12, 15, 1)
        self.grouped = nn.Conv2d(24, 12, 3, groups=2)
        self.rest = nn.Linear(4, 4)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(12, 20)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_layers(dtype: torch.dtype, name: str, mill: Any) -> None:
    mill.check(Mixed, LoKrConfig(target_modules=TARGETS, **OPTIONS[name]), dtype)


@pytest.mark.parametrize("name", OPTIONS)
def test_bits_do_not_depend_on_tiles(name: str, mill: Any, four_rows: list[int]) -> None:
    mill.check(Mixed, LoKrConfig(target_modules=TARGETS, **OPTIONS[name]), torch.bfloat16)
    assert 4 in four_rows
    assert max(four_rows) < 8


def test_options_make_the_forms_that_they_should(mill: Any) -> None:
    forms = {}
    for name, options in OPTIONS.items():
        config = LoKrConfig(target_modules=TARGETS, **options)
        adapter = open_adapter(mill.adapter(Mixed, config, name=name))
        forms[name] = {m.module: set(m.tensors) for m in adapter.modules}
    assert forms["whole"]["conv1"] == {"lokr_w1", "lokr_w2"}
    assert forms["product"]["lin0"] == {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}
    assert "lokr_w1_a" in forms["both products"]["lin0"]
    assert "lokr_t2" in forms["tucker"]["conv1"] & forms["tucker"]["conv2"]


def test_ranks_and_alphas_by_pattern(mill: Any) -> None:
    config = LoKrConfig(
        target_modules=TARGETS,
        r=3,
        alpha=1,
        rank_pattern={"lin0": 2, "conv.": 1},
        alpha_pattern={"lin1": 5, "^conv2": 9, "prime": 0.3},
        decompose_both=True,
        rank_dropout=0.3,
    )
    mill.check(Mixed, config, torch.bfloat16)


def test_two_adapters_in_turn(mill: Any, same_bits: Any) -> None:
    base = mill.base(Mixed, torch.bfloat16)
    config = functools.partial(LoKrConfig, target_modules=TARGETS)
    first = mill.adapter(Mixed, config(r=2), name="first")
    second = mill.adapter(Mixed, config(r=3, use_effective_conv2d=True), name="second")
    expected = mill.peft(Mixed, torch.bfloat16, first, second)
    same_bits(mill.export(base, first, second), expected)


def test_half_precision_file(mill: Any, same_bits: Any) -> None:
    base = mill.base(Small, torch.bfloat16)
    adapter = mill.adapter(Small, LoKrConfig(target_modules=["lin0"], r=2))
    change(adapter, lambda name, tensor: tensor.to(torch.bfloat16))
    expected = mill.peft(Small, torch.bfloat16, adapter)
    same_bits(mill.export(base, adapter), expected)


def test_weights_of_adapters(mill: Any) -> None:
    base = mill.base(Small, torch.float32)
    adapter = mill.adapter(Small, LoKrConfig(target_modules=["lin0"], r=2, alpha=3))
    merged = mill.export(base, adapter, adapter_weights=[-2.0])["lin0.weight"]
    start = load_file(base / "model.safetensors")["lin0.weight"].double()
    parts = load_file(adapter / "adapter_model.safetensors")
    u, a, b = (
        parts[f"base_model.model.lin0.lokr_{end}"].double() for end in ("w1", "w2_a", "w2_b")
    )
    delta = torch.kron(u, a @ b) * 1.5
    assert delta.abs().max() > 1e-3
    torch.testing.assert_close(merged.double(), start - 2 * delta, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda name, tensor: None if name.endswith("w1") else tensor, "no lokr_w1_a"),
        (lambda name, tensor: None if name.endswith("w2_b") else tensor, "no lokr_w2_b"),
        (lambda name, tensor: tensor[1:] if name.endswith("w1") else tensor, "shape mismatch"),
        (lambda name, tensor: tensor[:, 1:] if name.endswith("w2_b") else tensor, "shape mismatch"),
        (lambda name, tensor: tensor[:, 1:] if name.endswith("w2_a") else tensor, "rank"),
        (lambda name, tensor: tensor[1:] if name.endswith("w2_b") else tensor, "rank"),
        (lambda name, tensor: tensor[0] if name.endswith("w1") else tensor, "flat"),
    ],
)
def test_damaged_adapter(edit: Any, message: str, mill: Any) -> None:
    base = mill.base(Mixed, torch.float32)
    adapter = mill.adapter(Mixed, LoKrConfig(target_modules=["lin0"], r=2))
    change(adapter, edit)
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter)


def test_two_forms_at_once(mill: Any) -> None:
    base = mill.base(Mixed, torch.float32)
    adapter = mill.adapter(Mixed, LoKrConfig(target_modules=["lin0"], r=2))
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "base_model.model.lin0.lokr_w2": torch.ones(7, 6)}, path)
    with pytest.raises(PlanError, match="not used"):
        mill.export(base, adapter)


@pytest.mark.parametrize("effective", [False, True], ids=["flat", "tucker"])
def test_another_layer(effective: bool, mill: Any) -> None:
    config = LoKrConfig(target_modules=["conv2"], r=2, use_effective_conv2d=effective)
    adapter = mill.adapter(Mixed, config)

    def build(*shape: int) -> nn.Module:
        model = nn.Module()
        model.conv2 = nn.Conv2d(shape[0], shape[1], shape[2:])
        return model

    for shape in ((12, 18, 2, 2), (18, 12, 3, 2), (6, 36, 3, 2), (12, 19, 3, 2), (13, 18, 3, 2)):
        base = mill.base(functools.partial(build, *shape), torch.float32)
        with pytest.raises(PlanError, match="shape mismatch"):
            mill.export(base, adapter)


def test_weight_that_is_stored_transposed(mill: Any) -> None:
    def build() -> nn.Module:
        model = nn.Module()
        model.lin0 = Conv1D(12, 20)
        return model

    adapter = mill.adapter(Small, LoKrConfig(target_modules=["lin0"]))
    base = mill.base(build, torch.float32)
    with pytest.raises(PlanError, match="transposed"):
        mill.export(base, adapter)


def test_description(mill: Any) -> None:
    config = LoKrConfig(target_modules=TARGETS, r=2, alpha=3, use_effective_conv2d=True)
    adapter = open_adapter(mill.adapter(Mixed, config))
    tuner, settings = adapter.config.tuner, adapter.config.settings
    said = {m.module: tuner.describe(m, settings) for m in adapter.modules}
    assert said["lin0"] == {"rank": 2, "scaling": 1.5, "shape": [42, 24], "dtype": "F32"}
    assert said["conv2"]["shape"] == [18, 72]
    assert said["point1"]["shape"] == [15, 12]


def change(adapter: Path, edit: Callable[[str, torch.Tensor], torch.Tensor | None]) -> None:
    path = adapter / "adapter_model.safetensors"
    edited = {name: edit(name, tensor) for name, tensor in load_file(path).items()}
    kept = {name: tensor.contiguous() for name, tensor in edited.items() if tensor is not None}
    save_file(kept, path)
