"""OFT against PEFT, and the older series against its formula."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import OFTConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from streammerge.adapters.tuners import rotations
from streammerge.engine.inspect import inspect_folder
from streammerge.errors import AdapterError, PlanError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
VARIANTS: dict[str, dict[str, Any]] = {
    "blocks-of-4": {"oft_block_size": 4},
    "blocks-of-1-or-another": {"oft_block_size": 5},
    "blocks-of-12": {"oft_block_size": 12},
    "three-blocks": {"oft_block_size": 0, "r": 3},
    "one-block": {"oft_block_size": 0, "r": 1},
    "exact": {"oft_block_size": 8, "use_cayley_neumann": False},
    "one-exact-block": {"oft_block_size": 0, "r": 1, "use_cayley_neumann": False},
    "shared": {"oft_block_size": 6, "block_share": True},
    "constrained": {"oft_block_size": 4, "coft": True, "eps": 0.5},
    "constrained-exact": {
        "oft_block_size": 4, "coft": True, "eps": 1e-3, "use_cayley_neumann": False
    },
    "constrained-shared": {"oft_block_size": 8, "coft": True, "eps": 0.1, "block_share": True},
    **{f"terms-{n}": {"oft_block_size": 6, "num_cayley_neumann_terms": n} for n in (2, 3, 4, 7)},
}  # fmt: skip


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(31, 24)
        self.lin0 = nn.Linear(24, 41)
        self.lin1 = nn.Linear(41, 24, bias=False)
        self.few = nn.Linear(48, 5)
        self.one = nn.Linear(24, 1)
        self.prime = nn.Linear(13, 17)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 19, 3)
        self.few = nn.Conv2d(8, 7, 2, bias=False)
        self.point = nn.Conv2d(20, 33, 1)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.even = nn.Linear(1024, 37)
        self.ragged = nn.Linear(840, 300)
        self.few = nn.Linear(960, 3)
        self.many = nn.Linear(800, 300)


def oft(*targets: str, **options: Any) -> OFTConfig:
    targets = targets or ("lin0", "lin1", "few", "one", "prime", "emb")
    return OFTConfig(**{"oft_block_size": 4, "target_modules": list(targets), **options})


def rewrite(adapter: Path, change: Any) -> None:
    """Change names and values of an adapter's tensors."""
    path = adapter / "adapter_model.safetensors"
    save_file(dict(change(name, tensor) for name, tensor in load_file(path).items()), path)


def edit(adapter: Path, **edits: Any) -> None:
    """Change an adapter's configuration; None takes a key away."""
    path = adapter / "adapter_config.json"
    raw = {**json.loads(path.read_text()), **edits}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def move(_: str, parameter: nn.Parameter) -> None:
    parameter.add_(0.2 * torch.randn(parameter.shape).to(parameter.dtype))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant: str, mill: Any) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        mill.check(Mlp, oft(**VARIANTS[variant]), dtype, change=move)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["blocks-of-12", "exact", "constrained"])
def test_linear_layers_and_embeddings(variant: str, dtype: torch.dtype, mill: Any) -> None:
    mill.check(Mlp, oft(**VARIANTS[variant]), dtype, change=move)


def test_a_series_of_one_term(mill: Any) -> None:
    config = oft(num_cayley_neumann_terms=1)
    base, adapter = mill.base(Mlp, torch.half), mill.adapter(Mlp, config, change=move)
    merged, expected = mill.export(base, adapter), mill.peft(Mlp, torch.half, adapter)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["blocks-of-4", "exact", "shared", "constrained"])
def test_convolutions(variant: str, dtype: torch.dtype, mill: Any) -> None:
    mill.check(Convolutions, oft("conv", "few", "point", **VARIANTS[variant]), dtype)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_tiles(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Mlp, oft(oft_block_size=8), dtype, threads=3)
    mill.check(Convolutions, oft("conv", "few", "point"), dtype)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("options", [{}, {"block_share": True}, {"use_cayley_neumann": False}])
@pytest.mark.parametrize("block", [2, 8, 32])
def test_windows_of_wide_layers(block: int, options: dict[str, Any], mill: Any) -> None:
    targets = [name for name in ("even", "ragged", "few") if name != "ragged" or block < 32]
    mill.check(Wide, oft(*targets, oft_block_size=block, **options), torch.float32)


def test_blocks_that_fit_no_window(mill: Any) -> None:
    mill.check(Wide, oft("many", oft_block_size=40), torch.float32)


def test_wider_than_is_multiplied_whole(mill: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotations, "DENSE_COLUMNS", 768)
    base = mill.base(Wide, torch.float32)
    for block in (20, 160, 800):
        adapter = mill.adapter(Wide, oft("many", oft_block_size=block))
        merged, expected = mill.export(base, adapter), mill.peft(Wide, torch.float32, adapter)
        torch.testing.assert_close(merged["many.weight"], expected["many.weight"])
        whole = mill.export(base, adapter, max_memory="2GB", name="again")
        assert torch.equal(whole["many.weight"], merged["many.weight"])


@pytest.mark.parametrize("bias", ["all", "oft_only"])
def test_trained_biases(bias: str, mill: Any) -> None:
    mill.check(Mlp, oft("lin0", "few", bias=bias), torch.bfloat16)


def test_in_turn(mill: Any) -> None:
    configs = [oft(), oft("emb", "lin0", oft_block_size=6), oft("lin0", block_share=True)]
    mill.check_in_turn(Mlp, torch.bfloat16, *configs)


def test_language_model(workshop: Any, same_bits: Any) -> None:
    base = workshop.base("llama", torch.bfloat16)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, oft("q_proj", "v_proj", "down_proj", oft_block_size=16))
    for name, parameter in model.named_parameters():
        if "oft_R" in name:
            parameter.data.normal_(0, 0.1)
    adapter = workshop.folder / "adapter"
    model.save_pretrained(adapter)
    expected, _ = workshop.peft(base, adapter)
    same_bits(workshop.export(base, adapter), expected)


def test_rounded_once(mill: Any) -> None:
    base = mill.base(Mlp, torch.bfloat16)
    adapter = mill.adapter(Mlp, oft("lin0", use_cayley_neumann=False))
    merged = mill.export(base, adapter, numerics="fp32")["lin0.weight"]
    exact = mill.peft(Mlp, torch.float32, adapter)["lin0.weight"]
    assert merged.dtype == torch.bfloat16
    # the base of the one is the rounded base of the other
    torch.testing.assert_close(merged.float(), exact, rtol=0.02, atol=0.005)


@pytest.mark.parametrize("version", ["0.17.1", "0.16.0.dev0", None])
@pytest.mark.parametrize("terms", [3, 5])
def test_series_of_an_older_peft(version: str | None, terms: int, mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, oft("lin0", oft_block_size=8, num_cayley_neumann_terms=terms))
    edit(adapter, peft_version=version)
    merged = mill.export(base, adapter)["lin0.weight"].double()
    vectors = next(iter(load_file(adapter / "adapter_model.safetensors").values())).double()
    rows, columns = torch.triu_indices(8, 8, 1)
    skew = torch.zeros(3, 8, 8, dtype=torch.float64)
    skew[:, rows, columns] = vectors
    skew = skew - skew.mT
    blocks = 2 * sum(torch.linalg.matrix_power(skew, power) for power in range(1, terms))
    matrix = torch.block_diag(*(torch.eye(8, dtype=torch.float64) + blocks))
    expected = load_file(base / "model.safetensors")["lin0.weight"].double() @ matrix.T
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)
    # PEFT takes the series of today for it
    theirs = mill.peft(Mlp, torch.float32, adapter)["lin0.weight"]
    assert not torch.allclose(merged, theirs.double(), atol=1e-5)
    reproduced = mill.export(base, adapter, peft_bugs="reproduce", name="reproduced")
    assert torch.equal(reproduced["lin0.weight"], theirs)
    # the exact rotation never changed
    edit(adapter, use_cayley_neumann=False)
    exact = mill.export(base, adapter, name="exact")["lin0.weight"]
    assert torch.equal(exact, mill.peft(Mlp, torch.float32, adapter)["lin0.weight"])


def test_what_inspect_says(mill: Any) -> None:
    report = inspect_folder(mill.adapter(Mlp, oft("lin0", "emb", oft_block_size=6)))
    assert report["modules"][0]["block_size"] == 6
    assert [module["blocks"] for module in report["modules"]] == [4, 4]
    assert report["variants"] == []
    options = {"block_share": True, "coft": True, "use_cayley_neumann": False}
    report = inspect_folder(mill.adapter(Mlp, oft("lin0", **options)))
    assert report["variants"] == ["COFT", "block_share", "exact Cayley"]


@pytest.mark.parametrize("name", ["oft_r", "oft_s"])
def test_older_layouts(name: str, mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, oft("lin0"))
    rewrite(adapter, lambda key, tensor: (key.replace("oft_R.weight", name), tensor))
    with pytest.raises(AdapterError, match=r"PEFT 0\.15 or older"):
        mill.export(base, adapter)


def test_configuration_of_the_first_oft(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, oft("lin0"))
    edit(adapter, oft_block_size=None)
    with pytest.raises(AdapterError, match=r"PEFT 0\.13 or older"):
        mill.export(base, adapter)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((6, 5), "no shape of rotations"),
        ((6,), "no shape of rotations"),
        ((0, 6), "no shape of rotations"),
        ((5, 6), "shape mismatch"),
        ((7, 6), "shape mismatch"),
        ((1, 6), "shape mismatch"),
        ((3, 10), "shape mismatch"),
        ((8, 3), "block size of the tensors"),
    ],
)
def test_tensors_that_do_not_fit(shape: tuple[int, ...], message: str, mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, oft("lin0"))
    rewrite(adapter, lambda key, _: (key, torch.zeros(shape)))
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"block_share": True}, "block_share and its tensors"),
        ({"oft_block_size": 8}, "block size of the tensors"),
        ({"oft_block_size": 0, "r": 4}, "block size of the tensors"),
        ({"coft": True, "eps": 0}, "bad eps"),
        ({"num_cayley_neumann_terms": 0}, "bad num_cayley_neumann_terms"),
        ({"use_cayley_neumann": "yes"}, "bad use_cayley_neumann"),
    ],
)
def test_configurations_that_do_not_fit(edits: dict[str, Any], message: str, mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, oft("lin0"))
    edit(adapter, **edits)
    with pytest.raises((AdapterError, PlanError), match=message):
        mill.export(base, adapter)


def test_layers_that_peft_has_no_rotation_for(mill: Any) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin0 = Conv1D(41, 24)

    adapter = mill.adapter(Mlp, oft("lin0"))
    edit(adapter, fan_in_fan_out=True)
    with pytest.raises(PlanError, match="for linear layers"):
        mill.export(mill.base(Turned, torch.float32), adapter)


def test_no_weighted_sum(mill: Any) -> None:
    base = mill.base(Mlp, torch.float32)
    adapter = mill.adapter(Mlp, oft("lin0"))
    with pytest.raises(PlanError, match="adapter_weights"):
        mill.export(base, adapter, adapter_weights=[0.5])
