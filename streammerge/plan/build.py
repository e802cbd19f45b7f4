"""Decide what happens to every tensor, and prove that nothing of an adapter is lost.

The ledger: every adapter tensor is used exactly once, every base tensor is written exactly once.
What does not fit is an error before any write, with the nearest names.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from streammerge.errors import PlanError
from streammerge.plan.checks import check_quantized, check_weights
from streammerge.plan.config_edits import edit_config
from streammerge.plan.family import find_embeddings, is_conv1d, is_declared_tied
from streammerge.plan.match import NameResolver
from streammerge.plan.ops import ApplyTerms, BiasTerm, CopyBytes, LoraTerm, TensorPlan
from streammerge.plan.place import place_adapter
from streammerge.plan.tying import TieDecision, check_tie_is_known, decide_tie

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from streammerge.adapters.adapter import Adapter, LoraModule, Replacement
    from streammerge.checkpoint.header import StoredTensor
    from streammerge.checkpoint.index import Checkpoint
    from streammerge.dtypes import Dtype
    from streammerge.plan.ops import Change, Term

__all__ = ["PlanOptions", "TensorPlans", "plan_tensors"]


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the user chose, as far as it changes tensors."""

    adapter_weights: tuple[float, ...] = ()
    """One factor per adapter; empty merges one adapter after the other."""
    output_dtype: Dtype | None = None
    """Cast every floating-point tensor to it; None keeps each tensor's own."""


@dataclass(frozen=True, slots=True)
class TensorPlans:
    """What happens to every tensor, and what it means for config.json."""

    tensors: tuple[TensorPlan, ...]
    config_edits: dict[str, Any]
    vocabulary_rows: int | None
    """Rows of the resized vocabulary; None if it keeps its size."""
    adapter_tensors_used: int
    matches: dict[str, int]
    """How many adapter paths were found which way (exact, prefix, renamed, suffix)."""
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Slot:
    """A tensor of the output while adapters are applied to it."""

    source: StoredTensor
    work_dtype: Dtype
    change: Change = "copied"
    terms: list[Term] = field(default_factory=list)

    def copy(self) -> _Slot:
        return replace(self, terms=list(self.terms))


def plan_tensors(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    *,
    options: PlanOptions,
    same_bytes: Callable[[StoredTensor, StoredTensor], bool],
    renames: Mapping[str, str] | None = None,
) -> TensorPlans:
    """Plan every output tensor.

    Args:
        base: The base checkpoint.
        adapters: The adapters, in the order in which they are merged.
        options: What the user chose.
        same_bytes: Says whether two stored tensors hold the same bytes; asked only where an adapter
            stores both ends of a tied pair.
        renames: In-memory name to checkpoint name, where transformers renames tensors at load time.

    Raises:
        PlanError: Base and adapters do not fit.
    """
    builder = _Builder(
        base,
        NameResolver(frozenset(base.tensors), renames or {}),
        same_bytes,
        is_sum=bool(options.adapter_weights),
    )
    check_quantized(base, adapters, output_dtype=options.output_dtype)
    check_weights(adapters, options.adapter_weights)
    for number, adapter in enumerate(adapters):
        weight = options.adapter_weights[number] if options.adapter_weights else 1.0
        builder.add_adapter(adapter, weight=weight)
    return builder.finish(options)


class _Builder:
    """The output as it stands after the adapters seen so far."""

    def __init__(
        self,
        base: Checkpoint,
        resolver: NameResolver,
        same_bytes: Callable[[StoredTensor, StoredTensor], bool],
        *,
        is_sum: bool,
    ) -> None:
        self._is_sum = is_sum
        self._base = base
        self._resolver = resolver
        self._same_bytes = same_bytes
        self._slots = {name: _Slot(t, t.dtype) for name, t in base.tensors.items()}
        self._embeddings = find_embeddings(base.tensors, config=base.config)
        self._heads_differ = False
        self._used: set[str] = set()
        self._used_before = 0
        self._matches: Counter[str] = Counter()
        self._notes: list[str] = []

    # one adapter

    def add_adapter(self, adapter: Adapter, *, weight: float) -> None:
        """Apply one adapter on top of what stands."""
        self._used_before += len(self._used)
        self._used = set()
        placement = place_adapter(
            adapter,
            base=self._base,
            resolver=self._resolver,
            embeddings=self._embeddings,
            names=self._slots.keys(),
        )
        placed, modules = placement.placed, placement.modules
        self._matches.update(placement.matches)
        check_tie_is_known(
            self._embeddings,
            placed=placed,
            modules=modules,
            tensors=self._base.tensors,
            config=self._base.config,
        )
        tie = self._untie(adapter, placed, modules)
        for name, replacement in placed.items():
            self._use(replacement.tensor)
            is_start = self._is_sum and self._is_plain_copy(name, replacement)
            if name not in tie.placed_done and not is_start:
                self._replace(name, replacement)
        for name, module in modules.items():
            if name in tie.modules_done:
                self._use(module.a, module.b)
            else:
                self._add_module(adapter, name, module, weight=weight)
        self._used.update(adapter.twins)
        self._check_ledger(adapter)
        self._note_adapter(adapter, placed)

    # tied embeddings

    def _untie(
        self,
        adapter: Adapter,
        placed: Mapping[str, Replacement],
        modules: Mapping[str, LoraModule],
    ) -> TieDecision:
        """Apply what an adapter makes of a tied pair, before its own tensors are applied."""
        source, head = self._embeddings.input, self._embeddings.output
        if source is None or head in self._slots or not self._embeddings.is_tied:
            touched = placed.keys() | modules.keys()
            self._heads_differ |= head in self._slots and not touched.isdisjoint({source, head})
            return TieDecision()
        decision = decide_tie(
            (source, head),
            placed=placed,
            modules=modules,
            shared_rows=self._slots[source].source.shape[0],
            trains_as_one=adapter.config.ensure_weight_tying,
            same_bytes=self._same_bytes,
        )
        if decision.start is not None:
            self._replace(source, decision.start)
        if decision.splits:
            own = self._slots[source].copy()
            own.change = "added" if own.change == "copied" else own.change
            self._slots[head] = own
            self._heads_differ = True
        return decision

    def _is_plain_copy(self, name: str, replacement: Replacement) -> bool:
        """Whether a copy to start from is the base itself; in a sum there is only one start.

        Raises:
            PlanError: It is another base than that of the adapters before it.
        """
        if not replacement.is_base_copy:
            return False
        if self._same_bytes(replacement.tensor, self._slots[name].source):
            return True
        if self._slots[name].terms:
            raise PlanError(
                "adapter_weights cannot be used where adapters start from different base tensors",
                where=f"key '{replacement.tensor.name}' of {replacement.tensor.path}",
                hint="leave adapter_weights out to merge one adapter after the other",
            )
        return False

    # changes to one tensor

    def _replace(self, name: str, replacement: Replacement) -> None:
        tensor, slot = replacement.tensor, self._slots.get(name)
        if slot is None:
            dtype = self._base.main_dtype if tensor.dtype.is_mergeable else tensor.dtype
            self._slots[name] = _Slot(tensor, dtype, "added")
            return
        is_vocabulary = name in self._vocabulary_names()
        fits = tensor.shape == slot.source.shape or (
            is_vocabulary and tensor.shape[1:] == slot.source.shape[1:]
        )
        if not fits:
            raise PlanError(
                "shape mismatch: another base?",
                where=f"key '{tensor.name}' of {tensor.path}",
                expected=f"{slot.source.shape} as '{name}'",
                got=tensor.shape,
                hint="give the base that the adapter was trained on",
            )
        if not tensor.dtype.is_mergeable and tensor.dtype is not slot.work_dtype:
            raise PlanError(
                "adapter's tensor cannot be converted to the base's dtype",
                where=f"key '{tensor.name}' of {tensor.path}",
                expected=slot.work_dtype.value,
                got=tensor.dtype.value,
            )
        if slot.terms:
            self._notes.append(
                f"'{name}': {tensor.path} replaces what an adapter before it changed"
            )
        change: Change = slot.change if slot.change == "added" else "replaced"
        self._slots[name] = _Slot(tensor, slot.work_dtype, change)

    def _add_module(
        self, adapter: Adapter, name: str, module: LoraModule, *, weight: float
    ) -> None:
        slot = self._slots[name]
        is_transposed = module.is_embedding or self._is_conv1d(adapter, module)
        self._check_shapes(adapter, name, module, is_transposed=is_transposed)
        if module.magnitude is not None and is_transposed:
            raise PlanError(
                "DoRA on an embedding or a Conv1D is not merged by this version",
                where=f"module '{module.module}' of {adapter.path}",
                hint="merge it with PEFT",
            )
        slot.terms.append(
            LoraTerm(
                a=module.a,
                b=module.b,
                scaling=module.scaling * weight,
                is_transposed=is_transposed,
                rounds_delta=module.is_embedding,
                magnitude=module.magnitude,
            )
        )
        slot.change = slot.change if slot.change == "added" else "merged"
        self._use(module.a, module.b, module.magnitude)
        if module.b_bias is not None:
            self._add_bias(name, module, weight=weight)

    def _add_bias(self, name: str, module: LoraModule, *, weight: float) -> None:
        vector = module.b_bias
        assert vector is not None
        bias = name.removesuffix("weight") + "bias"
        slot = self._slots.get(bias)
        if slot is None or slot.source.shape != vector.shape:
            raise PlanError(
                "adapter was trained with lora_bias, but the base layer has no such bias",
                where=f"key '{vector.name}' of {vector.path}",
                expected=f"'{bias}' of shape {vector.shape}",
                got="none" if slot is None else slot.source.shape,
                hint="another base?",
            )
        self._check_mergeable(bias, slot)
        slot.terms.append(BiasTerm(vector, module.scaling * weight))
        slot.change = "merged"
        self._use(vector)

    def _is_conv1d(self, adapter: Adapter, module: LoraModule) -> bool:
        if is_conv1d(module.module, config=self._base.config):
            return True
        # a checkpoint without a config.json: the adapter's word is all there is
        return adapter.config.fan_in_fan_out and not self._base.config

    def _check_shapes(
        self, adapter: Adapter, name: str, module: LoraModule, *, is_transposed: bool
    ) -> None:
        slot = self._slots[name]
        self._check_mergeable(name, slot)
        shape = (module.b.shape[0], module.a.shape[1])
        wanted = shape[::-1] if is_transposed else shape
        if slot.source.shape == wanted:
            return
        hint = (
            f"give the base that the adapter was trained on: it names {adapter.config.base_model!r}"
        )
        if name in {self._embeddings.input, self._embeddings.output} and (
            slot.source.shape[1:] == wanted[1:]
        ):
            hint = (
                "the adapter was trained on a resized vocabulary but does not hold its rows: save "
                "it with save_embedding_layers=True, or resize the base first"
            )
        elif len(slot.source.shape) != 2:
            hint = "only matrices take a LoRA delta in this version"
        raise PlanError(
            "shape mismatch: another base?",
            where=f"module '{module.module}' of {adapter.path}",
            expected=f"a delta of shape {slot.source.shape} for '{name}'",
            got=f"{wanted} from lora_A {module.a.shape} and lora_B {module.b.shape}",
            hint=hint,
        )

    def _check_mergeable(self, name: str, slot: _Slot) -> None:
        if not slot.work_dtype.is_mergeable:
            raise PlanError(
                "adapter targets a quantized tensor: a delta cannot be added to its codes",
                where=f"'{name}' of {self._base.path}",
                expected="F16, BF16, F32 or F64",
                got=slot.work_dtype.value,
                hint="give the unquantized base",
            )

    # the ledger and the result

    def _use(self, *tensors: StoredTensor | None) -> None:
        for tensor in tensors:
            if tensor is not None:
                self._used.add(tensor.name)

    def _check_ledger(self, adapter: Adapter) -> None:
        left = [key for key in adapter.keys if key not in self._used]
        if left:
            raise PlanError(
                f"{len(left)} adapter tensors were not used, the first is '{left[0]}'",
                where=adapter.path,
                hint="this adapter cannot be merged without losing them",
            )

    def _note_adapter(self, adapter: Adapter, placed: Mapping[str, Replacement]) -> None:
        self._notes.extend(adapter.config.notes)
        named = (adapter.config.base_model or "").rstrip("/").rpartition("/")[2]
        if (
            named
            and named != self._base.path.resolve().name
            and "snapshots" not in str(self._base.path)
        ):
            self._notes.append(
                f"{adapter.path} was trained on {adapter.config.base_model!r}, merged onto "
                f"{self._base.path}"
            )
        is_classifier = adapter.config.task_type in {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"}
        if is_classifier and not placed:
            self._notes.append(
                f"{adapter.path} is a {adapter.config.task_type} adapter without a head: the "
                "merged model has whatever head the base has"
            )

    def finish(self, options: PlanOptions) -> TensorPlans:
        """Turn the slots into plans, and derive what config.json must say."""
        tensors = tuple(
            _finish_slot(name, slot, options.output_dtype) for name, slot in self._slots.items()
        )
        rows = self._vocabulary_rows()
        edits = edit_config(
            self._base.config,
            tensors,
            vocabulary_rows=rows,
            unties=self._heads_differ and is_declared_tied(self._base.config) is not False,
            output_dtype=options.output_dtype,
        )
        return TensorPlans(
            tensors,
            edits,
            rows,
            self._used_before + len(self._used),
            dict(self._matches),
            tuple(self._notes),
        )

    def _vocabulary_names(self) -> list[str]:
        """Tensors with a row per token: the embedding, the head, and the head's bias."""
        head = self._embeddings.output
        names = (self._embeddings.input, head, head.removesuffix("weight") + "bias")
        return [name for name in names if name is not None]

    def _vocabulary_rows(self) -> int | None:
        """Rows of the vocabulary, if they changed; they must change together.

        They need not be equal: Llama 3.2 Vision's embedding has eight rows more than its head.
        """
        source = self._embeddings.input
        if source is None:
            return None
        rows = {
            n: self._slots[n].source.shape[0] for n in self._vocabulary_names() if n in self._slots
        }
        tied = self._base.tensors[source]
        added = {n: count - self._base.tensors.get(n, tied).shape[0] for n, count in rows.items()}
        if not any(added.values()):
            return None
        if len(set(added.values())) > 1:
            raise PlanError(
                "adapter resizes a part of the vocabulary's tensors, but not all",
                where=self._base.path,
                expected="as many rows more in each",
                got=rows,
                hint="train the adapter with the embedding and the head in modules_to_save",
            )
        return rows.get(self._embeddings.output, rows[source])


def _finish_slot(name: str, slot: _Slot, output_dtype: Dtype | None) -> TensorPlan:
    dtype = slot.work_dtype
    if output_dtype is not None and dtype.is_mergeable:
        dtype = output_dtype
    if not slot.terms and slot.source.dtype is slot.work_dtype is dtype:
        return TensorPlan(name, dtype, slot.source, CopyBytes(), slot.change)
    change: Change = "cast" if slot.change == "copied" else slot.change
    return TensorPlan(
        name, dtype, slot.source, ApplyTerms(slot.work_dtype, tuple(slot.terms)), change
    )
