"""The whole plan, in numbers and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge.adapters.terms import Factor
from streammerge.adapters.tuners.trainable_tokens import RowsTerm
from streammerge.checkpoint.header import StoredTensor
from streammerge.checkpoint.sidecars import Sidecar, Sidecars
from streammerge.config.tuning import IoChoice
from streammerge.dtypes import Dtype
from streammerge.plan.build import TensorPlans
from streammerge.plan.layout import lay_out
from streammerge.plan.memory import RunShape, plan_memory
from streammerge.plan.merge_plan import MergePlan
from streammerge.plan.ops import (
    ApplyTerms,
    BiasTerm,
    CopyBytes,
    LoraTerm,
    TensorPlan,
    rank_of,
    unique_factors,
)

if TYPE_CHECKING:
    from streammerge.plan.ops import Term


def stored(name: str, dtype: Dtype, *shape: int) -> StoredTensor:
    return StoredTensor(name, dtype, shape, Path("x"), 0)


def lora(scaling: float = 0.5, **options: Any) -> LoraTerm:
    a, b = Factor(stored("a", Dtype.F32, 2, 6)), Factor(stored("b", Dtype.F32, 4, 2))
    return LoraTerm(a, b, scaling, **{"is_transposed": False, "rounds_delta": False, **options})


def merged(*terms: Term) -> TensorPlan:
    source = stored("w", Dtype.BF16, 4, 6)
    return TensorPlan("w", Dtype.F32, source, ApplyTerms(Dtype.BF16, terms), "merged")


def example(*terms: Term) -> MergePlan:
    tensors = (
        TensorPlan("norm", Dtype.F32, stored("norm", Dtype.F32, 4), CopyBytes(), "copied"),
        merged(*(terms or (lora(),))),
        TensorPlan("new", Dtype.BF16, stored("new", Dtype.BF16, 3), CopyBytes(), "added"),
    )
    contents = TensorPlans(tensors, {"vocab_size": 9}, 9, 2, {"exact": 1}, ())
    return MergePlan(
        base=Path("base"),
        adapters=(Path("one"), Path("two")),
        output=Path("out"),
        layout="safetensors",
        numerics="peft",
        contents=contents,
        shards=lay_out(tensors, max_shard_bytes=None, layout="safetensors"),
        sidecars=Sidecars((Sidecar("tokenizer.json", Path("base/tokenizer.json")),), ("x.pt",)),
        io=IoChoice(read_mode="mmap", write_mode="direct"),
        shape=RunShape(),
        memory=plan_memory(tensors, max_memory=10**10),
        base_config={},
        notes=("a note",),
    )


def test_bytes_are_counted() -> None:
    plan = example()
    assert plan.bytes_read == 16 + 48 + 6 + (48 + 32)
    assert plan.bytes_written == 4096 + 16 + 96 + 6
    assert plan.tensors == plan.contents.tensors
    assert [tensor.name for tensor in plan.targets] == ["w", "new"]


def test_description_is_json_and_complete() -> None:
    plan = example()
    described = json.loads(json.dumps(plan.describe()))
    assert described == {
        "base": "base",
        "adapters": ["one", "two"],
        "output_dir": "out",
        "format": "safetensors",
        "numerics": "peft",
        "tensors_total": 3,
        "tensors_changed": 2,
        "tensors_copied": 1,
        "adapter_tensors_used": 2,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "predicted_peak_bytes": plan.memory.predicted_peak_bytes,
        "least_memory_bytes": plan.memory.least_bytes,
        "read_mode": "mmap",
        "write_mode": "direct",
        "shards": [{"name": "model.safetensors", "bytes": plan.bytes_written, "tensors": 3}],
        "targets": [
            {
                "name": "w",
                "change": "merged",
                "dtype": "F32",
                "shape": [4, 6],
                "terms": ["LoRA"],
                "scalings": [0.5],
            },
            {"name": "new", "change": "added", "dtype": "BF16", "shape": [3]},
        ],
        "names": {"exact": 1},
        "config_edits": {"vocab_size": 9},
        "sidecars": ["tokenizer.json"],
        "not_copied": ["x.pt"],
        "notes": ["a note"],
    }


def test_factors_that_terms_share_are_read_once() -> None:
    assert example(lora(), lora(2.0)).bytes_read == example().bytes_read


def test_terms_and_scalings_are_named_once_each_in_their_order() -> None:
    magnitude = stored("m", Dtype.F32, 4)
    rows = RowsTerm(stored("r", Dtype.F32, 1, 6), (3,))
    cases: list[tuple[tuple[Term, ...], list[str], list[float]]] = [
        ((lora(),), ["LoRA"], [0.5]),
        # of the experts of a fused tensor they are one and the same
        ((lora(), lora(), lora(2.0), lora()), ["LoRA"], [0.5, 2.0]),
        ((lora(magnitude=magnitude), lora()), ["DoRA", "LoRA"], [0.5]),
        ((BiasTerm(magnitude, 3.0),), ["bias"], [3.0]),
        ((rows, lora()), ["RowsTerm", "LoRA"], [0.5]),
        ((rows,), ["RowsTerm"], []),
    ]
    for terms, names, scalings in cases:
        (described, _) = example(*terms).describe()["targets"]
        assert (described["terms"], described["scalings"]) == (names, scalings)


def test_a_cast_has_no_terms() -> None:
    source = stored("w", Dtype.BF16, 4, 6)
    cast = TensorPlan("w", Dtype.F32, source, ApplyTerms(Dtype.BF16, ()), "cast")
    plan = example()
    described = replace(plan, contents=replace(plan.contents, tensors=(cast,))).describe()
    assert described["targets"] == [
        {"name": "w", "change": "cast", "dtype": "F32", "shape": [4, 6]}
    ]


def test_records_say_what_they_hold() -> None:
    _, merged, added = example().tensors
    assert merged.shape == (4, 6)
    assert (merged.rows, merged.columns) == (4, 6)
    assert merged.nbytes == 96
    assert merged.specs == (merged.output,)
    assert (merged.output.name, merged.output.dtype, merged.output.shape) == (
        "w",
        Dtype.F32,
        (4, 6),
    )
    assert added.terms == ()
    vector = stored("v", Dtype.F32, 4)
    assert BiasTerm(vector, 1.0).factors == (vector,)
    assert [rank_of(tensor) for tensor in example().tensors] == [0, 2, 0]
    rows = RowsTerm(vector, (1,))
    assert rank_of(example(rows, lora()).tensors[1]) == 2
    assert rank_of(example(rows).tensors[1]) == 0
    assert [f.name for f in unique_factors((lora(), rows, lora()))] == ["a", "b", "v"]
