"""HiRA against PEFT."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import HiraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from streammerge.adapters.adapter import open_adapter
from streammerge.errors import AdapterError, PlanError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(31, 23)
        self.lin0 = nn.Linear(23, 41)
        self.lin1 = nn.Linear(41, 23, bias=False)


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = Conv1D(41, 23)
        self.lin1 = Conv1D(23, 41)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(5, 9, 3)
        self.point1d = nn.Conv1d(5, 9, 1)
        self.conv2d = nn.Conv2d(7, 13, (3, 2))
        self.point2d = nn.Conv2d(7, 13, 1)
        self.conv3d = nn.Conv3d(3, 11, 2)
        self.single = nn.Conv1d(1, 9, 3)
        self.many = nn.Conv2d(18, 5, (1, 3))


def hira(*targets: str, **options: Any) -> HiraConfig:
    return HiraConfig(**{"r": 5, "target_modules": list(targets or ["lin0", "lin1"]), **options})


def edit(adapter: Path, **edits: Any) -> None:
    """Change an adapter's configuration."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edits}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 5, 30])
def test_linear_layers_and_embeddings(dtype: torch.dtype, rank: int, mill: Any) -> None:
    mill.check(Mlp, hira("lin0", "lin1", "emb", r=rank), dtype)
    mill.check(Turned, hira(r=rank, fan_in_fan_out=True), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_convolutions(dtype: torch.dtype, mill: Any) -> None:
    names = ["conv1d", "point1d", "conv2d", "point2d", "conv3d", "single", "many"]
    mill.check(Convolutions, hira(*names), dtype)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_tiles(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Mlp, hira("lin0", "lin1", "emb"), dtype, threads=3)
    mill.check(Turned, hira(fan_in_fan_out=True), dtype)
    mill.check(Convolutions, hira("conv1d", "conv2d", "conv3d"), dtype)


def test_points_of_three_dimensions_that_peft_cannot_merge(mill: Any) -> None:
    class Points(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.point3d = nn.Conv3d(4, 10, 1)

    base = mill.base(Points, torch.float32)
    adapter = mill.adapter(Points, hira("point3d"))
    with pytest.raises(RuntimeError, match="size"):
        mill.peft(Points, torch.float32, adapter)
    weight = load_file(base / "model.safetensors")["point3d.weight"].flatten(1)
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.point3d.hira_{end}"].flatten(1) for end in "AB")
    merged = mill.export(base, adapter)["point3d.weight"].flatten(1)
    torch.testing.assert_close(merged, weight + weight * (b @ a), rtol=1e-6, atol=1e-7)


def test_zeros_of_either_sign(mill: Any, same_bits: Any) -> None:
    class Zeros(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.lin0.weight.data[::2] = -0.0
            self.lin0.weight.data[1::4] = 0.0

    def shrink(name: str, parameter: nn.Parameter) -> None:
        # the product becomes zero in half precision, with the sign it had
        parameter.copy_(torch.randn(parameter.shape) * (1e-12 if "hira_B" in name else 1.0))

    base = mill.base(Zeros, torch.float16)
    adapter = mill.adapter(Zeros, hira("lin0", "lin1"), change=shrink)
    same_bits(mill.export(base, adapter), mill.peft(Zeros, torch.float16, adapter))


def test_rank_pattern(mill: Any) -> None:
    # PEFT makes an adapter of the one rank, whatever the pattern says
    mill.check(Mlp, hira("lin0", "lin1", "emb", rank_pattern={"lin1": 3, "emb": 2}), torch.half)
    # and cannot load one that has the other
    base = mill.base(Mlp, torch.half)
    adapter = mill.adapter(Mlp, hira("lin1", r=3))
    expected = mill.peft(Mlp, torch.half, adapter)
    edit(adapter, r=5, rank_pattern={"lin1": 3})
    assert torch.equal(mill.export(base, adapter)["lin1.weight"], expected["lin1.weight"])


def test_in_turn(mill: Any) -> None:
    mill.check_in_turn(Mlp, torch.bfloat16, hira(), hira("emb", "lin0"), hira(r=1))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_models(family: str, workshop: Any, same_bits: Any) -> None:
    base = workshop.base(family, torch.bfloat16, tie_word_embeddings=False)
    targets = ["q_proj", "down_proj", "embed_tokens", "lm_head"]
    targets = ["c_attn", "c_fc", "wte"] if family == "gpt2" else targets
    config = hira(*targets, init_weights=False, fan_in_fan_out=family == "gpt2")
    adapter = workshop.folder / "adapter"
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(adapter)
    expected, _ = workshop.peft(base, adapter)
    same_bits(workshop.export(base, adapter, export_size="50KB"), expected)


def test_no_weighted_sum(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, hira())
    with pytest.raises(PlanError, match="adapter_weights"):
        mill.export(base, adapter, adapter_weights=[0.5])


@pytest.mark.parametrize(
    ("end", "change", "message"),
    [
        ("hira_A", None, "no hira_A"),
        ("hira_embedding_B", None, "no hira_embedding_B"),
        ("hira_A", lambda tensor: tensor[1:], "do not belong together"),
        ("hira_A", lambda tensor: tensor[:, 1:], "shape mismatch"),
        ("hira_B", lambda tensor: tensor[1:], "shape mismatch"),
        ("hira_A", lambda tensor: tensor[:, :, None], "do not belong together"),
    ],
)
def test_damaged_adapters(end: str, change: Any, message: str, mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, hira("lin0", "emb"))
    mill.rewrite(adapter, end, change)
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter)


def test_factors_of_two_kinds_of_layer(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, hira("emb", "lin0"))
    path = adapter / "adapter_model.safetensors"
    tensors = {n.replace(".lin0.hira_A", ".emb.hira_A"): t for n, t in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(AdapterError, match="embedding and of a layer"):
        mill.export(base, adapter)


def test_another_configuration(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, hira())
    edit(adapter, r=4)
    with pytest.raises(AdapterError, match="rank"):
        mill.export(base, adapter)


def test_description(mill: Any) -> None:
    adapter = open_adapter(mill.adapter(Mlp, hira()))
    (module,) = [module for module in adapter.modules if module.module == "lin0"]
    assert adapter.config.tuner.describe(module, adapter.config.settings) == {
        "rank": 5,
        "shape": [41, 23],
        "dtype": "F32",
    }
