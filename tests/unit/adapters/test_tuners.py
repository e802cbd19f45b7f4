"""The registry of kinds of adapters, and what every one of them says of itself."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from streammerge.adapters import config, tuners
from streammerge.adapters.terms import TunerTerm
from streammerge.adapters.tuners import NOT_MERGEABLE, all_tuners, foreign_factors
from streammerge.adapters.tuners.base import AdapterModule, Layer, Parameter, Shared, Tuner
from streammerge.adapters.tuners.trainable_tokens import RowsTerm
from streammerge.checkpoint.header import StoredTensor
from streammerge.dtypes import Dtype
from streammerge.errors import AdapterError, PlanError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from streammerge.adapters.tuners.base import PlannedTerm

KINDS = list(all_tuners())
# what parts of names in models, and in the grammar of the files, are called
ORDINARY = frozenset(
    """
    weight bias base_layer base_model model modules_to_save original_module token_adapter
    trainable_tokens_delta default layers h blocks layer encoder decoder transformer attention
    self_attn attn mlp experts q_proj k_proj v_proj o_proj gate_proj up_proj down_proj gate_up_proj
    c_attn c_proj query key value dense norm ln_1 ln_f embed_tokens wte lm_head score classifier
    pooler router gate in_proj_weight out_proj conv visual scale gamma beta running_mean A B S s u
    """.split()
)


def tuner_modules() -> list[ModuleType]:
    return [
        importlib.import_module(f"{tuners.__name__}.{info.name}")
        for info in pkgutil.iter_modules(tuners.__path__)
    ]


def words(tuner: Tuner) -> frozenset[str]:
    return tuner.factors | tuner.shared | tuner.replaces


def stored(name: str, *shape: int) -> StoredTensor:
    return StoredTensor(name, Dtype.F32, shape, Path("adapters/one"), 0)


# the registry


def test_every_kind_is_registered_once() -> None:
    listed = [tuner.peft_type for m in tuner_modules() for tuner in getattr(m, "TUNERS", ())]
    assert [kind for kind, count in Counter(listed).items() if count > 1] == []
    assert sorted(listed) == KINDS
    assert {"LORA", "TRAINABLE_TOKENS"} <= set(KINDS)


def test_every_tuner_that_is_written_is_registered() -> None:
    written = {
        found
        for module in tuner_modules()
        for _, found in inspect.getmembers(module, inspect.isclass)
        if issubclass(found, Tuner) and not inspect.isabstract(found) and "peft_type" in vars(found)
    }
    assert written == {type(tuner) for tuner in all_tuners().values()}


def test_no_kind_is_both_merged_and_refused() -> None:
    assert NOT_MERGEABLE.keys().isdisjoint(KINDS)
    assert all(reason and reason == reason.strip() for reason in NOT_MERGEABLE.values())


def test_every_kind_of_peft_is_merged_or_refused_by_name() -> None:
    mapping = pytest.importorskip("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING
    known = {*KINDS, *NOT_MERGEABLE}
    assert sorted({kind.value for kind in mapping} - known) == []


def test_the_registry_cannot_be_changed() -> None:
    registry: Any = all_tuners()
    with pytest.raises(TypeError):
        registry["LORA"] = None
    assert all_tuners() is registry


@pytest.mark.parametrize("kind", KINDS)
def test_a_tuner_says_what_it_is(kind: str) -> None:
    tuner = all_tuners()[kind]
    assert tuner.peft_type == kind
    for line in (tuner.title, tuner.formula):
        assert line
        assert line == line.strip()
        assert "\n" not in line
        # a cell of a table
        assert "|" not in line.replace("||", "")
    assert "\n" not in tuner.remarks


@pytest.mark.parametrize("kind", KINDS)
def test_the_words_of_a_tuner_have_one_meaning_each(kind: str) -> None:
    tuner = all_tuners()[kind]
    # but a module may have copies of what all modules share
    assert tuner.replaces.isdisjoint(tuner.factors | tuner.shared)
    assert ORDINARY.isdisjoint(words(tuner))
    assert not any("." in word or word.isdecimal() for word in words(tuner))
    # what follows a factor is not another one's beginning
    assert tuner.parts.isdisjoint(words(tuner))
    assert not (tuner.parts and tuner.has_free_parts)
    assert foreign_factors(kind).isdisjoint(words(tuner))


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_that_two_kinds_have_means_the_same_to_both(kind: str) -> None:
    tuner = all_tuners()[kind]
    for other in all_tuners().values():
        assert tuner.factors.isdisjoint(other.replaces)
        assert tuner.shared.isdisjoint(other.replaces)


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saves_by_default_is_known(kind: str) -> None:
    mapping = pytest.importorskip("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING
    if kind not in mapping:
        pytest.skip("this version of PEFT has another name for it, or none yet")
    known = config._COMMON | all_tuners()[kind].options
    for field in dataclasses.fields(mapping[kind]):
        default = (
            field.default_factory()
            if field.default_factory is not dataclasses.MISSING
            else field.default
        )
        is_off = default is dataclasses.MISSING or not default
        assert is_off or field.name in known, field.name


@pytest.mark.parametrize("kind", NOT_MERGEABLE)
def test_what_has_no_merged_form_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(f'{{"peft_type": "{kind}", "r": 4}}')
    with pytest.raises(AdapterError, match="adapter has no merged form") as caught:
        config.read_adapter_config(tmp_path)
    assert caught.value.got == f"peft_type {kind}"
    assert NOT_MERGEABLE[kind] in caught.value.what


def test_an_unknown_kind_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "TOMORROW"}')
    with pytest.raises(AdapterError, match="of a kind that is not known") as caught:
        config.read_adapter_config(tmp_path)
    assert all(kind in str(caught.value.expected) for kind in KINDS)


def test_terms_of_tuners_are_frozen_records() -> None:
    for module in tuner_modules():
        for name, term in inspect.getmembers(module, inspect.isclass):
            if not issubclass(term, TunerTerm) or inspect.isabstract(term):
                continue
            # a plan compares and hashes them
            parameters = getattr(term, "__dataclass_params__", None)
            assert parameters is not None, name
            assert parameters.frozen, name
            assert "__slots__" in vars(term), name


# the protocol


class Least(Tuner):
    """The least that a tuner is."""

    peft_type, title, formula = "LEAST", "Least", "W"
    factors = frozenset({"least"})

    def plan(self, layer: Layer, settings: Any, shared: Shared) -> Sequence[PlannedTerm]:
        return ()


def module(**tensors: StoredTensor) -> AdapterModule:
    return AdapterModule("model.q_proj", tensors, "module 'model.q_proj' of adapters/one")


def layer(*shape: int, is_transposed: bool = False) -> Layer:
    return Layer(module(), {"weight": Parameter("q.weight", shape)}, is_transposed)


def test_most_of_a_tuner_is_optional() -> None:
    tuner, settings = Least(), None
    assert tuner.read(None) is None  # type: ignore[arg-type, func-returns-value]
    tuner.check(module(), settings)
    assert list(tuner.unused(module())) == []
    assert tuner.describe(module(), settings) == {}
    assert tuner.variants(settings) == ()
    assert (tuner.parts, tuner.shared, tuner.replaces, tuner.options) == (frozenset(),) * 4
    assert (tuner.has_free_parts, tuner.is_additive, tuner.remarks) == (False, False, "")
    assert Shared() == Shared({}, ())


def test_tensors_of_a_module_are_had_by_name() -> None:
    a, b = stored("a", 2, 3), stored("b", 3, 2)
    one = module(lora_A=a, lora_B=b)
    assert one.get("lora_A") is a
    assert one.get("lora_C") is None
    assert one.need("lora_B", "lora_A") == [b, a]
    assert one.fit("lora_A", 2, 3) is a
    assert not one.is_embedding
    assert module(lora_embedding_A=a).is_embedding


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (("lora_B",), "module has no lora_B"),
        (("lora_A", "lora_B"), "module has no lora_B"),
        (("lora_B", "lora_C"), "module has no lora_B and no lora_C"),
    ],
)
def test_a_tensor_that_is_missing_is_named(names: tuple[str, ...], what: str) -> None:
    one = module(lora_A=stored("a", 2, 3))
    with pytest.raises(AdapterError) as caught:
        one.need(*names)
    assert (caught.value.what, caught.value.where) == (what, one.where)


def test_a_tensor_of_another_shape_is_named() -> None:
    one = module(lora_A=stored("the a", 2, 3))
    with pytest.raises(AdapterError) as caught:
        one.fit("lora_A", 3, 2)
    fault = caught.value
    assert fault.what == "adapter tensor has an unexpected shape: another base?"
    assert fault.where == "key 'the a' of adapters/one"
    assert (fault.expected, fault.got) == ("(3, 2)", "(2, 3)")
    with pytest.raises(AdapterError, match="module has no lora_B"):
        one.fit("lora_B", 2, 3)


@pytest.mark.parametrize(
    ("shape", "is_transposed", "features"),
    [
        ((4, 6), False, (4, 6)),
        ((4, 6), True, (6, 4)),
        ((4, 6, 3, 2), False, (4, 36)),
        ((4,), False, (4, 1)),
    ],
)
def test_features_are_counted_as_the_layer_has_them(
    shape: tuple[int, ...], is_transposed: bool, features: tuple[int, int]
) -> None:
    one = layer(*shape, is_transposed=is_transposed)
    assert (one.out_features, one.in_features) == features
    assert one.weight == Parameter("q.weight", shape)


def test_a_mismatch_names_what_is_there() -> None:
    fault = layer(4, 6).mismatch((4, 5))
    assert isinstance(fault, PlanError)
    assert fault.where == "module 'model.q_proj' of adapters/one"
    assert fault.expected == "a change of 'q.weight' (4, 6)"
    assert fault.got == "(4, 5)"
    fault = layer(4, 6).mismatch("none", parameter="bias", hint="look elsewhere")
    assert (fault.expected, fault.hint) == ("a bias", "look elsewhere")


# rows of tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("step", [4, 5, 7, 20])
def test_rows_go_where_their_indices_say_whatever_the_tiles(dtype: torch.dtype, step: int) -> None:
    random = torch.Generator().manual_seed(3)
    indices = (17, 0, 4, 19, 8, 7)
    term = RowsTerm(stored("rows", 6, 3), indices)
    rows = torch.randn((6, 3), generator=random)
    weight = torch.randn((20, 3), generator=random).to(dtype)
    expected = weight.clone()
    expected[list(indices)] = rows.to(dtype)
    unused: Any = None
    state = term.prepare([rows], unused)
    parts = [
        term.apply(weight[begin : begin + step].clone(), begin, state)
        for begin in range(0, 20, step)
    ]
    assert torch.equal(torch.cat(parts), expected)
    assert term.factors == (term.tensor,)


def test_one_kind_is_found_without_the_others() -> None:
    code = (
        "import sys\n"
        "from streammerge.adapters.tuners import find_tuner\n"
        "assert find_tuner('LORA').peft_type == 'LORA'\n"
        "print('streammerge.adapters.tuners.oft' in sys.modules)\n"
        "assert find_tuner('LOKR').peft_type == 'LOKR'\n"
        "assert find_tuner('BASE') is None\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
