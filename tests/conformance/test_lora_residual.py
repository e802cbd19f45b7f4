"""Adapters that start from a decomposed base (PiSSA, OLoRA, KaSA), against PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import KasaConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from streammerge.errors import AdapterError, PlanError

pytestmark = pytest.mark.filterwarnings("ignore")

# PEFT decomposes no wider ones; but KaSA does, as F32
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
KINDS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "kasa": {"kasa_config": KasaConfig()},
}
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"lin0": 3}, "alpha_pattern": {"lin1": 7}, "use_rslora": True,
}  # fmt: skip
BOTH = {"target_modules": ["lin0", "lin1"], "r": 5, "lora_alpha": 3}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # large enough for LAPACK to divide its work among threads
        self.lin0 = nn.Linear(90, 70)
        self.lin1 = nn.Linear(53, 81, bias=False)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = Conv1D(37, 53)
        self.lin1 = Conv1D(30, 30)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_decomposed_again(kind: str, dtype: torch.dtype, mill: Any) -> None:
    mill.check(Mlp, LoraConfig(**BOTH, **KINDS[kind]), dtype)
    mill.check(Mlp, LoraConfig(**BOTH, **PATTERNS, **KINDS[kind]), dtype, threads=3)


def test_kasa_decomposes_a_wide_base_in_f32(mill: Any) -> None:
    mill.check(Mlp, LoraConfig(**BOTH, **KINDS["kasa"]), torch.float64)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("kind", KINDS)
def test_in_tiles_of_four_rows(kind: str, mill: Any) -> None:
    mill.check(Mlp, LoraConfig(**BOTH, **KINDS[kind]), torch.bfloat16, threads=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposed_weights(dtype: torch.dtype, mill: Any) -> None:
    mill.check(Transposed, LoraConfig(**BOTH, **KINDS["pissa"]), dtype)
    # PEFT decomposes these as they are stored, which fits where both sides are equal
    square = {**BOTH, "target_modules": ["lin1"]}
    mill.check(Transposed, LoraConfig(**square, **KINDS["olora"]), dtype)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_with_dora(kind: str, mill: Any) -> None:
    for build in (Mlp, Transposed) if kind == "pissa" else (Mlp,):
        config = LoraConfig(**BOTH, **KINDS[kind], use_dora=True)
        mill.check(build, config, torch.bfloat16)


def test_embeddings_keep_their_base(mill: Any) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(53, 18)

    config = LoraConfig(target_modules=["table"], init_lora_weights="pissa", lora_alpha=3)
    mill.check(Table, config, torch.bfloat16)


def test_in_turn(mill: Any) -> None:
    pissa, olora, kasa = (LoraConfig(**BOTH, **KINDS[kind]) for kind in KINDS)
    for configs in ((pissa, olora), (olora, LoraConfig(**BOTH), pissa), (kasa, pissa)):
        mill.check_in_turn(Mlp, torch.bfloat16, *configs)


def test_rounds_once_with_one_rounding(mill: Any) -> None:
    base = mill.base(Mlp, torch.bfloat16)
    adapter = mill.adapter(Mlp, LoraConfig(**BOTH, **KINDS["pissa"]), dtype=torch.bfloat16)
    merged = mill.export(base, adapter, numerics="fp32")
    weight = mill.model(Mlp, torch.bfloat16).lin1.weight.double()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.lin1.lora_{letter}.weight"].double() for letter in "AB")
    expected = weight - (u[:, :5] * s[:5]) @ vh[:5] + 3 / 5 * (b @ a)
    wrong = merged["lin1.weight"] != expected.to(torch.bfloat16)
    # where the sum lies within the noise of a decomposition in F32 of the middle between two values
    assert wrong.float().mean() < 0.003


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_is_residual_already_is_not_decomposed(
    kind: str, mill: Any, edit_config: Any, same_bits: Any
) -> None:
    model: Any = mill.model(Mlp, torch.bfloat16)
    config = LoraConfig(**BOTH, **KINDS[kind])
    adapter = mill.adapter(Mlp, config, dtype=torch.bfloat16)
    original = mill.export(mill.base(Mlp, torch.bfloat16), adapter)
    # what training saves beside the adapter
    residual = PeftModel.from_pretrained(model, adapter).unload().state_dict()
    folder = mill.folder / "residual"
    folder.mkdir()
    save_file({name: t.contiguous() for name, t in residual.items()}, folder / "model.safetensors")
    same_bits(mill.export(folder, adapter, base_is_residual=True), original)
    # what cannot be found again needs no finding then
    edit_config(adapter, init_lora_weights="pissa_niter_4")
    same_bits(mill.export(folder, adapter, base_is_residual=True), original)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_was_converted_is_a_plain_one(
    kind: str, mill: Any, same_bits: Any, *, rslora: bool
) -> None:
    config = LoraConfig(**BOTH, **KINDS[kind], use_rslora=rslora)
    model: Any = get_peft_model(mill.model(Mlp, torch.bfloat16), config)
    start, path = mill.folder / "start", mill.folder / "converted"
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(start)
    model.peft_config["default"].init_lora_weights = kind
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path, path_initial_model_for_weight_conversion=start)
    base = mill.base(Mlp, torch.bfloat16)
    same_bits(mill.export(base, path), mill.peft(Mlp, torch.bfloat16, path))


# heads, which the adapter's file holds a copy of


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 27).view(2, 12)).logits.float()


def test_the_copy_of_a_head_is_residual_already(workshop: Any, same_bits: Any) -> None:
    base = workshop.base("llama", torch.bfloat16)
    options: dict[str, Any] = {"target_modules": ["lm_head", "q_proj"]}
    for saves in (True, False):
        adapter = workshop.adapter(
            base, save={"save_embedding_layers": saves}, **options, **KINDS["pissa"]
        )
        held = load_file(adapter / "adapter_model.safetensors")
        assert ("base_model.model.lm_head.base_layer.weight" in held) == saves
        expected, theirs = workshop.peft(base, adapter)
        same_bits(workshop.export(base, adapter), expected)
        assert torch.equal(workshop.merged_logits(), theirs)


def test_the_copy_of_a_tied_head_is_that_of_the_embedding(workshop: Any) -> None:
    base = workshop.base("llama-tied", torch.float32)
    options: dict[str, Any] = {"target_modules": ["lm_head", "q_proj"], **KINDS["olora"]}
    adapter = workshop.adapter(base, **options)
    workshop.export(base, adapter)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    wanted = logits(PeftModel.from_pretrained(model, adapter))
    torch.testing.assert_close(workshop.merged_logits(), wanted, atol=2e-6, rtol=0)


def test_a_tied_head_without_a_copy_is_refused(workshop: Any, same_bits: Any) -> None:
    base = workshop.base("llama-tied", torch.bfloat16)
    adapter = workshop.adapter(
        base,
        save={"save_embedding_layers": False},
        target_modules=["lm_head", "q_proj"],
        **KINDS["pissa"],
    )
    with pytest.raises(PlanError, match=r"a head that is tied .*save_embedding_layers=True"):
        workshop.export(base, adapter)
    expected, _ = workshop.peft(base, adapter)
    same_bits(workshop.export(base, adapter, peft_bugs="reproduce"), expected)


# refusals


@pytest.mark.parametrize(
    ("init", "match"),
    [
        ("pissa_niter_4", "its randomised SVD gives another base each time"),
        ("loftq", "its base was quantized and corrected in turns"),
        ("corda", "its base was decomposed with the covariance of training data"),
        ("lora_ga", "its base was changed by gradients of training data"),
    ],
)
def test_a_base_that_cannot_be_found_again_is_refused(
    init: str, match: str, mill: Any, edit_config: Any
) -> None:
    base = mill.base(Mlp, torch.bfloat16)
    adapter = mill.adapter(Mlp, LoraConfig(**BOTH), dtype=torch.bfloat16)
    edit_config(adapter, init_lora_weights=init)
    with pytest.raises(AdapterError, match=match) as caught:
        mill.export(base, adapter)
    for way_out in ("path_initial_model_for_weight_conversion", "base_is_residual: true"):
        assert way_out in str(caught.value)


def test_layers_that_peft_does_not_decompose_are_refused(mill: Any, edit_config: Any) -> None:
    base = mill.base(Transposed, torch.bfloat16)
    adapter = mill.adapter(Transposed, LoraConfig(**BOTH), dtype=torch.bfloat16)
    edit_config(adapter, init_lora_weights="olora")
    with pytest.raises(AdapterError, match=r"cannot be decomposed .* got a Conv1D of \(53, 37\)"):
        mill.export(base, adapter)

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin0 = nn.Linear(5, 24)

    base = mill.base(Narrow, torch.bfloat16)
    config = LoraConfig(target_modules=["lin0"], r=4, kasa_config=KasaConfig())
    adapter = mill.adapter(Narrow, config, dtype=torch.bfloat16)
    tensors = load_file(adapter / "adapter_model.safetensors")
    wider = {
        name: torch.cat([tensor, tensor[:, :1] if "lora_B" in name else tensor[:1]],
                        dim=1 if "lora_B" in name else 0)
        for name, tensor in tensors.items()
    }  # fmt: skip
    save_file(wider, adapter / "adapter_model.safetensors")
    edit_config(adapter, r=5)
    with pytest.raises(AdapterError, match=r"cannot be decomposed .* rank 5"):
        mill.export(base, adapter)


def test_kasa_on_top_of_another_start_is_refused(mill: Any, edit_config: Any) -> None:
    base = mill.base(Mlp, torch.bfloat16)
    config = LoraConfig(**BOTH, **KINDS["kasa"])
    adapter = mill.adapter(Mlp, config, dtype=torch.bfloat16)
    edit_config(adapter, init_lora_weights="pissa")
    with pytest.raises(AdapterError, match="a base that was changed twice"):
        mill.export(base, adapter)


def test_a_weighted_sum_is_refused(mill: Any) -> None:
    base = mill.base(Mlp, torch.bfloat16)
    adapter = mill.adapter(Mlp, LoraConfig(**BOTH, **KINDS["olora"]), dtype=torch.bfloat16)
    with pytest.raises(PlanError, match="its result is not a sum"):
        mill.export(base, adapter, adapter_weights=[0.5])
