"""HRA against PEFT."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import HRAConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from streammerge.adapters.tuners import hra as hra_module
from streammerge.config.tuning import DiskTuning
from streammerge.engine import machine
from streammerge.engine.inspect import inspect_folder
from streammerge.errors import AdapterError, NonFiniteError, PlanError
from streammerge.plan import memory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(23, 41)
        self.lin1 = nn.Linear(40, 24, bias=False)
        self.few = nn.Linear(48, 5)
        self.one = nn.Linear(32, 1)
        self.narrow = nn.Linear(1, 30)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 19, 3)
        self.few = nn.Conv2d(8, 7, 2, bias=False)
        self.point = nn.Conv2d(20, 33, 1)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(96, 70)


class Wider(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(1024, 320)


@pytest.fixture
def many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each thread some rows of a weight."""
    size = 64 << 10
    small = functools.partial(DiskTuning, block_bytes=size)
    monkeypatch.setattr(machine, "DiskTuning", small)
    buffered = dataclasses.replace(machine.BUFFERED, block_bytes=size)
    monkeypatch.setattr(machine, "BUFFERED", buffered)
    monkeypatch.setattr(memory, "MIN_SLAB_BYTES", size)
    monkeypatch.setenv("STREAMMERGE_PROFILE", "")


def hra(*targets: str, **options: Any) -> HRAConfig:
    targets = targets or ("lin0", "lin1", "few", "one")
    return HRAConfig(**{"r": 4, "target_modules": list(targets), **options})


def rewrite(adapter: Path, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> None:
    """Change names and values of an adapter's tensors."""
    path = adapter / "adapter_model.safetensors"
    tensors = dict(change(name, tensor) for name, tensor in load_file(path).items())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def edit(adapter: Path, **edits: Any) -> None:
    """Change an adapter's configuration."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edits}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_orthogonal", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 7])
def test_linear_layers(rank: int, is_orthogonal: bool, dtype: torch.dtype, mill: Any) -> None:
    mill.check(Mlp, hra(r=rank, apply_GS=is_orthogonal), dtype)


@pytest.mark.parametrize("is_orthogonal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolutions(dtype: torch.dtype, is_orthogonal: bool, mill: Any) -> None:
    mill.check(Convolutions, hra("conv", "few", "point", apply_GS=is_orthogonal), dtype)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_tiles(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Mlp, hra(apply_GS=True), dtype, threads=3)
    mill.check(Wide, hra(), dtype)
    mill.check(Convolutions, hra("conv", "few"), dtype)


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("is_orthogonal", [False, True])
def test_threads_that_share_a_weight(is_orthogonal: bool, mill: Any) -> None:
    # a thread's first product must be that of one thread too
    mill.check(Wider, hra("lin0", apply_GS=is_orthogonal), torch.float32, threads=3)


def test_single_inputs(mill: Any) -> None:
    mill.check(Mlp, hra("narrow", r=1), torch.bfloat16)


def test_one_vector_twice_changes_nothing(mill: Any) -> None:
    # as adapters begin; the reflections do not quite cancel
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, hra("lin1"), change=lambda *_: None)
    merged = mill.export(base, adapter)["lin1.weight"]
    torch.testing.assert_close(merged, load_file(base / "model.safetensors")["lin1.weight"])
    assert torch.equal(merged, mill.peft(Mlp, torch.float32, adapter)["lin1.weight"])


@pytest.mark.parametrize("is_orthogonal", [False, True])
def test_rows_of_m_by_parts(
    is_orthogonal: bool, mill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hra_module, "M_ROWS", 32)
    mill.check(Wide, hra("lin0", apply_GS=is_orthogonal), torch.float32)


@pytest.mark.parametrize("is_orthogonal", [False, True])
def test_more_inputs_than_m_is_made_for(
    is_orthogonal: bool,
    mill: Any,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hra_module, "DENSE_COLUMNS", 95)
    base = mill.base(Wide, torch.float32)
    adapter = mill.adapter(Wide, hra("lin0", apply_GS=is_orthogonal))
    merged = mill.export(base, adapter)["lin0.weight"]
    expected = mill.peft(Wide, torch.float32, adapter)["lin0.weight"]
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, load_file(base / "model.safetensors")["lin0.weight"])
    request.getfixturevalue("tiny_tiles")
    assert torch.equal(mill.export(base, adapter, name="again")["lin0.weight"], merged)


@pytest.mark.parametrize("bias", ["all", "hra_only"])
def test_trained_biases(bias: str, mill: Any) -> None:
    mill.check(Mlp, hra("lin0", "few", bias=bias), torch.bfloat16)


def test_in_turn(mill: Any) -> None:
    configs = [hra(), hra("lin0", r=3, apply_GS=True), hra("one", "lin0", r=1)]
    mill.check_in_turn(Mlp, torch.bfloat16, *configs)


def test_rounded_once(mill: Any) -> None:
    base = mill.base(Mlp, torch.bfloat16)
    adapters = [mill.adapter(Mlp, hra("lin1"), name=name) for name in ("one", "two")]
    merged = mill.export(base, *adapters, numerics="fp32")["lin1.weight"]
    start = load_file(base / "model.safetensors")["lin1.weight"].double()
    for adapter in adapters:
        (vectors,) = load_file(adapter / "adapter_model.safetensors").values()
        for vector in vectors.double().T:
            unit = vector / vector.norm()
            start = start - 2 * torch.outer(start @ unit, unit)
    assert torch.equal(merged, start.to(torch.bfloat16))


def test_what_inspect_says(mill: Any) -> None:
    report = inspect_folder(mill.adapter(Mlp, hra("lin0", apply_GS=True)))
    assert report["ranks"] == [4]
    assert report["variants"] == ["Gram-Schmidt"]
    assert report["modules"][0]["inputs"] == 23


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor[1:], "shape mismatch"),
        (lambda tensor: tensor[:, 1:], "rank of the tensors"),
        (lambda tensor: tensor[:, :0], "no shape of vectors"),
        (lambda tensor: tensor[:, :, None], "no shape of vectors"),
        (lambda tensor: tensor.view(-1), "no shape of vectors"),
    ],
)
def test_damaged_adapters(change: Any, message: str, mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, hra("lin0"))
    rewrite(adapter, lambda name, tensor: (name, change(tensor)))
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter)


def test_another_configuration(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, hra("lin0"))
    edit(adapter, r=8)
    with pytest.raises(AdapterError, match="rank of the tensors"):
        mill.export(base, adapter)
    edit(adapter, r=4, apply_GS="no")
    with pytest.raises(AdapterError, match="bad apply_GS"):
        mill.export(base, adapter)


def test_a_tensor_of_another_kind(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, hra("lin0"))
    rewrite(adapter, lambda name, tensor: (name.replace("hra_u", "boft_R"), tensor))
    with pytest.raises(AdapterError, match="another kind of adapter"):
        mill.export(base, adapter)


def test_a_vector_of_no_length(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, hra("lin0"))
    rewrite(adapter, lambda name, tensor: (name, torch.zeros_like(tensor)))
    with pytest.raises(NonFiniteError):
        mill.export(base, adapter)


@pytest.mark.parametrize(
    "layer", [Conv1D(41, 23), nn.Conv1d(23, 41, 1), nn.Conv3d(23, 41, 1)], ids=str
)
def test_layers_that_peft_has_no_reflection_for(layer: nn.Module, mill: Any) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin0 = layer

    adapter = mill.adapter(Mlp, hra("lin0"))
    edit(adapter, fan_in_fan_out=isinstance(layer, Conv1D))
    with pytest.raises(PlanError, match="for linear layers"):
        mill.export(mill.base(Other, torch.float32), adapter)


def test_no_weighted_sum(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, hra("lin0"))
    with pytest.raises(PlanError, match="adapter_weights"):
        mill.export(base, adapter, adapter_weights=[0.5])
