"""What it makes whether an adapter of a QLoRA training is merged onto 16 bits or onto NF4.

With W the base as it is stored, W_q what its NF4 codes stand for, d what the adapter adds, and M
the merge onto either of them in the dtype of the checkpoint:

    base error = ||W_q - W|| / ||d||        how far the base that was trained on is from the other
    kept       = <M - W, d> / <d, d>        share of the delta that is there after rounding
    noise      = ||M - W - d|| / ||d||      size of the rounding's error

A merge onto W is off what was trained by the base error, a merge onto W_q by its noise alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from streammerge.checkpoint.reader import ReaderPool
from streammerge.codecs.rounded import RoundedTensor
from streammerge.dtypes import Dtype
from streammerge.engine.evaluate import evaluate_merge
from streammerge.engine.fidelity import DeltaShare, middle_rows, read_rows, sample_by_kind
from streammerge.engine.prepare import prepare
from streammerge.errors import PlanError
from streammerge.plan.ops import ApplyTerms

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from streammerge.config import ExportConfig
    from streammerge.engine.evaluate import EvaluateOptions, EvaluationReport
    from streammerge.plan.merge_plan import MergePlan
    from streammerge.plan.ops import TensorPlan

__all__ = ["BasesReport", "KindReport", "compare_bases"]

_IN_FULL = " in float32"


@dataclass(frozen=True, slots=True)
class KindReport:
    """One kind of module, over the rows that were looked at."""

    weights: int
    """How many were looked at."""
    base_error: float
    kept_original: float
    noise_original: float
    kept_dequantized: float
    noise_dequantized: float


@dataclass(frozen=True, slots=True)
class BasesReport:
    """Both merges."""

    base: str
    adapters: tuple[str, ...]
    kinds: dict[str, KindReport]
    """By the last part of a module's path, such as `q_proj`."""
    all_kinds: KindReport
    original: EvaluationReport | None = None
    """Perplexity of the merge onto the base as it is stored; None without a text."""
    dequantized: EvaluationReport | None = None
    """And of that onto what its codes stand for."""

    def to_dict(self) -> dict[str, Any]:
        """Give the report as JSON types."""
        return asdict(self)


@dataclass(slots=True)
class _Kind:
    """What was found of one kind of module."""

    original: DeltaShare
    dequantized: DeltaShare
    weights: int = 0
    error: float = 0.0

    def __iadd__(self, other: _Kind) -> _Kind:
        self.original += other.original
        self.dequantized += other.dequantized
        self.weights += other.weights
        self.error += other.error
        return self

    def report(self) -> KindReport:
        first, second = self.original, self.dequantized
        return KindReport(
            weights=self.weights,
            base_error=(self.error / first.squares) ** 0.5 if first.squares else 0.0,
            kept_original=first.kept,
            noise_original=first.noise,
            kept_dequantized=second.kept,
            noise_dequantized=second.noise,
        )


def compare_bases(
    config: ExportConfig,
    *,
    text: Path | None = None,
    options: EvaluateOptions | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> BasesReport:
    """Compare the merges onto both bases, and write nothing that stays.

    Args:
        config: The export; its `qlora_base` and its quantization are not looked at.
        text: UTF-8 file whose perplexity under both is measured.
        options: How much of the text is looked at, and with how much memory.
        progress: Told each kind of module, and each layer.

    Raises:
        StreamMergeError: One of the merges cannot be done, or they do not differ.
    """
    plain = {"export_quantization_method": "gptq", "export_quantization_bit": None,
             "export_requantize": None}  # fmt: skip
    configs = [
        config.model_copy(update={**plain, "qlora_base": base})
        for base in ("original", "dequantized-nf4")
    ]
    plans = [prepare(each) for each in configs]
    kinds = _measure(plans, progress)
    total = _Kind(DeltaShare(), DeltaShare())
    for kind in kinds.values():
        total += kind
    reports: list[EvaluationReport | None] = [None, None]
    if text is not None:
        reports = [
            evaluate_merge(each, text, options=options, progress=progress) for each in configs
        ]
    return BasesReport(
        base=config.model_name_or_path,
        adapters=config.adapter_name_or_path,
        kinds={name: kind.report() for name, kind in kinds.items()},
        all_kinds=total.report(),
        original=reports[0],
        dequantized=reports[1],
    )


def _measure(plans: Sequence[MergePlan], progress: Callable[[str], None]) -> dict[str, _Kind]:
    """Look at some rows of some weights of each kind.

    Raises:
        PlanError: No adapter changes a weight that is rounded.
    """
    original, dequantized = ({tensor.name: tensor for tensor in plan.tensors} for plan in plans)
    kinds = sample_by_kind(
        [
            tensor
            for tensor in dequantized.values()
            if tensor.terms and isinstance(tensor.source, RoundedTensor)
        ]
    )
    if not kinds:
        raise PlanError(
            "no adapter changes a weight that a 4-bit training would have had as codes",
            where=plans[0].base,
            hint="both merges are the same",
        )
    found: dict[str, _Kind] = {}
    for kind, targets in kinds.items():
        progress(kind)
        others = [original[target.name] for target in targets]
        found[kind] = _Kind(
            _shares(plans[0], others),
            _shares(plans[1], targets),
            len(targets),
            _error(list(zip(others, targets, strict=True))),
        )
    return found


def _shares(plan: MergePlan, targets: Sequence[TensorPlan]) -> DeltaShare:
    """Compare merged rows with the base's, and with the same merge where nothing is rounded."""
    from streammerge.quantize.source import MergedSource  # noqa: PLC0415 (planning needs no torch)

    tensors = (*targets, *map(_in_full, targets))
    contents = replace(plan.contents, tensors=tensors)
    share = DeltaShare()
    with MergedSource(replace(plan, contents=contents)) as merge, _pool() as pool:
        for target in targets:
            rows = middle_rows(target)
            share.add(
                read_rows(target.source, rows, pool),
                merge.rows_between(f"{target.name}{_IN_FULL}", *rows),
                merge.rows_between(target.name, *rows),
            )
    return share


def _in_full(target: TensorPlan) -> TensorPlan:
    """Return the same merge in float32."""
    assert isinstance(target.op, ApplyTerms)
    op = replace(target.op, work_dtype=Dtype.F32)
    return replace(target, name=f"{target.name}{_IN_FULL}", dtype=Dtype.F32, op=op)


def _error(pairs: Sequence[tuple[TensorPlan, TensorPlan]]) -> float:
    total = 0.0
    with _pool() as pool:
        for left, right in pairs:
            rows = middle_rows(left)
            values = [read_rows(each.source, rows, pool).double() for each in (left, right)]
            total += float((values[0] - values[1]).square().sum())
    return total


def _pool() -> ReaderPool:
    return ReaderPool(mode="buffered")
