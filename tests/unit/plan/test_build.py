"""What happens to every tensor: the ledger, shapes, ties, vocabulary, dtypes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streammerge.adapters.adapter import Adapter, LoraModule, Replacement
from streammerge.adapters.config import AdapterConfig
from streammerge.checkpoint.header import StoredTensor
from streammerge.checkpoint.index import Checkpoint, Shard
from streammerge.dtypes import Dtype
from streammerge.errors import ConfigError, PlanError
from streammerge.plan.build import PlanOptions, TensorPlans, plan_tensors
from streammerge.plan.layout import lay_out
from streammerge.plan.ops import ApplyTerms, BiasTerm, CopyBytes, LoraTerm, TensorPlan

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


def module(name: str = Q, shape: tuple[int, int] = (DIM, DIM), **options: Any) -> LoraModule:
    rows, columns = shape
    is_embedding = options.pop("is_embedding", False)
    end = "lora_embedding_" if is_embedding else "lora_"
    return LoraModule(
        name,
        stored(f"{name}.{end}A", (RANK, columns), Dtype.F32, ADAPTER),
        stored(f"{name}.{end}B", (rows, RANK), Dtype.F32, ADAPTER),
        options.pop("scaling", 2.0),
        is_embedding,
        **options,
    )


def embedding(name: str = "model.embed_tokens", rows: int = VOCAB, **options: Any) -> LoraModule:
    return module(name, (DIM, rows), is_embedding=True, **options)


def head(rows: int = VOCAB) -> LoraModule:
    return module("lm_head", (rows, DIM))


def whole(
    path: str,
    shape: tuple[int, ...] = (VOCAB, DIM),
    dtype: Dtype = Dtype.BF16,
    *,
    is_copy: bool = False,
) -> Replacement:
    return Replacement(path, stored(f"saved.{path}", shape, dtype, ADAPTER), is_copy)


def adapter(
    *parts: LoraModule | Replacement,
    path: Path = ADAPTER,
    twins: tuple[str, ...] = (),
    extra_keys: tuple[str, ...] = (),
    **options: Any,
) -> Adapter:
    modules = tuple(part for part in parts if isinstance(part, LoraModule))
    wholes = tuple(part for part in parts if isinstance(part, Replacement))
    keys = [part.tensor.name for part in wholes]
    for part in modules:
        found = (part.a, part.b, part.magnitude, part.b_bias)
        keys.extend(tensor.name for tensor in found if tensor is not None)
    defaults: dict[str, Any] = {
        "path": path / "adapter_config.json",
        "rank": RANK,
        "lora_alpha": 4,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": (),
        "ensure_weight_tying": False,
        "task_type": "CAUSAL_LM",
        "base_model": "somewhere/llama",
        "peft_version": None,
    }
    config = AdapterConfig(**{**defaults, **options})
    return Adapter(path, config, modules, wholes, twins, (*keys, *twins, *extra_keys))


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


# plain merges and the ledger


def test_no_adapter_copies_everything_in_order() -> None:
    base = checkpoint()
    plans = plan(base)
    assert [t.name for t in plans.tensors] == list(base.tensors)
    for tensor in plans.tensors:
        source = base.tensors[tensor.name]
        assert tensor == TensorPlan(tensor.name, Dtype.BF16, source, CopyBytes(), "copied")
    assert plans == TensorPlans(plans.tensors, {}, None, 0, {}, ())


def test_a_module_becomes_one_term() -> None:
    part = module(scaling=0.5)
    plans = plan(checkpoint(), adapter(part))
    assert by_name(plans)[f"{Q}.weight"].op == ApplyTerms(
        Dtype.BF16, (LoraTerm(part.a, part.b, 0.5, is_transposed=False, rounds_delta=False),)
    )
    assert changes(plans) == {f"{Q}.weight": "merged"}
    assert plans.adapter_tensors_used == 2
    assert plans.matches == {"exact": 1}
    assert plans.config_edits == {}
    assert plans.notes == ()


def test_an_embedding_term_is_transposed_and_rounds() -> None:
    part = embedding()
    plans = plan(checkpoint(), adapter(part))
    assert by_name(plans)[EMBED].terms == (
        LoraTerm(part.a, part.b, 2.0, is_transposed=True, rounds_delta=True),
    )


def test_magnitude_goes_with_its_term() -> None:
    part = module(magnitude=stored("m", (DIM,), Dtype.F32, ADAPTER))
    plans = plan(checkpoint(), adapter(part, use_dora=True))
    assert factors(by_name(plans)[f"{Q}.weight"]) == [part.a.name, part.b.name, "m"]
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
    assert error.expected == f"a delta of shape (4, 4) for '{Q}.weight'"
    assert error.got == "(4, 6) from lora_A (2, 6) and lora_B (4, 2)"
    assert "'somewhere/llama'" in str(error.hint)


def test_a_resized_vocabulary_without_its_rows_is_explained() -> None:
    for part in (embedding(rows=10), head(rows=10)):
        with pytest.raises(PlanError) as caught:
            plan(checkpoint(), adapter(part))
        assert "save_embedding_layers=True" in str(caught.value.hint)


def test_three_dimensional_targets_are_refused() -> None:
    base = checkpoint({f"{Q}.weight": (3, DIM, DIM)})
    with pytest.raises(PlanError, match="only matrices take a LoRA delta"):
        plan(base, adapter(module()))


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
    vector = stored("bias of B", (DIM,), Dtype.F32, ADAPTER)
    base = checkpoint({**UNTIED_SHAPES, f"{Q}.bias": (DIM,)})
    plans = plan(base, adapter(module(b_bias=vector)))
    assert by_name(plans)[f"{Q}.bias"].op == ApplyTerms(Dtype.BF16, (BiasTerm(vector, 2.0),))
    assert changes(plans) == {f"{Q}.weight": "merged", f"{Q}.bias": "merged"}
    assert plans.adapter_tensors_used == 3


@pytest.mark.parametrize(("shape", "got"), [(None, "none"), ((DIM + 1,), "(5,)")])
def test_lora_bias_needs_a_bias_of_its_shape(shape: tuple[int, ...] | None, got: str) -> None:
    vector = stored("bias of B", (DIM,), Dtype.F32, ADAPTER)
    extra: Shapes = {} if shape is None else {f"{Q}.bias": shape}
    with pytest.raises(PlanError) as caught:
        plan(checkpoint({**UNTIED_SHAPES, **extra}), adapter(module(b_bias=vector)))
    assert "lora_bias" in caught.value.what
    assert caught.value.expected == f"'{Q}.bias' of shape (4,)"
    assert caught.value.got == got


def test_lora_bias_on_codes_is_refused() -> None:
    vector = stored("bias of B", (DIM,), Dtype.F32, ADAPTER)
    base = checkpoint({**UNTIED_SHAPES, f"{Q}.bias": (DIM,)}, dtypes={f"{Q}.bias": Dtype.I32})
    with pytest.raises(PlanError, match="quantized tensor"):
        plan(base, adapter(module(b_bias=vector)))


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
    base = checkpoint({"h.0.c_attn.weight": shape}, config)
    plans = plan(base, adapter(module("h.0.c_attn", (DIM, 6)), fan_in_fan_out=True))
    (term,) = by_name(plans)["h.0.c_attn.weight"].terms
    assert isinstance(term, LoraTerm)
    assert term.is_transposed is (not config)


def test_dora_on_transposed_weights_is_refused() -> None:
    magnitude = stored("m", (DIM,), Dtype.F32, ADAPTER)
    with pytest.raises(PlanError, match="DoRA on an embedding"):
        plan(checkpoint(), adapter(embedding(magnitude=magnitude), use_dora=True))
    base = checkpoint({"h.0.c_attn.weight": (DIM, DIM)}, {"model_type": "gpt2"})
    with pytest.raises(PlanError, match="DoRA on an embedding or a Conv1D"):
        plan(base, adapter(module("h.0.c_attn", magnitude=magnitude), use_dora=True))


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
    *parts: LoraModule | Replacement, same: bool | None = None, **options: Any
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
def test_tied_training_of_one_end_still_splits(part: LoraModule) -> None:
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
    plans = plan(checkpoint(shapes, {}), adapter(module("model.lm_head", (VOCAB, DIM))))
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
    vector = stored("bias of B", (DIM,), Dtype.F32, ADAPTER)
    base = checkpoint({**UNTIED_SHAPES, f"{Q}.bias": (DIM,)})
    one, two = adapter(module(b_bias=vector)), adapter(module(scaling=1.0), path=Path("b"))
    tensors = by_name(plan(base, one, two, adapter_weights=(0.75, 0.25)))
    assert [term.scaling for term in tensors[f"{Q}.weight"].terms] == [1.5, 0.25]
    assert [term.scaling for term in tensors[f"{Q}.bias"].terms] == [1.5]


def test_weights_and_adapters_are_as_many() -> None:
    with pytest.raises(ConfigError, match="differ in length") as caught:
        plan(checkpoint(), adapter(module()), adapter_weights=(0.5, 0.5))
    assert (caught.value.expected, caught.value.got) == ("1 weights", "2")


def test_weights_and_dora_exclude_each_other() -> None:
    part = module(magnitude=stored("m", (DIM,), Dtype.F32, ADAPTER))
    with pytest.raises(PlanError, match="cannot be used with DoRA"):
        plan(checkpoint(), adapter(part, use_dora=True), adapter_weights=(1.0,))


def test_weights_and_several_replacements_exclude_each_other() -> None:
    one, two = adapter(whole(NORM, (DIM,))), adapter(whole(NORM, (DIM,)), path=Path("b"))
    with pytest.raises(PlanError, match="several adapters replace whole tensors"):
        plan(checkpoint(), one, two, adapter_weights=(0.5, 0.5))
    plans = plan(checkpoint(), one, adapter(module(), path=Path("b")), adapter_weights=(0.5, 0.5))
    assert changes(plans) == {NORM: "replaced", f"{Q}.weight": "merged"}


# several adapters and notes


def test_adapters_are_merged_in_order() -> None:
    one, two = adapter(module(scaling=1.0)), adapter(module(scaling=2.0), path=Path("b"))
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
