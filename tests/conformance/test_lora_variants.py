"""LoRA's variants on linear layers, against PEFT."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from streammerge.errors import AdapterError, PlanError

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
BOTH = ["lin0", "lin1"]


class Mlp(nn.Module):
    """Sides that are no multiples of anything; one layer without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(24, 43)
        self.lin1 = nn.Linear(43, 24, bias=False)


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(24, 40)
        self.lin1 = nn.Linear(40, 24)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = Conv1D(43, 24)
        self.lin1 = Conv1D(24, 43)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"lin0": 3},
        "alpha_pattern": {"^lin1": 5, "lin0": 0.5},
        "use_rslora": True,
    },
    "dora": {"use_dora": True},
    "dora-patterns": {
        "use_dora": True,
        "rank_pattern": {"lin1": 1},
        "alpha_pattern": {"lin0": 3},
        "use_rslora": True,
    },
    "velora": {"velora_config": VeloraConfig()},
    "monteclora": {"monteclora_config": MontecloraConfig(num_samples=3)},
    "monteclora-patterns": {
        "monteclora_config": MontecloraConfig(),
        "rank_pattern": {"lin0": 2},
        "use_rslora": True,
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("build", [Mlp, Transposed])
def test_variants(build: Any, options: str, dtype: torch.dtype, mill: Any) -> None:
    mill.check(build, LoraConfig(target_modules=BOTH, lora_alpha=12, **OPTIONS[options]), dtype)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("options", ["plain", "dora", "monteclora"])
@pytest.mark.parametrize("build", [Mlp, Transposed])
def test_variants_in_tiles_of_four_rows(build: Any, options: str, mill: Any) -> None:
    config = LoraConfig(target_modules=BOTH, lora_alpha=12, **OPTIONS[options])
    mill.check(build, config, torch.bfloat16, threads=3)


# MiCA starts from a decomposition, which PEFT has in no wider dtype
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("build", [Mlp, Transposed])
def test_mica_rounds_its_delta(build: Any, dtype: torch.dtype, mill: Any) -> None:
    config = LoraConfig(target_modules=BOTH, init_lora_weights="mica", lora_alpha=12)
    mill.check(build, config, dtype)
    config = LoraConfig(
        target_modules=BOTH,
        init_lora_weights="mica",
        rank_pattern={"lin0": 3},
        alpha_pattern={"lin1": 2},
        use_rslora=True,
    )
    mill.check(build, config, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("in_a", "in_b"), [(["lin0"], ["lin1"]), (["1"], []), (None, ["lin"])], ids=str
)
def test_block_diagonal(in_a: Any, in_b: Any, dtype: torch.dtype, mill: Any) -> None:
    blocks = BdLoraConfig(
        target_modules_bd_a=in_a, target_modules_bd_b=in_b, nblocks=4, match_strict=False
    )
    config = LoraConfig(target_modules=BOTH, r=8, use_bdlora=blocks, rank_pattern={"lin1": 4})
    mill.check(Biased, config, dtype)
    config = LoraConfig(target_modules=BOTH, r=8, use_bdlora=blocks, use_rslora=True, lora_alpha=3)
    mill.check(Biased, config, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("build", [Biased, Transposed])
def test_bias_of_b(build: Any, dtype: torch.dtype, mill: Any) -> None:
    config = LoraConfig(target_modules=BOTH, lora_bias=True, lora_alpha=3, use_rslora=True)
    merged = mill.check(build, config, dtype)
    before = mill.model(build, dtype).state_dict()
    assert not torch.equal(merged["lin0.bias"], before["lin0.bias"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("build", [Mlp, Transposed])
def test_dora_in_turn(build: Any, dtype: torch.dtype, mill: Any) -> None:
    # the second one's norms are those of what the first one left
    dora = LoraConfig(target_modules=BOTH, use_dora=True)
    plain = LoraConfig(target_modules=["lin1"], r=3)
    mill.check_in_turn(build, dtype, dora, dora, plain)
    mill.check_in_turn(build, dtype, plain, dora)


def test_what_megatron_needs_changes_nothing(mill: Any) -> None:
    base = mill.base(Mlp, torch.bfloat16)
    adapter = mill.adapter(Mlp, LoraConfig(target_modules=BOTH), dtype=torch.bfloat16)
    expected = mill.export(base, adapter)
    _edit(adapter, megatron_config={"hidden_size": 24}, megatron_core="megatron.core")
    merged = mill.export(base, adapter)
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooled_inputs_follow_the_formula(dtype: torch.dtype, mill: Any) -> None:
    # PEFT applies QA-LoRA to quantized layers only, and refuses to merge it
    base = mill.base(Mlp, dtype)
    adapter = mill.adapter(Mlp, LoraConfig(target_modules=["lin0"], r=3, lora_alpha=4), dtype=dtype)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.lin0.lora_{}.weight"
    tensors[key.format("A")] = tensors[key.format("A")][:, ::6].contiguous()
    save_file(tensors, path)
    _edit(adapter, use_qalora=True, qalora_group_size=6, use_rslora=True)
    merged = mill.export(base, adapter)
    layer = mill.model(Mlp, dtype).lin0
    inputs = torch.eye(24, dtype=torch.float64)
    pooled = inputs.view(24, 4, 6).mean(dim=2) * 4
    a, b = (tensors[key.format(letter)].double() for letter in "AB")
    scaling = 4 / 3**0.5
    delta = (pooled @ a.T @ b.T * scaling).T
    expected = layer.weight.double() + delta
    # one rounding to the base's dtype, and in the compute dtype those of the gain, of a product of
    # three terms, of the scaling and of the sum
    unit = 2.0**-53 if dtype is torch.float64 else 2.0**-24
    bound = torch.finfo(dtype).eps / 2 * expected.abs() if dtype.itemsize < 4 else 0.0
    bound = bound + 8 * unit * (scaling * (b.abs() @ (pooled @ a.T).abs().T) + expected.abs())
    assert ((merged["lin0.weight"].double() - expected).abs() <= bound).all()
    assert not torch.equal(merged["lin0.weight"], layer.weight)


# refusals


def _edit(adapter: Any, **options: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def _drop(adapter: Any, ending: str) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(ending)}
    assert kept.keys() != tensors.keys()
    save_file(kept, path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA .* use it unmerged"),
        ({"arrow_config": {"top_k": 2}}, "Arrow router .* use it unmerged"),
        ({"use_dora": True, "velora_config": {"num_groups": 4}}, "got DoRA and VeLoRA"),
        ({"use_bdlora": {"nblocks": 2}, "init_lora_weights": "mica"}, "got BD-LoRA and MiCA"),
        ({"use_qalora": True, "qalora_group_size": 1}, "bad qalora_group_size"),
        ({"use_newlora": True}, "option that this version does not know.*use_newlora"),
    ],
)
def test_options_without_a_formula_are_refused(
    options: dict[str, Any], match: str, mill: Any
) -> None:
    base = mill.base(Mlp, torch.bfloat16)
    adapter = mill.adapter(Mlp, LoraConfig(target_modules=BOTH), dtype=torch.bfloat16)
    _edit(adapter, **options)
    with pytest.raises(AdapterError, match=match):
        mill.export(base, adapter)


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"use_dora": True}, "lin0.lora_magnitude_vector"),
        ({"kasa_config": KasaConfig()}, "lin0.lora_diag"),
        ({}, "lin0.lora_B.weight"),
    ],
)
def test_a_missing_tensor_is_refused(options: dict[str, Any], missing: str, mill: Any) -> None:
    base = mill.base(Mlp, torch.bfloat16)
    adapter = mill.adapter(Mlp, LoraConfig(target_modules=BOTH, **options), dtype=torch.bfloat16)
    _drop(adapter, missing)
    with pytest.raises(AdapterError, match="lin0"):
        mill.export(base, adapter)


def test_a_tensor_without_its_option_is_refused(mill: Any) -> None:
    base = mill.base(Mlp, torch.bfloat16)
    dora = LoraConfig(target_modules=BOTH, use_dora=True)
    adapter = mill.adapter(Mlp, dora, dtype=torch.bfloat16)
    _edit(adapter, use_dora=False)
    with pytest.raises(AdapterError, match="use_dora and its tensors disagree"):
        mill.export(base, adapter)
    kasa = LoraConfig(target_modules=BOTH, kasa_config=KasaConfig())
    adapter = mill.adapter(Mlp, kasa, dtype=torch.bfloat16)
    _edit(adapter, kasa_config=None)
    with pytest.raises(PlanError, match=r"not used, the first is '.*lora_diag'"):
        mill.export(base, adapter)


def test_dora_with_a_bias_of_b_is_refused(mill: Any) -> None:
    # PEFT has no such adapter: the bias would have to be scaled as the rows are
    base = mill.base(Biased, torch.bfloat16)
    adapter = mill.adapter(Biased, LoraConfig(target_modules=BOTH, lora_bias=True))
    _edit(adapter, use_dora=True)
    path = adapter / "adapter_model.safetensors"
    key = "base_model.model.lin{}.lora_magnitude_vector"
    norms = {key.format(number): torch.ones(width) for number, width in enumerate((40, 24))}
    save_file({**load_file(path), **norms}, path)
    with pytest.raises(AdapterError, match="there is no DoRA with lora_bias"):
        mill.export(base, adapter)


def test_blocks_that_do_not_divide_are_refused(mill: Any) -> None:
    base = mill.base(Biased, torch.bfloat16)
    blocks = BdLoraConfig(target_modules_bd_a=["lin0"], target_modules_bd_b=["lin1"], nblocks=4)
    config = LoraConfig(target_modules=BOTH, r=8, use_bdlora=blocks)
    adapter = mill.adapter(Biased, config, dtype=torch.bfloat16)
    in_b = {"nblocks": 4, "target_modules_bd_a": ["lin0"], "target_modules_bd_b": ["lin"]}
    for options, match in (
        ({**in_b, "nblocks": 3}, "cannot be cut into blocks"),
        (in_b, "got both"),
        ({**in_b, "nblocks": 2, "target_modules_bd_b": ["lin1"]}, "shape mismatch|rank of the two"),
    ):
        _edit(adapter, use_bdlora=options)
        with pytest.raises((AdapterError, PlanError), match=match):
            mill.export(base, adapter)


def test_another_base_is_refused(mill: Any) -> None:
    class Wider(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin0 = nn.Linear(25, 43)
            self.lin1 = nn.Linear(43, 24, bias=False)

    for options in ({}, {"use_dora": True}, {"kasa_config": KasaConfig()}):
        adapter = mill.adapter(Mlp, LoraConfig(target_modules=BOTH, **options))
        with pytest.raises(PlanError, match="shape mismatch: another base"):
            mill.export(mill.base(Wider, torch.bfloat16), adapter)
    adapter = mill.adapter(Biased, LoraConfig(target_modules=["lin1"], lora_bias=True))
    # one whose shapes are the same, but for the bias

    class Unbiased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin1 = nn.Linear(40, 24, bias=False)

    with pytest.raises(PlanError, match="trained with lora_bias, but the base layer has no such"):
        mill.export(mill.base(Unbiased, torch.bfloat16), adapter)
