"""C3A against PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import C3AConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from streammerge.adapters.tuners import c3a as c3a_module
from streammerge.engine.inspect import inspect_folder
from streammerge.errors import AdapterError, PlanError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(24, 60)
        self.lin1 = nn.Linear(60, 24, bias=False)
        self.row = nn.Linear(36, 12)
        self.column = nn.Linear(12, 36)
        self.square = nn.Linear(12, 12)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(35, 21)
        self.lin1 = nn.Linear(7, 49)
        self.few = nn.Linear(35, 7)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(520, 260)
        self.many = nn.Linear(96, 256)
        self.ragged = nn.Linear(129, 258)


def c3a(*targets: str, **options: Any) -> C3AConfig:
    targets = targets or ("lin0", "lin1", "row", "column", "square")
    return C3AConfig(**{"block_size": 12, "target_modules": list(targets), **options})


def grow(_: str, parameter: nn.Parameter) -> None:
    """Make the delta as large as the weight."""
    parameter.add_(20 * torch.randn(parameter.shape).to(parameter.dtype))


def rewrite(adapter: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the tensors of an adapter."""
    path = adapter / "adapter_model.safetensors"
    save_file({name: change(tensor).contiguous() for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [1, 2, 3, 4, 12])
def test_linear_layers(block: int, dtype: torch.dtype, mill: Any) -> None:
    mill.check(Mlp, c3a(block_size=block), dtype, change=grow)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_blocks(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Odd, c3a("lin0", "lin1", "few", block_size=7), dtype, change=grow)


@pytest.mark.parametrize("init", [True, "gaussian", "kaiming_uniform", "xavier_uniform", False])
def test_initialisations(init: Any, mill: Any) -> None:
    mill.check(Mlp, c3a(init_weights=init), torch.bfloat16, change=grow)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("target", "block"), [("one", 260), ("one", 130), ("one", 10), ("many", 32), ("ragged", 129)]
)
def test_large_blocks(target: str, block: int, dtype: torch.dtype, mill: Any) -> None:
    mill.check(Wide, c3a(target, block_size=block), dtype, change=grow)


def test_pattern_of_sizes(mill: Any) -> None:
    sizes = {"lin0": 6, "row": 4}
    mill.check(Mlp, c3a(block_size_pattern=sizes), torch.bfloat16, change=grow)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_tiles(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Mlp, c3a(), dtype, change=grow, threads=3)
    mill.check(Odd, c3a("lin0", "lin1", "few", block_size=7), dtype, change=grow)


@pytest.mark.usefixtures("tiny_tiles")
def test_groups_that_are_not_kept(mill: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c3a_module, "KEPT_BYTES", 0)
    mill.check(Wide, c3a("many", block_size=16), torch.float32, change=grow, threads=3)


@pytest.mark.parametrize("bias", ["all", "c3a_only"])
def test_trained_biases(bias: str, mill: Any) -> None:
    mill.check(Mlp, c3a("lin0", "row", bias=bias), torch.bfloat16)


def test_in_turn(mill: Any) -> None:
    configs = [c3a(), c3a("lin0", block_size=4), c3a("square", block_size=6)]
    mill.check_in_turn(Mlp, torch.bfloat16, *configs)


def test_weighted_sum(mill: Any) -> None:
    base = mill.base(Mlp, torch.bfloat16)
    adapters = [
        mill.adapter(Mlp, c3a("lin0", block_size=size), name=f"blocks-of-{size}", change=grow)
        for size in (4, 12)
    ]
    merged = mill.export(base, *adapters, adapter_weights=[0.5, -2.0])["lin0.weight"]
    expected = load_file(base / "model.safetensors")["lin0.weight"].double()
    for weight, adapter in zip((0.5, -2.0), adapters, strict=True):
        (kernel,) = load_file(adapter / "adapter_model.safetensors").values()
        groups, columns, block = kernel.shape
        places = (torch.arange(block)[None, :] - torch.arange(block)[:, None]) % block
        matrix = kernel.double()[:, :, places].permute(0, 2, 1, 3)
        expected += weight * matrix.reshape(groups * block, columns * block) / 24
    torch.testing.assert_close(merged, expected.to(torch.bfloat16), rtol=2**-7, atol=1e-6)


def test_what_inspect_says(mill: Any) -> None:
    (module,) = inspect_folder(mill.adapter(Mlp, c3a("lin0")))["modules"]
    assert (module["block_size"], module["shape"]) == (12, [60, 24])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor[0], "no shape of circulant blocks"),
        (lambda tensor: tensor[:0], "no shape of circulant blocks"),
        (lambda tensor: tensor[1:], "shape mismatch"),
        (lambda tensor: tensor[:, 1:], "shape mismatch"),
        (lambda tensor: tensor[:, :, 1:], "shape mismatch"),
    ],
)
def test_damaged_adapters(change: Any, message: str, mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, c3a("lin0"))
    rewrite(adapter, change)
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter)


@pytest.mark.parametrize("layer", [Conv1D(60, 24), nn.Conv2d(24, 60, 1)], ids=str)
def test_layers_that_peft_has_no_blocks_for(layer: nn.Module, mill: Any, edit_config: Any) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin0 = layer

    adapter = mill.adapter(Mlp, c3a("lin0"))
    edit_config(adapter, fan_in_fan_out=isinstance(layer, Conv1D))
    with pytest.raises(PlanError, match="for linear layers"):
        mill.export(mill.base(Other, torch.float32), adapter)
