"""BOFT against PEFT."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import BOFTConfig
from peft.tuners.boft import layer as peft_layer
from torch import nn
from transformers.pytorch_utils import Conv1D

from streammerge.engine.inspect import inspect_folder
from streammerge.errors import AdapterError, PlanError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(24, 41)
        self.lin1 = nn.Linear(40, 24, bias=False)
        self.few = nn.Linear(48, 5)
        self.one = nn.Linear(32, 1)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 19, 3)
        self.few = nn.Conv2d(8, 7, 2, bias=False)
        self.point = nn.Conv2d(20, 33, 1)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.even = nn.Linear(1024, 37)
        self.ragged = nn.Linear(832, 300)


class OnOtherHardware:
    """PEFT's extension, which makes block-diagonal matrices, without a GPU."""

    @staticmethod
    def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*matrices) for matrices in blocks])]


@pytest.fixture(autouse=True)
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    # it would be compiled for every layer
    monkeypatch.setattr(peft_layer, "get_fbd_cuda", lambda: None)


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_layer, "get_fbd_cuda", OnOtherHardware)


def boft(*targets: str, **options: Any) -> BOFTConfig:
    targets = targets or ("lin0", "lin1", "few", "one")
    return BOFTConfig(**{"boft_block_size": 4, "target_modules": list(targets), **options})


def move(_: str, parameter: nn.Parameter) -> None:
    parameter.add_(0.3 * torch.randn(parameter.shape).to(parameter.dtype))


def edit(adapter: Path, **edits: Any) -> None:
    """Change an adapter's configuration."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edits}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"boft_block_size": 8}, {"boft_block_size": 0, "boft_block_num": 2}]
)
def test_linear_layers(dtype: torch.dtype, options: dict[str, Any], mill: Any) -> None:
    mill.check(Mlp, boft(**options), dtype, change=move)


@pytest.mark.parametrize("options", [{"boft_block_size": 1}, {"boft_block_size": 3}])
def test_odd_blocks(options: dict[str, Any], mill: Any) -> None:
    mill.check(Mlp, boft("lin0", "few", **options), torch.bfloat16, change=move)


def test_factors_that_peft_leaves_out(mill: Any) -> None:
    mill.check(Mlp, boft(boft_n_butterfly_factor=2), torch.bfloat16, change=move)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolutions(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Convolutions, boft("conv", "few", "point"), dtype, change=move)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("factors", "block"), [(2, 4), (3, 2)])
def test_butterflies(dtype: torch.dtype, factors: int, block: int, mill: Any) -> None:
    options = {"boft_block_size": block, "boft_n_butterfly_factor": factors}
    mill.check(Mlp, boft("lin0", "lin1", "few", **options), dtype, change=move)
    mill.check(Convolutions, boft("few", **options), dtype, change=move)


@pytest.mark.usefixtures("extension", "tiny_tiles")
@pytest.mark.parametrize(("factors", "block"), [(1, 8), (2, 8), (3, 16), (4, 4), (5, 4)])
def test_windows_of_wide_layers(factors: int, block: int, mill: Any) -> None:
    config = boft("even", boft_block_size=block, boft_n_butterfly_factor=factors)
    mill.check(Wide, config, torch.float32, change=move)


def test_a_window_that_overlaps_another(mill: Any) -> None:
    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ragged = nn.Linear(840, 300)

    mill.check(Ragged, boft("ragged", boft_block_size=8), torch.float32, change=move)


@pytest.mark.usefixtures("extension", "tiny_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_tiles(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Mlp, boft(), dtype, change=move, threads=3)
    config = boft("lin0", "few", boft_n_butterfly_factor=2)
    mill.check(Mlp, config, dtype, change=move)
    mill.check(Convolutions, boft("conv", "few"), dtype, change=move)


@pytest.mark.parametrize("bias", ["all", "boft_only"])
def test_trained_biases(bias: str, mill: Any) -> None:
    mill.check(Mlp, boft("lin0", "few", bias=bias), torch.bfloat16, change=move)


def test_in_turn(mill: Any) -> None:
    configs = [boft(), boft("lin0", boft_block_size=6), boft("one", "lin0", boft_block_size=8)]
    mill.check_in_turn(Mlp, torch.bfloat16, *configs)


@pytest.mark.usefixtures("extension")
def test_what_inspect_says(mill: Any) -> None:
    report = inspect_folder(mill.adapter(Mlp, boft("lin0", boft_n_butterfly_factor=2)))
    (module,) = report["modules"]
    assert (module["block_size"], module["blocks"], module["butterfly_factors"]) == (4, 6, 2)


@pytest.mark.parametrize(
    ("end", "change", "message"),
    [
        ("boft_R", None, "no boft_R"),
        ("boft_s", None, "no boft_s"),
        ("boft_R", lambda tensor: tensor[0], "no shape of butterfly"),
        ("boft_R", lambda tensor: tensor[..., 1:], "no shape of butterfly"),
        ("boft_R", lambda tensor: tensor[:0], "no shape of butterfly"),
        ("boft_R", lambda tensor: tensor.repeat(3, 1, 1, 1), "no shape of butterfly"),
        ("boft_R", lambda tensor: tensor.repeat(9, 1, 1, 1), "no shape of butterfly"),
        ("boft_R", lambda tensor: tensor[:, 1:], "shape mismatch"),
        ("boft_R", lambda tensor: tensor[..., :3, :3], "disagree"),
        ("boft_s", lambda tensor: tensor[1:], "scale has an unexpected shape"),
        ("boft_s", lambda tensor: tensor.view(1, -1), "scale has an unexpected shape"),
    ],
)
def test_damaged_adapters(end: str, change: Any, message: str, mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, boft("lin0"))
    mill.rewrite(adapter, end, change)
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter)


@pytest.mark.parametrize(
    "edits", [{"boft_block_size": 8}, {"boft_block_size": 0, "boft_block_num": 4}]
)
def test_another_configuration(edits: dict[str, Any], mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, boft("lin0"))
    edit(adapter, **edits)
    with pytest.raises(AdapterError, match=r"blocks of the tensors and of adapter_config\.json"):
        mill.export(base, adapter)


def test_layers_that_peft_has_no_rotation_for(mill: Any) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin0 = Conv1D(41, 24)

    adapter = mill.adapter(Mlp, boft("lin0"))
    edit(adapter, fan_in_fan_out=True)
    with pytest.raises(PlanError, match="for linear layers"):
        mill.export(mill.base(Turned, torch.float32), adapter)


def test_no_weighted_sum(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, boft("lin0"))
    with pytest.raises(PlanError, match="adapter_weights"):
        mill.export(base, adapter, adapter_weights=[0.5])
