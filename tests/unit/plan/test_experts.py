"""Adapters on experts: which tensors of the base they are for, and which parts of the factors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from streammerge.adapters.adapter import Adapter
from streammerge.adapters.config import AdapterConfig
from streammerge.adapters.tuners import all_tuners
from streammerge.adapters.tuners.base import AdapterModule
from streammerge.adapters.tuners.lora_settings import LoraSettings
from streammerge.checkpoint.header import StoredTensor
from streammerge.dtypes import Dtype
from streammerge.errors import PlanError
from streammerge.plan.experts import ExpertParts, MoeLayout, find_expert_parts
from streammerge.plan.match import NameResolver
from streammerge.plan.slots import Slot

if TYPE_CHECKING:
    from streammerge.plan.ops import LoraTerm

BASE, ADAPTER = Path("models/moe"), Path("adapters/one")
E, H, WIDTH, RANK = 3, 8, 5, 2
LAYER = "model.layers.1"
PATH = f"{LAYER}.mlp.experts"
BOTH = ("experts.gate_up_proj", "experts.down_proj")
Shapes = dict[str, tuple[int, ...]]


def stored(name: str, *shape: int, path: Path = ADAPTER) -> StoredTensor:
    return StoredTensor(name, Dtype.BF16, shape, path, 0)


def wrapper(in_features: int, out_features: int, depth: int = 0, **options: Any) -> AdapterModule:
    """A wrapped parameter of all experts."""
    path, count = options.get("path", PATH), options.get("count", E) * options.get("rank", RANK)
    tensors = {
        "lora_A": stored("a", count, in_features),
        "lora_B": stored("b", out_features, count),
    }
    return AdapterModule(path, tensors, f"module '{path}'", depth)


def single(path: str, n: int, k: int, rank: int = RANK) -> AdapterModule:
    """An adapter on one expert's projection."""
    tensors = {"lora_A": stored("a", rank, k), "lora_B": stored("b", n, rank)}
    return AdapterModule(path, tensors, f"module '{path}'")


def find(
    shapes: Shapes,
    *modules: AdapterModule,
    targets: tuple[str, ...] = BOTH,
    model_type: str | None = None,
    version: str | None = "0.21.2",
    layout: MoeLayout = "peft",
    renames: dict[str, str] | None = None,
    settings: Any = None,
) -> tuple[list[ExpertParts], list[AdapterModule]]:
    config = AdapterConfig(
        ADAPTER / "adapter_config.json",
        all_tuners()["LORA"],
        settings or LoraSettings(RANK, 3, target_parameters=targets),
        target_parameters=targets,
        peft_version=version,
    )
    return find_expert_parts(
        modules,
        adapter=Adapter(ADAPTER, config, modules),
        resolver=NameResolver(frozenset(shapes), renames or {}),
        slots={
            name: Slot(stored(name, *shape, path=BASE / "model.safetensors"), Dtype.BF16)
            for name, shape in shapes.items()
        },
        config={"model_type": model_type} if model_type else {},
        layout=layout,
    )


def terms(
    shapes: Shapes, *modules: AdapterModule, **options: Any
) -> list[list[tuple[str, LoraTerm]]]:
    parts, left = find(shapes, *modules, **options)
    assert left == []
    assert [part.module for part in parts] == sorted(modules, key=lambda module: -module.depth)
    return [list(part.terms) for part in parts]


def apart(
    container: str = PATH, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Shapes:
    gate, up, down = names
    shapes: Shapes = {}
    for expert in range(E):
        for name in (gate, up):
            shapes[f"{container}.{expert}.{name}.weight"] = (WIDTH, H)
        shapes[f"{container}.{expert}.{down}.weight"] = (H, WIDTH)
    return shapes


FUSED = {f"{PATH}.gate_up_proj": (E, 2 * WIDTH, H), f"{PATH}.down_proj": (E, H, WIDTH)}
INNER, OUTER = wrapper(H, 2 * WIDTH, depth=1), wrapper(WIDTH, H)


def test_fused_on_disk() -> None:
    gate_up, down = terms(FUSED, INNER, OUTER)
    assert [name for name, _ in gate_up] == [f"{PATH}.gate_up_proj"] * E
    for expert, (_, term) in enumerate(gate_up):
        assert term.region is not None
        assert term.region.rows == range(expert * 2 * WIDTH, (expert + 1) * 2 * WIDTH)
        assert term.region.columns == range(H)
        assert term.a.rows == range(expert * RANK, (expert + 1) * RANK)
        assert term.b.columns == range(expert, E * RANK, E)
        assert (term.a.shape, term.b.shape) == ((RANK, H), (2 * WIDTH, RANK))
        assert (term.is_transposed, term.rounds_delta, term.scaling) == (False, True, 1.5)
    assert [name for name, _ in down] == [f"{PATH}.down_proj"] * E
    assert {term.a.tensor.shape for _, term in down} == {(E * RANK, WIDTH)}


@pytest.mark.parametrize(
    ("container", "names"),
    [
        (PATH, ("gate_proj", "up_proj", "down_proj")),
        (PATH, ("w1", "w3", "w2")),
        (f"{LAYER}.block_sparse_moe.experts", ("w1", "w3", "w2")),
        (f"{LAYER}.feed_forward.experts", ("w1", "w3", "w2")),
        # a bare model, and one inside another
        ("layers.1.mlp.experts", ("gate_proj", "up_proj", "down_proj")),
        ("language_model.model.layers.1.mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_apart_on_disk(container: str, names: tuple[str, str, str]) -> None:
    gate_up, down = terms(apart(container, names), INNER, OUTER)
    gate, up, last = names
    assert [name for name, _ in gate_up] == [
        f"{container}.{expert}.{name}.weight" for expert in range(E) for name in (gate, up)
    ]
    for number, (_, term) in enumerate(gate_up):
        expert, half = divmod(number, 2)
        assert term.region is None
        assert term.a.rows == range(expert * RANK, (expert + 1) * RANK)
        assert term.b.rows == range(half * WIDTH, (half + 1) * WIDTH)
        assert term.b.columns == range(expert, E * RANK, E)
    assert [name for name, _ in down] == [f"{container}.{e}.{last}.weight" for e in range(E)]


def test_names_that_transformers_gives() -> None:
    """Experts that are apart on disk, by the names that they would have in memory."""
    hub = apart("stack.1.bank", ("a", "b", "c"))
    renames = {
        f"{PATH}.{expert}.{ours}.weight": f"stack.1.bank.{expert}.{theirs}.weight"
        for expert in range(E)
        for ours, theirs in zip(("w1", "w3", "w2"), "abc", strict=True)
    }
    gate_up, down = terms(hub, INNER, OUTER, renames=renames)
    assert [name for name, _ in (*gate_up, *down)] == sorted(hub, key=lambda n: "c.weight" in n)
    renames = {f"{PATH}.gate_up_proj": "moe.in.weight", f"{PATH}.down_proj": "moe.out.weight"}
    shapes = {"moe.in.weight": (E, 2 * WIDTH, H), "moe.out.weight": (E, H, WIDTH)}
    gate_up, down = terms(shapes, INNER, OUTER, renames=renames)
    assert {name for name, _ in gate_up} == {"moe.in.weight"}
    assert {name for name, _ in down} == {"moe.out.weight"}


@pytest.mark.parametrize(
    ("container", "owner", "first", "second"),
    [
        ("block_sparse_moe.experts", "block_sparse_moe", "input_linear", "output_linear"),
        ("mlp.experts", "mlp.experts", "fc1", "fc2"),
    ],
)
def test_one_module_per_parameter_on_disk(
    container: str, owner: str, first: str, second: str
) -> None:
    names = [f"{LAYER}.{owner}.{name}.weight" for name in (first, second)]
    shapes: Shapes = dict(zip(names, FUSED.values(), strict=True))
    modules = [
        AdapterModule(f"{LAYER}.{container}", module.tensors, "", module.depth)
        for module in (INNER, OUTER)
    ]
    found = terms(shapes, *modules)
    assert [{name for name, _ in part} for part in found] == [{name} for name in names]


def test_one_module_per_parameter_in_memory() -> None:
    """What older versions of a model had, on a base of either kind."""
    moe = f"{LAYER}.block_sparse_moe"
    module = wrapper(H, 2 * WIDTH, path=f"{moe}.input_linear")
    for name in (f"{moe}.input_linear.weight", f"{moe}.experts.gate_up_proj"):
        ((first, *_),) = terms({name: (E, 2 * WIDTH, H)}, module, targets=("input_linear.weight",))
        assert first[0] == name
    module = wrapper(WIDTH, H, path=f"{PATH}.fc2")
    ((first, *_),) = terms(FUSED, module, targets=("fc2.weight",))
    assert first[0] == f"{PATH}.down_proj"


def test_gate_and_up_fused_each_by_itself() -> None:
    moe = f"{LAYER}.moe"
    shapes = {
        f"{moe}.gate_proj.weight": (E, WIDTH, H),
        f"{moe}.up_proj.weight": (E, WIDTH, H),
        f"{moe}.down_proj.weight": (E, H, WIDTH),
    }
    gate_up, _ = terms(shapes, INNER, OUTER)
    found = [(name, term.b.rows, term.a.rows) for name, term in gate_up]
    assert found == [
        (f"{moe}.{name}.weight", rows, range(expert * RANK, (expert + 1) * RANK))
        for name, rows in (("gate_proj", range(WIDTH)), ("up_proj", range(WIDTH, 2 * WIDTH)))
        for expert in range(E)
    ]


def test_stored_the_other_way_round() -> None:
    turned = {f"{PATH}.gate_up_proj": (E, H, 2 * WIDTH), f"{PATH}.down_proj": (E, WIDTH, H)}
    gate_up, _ = terms(turned, INNER, OUTER, model_type="qwen3_vl_moe")
    for expert, (_, term) in enumerate(gate_up):
        assert term.region is not None
        assert term.region.rows == range(expert * H, (expert + 1) * H)
        assert term.is_transposed
    # as a family has it in memory: the factors fit the matrices as they are
    gate_up, _ = terms(turned, INNER, OUTER)
    assert all(term.is_transposed for _, term in gate_up)


UNSWAPPED = wrapper(2 * WIDTH, H, depth=1), wrapper(H, WIDTH)


@pytest.mark.parametrize("version", ["0.17.1", "0.21.2", None])
def test_layout_before_0_19(version: str | None) -> None:
    gate_up, _ = terms(FUSED, *UNSWAPPED, version=version)
    for _, term in gate_up:
        assert term.is_transposed
        assert (term.a.shape, term.b.shape) == ((RANK, 2 * WIDTH), (H, RANK))
    gate_up, _ = terms(apart(), *UNSWAPPED, version=version)
    for number, (_, term) in enumerate(gate_up):
        half = number % 2
        assert term.is_transposed
        # a half of the columns of A, and all of B
        assert term.a.columns == range(half * WIDTH, (half + 1) * WIDTH)
        assert term.b.rows is None


@pytest.mark.parametrize(
    ("model_type", "version", "is_transposed"),
    [
        ("qwen3_moe", "0.19.0", False),
        ("qwen3_moe", "0.20.0.dev0", False),
        ("qwen3_moe", "0.18.1", True),
        # so old that it does not say
        ("qwen3_moe", None, True),
        ("llama4", "0.19.0", False),
        ("gpt_oss", "0.21.2", True),
        ("gpt_oss", "0.18.0", True),
        # what is stored turned is turned once more
        ("qwen3_vl_moe", "0.19.0", True),
        ("qwen3_vl_moe", "0.18.0", False),
    ],
)
def test_square_matrices(model_type: str, version: str | None, is_transposed: bool) -> None:
    shapes = {f"{PATH}.gate_up_proj": (E, H, H)}
    ((first, *_),) = terms(
        shapes, wrapper(H, H), targets=BOTH[:1], version=version, model_type=model_type
    )
    assert first[1].is_transposed == is_transposed


def test_one_expert_is_a_plain_layer() -> None:
    shapes = {f"{PATH}.gate_up_proj": (1, H, H)}
    module = wrapper(H, H, count=1)
    ((first,),) = terms(shapes, module, targets=BOTH[:1], version=None)
    assert not first[1].is_transposed
    with pytest.raises(PlanError, match="do not fit"):
        find({f"{PATH}.down_proj": (1, H, WIDTH)}, wrapper(H, WIDTH, count=1), targets=BOTH[1:])


def test_a_matrix_is_one_piece() -> None:
    name = f"{PATH}.gate_up_proj_bias"
    module = wrapper(WIDTH, E, count=1)
    ((first,),) = terms({name: (E, WIDTH)}, module, targets=("experts.gate_up_proj_bias",))
    assert first[0] == name
    assert first[1].region is None


def test_columns_as_unsloth_orders_them() -> None:
    gate_up, _ = terms(FUSED, INNER, OUTER, layout="unsloth")
    assert [term.b.columns for _, term in gate_up] == [range(2), range(2, 4), range(4, 6)]


def test_ranks_by_the_name_of_the_parameter() -> None:
    settings = LoraSettings(
        RANK, 3, use_rslora=True,
        rank_pattern={".*gate_up_proj": 4}, alpha_pattern={"experts.down_proj": 7},
    )  # fmt: skip
    inner = wrapper(H, 2 * WIDTH, depth=1, rank=4)
    gate_up, down = terms(FUSED, inner, OUTER, settings=settings)
    assert {term.rank for _, term in gate_up} == {4}
    assert {term.scaling for _, term in gate_up} == {3 / 2}
    assert {term.scaling for _, term in down} == {7 / 2**0.5}


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (("up_proj", "down_proj"), ("up_proj", "down_proj")),
        (("down_proj", "gate_proj", "up_proj"), ("gate_proj", "up_proj", "down_proj")),
        (("w2", "v1", "w1"), ("w1", "v1", "w2")),
    ],
)
def test_first_registered_is_innermost(names: tuple[str, ...], order: tuple[str, ...]) -> None:
    shapes = {f"{PATH}.{name}": (E, H, H) for name in names}
    modules = [wrapper(H, H, depth=len(names) - 1 - number) for number in range(len(names))]
    targets = tuple(f"experts.{name}" for name in names)
    found = terms(shapes, *modules, targets=targets)
    assert [part[0][0] for part in found] == [f"{PATH}.{name}" for name in order]


def test_unknown_parameters_are_told_apart_by_their_shapes() -> None:
    shapes = {f"{PATH}.one": (E, H, WIDTH), f"{PATH}.two": (E, H, 2 * WIDTH)}
    modules = wrapper(2 * WIDTH, H, depth=1), wrapper(WIDTH, H)
    two, one = terms(shapes, *modules, targets=("experts.one", "experts.two"))
    assert (two[0][0], one[0][0]) == (f"{PATH}.two", f"{PATH}.one")
    with pytest.raises(PlanError, match="not clear which"):
        find(
            {f"{PATH}.one": (E, H, WIDTH), f"{PATH}.two": (E, H, WIDTH)},
            wrapper(WIDTH, H, depth=1),
            wrapper(WIDTH, H),
            targets=("experts.one", "experts.two"),
        )


def test_a_parameter_that_is_not_found_is_named() -> None:
    shapes = {f"{PATH}.down_proj": (E, H, WIDTH)}
    with pytest.raises(PlanError, match="gate_up_proj, which is not found in the base"):
        find(shapes, INNER, OUTER)
    # one that was not trained here is not missed
    ((first, *_),) = terms(shapes, OUTER)
    assert first[0] == f"{PATH}.down_proj"


def test_other_parameters_are_not_looked_at() -> None:
    assert find(FUSED, OUTER, targets=()) == ([], [OUTER])
    assert find(FUSED, OUTER, targets=("mlp.gate.weight",)) == ([], [OUTER])
    assert find({}, OUTER) == ([], [OUTER])
    other = object()
    assert find(FUSED, OUTER, settings=other) == ([], [OUTER])


@pytest.mark.parametrize("shapes", [FUSED, apart()], ids=["fused", "apart"])
@pytest.mark.parametrize(
    "modules",
    [
        # of another number of experts, of another rank, of another width
        [wrapper(H, 2 * WIDTH, depth=1, count=4), OUTER],
        [INNER, wrapper(WIDTH, H, rank=3)],
        [INNER, wrapper(WIDTH + 1, H)],
        [INNER, wrapper(H, H)],
        # one too many, one too few, and a level that is missing
        [wrapper(H, 2 * WIDTH, depth=2), wrapper(H, 2 * WIDTH, depth=1), OUTER],
        [OUTER],
        [wrapper(H, 2 * WIDTH, depth=2), OUTER],
        # the other way round
        [wrapper(WIDTH, H, depth=1), wrapper(H, 2 * WIDTH)],
    ],
)
def test_misfits_name_what_was_expected(shapes: Shapes, modules: list[AdapterModule]) -> None:
    with pytest.raises(PlanError, match="do not fit") as caught:
        find(shapes, *modules)
    text = str(caught.value)
    assert PATH in text
    assert "gate_up_proj (3, 10, 8) of rank 2" in text
    assert "lora_A" in text


@pytest.mark.parametrize("missing", [f"{PATH}.2.up_proj.weight", f"{PATH}.1.gate_proj.weight"])
def test_experts_that_are_not_all_there(missing: str) -> None:
    shapes = {name: shape for name, shape in apart().items() if name != missing}
    with pytest.raises(PlanError, match="do not fit"):
        find(shapes, INNER, OUTER)


def test_experts_that_differ() -> None:
    shapes = apart() | {f"{PATH}.1.down_proj.weight": (H, WIDTH + 1)}
    with pytest.raises(PlanError, match=r"differ in shape.*\(8, 5\), \(8, 6\)"):
        find(shapes, INNER, OUTER)


def test_stored_codes_are_not_experts() -> None:
    shapes = {name: (3, *shape) for name, shape in apart().items()}
    assert find(shapes, INNER, OUTER)[1] == [INNER, OUTER]
    shapes = {f"{PATH}.gate_up_proj": (2, E, WIDTH, H)}
    assert find(shapes, OUTER, targets=BOTH[:1])[1] == [OUTER]


# single experts of fused tensors


@pytest.mark.parametrize(
    ("projection", "n", "k", "target", "inside"),
    [
        ("gate_proj", WIDTH, H, "gate_up_proj", range(WIDTH)),
        ("w1", WIDTH, H, "gate_up_proj", range(WIDTH)),
        ("up_proj", WIDTH, H, "gate_up_proj", range(WIDTH, 2 * WIDTH)),
        ("w3", WIDTH, H, "gate_up_proj", range(WIDTH, 2 * WIDTH)),
        ("gate_up_proj", 2 * WIDTH, H, "gate_up_proj", range(2 * WIDTH)),
        ("down_proj", H, WIDTH, "down_proj", range(H)),
        ("w2", H, WIDTH, "down_proj", range(H)),
    ],
)
def test_one_expert(projection: str, n: int, k: int, target: str, inside: range) -> None:
    module = single(f"{LAYER}.block_sparse_moe.experts.2.{projection}", n, k)
    (((name, term),),) = terms(FUSED, module, targets=())
    assert name == f"{PATH}.{target}"
    assert term.region is not None
    first = 2 * FUSED[name][1]
    assert term.region.rows == range(first + inside.start, first + inside.stop)
    assert term.region.columns == range(k)
    assert (term.is_transposed, term.rounds_delta) == (False, False)
    turned = {name: (e, d2, d1) for name, (e, d1, d2) in FUSED.items()}
    (((name, term),),) = terms(turned, module, targets=())
    assert term.region is not None
    assert term.region.rows == range(2 * k, 3 * k)
    assert term.region.columns == inside
    assert term.is_transposed


@pytest.mark.parametrize(
    ("model_type", "columns"),
    [("gpt_oss", range(1, 8, 2)), ("llama4_text", range(4, 8)), ("aria", range(4, 8)),
     ("openai_privacy_filter", range(4, 8)), ("qwen3_vl_moe", range(4, 8))],
)  # fmt: skip
def test_one_expert_of_square_matrices_that_are_in_out(model_type: str, columns: range) -> None:
    shapes = {f"{PATH}.gate_up_proj": (E, 8, 8)}
    module = single(f"{PATH}.1.up_proj", 4, 8)
    (((_, term),),) = terms(shapes, module, targets=(), model_type=model_type)
    assert term.region is not None
    assert (term.region.rows, term.region.columns) == (range(8, 16), columns)
    (((_, term),),) = terms(shapes, module, targets=(), model_type="qwen3_moe")
    assert term.region is not None
    assert (term.region.rows, term.region.columns) == (range(12, 16), range(8))


@pytest.mark.parametrize(
    ("path", "n", "k", "rank"),
    [
        (f"{PATH}.3.up_proj", WIDTH, H, RANK),
        (f"{PATH}.1.up_proj", WIDTH, H, 3),
        (f"{PATH}.1.up_proj", WIDTH + 1, H, RANK),
        (f"{PATH}.1.up_proj", 2 * WIDTH, H, RANK),
        (f"{PATH}.1.down_proj", WIDTH, WIDTH, RANK),
    ],
)
def test_one_expert_that_does_not_fit(path: str, n: int, k: int, rank: int) -> None:
    with pytest.raises(PlanError, match="shape mismatch") as caught:
        find(FUSED, single(path, n, k, rank), targets=())
    assert path in str(caught.value)


@pytest.mark.parametrize(
    "path", [f"{PATH}.x.up_proj", f"{PATH}.1.other", f"{LAYER}.mlp.shared_experts.up_proj", "up"]
)
def test_what_is_no_expert_is_left(path: str) -> None:
    module = single(path, WIDTH, H)
    assert find(FUSED, module, targets=()) == ([], [module])


@pytest.mark.parametrize(
    ("settings", "more", "got"),
    [
        ({"use_dora": True, "variant": "DoRA"}, "lora_magnitude_vector", "DoRA"),
        ({"has_gain": True, "variant": "KaSA"}, "lora_diag", "KaSA"),
        ({"pool": 2, "variant": "QA-LoRA"}, None, "QA-LoRA"),
        ({"residual": "pissa"}, None, "PiSSA"),
        ({"residual": "olora"}, None, "OLoRA"),
        ({}, "lora_B.bias", "lora_B.bias"),
    ],
)
def test_more_than_two_factors(settings: Any, more: str | None, got: str) -> None:
    plain = single(f"{PATH}.1.up_proj", WIDTH, H)
    tensors = dict(plain.tensors) | ({more: stored("x", WIDTH)} if more else {})
    module = AdapterModule(plain.module, tensors, "here")
    with pytest.raises(PlanError, match=f"one expert of a fused tensor.*{got}"):
        find(FUSED, module, targets=(), settings=LoraSettings(RANK, 3, **settings))
    wrapped = dict(OUTER.tensors) | ({more: stored("x", WIDTH)} if more else {})
    module = AdapterModule(PATH, wrapped, "here")
    with pytest.raises(PlanError, match=f"into a parameter.*{got}"):
        find(FUSED, module, targets=BOTH[1:], settings=LoraSettings(RANK, 3, **settings))


def test_single_experts_beside_whole_parameters() -> None:
    router = single(f"{LAYER}.mlp.gate", E, H)
    alone = single(f"{LAYER}.mlp.experts.0.up_proj", WIDTH, H)
    parts, left = find(FUSED, OUTER, router, alone, targets=BOTH[1:])
    assert [part.module for part in parts] == [OUTER, alone]
    assert left == [router]
