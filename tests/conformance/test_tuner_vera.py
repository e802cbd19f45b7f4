"""VeRA and PVeRA against PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PveraConfig, VeraConfig
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from streammerge.adapters.adapter import open_adapter
from streammerge.errors import AdapterError, PlanError

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
KINDS = [VeraConfig, PveraConfig]
TARGETS = ["lin0", "lin1", "conv0", "conv1"]


class Net(nn.Module):
    """The largest N and the largest K are those of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(23, 41)
        self.lin1 = nn.Linear(57, 19, bias=False)
        self.conv0 = Conv1D(37, 29)
        self.conv1 = Conv1D(3, 31)


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv1D(24, 24)


class Wider(nn.Module):
    """Another base, whose only other size is one that no vector has."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(23, 41)
        self.lin1 = nn.Linear(58, 19, bias=False)
        self.conv0 = Conv1D(37, 29)
        self.conv1 = Conv1D(3, 31)


def config(kind: Any, **options: Any) -> Any:
    return kind(**{"r": 6, "target_modules": TARGETS, **options})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_linear_and_conv1d(kind: Any, dtype: torch.dtype, mill: Any, tiny_tiles: None) -> None:
    mill.check(Net, config(kind), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_projections_drawn_again(kind: Any, dtype: torch.dtype, mill: Any) -> None:
    mill.check(Net, config(kind, save_projection=False, projection_prng_key=12345), dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_options(kind: Any, mill: Any) -> None:
    mill.check(Net, config(kind, r=1, target_modules=["lin1"]), torch.bfloat16)
    mill.check(Net, config(kind, r=70, d_initial=0.3, bias="all"), torch.bfloat16)
    only = "vera_only" if kind is VeraConfig else "pvera_only"
    mill.check(Net, config(kind, bias=only, projection_prng_key=-7), torch.float16)
    saved = {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "save_projection": False}
    mill.check(Net, config(kind, **saved), torch.bfloat16)
    mill.check(Square, config(kind, target_modules=["conv"]), torch.bfloat16)


def test_the_mean_is_merged_whatever_is_sampled(mill: Any) -> None:
    mill.check(Net, config(PveraConfig, sample_at_inference=True, generator_seed=3), torch.bfloat16)


def test_two_adapters_in_turn(mill: Any) -> None:
    mill.check_in_turn(
        Net,
        torch.bfloat16,
        config(VeraConfig),
        config(PveraConfig, target_modules=["lin0", "conv0"], save_projection=False),
        config(VeraConfig, r=3, target_modules=["lin0"], save_projection=False),
    )


def test_layers_of_several_dtypes(mill: Any) -> None:
    def mixed(*dtypes: torch.dtype) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            net = Net()
            for layer, dtype in zip(net.children(), dtypes, strict=True):
                layer.to(dtype)
            # the fixture's own conversion does nothing
            net.to = lambda _: net  # type: ignore[assignment,method-assign]
            return net

        return build

    half, wide = torch.bfloat16, torch.float32
    mill.check(mixed(wide, half, wide, half), config(VeraConfig, save_projection=False), wide)
    both = mixed(half, torch.float16, wide, half)
    mill.check(both, config(VeraConfig), wide)
    base = mill.base(both, wide)
    adapter = mill.adapter(both, config(VeraConfig, save_projection=False), dtype=wide)
    with pytest.raises(PlanError, match="order of layers in F16 and in BF16"):
        mill.export(base, adapter)


def test_fp32_keeps_the_projections_that_were_trained_with(mill: Any) -> None:
    options = {"target_modules": ["lin0"], "projection_prng_key": 5}
    base = mill.base(Net, torch.bfloat16)
    saved = mill.adapter(Net, config(VeraConfig, **options), dtype=torch.bfloat16, name="ab")
    drawn = mill.adapter(
        Net, config(VeraConfig, **options, save_projection=False), dtype=torch.bfloat16, name="ba"
    )
    merged = [
        mill.export(base, path, numerics="fp32", infer_dtype="float32") for path in (saved, drawn)
    ]
    assert torch.equal(merged[0]["lin0.weight"], merged[1]["lin0.weight"])


def test_weighted_sum(mill: Any) -> None:
    base = mill.base(Net, torch.float64)
    one = mill.adapter(Net, config(VeraConfig), name="one")
    two = mill.adapter(Net, config(PveraConfig, r=4), name="two")
    merged = mill.export(base, one, two, adapter_weights=[0.7, -0.3])
    plain = load_file(base / "model.safetensors")
    for name, turn in (("lin0", False), ("conv0", True)):
        total = plain[f"{name}.weight"].clone()
        rows, columns = total.shape[::-1] if turn else total.shape
        for path, prefix, rank, weight in ((one, "vera", 6, 0.7), (two, "pvera", 4, -0.3)):
            tensors = {
                key.removeprefix("base_model."): tensor.double()
                for key, tensor in load_file(path / "adapter_model.safetensors").items()
            }
            outer = tensors[f"model.{name}.{prefix}_lambda_b"][:, None]
            inner = tensors[f"model.{name}.{prefix}_lambda_d"][:rank, None]
            a, b = tensors[f"{prefix}_A"][:rank, :columns], tensors[f"{prefix}_B"][:rows]
            delta = (outer * b) @ (inner * a)
            total += weight * (delta.T if turn else delta)
        torch.testing.assert_close(merged[f"{name}.weight"], total, rtol=0, atol=1e-13)


def test_stored_projections_are_used_whatever_the_configuration_says(
    mill: Any, same_bits: Any, edit_config: Any
) -> None:
    base = mill.base(Net, torch.bfloat16)
    adapter = mill.adapter(Net, config(VeraConfig), dtype=torch.bfloat16)
    merged = mill.export(base, adapter)
    edit_config(adapter, save_projection=False, projection_prng_key=99)
    same_bits(mill.export(base, adapter), merged)


@pytest.mark.parametrize("kind", KINDS)
def test_another_base(kind: Any, mill: Any) -> None:
    adapter = mill.adapter(Net, config(kind))
    with pytest.raises(AdapterError, match="another base"):
        mill.export(mill.base(Wider, torch.float32), adapter)
    small = mill.adapter(Net, config(kind, target_modules=["lin0"]), name="small")
    mill.rewrite(small, "lambda_b", lambda tensor: tensor[:-1])
    with pytest.raises(PlanError, match="another base"):
        mill.export(mill.base(Net, torch.float32), small)
    assert not (mill.folder / "merged").exists()


def test_damaged_adapters(mill: Any, edit_config: Any) -> None:
    base = mill.base(Net, torch.float32)
    adapter = mill.adapter(Net, config(VeraConfig))
    mill.rewrite(adapter, "vera_B", None)
    with pytest.raises(AdapterError, match="adapter has no vera_B"):
        mill.export(base, adapter)
    mill.rewrite(adapter, "vera_A", None)
    with pytest.raises(AdapterError, match="adapter has no vera_A"):
        mill.export(base, adapter)
    edit_config(adapter, r=7)
    with pytest.raises(AdapterError, match="rank of the tensors"):
        open_adapter(adapter)
    edit_config(adapter, r=6, projection_prng_key="zero")
    with pytest.raises(AdapterError, match="bad projection_prng_key"):
        open_adapter(adapter)
    edit_config(adapter, projection_prng_key=0)
    mill.rewrite(adapter, "lin0.vera_lambda_d", lambda tensor: tensor[None])
    with pytest.raises(AdapterError, match="no vector of the right length"):
        open_adapter(adapter)
    mill.rewrite(adapter, "lin0.vera_lambda_d", None)
    with pytest.raises(AdapterError, match="module has no vera_lambda_d"):
        open_adapter(adapter)


def test_description(mill: Any) -> None:
    adapter = open_adapter(mill.adapter(Net, config(PveraConfig, target_modules=["lin0"])))
    (module,) = adapter.modules
    described = adapter.config.tuner.describe(module, adapter.config.settings)
    assert described == {"rank": 6, "out_features": 41, "dtype": "F32"}
