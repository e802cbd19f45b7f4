"""Where terms round, and which faults of PEFT are done on purpose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from streammerge.adapters.adapter import Adapter
from streammerge.adapters.config import AdapterConfig
from streammerge.adapters.terms import BiasTerm, Factor, LoraTerm, TunerTerm
from streammerge.adapters.tuners import all_tuners
from streammerge.adapters.tuners.base import AdapterModule
from streammerge.adapters.tuners.lora_settings import LoraSettings
from streammerge.checkpoint.header import StoredTensor
from streammerge.dtypes import Dtype
from streammerge.plan.numerics import as_peft_merges

if TYPE_CHECKING:
    import torch

    from streammerge.adapters.terms import Term

ADAPTER = Path("adapters/one")
LAYER = "model.layers.0"


def stored(*shape: int) -> StoredTensor:
    return StoredTensor("x", Dtype.F32, shape, ADAPTER, 0)


PLAIN = LoraTerm(
    Factor(stored(2, 6)), Factor(stored(4, 2)), 1.5, is_transposed=False, rounds_delta=False
)
BIAS = BiasTerm(stored(4), 1.5)


def merged(
    module: str,
    *,
    target: str | None = None,
    term: Term = PLAIN,
    model_type: str = "mixtral",
    targets: tuple[str, ...] = (),
    version: str | None = "0.21.2",
    settings: Any = None,
    reproduces_bugs: bool = False,
) -> Any:
    config = AdapterConfig(
        ADAPTER / "adapter_config.json",
        all_tuners()["LORA"],
        settings or LoraSettings(2, 3),
        target_parameters=targets,
        peft_version=version,
    )
    return as_peft_merges(
        term,
        module=AdapterModule(module, {}, "here"),
        target=target or f"{module}.weight",
        adapter=Adapter(ADAPTER, config, ()),
        config={"model_type": model_type},
        reproduces_bugs=reproduces_bugs,
    )


@pytest.mark.parametrize(
    ("module", "model_type", "rounds"),
    [
        (f"{LAYER}.self_attn.q_proj", "mixtral", False),
        (f"{LAYER}.block_sparse_moe.experts.1.w1", "mixtral", True),
        (f"{LAYER}.block_sparse_moe.experts.1.w2", "mixtral", True),
        (f"{LAYER}.block_sparse_moe.gate", "mixtral", True),
        (f"{LAYER}.mlp.experts.1.down_proj", "qwen3_moe", True),
        # what PEFT leaves as layers, if it does not leave it out
        (f"{LAYER}.mlp.shared_experts.down_proj", "deepseek_v3", False),
        (f"{LAYER}.mlp.gate_proj", "deepseek_v3", False),
        (f"{LAYER}.mlp.shared_expert_gate", "qwen2_moe", False),
        # families of which PEFT does not know that they are fused in memory
        (f"{LAYER}.mlp.experts.1.down_proj", "qwen2_moe", False),
        (f"{LAYER}.mlp.gate", "qwen2_moe", False),
    ],
)
def test_single_experts_are_parameters_to_peft(module: str, model_type: str, rounds: bool) -> None:
    assert merged(module, model_type=model_type).rounds_delta == rounds


def test_only_the_whole_model_s_type_counts() -> None:
    config = {"model_type": "some_vl", "text_config": {"model_type": "qwen3_moe"}}
    settings = LoraSettings(2, 3)
    adapter = Adapter(ADAPTER, AdapterConfig(ADAPTER, all_tuners()["LORA"], settings), ())
    module = AdapterModule(f"{LAYER}.mlp.experts.1.up_proj", {}, "here")
    term = as_peft_merges(
        PLAIN, module=module, target=f"{module.module}.weight", adapter=adapter, config=config,
        reproduces_bugs=True,
    )  # fmt: skip
    assert term is PLAIN


@pytest.mark.parametrize(
    ("target", "rounds"),
    [("q_proj.weight", True), (f"{LAYER}.self_attn.q_proj.weight", True), ("proj.weight", False),
     ("q_proj", False), ("v_proj.weight", False)],
)  # fmt: skip
def test_wrapped_matrices_round_their_delta(target: str, rounds: bool) -> None:
    term = merged(f"{LAYER}.self_attn.q_proj", model_type="llama", targets=(target,))
    assert term.rounds_delta == rounds


@pytest.mark.parametrize(
    ("projection", "rank", "factor"),
    [("w1", 2, 2**0.5), ("w3", 2, 2**0.5), ("w2", 2, 1.0), ("w1", 5, 2**0.5)],
)
@pytest.mark.parametrize("is_fused", [True, False])
def test_rslora_of_fused_halves(projection: str, rank: int, factor: float, is_fused: bool) -> None:
    settings = LoraSettings(rank, 3, use_rslora=True)
    module = f"{LAYER}.block_sparse_moe.experts.1.{projection}"
    a, b = Factor(stored(rank, 6)), Factor(stored(4, rank))
    term = LoraTerm(a, b, settings.scaling_of(module), is_transposed=False, rounds_delta=False)
    target = f"{LAYER}.mlp.experts.gate_up_proj" if is_fused else None
    options: dict[str, Any] = {"term": term, "settings": settings, "target": target}
    assert merged(module, **options).scaling == term.scaling
    wrong = merged(module, **options, reproduces_bugs=True).scaling
    assert wrong == pytest.approx(term.scaling * factor)
    if factor > 1:
        # to the last bit as PEFT has it, of twice the rank and alpha
        assert wrong == 6 / math.sqrt(2 * rank)


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ("block_sparse_moe.experts.1.w1", {"settings": LoraSettings(2, 3)}),
        ("mlp.experts.1.gate_proj", {"model_type": "qwen2_moe"}),
        ("mlp.shared_experts.gate_proj", {"model_type": "deepseek_v3"}),
        ("mlp.gate_proj", {"model_type": "deepseek_v3"}),
        ("self_attn.q_proj", {}),
    ],
)
def test_rslora_is_right_elsewhere(module: str, options: dict[str, Any]) -> None:
    options = {"settings": LoraSettings(2, 3, use_rslora=True)} | options
    assert merged(f"{LAYER}.{module}", **options, reproduces_bugs=True).scaling == PLAIN.scaling


@pytest.mark.parametrize(
    ("version", "reproduces_bugs", "scaling"),
    [("0.15.2", True, 1.0), ("0.15.2", False, 1.5), ("0.16.0", True, 1.5), (None, True, 1.5)],
)
def test_bias_of_old_versions(version: str | None, reproduces_bugs: bool, scaling: float) -> None:
    found = merged(
        f"{LAYER}.self_attn.q_proj", term=BIAS, version=version, reproduces_bugs=reproduces_bugs
    )
    assert found.scaling == scaling


@dataclass(frozen=True, slots=True)
class Other(TunerTerm):
    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        return ()

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        del begin, state
        return rows


def test_other_terms_stay_as_they_are() -> None:
    term = Other()
    module = f"{LAYER}.block_sparse_moe.experts.1.w1"
    assert merged(module, term=term, reproduces_bugs=True) is term
    # a LoRA term of another kind of adapter, which PEFT does not convert
    assert merged(module, settings=object(), reproduces_bugs=True) is PLAIN
