"""What happens to every tensor: the ledger, shapes, ties, vocabulary, dtypes."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from streammerge.adapters.adapter import Adapter, Replacement, RowReplacement
from streammerge.adapters.combine import CombinedTerm, Combining
from streammerge.adapters.config import AdapterConfig
from streammerge.adapters.terms import Factor
from streammerge.adapters.tuners import all_tuners
from streammerge.adapters.tuners.base import AdapterModule, Layer, PlannedTerm, Shared
from streammerge.adapters.tuners.lora import BlockDiagonal, Lora, LoraSettings
from streammerge.adapters.tuners.lora_base import ResidualTerm
from streammerge.adapters.tuners.trainable_tokens import RowsTerm
from streammerge.checkpoint.header import StoredTensor
from streammerge.checkpoint.index import Checkpoint, Shard
from streammerge.dtypes import Dtype
from streammerge.errors import AdapterError, ConfigError, PlanError
from streammerge.plan.build import PlanOptions, TensorPlans, plan_tensors
from streammerge.plan.layout import lay_out
from streammerge.plan.ops import ApplyTerms, BiasTerm, CopyBytes, LoraTerm, TensorPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

BASE, ADAPTER = Path("models/llama"), Path("adapters/one")
VOCAB, DIM, RANK = 8, 4, 2
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q = "model.layers.0.self_attn.q_proj"
NORM = "model.norm.weight"
TIED: dict[str, Any] = {"tie_word_embeddings": True, "vocab_size": VOCAB}
UNTIED: dict[str, Any] = {"tie_word_embeddings": False, "vocab_size": VOCAB}
Shapes = dict[str, tuple[int, ...]]
TIED_SHAPES: Shapes = {EMBED: (VOCAB, DIM), f"{Q}.weight": (DIM, DIM), NORM: (DIM,)}
UNTIED_SHAPES: Shapes = {**TIED_SHAPES, HEAD: (VOCAB, DIM)}


def stored(
    name: str, shape: tuple[int, ...], dtype: Dtype = Dtype.BF16, path: Path = BASE
) -> StoredTensor:
    return StoredTensor(name, dtype, shape, path, 0)


def checkpoint(
    shapes: Shapes | None = None,
    config: dict[str, Any] | None = None,
    *,
    dtypes: dict[str, Dtype] | None = None,
    path: Path = BASE,
) -> Checkpoint:
    shapes = UNTIED_SHAPES if shapes is None else shapes
    tensors = {
        name: stored(name, shape, (dtypes or {}).get(name, Dtype.BF16))
        for name, shape in shapes.items()
    }
    return Checkpoint(
        path,
        "safetensors",
        (Shard(path, tuple(tensors.values())),),
        UNTIED if config is None else config,
        tensors,
    )


def trained(name: str, *shape: int) -> StoredTensor:
    return stored(name, shape, Dtype.F32, ADAPTER)


def vector(name: str) -> StoredTensor:
    return trained(name, DIM)


def module(
    name: str = Q,
    shape: tuple[int, int] = (DIM, DIM),
    *,
    end: str = "lora_",
    **more: StoredTensor,
) -> AdapterModule:
    """A LoRA, with `magnitude` and `bias` if they are given."""
    rows, columns = shape
    tensors = {
        f"{end}A": stored(f"{name}.{end}A", (RANK, columns), Dtype.F32, ADAPTER),
        f"{end}B": stored(f"{name}.{end}B", (rows, RANK), Dtype.F32, ADAPTER),
    }
    names = {"magnitude": "lora_magnitude_vector", "bias": "lora_B.bias"}
    tensors |= {names.get(key, key): tensor for key, tensor in more.items()}
    return AdapterModule(name, tensors, f"module '{name}' of {ADAPTER}")


def embedding(
    name: str = "model.embed_tokens", rows: int = VOCAB, **more: StoredTensor
) -> AdapterModule:
    return module(name, (DIM, rows), end="lora_embedding_", **more)


def head(rows: int = VOCAB) -> AdapterModule:
    return module("lm_head", (rows, DIM))


def whole(
    path: str,
    shape: tuple[int, ...] = (VOCAB, DIM),
    dtype: Dtype = Dtype.BF16,
    *,
    is_copy: bool = False,
) -> Replacement:
    return Replacement(path, stored(f"saved.{path}", shape, dtype, ADAPTER), is_copy)


def token_rows(
    *indices: int, name: str = "model.embed_tokens", columns: int = DIM
) -> RowReplacement:
    tensor = stored(f"{name}.rows", (len(indices), columns), Dtype.F32, ADAPTER)
    return RowReplacement(name, tensor, indices)


Part = AdapterModule | Replacement | RowReplacement
SETTINGS, CONFIG = ({field.name for field in fields(of)} for of in (LoraSettings, AdapterConfig))


def adapter(
    *parts: Part,
    path: Path = ADAPTER,
    twins: tuple[str, ...] = (),
    extra_keys: tuple[str, ...] = (),
    shared: dict[str, StoredTensor] | None = None,
    tuner: Lora | None = None,
    **options: Any,
) -> Adapter:
    """A LoRA adapter whose scaling is 2, unless options say otherwise."""
    modules = tuple(part for part in parts if isinstance(part, AdapterModule))
    wholes = tuple(part for part in parts if isinstance(part, Replacement))
    rows = tuple(part for part in parts if isinstance(part, RowReplacement))
    tensors = [part.tensor for part in (*wholes, *rows)]
    for part in modules:
        tensors.extend(part.tensors.values())
    keys = [tensor.name for tensor in (*tensors, *(shared or {}).values())]
    settings = LoraSettings(
        **{
            "rank": RANK,
            "lora_alpha": 4,
            **{key: value for key, value in options.items() if key in SETTINGS},
        }
    )
    config = AdapterConfig(
        path / "adapter_config.json",
        tuner or all_tuners()["LORA"],
        settings,
        **{
            "task_type": "CAUSAL_LM",
            "base_model": "somewhere/llama",
            **{key: value for key, value in options.items() if key in CONFIG},
        },
    )
    return Adapter(
        path, config, modules, wholes, rows, shared or {}, twins, (*keys, *twins, *extra_keys)
    )


def plan(
    base: Checkpoint,
    *adapters: Adapter,
    same: bool | None = None,
    renames: dict[str, str] | None = None,
    **options: Any,
) -> TensorPlans:
    def same_bytes(left: StoredTensor, right: StoredTensor) -> bool:
        assert same is not None, "asked for bytes without need"
        return same

    return plan_tensors(
        base, adapters, options=PlanOptions(**options), same_bytes=same_bytes, renames=renames
    )


def by_name(plans: TensorPlans) -> dict[str, TensorPlan]:
    return {tensor.name: tensor for tensor in plans.tensors}


def changes(plans: TensorPlans) -> dict[str, str]:
    return {tensor.name: tensor.change for tensor in plans.tensors if tensor.change != "copied"}


def factors(tensor: TensorPlan) -> list[str]:
    return [factor.name for term in tensor.terms for factor in term.factors]


def lora_terms(plans: TensorPlans, name: str) -> list[LoraTerm]:
    return [term for term in by_name(plans)[name].terms if isinstance(term, LoraTerm)]


# plain merges and the ledger


def test_no_adapter_copies_everything_in_order() -> None:
    base = checkpoint()
    plans = plan(base)
    assert [t.name for t in plans.tensors] == list(base.tensors)
    for tensor in plans.tensors:
        source = base.tensors[tensor.name]
        assert tensor == TensorPlan(tensor.name, Dtype.BF16, source, CopyBytes(), "copied")
    assert plans == TensorPlans(plans.tensors, {}, None, 0, {}, ())


def lora_term(
    part: AdapterModule, scaling: float = 2.0, *, end: str = "lora_", **options: Any
) -> LoraTerm:
    """The term that a module becomes."""
    a, b = (Factor(part.tensors[f"{end}{letter}"]) for letter in "AB")
    return LoraTerm(a, b, scaling, **{"is_transposed": False, "rounds_delta": False, **options})


def test_a_module_becomes_one_term() -> None:
    part = module()
    plans = plan(checkpoint(), adapter(part, lora_alpha=1))
    assert by_name(plans)[f"{Q}.weight"].op == ApplyTerms(Dtype.BF16, (lora_term(part, 0.5),))
    assert changes(plans) == {f"{Q}.weight": "merged"}
    assert plans.adapter_tensors_used == 2
    assert plans.matches == {"exact": 1}
    assert plans.config_edits == {}
    assert plans.notes == ()


def test_an_embedding_term_is_transposed_and_rounds() -> None:
    part = embedding()
    plans = plan(checkpoint(), adapter(part))
    expected = lora_term(part, end="lora_embedding_", is_transposed=True, rounds_delta=True)
    assert by_name(plans)[EMBED].terms == (expected,)


def test_magnitude_goes_with_its_term() -> None:
    part = module(magnitude=vector("m"))
    plans = plan(checkpoint(), adapter(part, use_dora=True))
    assert factors(by_name(plans)[f"{Q}.weight"]) == [f"{Q}.lora_A", f"{Q}.lora_B", "m"]
    assert plans.adapter_tensors_used == 3


def test_matches_are_counted_by_kind() -> None:
    shapes = {
        "model.layers.0.q.weight": (DIM, DIM),
        "model.layers.1.q.weight": (DIM, DIM),
        "model.lm.layers.2.q.weight": (DIM, DIM),
        "renamed.weight": (DIM, DIM),
    }
    one = adapter(
        *(
            module(name)
            for name in ("model.layers.0.q", "layers.1.q", "lm.model.layers.2.q", "other.name")
        )
    )
    plans = plan(checkpoint(shapes), one, renames={"other.name.weight": "renamed.weight"})
    assert plans.matches == {"exact": 1, "prefix": 1, "suffix": 1, "renamed": 1}
    assert set(changes(plans)) == set(shapes)


def test_one_unknown_key_is_an_error_with_the_nearest_names() -> None:
    with pytest.raises(PlanError) as caught:
        plan(checkpoint(), adapter(module("model.layers.7.self_attn.q_proj")))
    error = caught.value
    assert error.what == (
        "an adapter tensor has no base tensor, the first is "
        "'model.layers.7.self_attn.q_proj.lora_A'"
    )
    assert error.where == str(ADAPTER)
    assert error.expected == f"'model.layers.7.self_attn.q_proj.weight' in {BASE}"
    assert error.got == f"nearest: {Q}.weight"
    assert "'somewhere/llama'" in str(error.hint)


def test_unknown_keys_are_counted() -> None:
    parts = [module(f"model.layers.{n}.self_attn.q_proj") for n in (1, 2, 3)]
    with pytest.raises(PlanError, match=r"^4 adapter tensors have no base tensor, the first is 's"):
        plan(checkpoint(), adapter(*parts, whole("extra.weight")))


def test_two_modules_for_one_tensor_are_an_error() -> None:
    with pytest.raises(PlanError) as caught:
        plan(checkpoint(), adapter(module(), module(Q.removeprefix("model."))))
    assert caught.value.what == "two modules of the adapter mean the same base tensor"
    assert caught.value.got == f"{Q}.weight"


def test_two_replacements_for_one_tensor_are_an_error() -> None:
    with pytest.raises(PlanError, match="mean the same base tensor"):
        plan(checkpoint(), adapter(whole(EMBED), whole("embed_tokens.weight")))


def test_a_key_that_nothing_uses_is_an_error() -> None:
    with pytest.raises(PlanError, match=r"^2 adapter tensors were not used, the first is 'stray'"):
        plan(checkpoint(), adapter(module(), extra_keys=("stray", "other")))


def test_twins_count_as_used() -> None:
    plans = plan(checkpoint(), adapter(whole(EMBED), twins=("twin",)))
    assert plans.adapter_tensors_used == 2


def test_shape_mismatch_names_both_shapes() -> None:
    with pytest.raises(PlanError) as caught:
        plan(checkpoint(), adapter(module(shape=(DIM, 6))))
    error = caught.value
    assert error.what == "shape mismatch: another base?"
    assert error.expected == f"a change of '{Q}.weight' (4, 4)"
    assert error.got == "(4, 6) from lora_A (2, 6) and lora_B (4, 2)"
    assert error.where == f"module '{Q}' of {ADAPTER}"


def test_a_resized_vocabulary_without_its_rows_is_explained() -> None:
    for part in (embedding(rows=10), head(rows=10)):
        with pytest.raises(PlanError) as caught:
            plan(checkpoint(), adapter(part))
        assert "save_embedding_layers=True" in str(caught.value.hint)
    with pytest.raises(PlanError) as caught:
        plan(checkpoint(), adapter(module(shape=(DIM, 10))))
    assert caught.value.hint == "give the base that the adapter was trained on"


@pytest.mark.parametrize("shape", [(3, DIM, DIM), (DIM,), (DIM, 2, 3)])
def test_a_delta_does_not_fit_another_number_of_dimensions(shape: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="shape mismatch"):
        plan(checkpoint({f"{Q}.weight": shape}), adapter(module()))


@pytest.mark.parametrize("dtype", [Dtype.I8, Dtype.U8, Dtype.I32, Dtype.F8_E4M3, Dtype.F4])
def test_codes_take_no_delta(dtype: Dtype) -> None:
    base = checkpoint(dtypes={f"{Q}.weight": dtype})
    with pytest.raises(PlanError) as caught:
        plan(base, adapter(module()))
    assert caught.value.what.startswith("adapter targets a quantized tensor")
    assert caught.value.got == dtype.value


def test_replacement_of_another_shape_is_an_error() -> None:
    with pytest.raises(PlanError) as caught:
        plan(checkpoint(), adapter(whole(NORM, (DIM + 1,))))
    assert caught.value.expected == f"(4,) as '{NORM}'"
    assert caught.value.got == "(5,)"
    with pytest.raises(PlanError, match="shape mismatch"):
        plan(checkpoint(), adapter(whole(EMBED, (VOCAB, DIM + 1)), whole(HEAD)))


def test_replacement_is_copied_in_the_dtype_of_the_base_and_cast_otherwise() -> None:
    plans = by_name(plan(checkpoint(), adapter(whole(NORM, (DIM,)), whole(HEAD, dtype=Dtype.F32))))
    assert plans[NORM].op == CopyBytes()
    assert plans[HEAD].op == ApplyTerms(Dtype.BF16, ())
    assert [plans[name].change for name in (NORM, HEAD)] == ["replaced", "replaced"]
    assert plans[HEAD].dtype is Dtype.BF16
    assert plans[HEAD].source.path == ADAPTER


def test_integer_replacement_of_a_float_is_an_error() -> None:
    with pytest.raises(PlanError) as caught:
        plan(checkpoint(), adapter(whole(NORM, (DIM,), Dtype.I64)))
    assert (caught.value.expected, caught.value.got) == ("BF16", "I64")


def test_integer_replacement_of_an_integer_is_copied() -> None:
    base = checkpoint(dtypes={NORM: Dtype.I64})
    plans = by_name(plan(base, adapter(whole(NORM, (DIM,), Dtype.I64))))
    assert plans[NORM].op == CopyBytes()


# biases


def test_lora_bias_is_a_term_on_the_bias() -> None:
    of_b = vector("bias of B")
    base = checkpoint({**UNTIED_SHAPES, f"{Q}.bias": (DIM,)})
    plans = plan(base, adapter(module(bias=of_b)))
    assert by_name(plans)[f"{Q}.bias"].op == ApplyTerms(Dtype.BF16, (BiasTerm(of_b, 2.0),))
    assert changes(plans) == {f"{Q}.weight": "merged", f"{Q}.bias": "merged"}
    assert plans.adapter_tensors_used == 3


@pytest.mark.parametrize(("shape", "got"), [(None, "none"), ((DIM + 1,), "(5,)")])
def test_lora_bias_needs_a_bias_of_its_shape(shape: tuple[int, ...] | None, got: str) -> None:
    of_b = vector("bias of B")
    extra: Shapes = {} if shape is None else {f"{Q}.bias": shape}
    with pytest.raises(PlanError) as caught:
        plan(checkpoint({**UNTIED_SHAPES, **extra}), adapter(module(bias=of_b)))
    assert "lora_bias" in str(caught.value.hint)
    found = f"a change of '{Q}.bias' {shape}" if shape else "a bias"
    assert caught.value.expected == found
    assert caught.value.got == got


def test_lora_bias_on_codes_is_refused() -> None:
    of_b = vector("bias of B")
    base = checkpoint({**UNTIED_SHAPES, f"{Q}.bias": (DIM,)}, dtypes={f"{Q}.bias": Dtype.I32})
    with pytest.raises(PlanError, match="quantized tensor"):
        plan(base, adapter(module(bias=of_b)))


# Conv1D and DoRA


def test_conv1d_of_the_config_is_transposed() -> None:
    base = checkpoint({"h.0.c_attn.weight": (6, DIM)}, {"model_type": "gpt2"})
    plans = plan(base, adapter(module("h.0.c_attn", (DIM, 6))))
    (term,) = by_name(plans)["h.0.c_attn.weight"].terms
    assert isinstance(term, LoraTerm)
    assert term.is_transposed
    assert not term.rounds_delta


@pytest.mark.parametrize(("config", "shape"), [({}, (6, DIM)), ({"model_type": "llama"}, (DIM, 6))])
def test_fan_in_fan_out_counts_only_without_a_config(
    config: dict[str, Any], shape: tuple[int, int]
) -> None:
    base = checkpoint({"h.0.c_attn.weight": shape, "h.0.c_attn.bias": (DIM,)}, config)
    plans = plan(base, adapter(module("h.0.c_attn", (DIM, 6)), fan_in_fan_out=True))
    (term,) = by_name(plans)["h.0.c_attn.weight"].terms
    assert isinstance(term, LoraTerm)
    assert term.is_transposed is (not config)


@pytest.mark.parametrize(
    ("shape", "bias", "said", "is_transposed"),
    [
        # the bias, which is as long as there are outputs, says more than the adapter
        ((6, DIM), (DIM,), False, True),
        ((6, DIM), (6,), True, False),
        # of a square weight it says nothing
        ((DIM, DIM), (DIM,), True, True),
        ((DIM, DIM), (DIM,), False, False),
        # a Conv1D always has one
        ((DIM, DIM), None, True, False),
    ],
)
def test_without_a_config_the_bias_tells_a_conv1d(
    shape: tuple[int, int], bias: tuple[int, ...] | None, said: bool, is_transposed: bool
) -> None:
    shapes: Shapes = {"fc.weight": shape, **({"fc.bias": bias} if bias else {})}
    part = module("fc", shape[::-1] if is_transposed else shape)
    plans = plan(checkpoint(shapes, {}), adapter(part, fan_in_fan_out=said))
    (term,) = lora_terms(plans, "fc.weight")
    assert term.is_transposed is is_transposed


def test_a_convolution_is_never_a_conv1d() -> None:
    tensors = {"lora_A": trained("a", RANK, 3, 5), "lora_B": trained("b", DIM, RANK, 1)}
    part = AdapterModule("conv", tensors, "conv")
    base = checkpoint({"conv.weight": (DIM, 3, 5)}, {})
    (term,) = lora_terms(plan(base, adapter(part, fan_in_fan_out=True)), "conv.weight")
    assert not term.is_transposed


def test_dora_on_transposed_weights_has_to_look_at_them_first() -> None:
    plans = plan(checkpoint(), adapter(embedding(magnitude=vector("m")), use_dora=True))
    base = checkpoint({"h.0.c_attn.weight": (DIM, DIM)}, {"model_type": "gpt2"})
    conv = plan(base, adapter(module("h.0.c_attn", magnitude=vector("m")), use_dora=True))
    for tensor in (by_name(plans)[EMBED], by_name(conv)["h.0.c_attn.weight"]):
        (term,) = tensor.terms
        assert isinstance(term, LoraTerm)
        assert term.needs_scan


# heads


def test_a_listed_head_is_added_at_the_end_in_the_main_dtype() -> None:
    score = whole("score.weight", (3, DIM), Dtype.F32)
    plans = plan(checkpoint(), adapter(score, modules_to_save=("score",), task_type="SEQ_CLS"))
    assert plans.tensors[-1] == TensorPlan(
        "score.weight", Dtype.BF16, score.tensor, ApplyTerms(Dtype.BF16, ()), "added"
    )
    assert plans.matches == {"exact": 1}
    assert plans.notes == ()


def test_a_nested_module_of_a_listed_head_is_added() -> None:
    part = whole("classifier.inner.dense.weight", (3,))
    plans = plan(checkpoint(), adapter(part, modules_to_save=("classifier",)))
    assert changes(plans) == {"classifier.inner.dense.weight": "added"}
    assert plans.tensors[-1].op == CopyBytes()


def test_a_layer_of_a_listed_head_never_replaces_a_tensor_of_the_base() -> None:
    part = whole("classifier.norm.weight", (DIM,))
    plans = plan(checkpoint(), adapter(part, modules_to_save=("classifier",)))
    assert changes(plans) == {"classifier.norm.weight": "added"}


@pytest.mark.parametrize(
    ("path", "listed"),
    [
        ("score.weight", ()),
        ("score.weight", ("classifier",)),
        ("other.score.weight", ("score",)),
    ],
)
def test_a_head_that_is_not_listed_or_not_new_is_an_error(
    path: str, listed: tuple[str, ...]
) -> None:
    with pytest.raises(PlanError, match="has no base tensor"):
        plan(checkpoint(), adapter(whole(path, (3, DIM)), modules_to_save=listed))


def test_a_new_module_may_stand_inside_a_part_of_the_base() -> None:
    part = whole("model.pooler.dense.weight", (DIM, DIM))
    plans = plan(checkpoint(), adapter(part, modules_to_save=("pooler",)))
    assert changes(plans) == {"model.pooler.dense.weight": "added"}


def test_a_second_head_is_never_added_beside_one_of_another_name() -> None:
    shapes = {EMBED: (8, DIM), "embed_out.weight": (8, DIM)}
    base = checkpoint(shapes, {"model_type": "gpt_neox", "tie_word_embeddings": False})
    with pytest.raises(PlanError, match="has no base tensor"):
        plan(base, adapter(whole("lm_head.weight", (8, DIM)), modules_to_save=("lm_head",)))


@pytest.mark.parametrize(
    ("config", "is_refused"),
    [
        ({"is_encoder_decoder": True, "vocab_size": 8}, True),
        ({"is_encoder_decoder": True}, True),
        ({"model_type": "biogpt", "vocab_size": 8, "architectures": ["BioGptForCausalLM"]}, True),
        ({"architectures": ["BertForMaskedLM"], "model_type": "modernbert", "vocab_size": 8}, True),
        ({"architectures": ["LlamaForCausalLM"], "vocab_size": 8}, False),
        ({"architectures": ["BertForSequenceClassification"], "vocab_size": 8}, False),
    ],
)
def test_a_vocabulary_that_may_be_shared_unknown_to_us_is_not_changed(
    config: dict[str, Any], *, is_refused: bool
) -> None:
    base = checkpoint({EMBED: (VOCAB, DIM), f"{Q}.weight": (DIM, DIM)}, config)
    change = adapter(embedding())
    if is_refused:
        with pytest.raises(PlanError, match="may share"):
            plan(base, change)
        plan(base, adapter(module()))
    else:
        plan(base, change)


def test_a_base_copy_is_never_a_new_head() -> None:
    part = whole("score.weight", (3, DIM), is_copy=True)
    with pytest.raises(PlanError, match="has no base tensor"):
        plan(checkpoint(), adapter(part, modules_to_save=("score",)))


def test_an_integer_tensor_of_a_new_head_keeps_its_bytes() -> None:
    part = whole("score.num_batches_tracked", (), Dtype.I64)
    plans = plan(checkpoint(), adapter(part, modules_to_save=("score",)))
    assert plans.tensors[-1].op == CopyBytes()
    assert plans.tensors[-1].dtype is Dtype.I64


def test_a_second_adapter_finds_the_head_that_the_first_added() -> None:
    first = adapter(whole("score.weight", (DIM, DIM)), modules_to_save=("score",))
    second = adapter(module("score"), path=Path("adapters/two"))
    plans = plan(checkpoint(), first, second)
    tensor = by_name(plans)["score.weight"]
    assert tensor.change == "added"
    assert len(tensor.terms) == 1
    assert tensor.source.path == ADAPTER


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_a_classifier_without_a_head_is_noted(task: str) -> None:
    assert plan(checkpoint(), adapter(module(), task_type=task)).notes == (
        (
            f"{ADAPTER} is a {task} adapter without a head: the merged model has whatever head the "
            "base has"
        ),
    )


# tied embeddings


def tie_case(
    *parts: Part, same: bool | None = None, **options: Any
) -> tuple[TensorPlans, dict[str, TensorPlan]]:
    base = checkpoint(TIED_SHAPES, TIED)
    plans = plan(base, adapter(*parts, **options), same=same)
    return plans, by_name(plans)


NO_TIE = {"tie_word_embeddings": False}


def test_layers_alone_keep_the_tie() -> None:
    plans, tensors = tie_case(module())
    assert HEAD not in tensors
    assert plans.config_edits == {}


def test_delta_on_the_embedding_keeps_the_old_head() -> None:
    plans, tensors = tie_case(embedding())
    assert changes(plans) == {EMBED: "merged", HEAD: "added"}
    assert tensors[HEAD].op == CopyBytes()
    assert tensors[HEAD].source.name == EMBED
    assert plans.tensors[-1].name == HEAD
    assert plans.config_edits == NO_TIE


def test_delta_on_the_head_keeps_the_old_embedding() -> None:
    plans, tensors = tie_case(head())
    assert changes(plans) == {HEAD: "added"}
    assert tensors[HEAD].source.name == EMBED
    assert factors(tensors[HEAD]) == ["lm_head.lora_A", "lm_head.lora_B"]
    assert tensors[EMBED].op == CopyBytes()
    assert plans.config_edits == NO_TIE


def test_deltas_on_both_stay_apart() -> None:
    plans, tensors = tie_case(embedding(), head())
    assert factors(tensors[HEAD]) == ["lm_head.lora_A", "lm_head.lora_B"]
    assert len(tensors[EMBED].terms) == 1
    assert plans.config_edits == NO_TIE
    assert plans.adapter_tensors_used == 4


def test_tied_training_takes_the_delta_once() -> None:
    plans, tensors = tie_case(embedding(), head(), ensure_weight_tying=True)
    assert HEAD not in tensors
    assert len(tensors[EMBED].terms) == 1
    assert plans.config_edits == {}
    assert plans.adapter_tensors_used == 4


@pytest.mark.parametrize("part", [embedding(), head()])
def test_tied_training_of_one_end_still_splits(part: AdapterModule) -> None:
    plans, tensors = tie_case(part, ensure_weight_tying=True)
    assert HEAD in tensors
    assert plans.config_edits == NO_TIE


def test_replaced_embedding_keeps_the_old_head() -> None:
    plans, tensors = tie_case(whole(EMBED))
    assert changes(plans) == {EMBED: "replaced", HEAD: "added"}
    assert tensors[HEAD].source == stored(EMBED, (VOCAB, DIM))
    assert plans.config_edits == NO_TIE


def test_replaced_head_keeps_the_old_embedding() -> None:
    plans, tensors = tie_case(whole(HEAD))
    assert changes(plans) == {HEAD: "added"}
    assert tensors[HEAD].source.path == ADAPTER
    assert plans.config_edits == NO_TIE


def test_equal_replacements_stay_tied() -> None:
    plans, tensors = tie_case(whole(EMBED), whole(HEAD), same=True)
    assert changes(plans) == {EMBED: "replaced"}
    assert HEAD not in tensors
    assert plans.config_edits == {}
    assert plans.adapter_tensors_used == 2


def test_different_replacements_are_both_kept() -> None:
    plans, tensors = tie_case(whole(EMBED), whole(HEAD), same=False)
    assert changes(plans) == {EMBED: "replaced", HEAD: "added"}
    assert tensors[HEAD].source.name == f"saved.{HEAD}"
    assert tensors[EMBED].source.name == f"saved.{EMBED}"
    assert plans.config_edits == NO_TIE


def test_saved_embedding_and_a_delta_on_the_head() -> None:
    plans, tensors = tie_case(whole(EMBED), head())
    assert tensors[EMBED].source.path == ADAPTER
    assert tensors[EMBED].terms == ()
    assert tensors[HEAD].source.path == BASE
    assert len(tensors[HEAD].terms) == 1
    assert plans.config_edits == NO_TIE


def test_saved_head_and_a_delta_on_the_embedding() -> None:
    plans, tensors = tie_case(whole(HEAD), embedding())
    assert tensors[HEAD].source.path == ADAPTER
    assert tensors[HEAD].terms == ()
    assert tensors[EMBED].source.path == BASE
    assert len(tensors[EMBED].terms) == 1
    assert plans.config_edits == NO_TIE


@pytest.mark.parametrize("rows", [VOCAB, 10])
def test_base_copy_of_the_embedding_is_where_both_ends_start(rows: int) -> None:
    copy = whole(EMBED, (rows, DIM), is_copy=True)
    plans, tensors = tie_case(copy, embedding(rows=rows))
    assert tensors[EMBED].source == tensors[HEAD].source == copy.tensor
    assert len(tensors[EMBED].terms) == 1
    assert tensors[HEAD].terms == ()
    assert plans.config_edits["tie_word_embeddings"] is False
    assert plans.vocabulary_rows == (None if rows == VOCAB else rows)


@pytest.mark.parametrize("rows", [VOCAB, 10])
def test_base_copy_of_the_head_is_where_both_ends_start(rows: int) -> None:
    copy = whole(HEAD, (rows, DIM), is_copy=True)
    plans, tensors = tie_case(copy, head(rows))
    assert tensors[EMBED].source == tensors[HEAD].source == copy.tensor
    assert tensors[EMBED].terms == ()
    assert len(tensors[HEAD].terms) == 1
    assert plans.config_edits["tie_word_embeddings"] is False


def test_base_copy_of_the_head_without_a_delta_keeps_the_tie() -> None:
    copy = whole(HEAD, is_copy=True)
    plans, tensors = tie_case(copy)
    assert tensors[EMBED].source == copy.tensor
    assert HEAD not in tensors
    assert plans.config_edits == {}


def test_equal_base_copies_and_two_deltas() -> None:
    parts = (whole(EMBED, (10, DIM), is_copy=True), whole(HEAD, (10, DIM), is_copy=True))
    plans, tensors = tie_case(*parts, embedding(rows=10), head(10), same=True)
    assert len(tensors[EMBED].terms) == len(tensors[HEAD].terms) == 1
    assert tensors[EMBED].shape == tensors[HEAD].shape == (10, DIM)
    assert plans.config_edits == {"vocab_size": 10, "tie_word_embeddings": False}
    assert plans.adapter_tensors_used == 6


def test_tied_training_starts_from_the_base_copy() -> None:
    copy = whole(EMBED, (10, DIM), is_copy=True)
    plans, tensors = tie_case(copy, embedding(rows=10), head(10), ensure_weight_tying=True)
    assert HEAD not in tensors
    assert tensors[EMBED].source == copy.tensor
    assert len(tensors[EMBED].terms) == 1
    assert plans.config_edits == {"vocab_size": 10}


def test_resized_embedding_alone_resizes_the_tied_head() -> None:
    plans, tensors = tie_case(whole(EMBED, (10, DIM)))
    assert HEAD not in tensors
    assert plans.vocabulary_rows == 10
    assert plans.config_edits == {"vocab_size": 10}


def test_a_second_adapter_works_on_the_head_of_its_own() -> None:
    base = checkpoint(TIED_SHAPES, TIED)
    plans = plan(base, adapter(head()), adapter(head(), path=Path("adapters/two")))
    assert len(by_name(plans)[HEAD].terms) == 2
    assert plans.config_edits == NO_TIE


def test_a_tied_base_that_stores_both_ends_is_untied_by_a_change() -> None:
    base = checkpoint(UNTIED_SHAPES, TIED)
    assert plan(base, adapter(module())).config_edits == {}
    assert plan(base, adapter(head())).config_edits == NO_TIE
    assert plan(base, adapter(whole(EMBED))).config_edits == NO_TIE


def test_a_declared_untied_base_needs_no_edit() -> None:
    assert plan(checkpoint(), adapter(embedding(), head())).config_edits == {}


def test_tie_edit_goes_to_the_root_and_the_section() -> None:
    base = checkpoint(TIED_SHAPES, {"text_config": {"tie_word_embeddings": True}})
    assert plan(base, adapter(head())).config_edits == {
        "text_config": {"tie_word_embeddings": False},
        "tie_word_embeddings": False,
    }


def test_a_head_is_found_by_its_last_name_where_it_is_tied() -> None:
    shapes = {"language_model.model.embed_tokens.weight": (VOCAB, DIM)}
    base = checkpoint(shapes, {"model_type": "llava"})
    plans = plan(base, adapter(module("model.lm_head", (VOCAB, DIM))))
    assert changes(plans) == {"language_model.lm_head.weight": "added"}


def test_a_base_without_embeddings_is_left_alone() -> None:
    plans = plan(checkpoint({f"{Q}.weight": (DIM, DIM)}, {}), adapter(module()))
    assert changes(plans) == {f"{Q}.weight": "merged"}
    assert plans.config_edits == {}


def test_a_classifier_is_given_no_language_model_head() -> None:
    config = {"architectures": ["LlamaForSequenceClassification"]}
    base = checkpoint({EMBED: (VOCAB, DIM), "score.weight": (3, DIM)}, config)
    assert changes(plan(base, adapter(embedding()))) == {EMBED: "merged"}


# vocabulary


def test_resized_vocabulary_edits_the_root() -> None:
    plans = plan(checkpoint(), adapter(whole(EMBED, (10, DIM)), whole(HEAD, (10, DIM))))
    assert plans.vocabulary_rows == 10
    assert plans.config_edits == {"vocab_size": 10}


@pytest.mark.parametrize(
    ("config", "edits"),
    [
        ({"text_config": {"vocab_size": 8}}, {"text_config": {"vocab_size": 10}}),
        (
            {"vocab_size": 8, "text_config": {"vocab_size": 8}},
            {"vocab_size": 10, "text_config": {"vocab_size": 10}},
        ),
        ({}, {"vocab_size": 10}),
    ],
)
def test_resized_vocabulary_edits_the_section(
    config: dict[str, Any], edits: dict[str, Any]
) -> None:
    base = checkpoint(config={**config, "tie_word_embeddings": False})
    plans = plan(base, adapter(whole(EMBED, (10, DIM)), whole(HEAD, (10, DIM))))
    assert plans.config_edits == edits


@pytest.mark.parametrize("name", [EMBED, HEAD])
def test_resizing_one_end_alone_is_an_error(name: str) -> None:
    with pytest.raises(PlanError, match="resizes a part of the vocabulary's tensors, but not all"):
        plan(checkpoint(), adapter(whole(name, (10, DIM))))


# dtypes


def test_cast_changes_floats_alone() -> None:
    base = checkpoint(
        {**UNTIED_SHAPES, "steps": (2,), "codes": (2, 2)},
        {**UNTIED, "torch_dtype": "bfloat16"},
        dtypes={"steps": Dtype.I64, "codes": Dtype.F8_E4M3, NORM: Dtype.F32},
    )
    plans = plan(base, output_dtype=Dtype.F32)
    tensors = by_name(plans)
    assert tensors["steps"].op == tensors["codes"].op == tensors[NORM].op == CopyBytes()
    assert tensors["steps"].dtype is Dtype.I64
    assert tensors["codes"].dtype is Dtype.F8_E4M3
    assert tensors[EMBED].op == ApplyTerms(Dtype.BF16, ())
    assert tensors[EMBED].dtype is Dtype.F32
    assert changes(plans) == {EMBED: "cast", HEAD: "cast", f"{Q}.weight": "cast"}
    assert plans.config_edits == {"torch_dtype": "float32"}


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(Dtype.F16, "float16"), (Dtype.F32, "float32")],
)
def test_dtype_edit_uses_the_key_of_the_config(dtype: Dtype, name: str) -> None:
    new = checkpoint(config={**UNTIED, "dtype": "bfloat16"})
    assert plan(new, output_dtype=dtype).config_edits == {"dtype": name}
    assert plan(checkpoint(), output_dtype=dtype).config_edits == {"torch_dtype": name}


def test_dtype_edit_reaches_the_sections_that_say_it() -> None:
    sections = {
        "text_config": {"dtype": "bfloat16"},
        "vision_config": {},
        "audio_config": {"dtype": "float32"},
    }
    base = checkpoint(config={**UNTIED, "dtype": "bfloat16", **sections})
    assert plan(base, output_dtype=Dtype.F16).config_edits == {
        "dtype": "float16",
        "text_config": {"dtype": "float16"},
        "audio_config": {"dtype": "float16"},
    }


def test_no_cast_no_dtype_edit() -> None:
    assert plan(checkpoint(), output_dtype=Dtype.BF16).config_edits == {}


def test_a_merged_tensor_is_cast_after_its_terms() -> None:
    plans = plan(checkpoint(), adapter(module()), output_dtype=Dtype.F32)
    target = by_name(plans)[f"{Q}.weight"]
    assert (target.change, target.dtype) == ("merged", Dtype.F32)
    assert isinstance(target.op, ApplyTerms)
    assert target.op.work_dtype is Dtype.BF16


def test_a_cast_of_merged_tensors_alone_edits_the_dtype() -> None:
    base = checkpoint({f"{Q}.weight": (DIM, DIM)}, {"torch_dtype": "bfloat16"})
    plans = plan(base, adapter(module()), output_dtype=Dtype.F32)
    assert plans.config_edits == {"torch_dtype": "float32"}


# quantized bases and weights


@pytest.mark.parametrize(
    ("section", "method"), [({"quant_method": "awq"}, "awq"), ({"bits": 4}, "?"), ("gptq", "?")]
)
def test_quantized_bases_are_refused(section: Any, method: str) -> None:
    base = checkpoint(config={"quantization_config": section})
    for adapters, options in (([adapter(module())], {}), ([], {"output_dtype": Dtype.F32})):
        with pytest.raises(PlanError, match="base is quantized") as caught:
            plan(base, *adapters, **options)
        assert caught.value.got == f"quantization_config of {method}"


def test_a_quantized_base_may_be_copied() -> None:
    assert changes(plan(checkpoint(config={"quantization_config": {"quant_method": "awq"}}))) == {}


def test_weights_scale_every_term() -> None:
    of_b = vector("bias of B")
    base = checkpoint({**UNTIED_SHAPES, f"{Q}.bias": (DIM,)})
    one, two = adapter(module(bias=of_b)), adapter(module(), path=Path("b"), lora_alpha=2)
    tensors = by_name(plan(base, one, two, adapter_weights=(0.75, 0.25)))
    assert [term.scaling for term in tensors[f"{Q}.weight"].terms] == [1.5, 0.25]
    assert [term.scaling for term in tensors[f"{Q}.bias"].terms] == [1.5]


def test_weights_and_adapters_are_as_many() -> None:
    with pytest.raises(ConfigError, match="differ in length") as caught:
        plan(checkpoint(), adapter(module()), adapter_weights=(0.5, 0.5))
    assert (caught.value.expected, caught.value.got) == ("1 weights", "2")


def test_weights_and_dora_exclude_each_other() -> None:
    part = module(magnitude=vector("m"))
    for weight in (0.5, 1.0):
        with pytest.raises(PlanError, match="cannot be used with DoRA"):
            plan(checkpoint(), adapter(part, use_dora=True), adapter_weights=(weight,))


def test_weights_and_several_replacements_exclude_each_other() -> None:
    one, two = adapter(whole(NORM, (DIM,))), adapter(whole(NORM, (DIM,)), path=Path("b"))
    with pytest.raises(PlanError, match="several adapters replace whole tensors"):
        plan(checkpoint(), one, two, adapter_weights=(0.5, 0.5))
    plans = plan(checkpoint(), one, adapter(module(), path=Path("b")), adapter_weights=(0.5, 0.5))
    assert changes(plans) == {NORM: "replaced", f"{Q}.weight": "merged"}


# several adapters and notes


def test_adapters_are_merged_in_order() -> None:
    one, two = adapter(module(), lora_alpha=2), adapter(module(), path=Path("b"))
    for adapters, expected in (((one, two), [1.0, 2.0]), ((two, one), [2.0, 1.0])):
        terms = by_name(plan(checkpoint(), *adapters))[f"{Q}.weight"].terms
        assert [term.scaling for term in terms] == expected


def test_a_replacement_drops_what_came_before_it() -> None:
    one = adapter(module())
    two = adapter(whole(f"{Q}.weight", (DIM, DIM)), path=Path("b"))
    plans = plan(checkpoint(), one, two)
    target = by_name(plans)[f"{Q}.weight"]
    assert (target.change, target.terms) == ("replaced", ())
    assert plans.notes == (f"'{Q}.weight': {ADAPTER} replaces what an adapter before it changed",)
    later = by_name(plan(checkpoint(), two, one))[f"{Q}.weight"]
    assert (later.change, len(later.terms)) == ("merged", 1)
    assert later.source.name == f"saved.{Q}.weight"


@pytest.mark.parametrize(
    ("named", "path", "is_noted"),
    [
        ("owner/llama", BASE, False),
        ("/data/llama/", BASE, False),
        (None, BASE, False),
        ("", BASE, False),
        ("owner/mistral", Path("hub/snapshots/0123abc"), False),
        ("owner/mistral", BASE, True),
    ],
)
def test_another_base_model_is_noted(named: str | None, path: Path, is_noted: bool) -> None:
    notes = plan(checkpoint(path=path), adapter(module(), base_model=named)).notes
    expected = f"{ADAPTER} was trained on {named!r}, merged onto {path}"
    assert notes == ((expected,) if is_noted else ())


def test_notes_of_the_adapter_are_kept() -> None:
    assert plan(checkpoint(), adapter(module(), notes=("odd",))).notes == ("odd",)


def test_the_same_plan_comes_out_twice() -> None:
    one = adapter(embedding(), head(), module())
    assert plan(checkpoint(TIED_SHAPES, TIED), one) == plan(checkpoint(TIED_SHAPES, TIED), one)


def test_kept_shards_are_those_of_the_base_whatever_is_replaced() -> None:
    base = checkpoint()
    paths = {EMBED: "one", f"{Q}.weight": "two", NORM: "three", HEAD: "three"}
    tensors = {
        name: replace(tensor, path=Path(paths[name])) for name, tensor in base.tensors.items()
    }
    base = replace(base, tensors=tensors)
    plans = plan(base, adapter(whole(f"{Q}.weight", (DIM, DIM))))
    shards = lay_out(
        plans.tensors,
        max_shard_bytes=None,
        layout="safetensors",
        base_shards={name: tensor.path for name, tensor in base.tensors.items()},
    )
    assert [[p.tensor.name for p in shard.tensors] for shard in shards] == [
        [EMBED],
        [f"{Q}.weight"],
        [NORM, HEAD],
    ]


def test_an_embedding_may_have_more_rows_than_the_head() -> None:
    shapes = {**UNTIED_SHAPES, EMBED: (VOCAB + 3, DIM)}
    plans = plan(checkpoint(shapes), adapter(module()))
    assert plans.vocabulary_rows is None
    assert changes(plans) == {f"{Q}.weight": "merged"}


# rows of tokens


def test_rows_of_tokens_are_a_term_that_puts_them_in_place() -> None:
    rows = token_rows(5, 1)
    plans = plan(checkpoint(), adapter(module(), rows))
    assert by_name(plans)[EMBED].terms == (RowsTerm(rows.tensor, (5, 1)),)
    assert changes(plans) == {EMBED: "merged", f"{Q}.weight": "merged"}
    assert plans.adapter_tensors_used == 3


@pytest.mark.parametrize(
    ("rows", "base_shape"),
    [
        (token_rows(1, VOCAB), (VOCAB, DIM)),
        (token_rows(1, columns=DIM + 1), (VOCAB, DIM)),
        (token_rows(1), (VOCAB, DIM, 1)),
        (token_rows(1), (VOCAB,)),
    ],
)
def test_rows_that_do_not_fit_are_an_error(
    rows: RowReplacement, base_shape: tuple[int, ...]
) -> None:
    with pytest.raises(PlanError, match="trained token rows do not fit") as caught:
        plan(checkpoint({**UNTIED_SHAPES, EMBED: base_shape}), adapter(rows))
    assert caught.value.expected == f"rows of '{EMBED}' {base_shape}"
    assert f"the highest of row {max(rows.indices)}" in str(caught.value.got)


def test_no_row_at_all_is_no_change_of_values() -> None:
    plans = plan(checkpoint(), adapter(token_rows()))
    assert by_name(plans)[EMBED].terms == (
        RowsTerm(trained("model.embed_tokens.rows", 0, DIM), ()),
    )


def test_rows_without_a_place_are_an_error() -> None:
    with pytest.raises(PlanError, match=r"has no base tensor, the first is 'other\.rows'"):
        plan(checkpoint(), adapter(token_rows(1, name="other")))


def test_two_rows_for_one_tensor_are_an_error() -> None:
    with pytest.raises(PlanError, match="mean the same base tensor"):
        plan(checkpoint(), adapter(token_rows(1), token_rows(2, name="embed_tokens")))


def test_rows_and_a_delta_on_one_embedding_are_both_applied() -> None:
    rows = token_rows(5)
    plans = plan(checkpoint(), adapter(embedding(), rows))
    first, second = by_name(plans)[EMBED].terms
    assert isinstance(first, LoraTerm)
    assert isinstance(second, RowsTerm)


def test_rows_of_a_tied_embedding_keep_the_tie() -> None:
    plans, tensors = tie_case(token_rows(5))
    assert HEAD not in tensors
    assert plans.config_edits == {}
    assert len(tensors[EMBED].terms) == 1


def test_equal_rows_of_both_ends_keep_the_tie() -> None:
    plans, tensors = tie_case(token_rows(5), token_rows(5, name="lm_head"), same=True)
    assert HEAD not in tensors
    assert len(tensors[EMBED].terms) == 1
    assert plans.config_edits == {}
    assert plans.adapter_tensors_used == 2


@pytest.mark.parametrize(
    ("rows", "same"),
    [(token_rows(5, name="lm_head"), False), (token_rows(4, name="lm_head"), True)],
)
def test_different_rows_of_both_ends_split_them(rows: RowReplacement, same: bool) -> None:
    plans, tensors = tie_case(token_rows(5), rows, same=same)
    assert tensors[EMBED].terms == (RowsTerm(token_rows(5).tensor, (5,)),)
    assert tensors[HEAD].terms == (RowsTerm(rows.tensor, rows.indices),)
    assert plans.config_edits == NO_TIE


def test_rows_of_the_head_alone_split_it() -> None:
    plans, tensors = tie_case(token_rows(5, name="lm_head"))
    assert tensors[EMBED].terms == ()
    assert len(tensors[HEAD].terms) == 1
    assert plans.config_edits == NO_TIE


def test_rows_of_both_ends_that_are_stored_apart_stay_apart() -> None:
    base = checkpoint(UNTIED_SHAPES, TIED)
    plans = plan(base, adapter(token_rows(5), token_rows(5, name="lm_head")))
    assert changes(plans) == {EMBED: "merged", HEAD: "merged"}
    assert plans.config_edits == NO_TIE


def test_rows_count_as_a_replacement_in_a_weighted_sum() -> None:
    one, two = adapter(token_rows(5)), adapter(token_rows(5), path=Path("b"))
    with pytest.raises(PlanError, match="several adapters replace whole tensors"):
        plan(checkpoint(), one, two, adapter_weights=(0.5, 0.5))
    plans = plan(checkpoint(), one, adapter(module(), path=Path("b")), adapter_weights=(0.5, 0.5))
    assert changes(plans) == {EMBED: "merged", f"{Q}.weight": "merged"}


# what a tuner says of its tensors


class Forgetful(Lora):
    """It has no use for a tensor, and says so or not."""

    def __init__(self, *, says_so: bool) -> None:
        self.says_so = says_so

    def unused(self, module: AdapterModule) -> list[StoredTensor]:
        return [module.tensors["extra"]] if self.says_so and "extra" in module.tensors else []


def test_a_tensor_that_no_term_reads_is_an_error_unless_it_is_known() -> None:
    part = module(extra=vector("extra"))
    with pytest.raises(PlanError, match=r"^1 adapter tensors were not used, the first is 'extra'"):
        plan(checkpoint(), adapter(part, tuner=Forgetful(says_so=False)))
    plans = plan(checkpoint(), adapter(part, tuner=Forgetful(says_so=True)))
    assert plans.adapter_tensors_used == 3
    assert factors(by_name(plans)[f"{Q}.weight"]) == [f"{Q}.lora_A", f"{Q}.lora_B"]


class Looking(Lora):
    """It keeps what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[Layer, Shared]] = []

    def plan(self, layer: Layer, settings: LoraSettings, shared: Shared) -> Sequence[PlannedTerm]:
        self.seen.append((layer, shared))
        return super().plan(layer, settings, shared)


def test_a_tuner_is_told_of_all_layers_and_of_what_they_share() -> None:
    tuner, common = Looking(), vector("common")
    base = checkpoint({**UNTIED_SHAPES, f"{Q}.bias": (DIM,)})
    one = adapter(module(), head(), shared={"common": common}, tuner=tuner)
    plans = plan(base, one)
    assert plans.adapter_tensors_used == 5
    layers = [layer for layer, _ in tuner.seen]
    assert [layer.module.module for layer in layers] == [Q, "lm_head"]
    for _, shared in tuner.seen:
        assert shared.tensors == {"common": common}
        assert shared.layers == tuple(layers)
    assert {name: p.name for name, p in layers[0].parameters.items()} == {
        "weight": f"{Q}.weight",
        "bias": f"{Q}.bias",
    }
    assert layers[1].weight.shape == (VOCAB, DIM)
    assert not layers[0].is_transposed


# forms of LoRA


def test_attention_in_one_parameter_is_found_and_rounds() -> None:
    shapes: Shapes = {"attn.in_proj_weight": (3 * DIM, DIM), "attn.in_proj_bias": (3 * DIM,)}
    part = module("attn", (3 * DIM, DIM))
    plans = plan(checkpoint(shapes, {}), adapter(part))
    expected = lora_term(part, rounds_delta=True)
    assert by_name(plans)["attn.in_proj_weight"].terms == (expected,)
    assert changes(plans) == {"attn.in_proj_weight": "merged"}


def test_the_projection_inside_attention_takes_its_delta_twice() -> None:
    shapes: Shapes = {"attn.in_proj_weight": (3 * DIM, DIM), "attn.out_proj.weight": (DIM, DIM)}
    part = replace(module("attn.out_proj"), is_inner=True)
    plans = plan(checkpoint(shapes, {}), adapter(part))
    inner, outer = lora_term(part, rounds_delta=True), lora_term(part)
    assert by_name(plans)["attn.out_proj.weight"].terms == (inner, outer)


def test_a_convolution_is_a_matrix_of_its_outputs() -> None:
    a = stored("a", (RANK, 3, 5, 5), Dtype.F32, ADAPTER)
    b = stored("b", (DIM, RANK, 1, 1), Dtype.F32, ADAPTER)
    part = AdapterModule("conv", {"lora_A": a, "lora_B": b}, "conv")
    plans = plan(checkpoint({"conv.weight": (DIM, 3, 5, 5)}, {}), adapter(part))
    target = by_name(plans)["conv.weight"]
    assert target.terms == (LoraTerm(Factor(a), Factor(b), 2.0, False, False),)
    assert (target.rows, target.columns) == (DIM, 75)
    for shape in ((DIM, 3, 3, 5), (DIM, 75), (DIM, 5, 5, 3)):
        with pytest.raises(PlanError, match="shape mismatch"):
            plan(checkpoint({"conv.weight": shape}, {}), adapter(part))


def test_a_rank_that_the_configuration_does_not_say_is_an_error() -> None:
    with pytest.raises(
        AdapterError, match=r"rank of the tensors and of adapter_config\.json"
    ) as caught:
        plan(checkpoint(), adapter(module(), rank=3))
    assert (caught.value.expected, caught.value.got) == ("r = 3", "lora_A (2, 4), lora_B (4, 2)")
    plans = plan(checkpoint(), adapter(module(), rank=3, rank_pattern={"q_proj": RANK}))
    assert [term.scaling for term in lora_terms(plans, f"{Q}.weight")] == [2.0]


def test_factors_that_cannot_be_multiplied_are_an_error() -> None:
    part = module()
    part = replace(part, tensors={**part.tensors, "lora_B": trained("b", DIM, RANK + 1)})
    with pytest.raises(AdapterError, match="rank of the two factors differs"):
        plan(checkpoint(), adapter(part))


def test_a_pooled_factor_stands_for_all_inputs() -> None:
    tensors = {"lora_A": trained("a", RANK, 2), "lora_B": trained("b", DIM, RANK)}
    part = AdapterModule(Q, tensors, Q)
    plans = plan(checkpoint(), adapter(part, pool=2))
    (term,) = lora_terms(plans, f"{Q}.weight")
    # the mean of each pair, times the number of pairs
    assert term.a == Factor(tensors["lora_A"], column_repeats=2, gain=1.0)
    with pytest.raises(PlanError, match="shape mismatch"):
        plan(checkpoint(), adapter(part, pool=3))


@pytest.mark.parametrize("side", ["a", "b"])
def test_block_diagonal_factors_are_told_by_the_module_s_name(side: str) -> None:
    in_a, in_b = (("q_pr",), ()) if side == "a" else ((), ("q_pr",))
    a = trained("a", RANK, DIM // 2 if side == "a" else DIM)
    b = trained("b", DIM, 1 if side == "b" else RANK)
    part = AdapterModule(Q, {"lora_A": a, "lora_B": b}, Q)
    blocks = BlockDiagonal(2, in_a, in_b)
    plans = plan(checkpoint(), adapter(part, block_diagonal=blocks))
    (term,) = lora_terms(plans, f"{Q}.weight")
    assert term.a == Factor(a, diagonal_blocks=2 if side == "a" else 1)
    assert term.b == Factor(b, diagonal_blocks=2 if side == "b" else 1)


def test_a_gain_goes_with_its_term() -> None:
    gain = trained("d", RANK)
    plans = plan(checkpoint(), adapter(module(lora_diag=gain), has_gain=True))
    assert [term.gain for term in lora_terms(plans, f"{Q}.weight")] == [gain]
    with pytest.raises(AdapterError, match="unexpected shape"):
        plan(checkpoint(), adapter(module(lora_diag=trained("d", 3)), has_gain=True))
    with pytest.raises(PlanError, match="not used, the first is 'd'"):
        plan(checkpoint(), adapter(module(lora_diag=gain)))


def test_what_training_took_off_the_base_is_taken_off_first() -> None:
    plans = plan(checkpoint(), adapter(module(), residual="olora"))
    first, second = by_name(plans)[f"{Q}.weight"].terms
    assert isinstance(first, ResidualTerm)
    assert (first.kind, first.rank, first.scaling) == ("olora", RANK, 2.0)
    assert second == lora_term(module())


# layers that are there several times


def replicated(*ranges: tuple[int, int], **options: Any) -> Adapter:
    name = "model.layers.2.self_attn.q_proj"
    return adapter(module(name), layer_replication=ranges, **options)


def stack(count: int, **config: Any) -> Checkpoint:
    shapes: Shapes = {EMBED: (VOCAB, DIM)}
    shapes |= {f"model.layers.{n}.self_attn.q_proj.weight": (DIM, DIM) for n in range(count)}
    shapes |= {NORM: (DIM,), HEAD: (VOCAB, DIM)}
    return checkpoint(shapes, {**UNTIED, "num_hidden_layers": count, **config})


def test_replicated_layers_have_tensors_and_deltas_of_their_own() -> None:
    plans = plan(stack(2), replicated((0, 2), (1, 2)))
    names = [f"model.layers.{n}.self_attn.q_proj.weight" for n in range(3)]
    assert [tensor.name for tensor in plans.tensors] == [EMBED, *names, NORM, HEAD]
    tensors = by_name(plans)
    assert [tensors[name].source.name for name in names] == [*names[:2], names[1]]
    # the copy's delta is not on the layer that it is a copy of
    assert [len(tensors[name].terms) for name in names] == [0, 0, 1]
    assert plans.config_edits == {"num_hidden_layers": 3}


def test_other_adapters_are_merged_onto_replicated_layers() -> None:
    second = adapter(module("model.layers.2.self_attn.q_proj"), path=Path("b"))
    plans = plan(stack(2), replicated((0, 2), (1, 2)), second)
    assert len(by_name(plans)["model.layers.2.self_attn.q_proj.weight"].terms) == 2


def test_only_the_first_adapter_may_replicate_layers() -> None:
    first = adapter(module("model.layers.0.self_attn.q_proj"))
    with pytest.raises(PlanError, match="merged as the first adapter only") as caught:
        plan(stack(2), first, replicated((0, 2), (1, 2), path=Path("b")))
    assert caught.value.where == "b"


# PEFT's faults


def test_peft_adds_what_is_for_either_end_to_the_tensor_that_both_share() -> None:
    base = checkpoint(TIED_SHAPES, TIED)
    one = adapter(embedding(), head())
    plans = plan(base, one, reproduces_bugs=True)
    tensors = by_name(plans)
    assert HEAD not in tensors
    first, second = tensors[EMBED].terms
    assert isinstance(first, LoraTerm)
    assert isinstance(second, LoraTerm)
    assert (first.is_transposed, second.is_transposed) == (True, False)
    assert plans.config_edits == {}
    alone = by_name(plan(base, adapter(head()), reproduces_bugs=True))
    assert len(alone[EMBED].terms) == 1


@pytest.mark.parametrize(
    ("version", "reproduces", "scaling"),
    [("0.15.2", True, 1.0), ("0.15.2", False, 2.0), ("0.16.0", True, 2.0), (None, True, 2.0)],
)
def test_an_old_peft_adds_the_bias_of_b_unscaled(
    version: str | None, reproduces: bool, scaling: float
) -> None:
    base = checkpoint({**UNTIED_SHAPES, f"{Q}.bias": (DIM,)})
    one = adapter(module(bias=vector("bias of B")), peft_version=version)
    plans = plan(base, one, reproduces_bugs=reproduces)
    assert by_name(plans)[f"{Q}.bias"].terms == (BiasTerm(vector("bias of B"), scaling),)


# start from a copy of the base


def test_a_copy_that_is_the_base_itself_is_no_change_in_a_weighted_sum() -> None:
    part = whole(f"{Q}.weight", (DIM, DIM), is_copy=True)
    one, two = adapter(module(), part), adapter(module(), path=Path("b"))
    plans = plan(checkpoint(), two, one, same=True, adapter_weights=(0.5, 0.5))
    assert len(by_name(plans)[f"{Q}.weight"].terms) == 2
    assert by_name(plans)[f"{Q}.weight"].source.path == BASE


def test_another_start_is_the_first_adapter_s_to_choose() -> None:
    part = whole(f"{Q}.weight", (DIM, DIM), is_copy=True)
    one, two = adapter(module(), part), adapter(module(), path=Path("b"))
    plans = plan(checkpoint(), one, two, same=False, adapter_weights=(0.5, 0.5))
    target = by_name(plans)[f"{Q}.weight"]
    assert (target.source.path, len(target.terms)) == (ADAPTER, 2)
    with pytest.raises(PlanError, match="adapters start from different base tensors"):
        plan(checkpoint(), two, one, same=False, adapter_weights=(0.5, 0.5))


# fused experts


def wrapped(**more: StoredTensor) -> AdapterModule:
    """What adapts all experts' down_proj."""
    name = "model.layers.0.mlp.experts"
    tensors = {
        "lora_A": trained(f"{name}.a", 3 * RANK, 5),
        "lora_B": trained(f"{name}.b", DIM, RANK * 3),
        **more,
    }
    return AdapterModule(name, tensors, name)


EXPERTS = "model.layers.0.mlp.experts.down_proj"


def test_experts_take_their_parts_of_the_factors() -> None:
    base = checkpoint({**UNTIED_SHAPES, EXPERTS: (3, DIM, 5)})
    one = adapter(module(), wrapped(), target_parameters=("experts.down_proj",))
    plans = plan(base, one)
    assert plans.matches == {"exact": 1, "experts": 1}
    assert plans.adapter_tensors_used == 4
    assert changes(plans) == {f"{Q}.weight": "merged", EXPERTS: "merged"}
    terms = lora_terms(plans, EXPERTS)
    assert len(terms) == 3
    assert all(term.region is not None and term.rounds_delta for term in terms)
    halved = plan(base, one, adapter_weights=(0.5,))
    assert {term.scaling for term in lora_terms(halved, EXPERTS)} == {terms[0].scaling / 2}


def test_wrappers_of_two_parameters_are_told_apart_by_their_depth() -> None:
    gate_up = EXPERTS.replace("down_proj", "gate_up_proj")
    base = checkpoint({**UNTIED_SHAPES, EXPERTS: (3, DIM, 5), gate_up: (3, 10, DIM)})
    inner = {"lora_A": trained("c", 3 * RANK, DIM), "lora_B": trained("d", 10, RANK * 3)}
    nested = replace(wrapped(), tensors=inner, depth=1)
    targets = ("experts.down_proj", "experts.gate_up_proj")
    plans = plan(base, adapter(wrapped(), nested, target_parameters=targets))
    tensors = by_name(plans)
    assert set(factors(tensors[gate_up])) == {"c", "d"}
    assert {name.rpartition(".")[2] for name in factors(tensors[EXPERTS])} == {"a", "b"}
    assert plans.matches == {"experts": 2}


def test_what_experts_cannot_take_is_an_error() -> None:
    base = checkpoint({**UNTIED_SHAPES, EXPERTS: (3, DIM, 5)})
    part = wrapped(**{"lora_B.bias": vector("left over")})
    with pytest.raises(PlanError, match="only plain LoRA is merged into a parameter") as caught:
        plan(base, adapter(part, target_parameters=("experts.down_proj",)))
    assert str(caught.value).endswith("; got lora_B.bias")


# combinations


def combined(
    *adapters: Adapter, base: Checkpoint | None = None, **options: Any
) -> dict[str, TensorPlan]:
    weights = tuple(0.5 + number for number in range(len(adapters)))
    return by_name(
        plan(
            base or checkpoint(),
            *adapters,
            adapter_weights=weights,
            combining=Combining("cat"),
            **options,
        )
    )


def test_one_term_stands_for_those_of_all_adapters() -> None:
    one, two = adapter(module(), head()), adapter(module(), path=Path("b"), lora_alpha=2)
    tensors = combined(one, two)
    (term,) = tensors[f"{Q}.weight"].terms
    assert isinstance(term, CombinedTerm)
    assert [part.scaling for part in term.parts] == [2.0, 1.0]
    assert term.weights == (0.5, 1.5)
    (alone,) = tensors[HEAD].terms
    assert isinstance(alone, CombinedTerm)
    assert alone.weights == (0.5,)


def test_rows_stay_behind_a_combination() -> None:
    tensors = combined(adapter(token_rows(5), embedding()), adapter(embedding(), path=Path("b")))
    first, second = tensors[EMBED].terms
    assert isinstance(first, CombinedTerm)
    assert len(first.parts) == 2
    assert isinstance(second, RowsTerm)


def test_what_is_replaced_later_takes_no_part_in_a_combination() -> None:
    one = adapter(module(), head())
    two = adapter(module(), whole(HEAD), path=Path("b"))
    tensors = combined(one, two)
    assert (tensors[HEAD].terms, tensors[HEAD].source.path) == ((), ADAPTER)
    (term,) = tensors[f"{Q}.weight"].terms
    assert isinstance(term, CombinedTerm)


def test_a_head_that_is_split_off_later_has_what_was_for_both() -> None:
    one = adapter(embedding(), head(), ensure_weight_tying=True)
    two = adapter(head(), path=Path("b"))
    tensors = combined(one, two, base=checkpoint(TIED_SHAPES, TIED))
    (term,) = tensors[HEAD].terms
    assert isinstance(term, CombinedTerm)
    assert term.weights == (0.5, 1.5)
    (alone,) = tensors[EMBED].terms
    assert isinstance(alone, CombinedTerm)
    assert alone.weights == (0.5,)


def test_only_plain_deltas_are_combined() -> None:
    base = checkpoint({**UNTIED_SHAPES, f"{Q}.bias": (DIM,)})
    with pytest.raises(PlanError, match="cannot be used with BiasTerm"):
        combined(adapter(module(bias=vector("bias of B"))), base=base)
    with pytest.raises(PlanError, match="takes plain LoRA only"):
        combined(adapter(module(magnitude=vector("m")), use_dora=True))


# a vocabulary that may be shared under unknown names


UNKNOWN: dict[str, Any] = {"is_encoder_decoder": True, "vocab_size": VOCAB}


@pytest.mark.parametrize(
    ("part", "config", "is_refused"),
    [
        (whole(EMBED), UNKNOWN, True),
        (token_rows(5), UNKNOWN, True),
        (whole(HEAD), UNKNOWN, True),
        (head(), UNKNOWN, True),
        # an untied head is a tensor of its own, whatever the others share
        (whole(HEAD), {**UNKNOWN, "tie_word_embeddings": False}, False),
        (token_rows(5), {**UNKNOWN, "tie_word_embeddings": False}, True),
        # of another length
        (whole(EMBED), {**UNKNOWN, "vocab_size": VOCAB + 1}, False),
        (whole(NORM, (DIM,)), UNKNOWN, False),
        (module(), UNKNOWN, False),
        # and what is new is shared with nothing
        (whole("score.weight", (VOCAB, DIM)), UNKNOWN, False),
    ],
)
def test_what_may_be_shared_is_not_changed(
    part: Part, config: dict[str, Any], is_refused: bool
) -> None:
    base, one = checkpoint(config=config), adapter(part, modules_to_save=("score",))
    if not is_refused:
        assert len(changes(plan(base, one))) == 1
        return
    with pytest.raises(PlanError, match="may share"):
        plan(base, one)


@pytest.mark.parametrize(
    ("labels", "edits"),
    [
        ({"0": "a", "1": "b", "2": "c"}, {}),
        (
            {"0": "a"},
            {
                "id2label": {str(n): f"LABEL_{n}" for n in range(3)},
                "label2id": {f"LABEL_{n}": n for n in range(3)},
            },
        ),
    ],
)
def test_a_new_classifier_has_labels(labels: dict[str, str], edits: dict[str, Any]) -> None:
    base = checkpoint(config={**UNTIED, "id2label": labels})
    one = adapter(whole("score.weight", (3, DIM)), modules_to_save=("score",))
    assert plan(base, one).config_edits == edits
