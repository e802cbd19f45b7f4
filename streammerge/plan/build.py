"""Decide what happens to every tensor, and prove that nothing of an adapter is lost.

The ledger: every adapter tensor is used exactly once, every base tensor is written exactly once.
What does not fit is an error before any write, with the nearest names.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from streammerge.adapters.combine import Combining, combine
from streammerge.adapters.terms import LoraTerm, not_a_sum
from streammerge.adapters.tuners.base import Shared
from streammerge.adapters.tuners.lora_settings import LoraSettings
from streammerge.adapters.tuners.trainable_tokens import RowsTerm
from streammerge.codecs.decoded import DecodedTensor
from streammerge.codecs.rounded import RoundedTensor
from streammerge.errors import PlanError
from streammerge.plan.checks import check_quantized, check_weights
from streammerge.plan.config_edits import edit_config
from streammerge.plan.family import find_embeddings, is_declared_tied
from streammerge.plan.match import NameResolver
from streammerge.plan.numerics import as_peft_merges
from streammerge.plan.place import BaseView, layer_of, place_adapter
from streammerge.plan.replicate import replicate_layers, replication_edits
from streammerge.plan.slots import Slot
from streammerge.plan.tying import TieDecision, check_tie_is_known, decide_tie

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from streammerge.adapters.adapter import Adapter, Replacement, RowReplacement
    from streammerge.adapters.terms import Term
    from streammerge.adapters.tuners.base import AdapterModule
    from streammerge.checkpoint.header import StoredTensor
    from streammerge.checkpoint.index import Checkpoint
    from streammerge.dtypes import Dtype
    from streammerge.plan.experts import MoeLayout
    from streammerge.plan.ops import TensorPlan
    from streammerge.plan.place import Placement

__all__ = ["PlanOptions", "TensorPlans", "plan_tensors"]


# tensors whose values are no bytes of a file
_MADE = (DecodedTensor, RoundedTensor)


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the user chose, as far as it changes tensors."""

    adapter_weights: tuple[float, ...] = ()
    """One factor per adapter; empty merges one adapter after the other."""
    output_dtype: Dtype | None = None
    """Cast every floating-point tensor to it; None keeps each tensor's own."""
    moe_layout: MoeLayout = "peft"
    """How adapters on fused experts divide the columns of B."""
    combining: Combining | None = None
    """How factors of several adapters are combined, each with its weight."""
    reproduces_bugs: bool = False
    """Merge as PEFT does where PEFT is known to be wrong."""


@dataclass(frozen=True, slots=True)
class TensorPlans:
    """What happens to every tensor, and what it means for config.json."""

    tensors: tuple[TensorPlan, ...]
    config_edits: dict[str, Any]
    vocabulary_rows: int | None
    """Rows of the resized vocabulary; None if it keeps its size."""
    adapter_tensors_used: int
    matches: dict[str, int]
    """How many adapter paths were found which way (exact, prefix, renamed, suffix, experts)."""
    notes: tuple[str, ...]


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
    check_quantized(base, adapters, output_dtype=options.output_dtype)
    check_weights(adapters, options.adapter_weights)
    builder = _Builder(base, options, renames or {}, same_bytes)
    for number, adapter in enumerate(adapters):
        if adapter.config.layer_replication:
            builder.replicate(adapter, is_first=not number)
        weight = options.adapter_weights[number] if options.adapter_weights else 1.0
        builder.add_adapter(adapter, weight=weight)
    return builder.finish()


class _Builder:
    """The output as it stands after the adapters seen so far."""

    def __init__(
        self,
        base: Checkpoint,
        options: PlanOptions,
        renames: Mapping[str, str],
        same_bytes: Callable[[StoredTensor, StoredTensor], bool],
    ) -> None:
        self._options = options
        self._base = base
        self._same_bytes = same_bytes
        self._slots = {
            name: Slot(t, t.dtype, "decoded" if isinstance(t, _MADE) else "copied")
            for name, t in base.tensors.items()
        }
        self._edits: dict[str, Any] = {}
        self._combined: dict[str, list[tuple[LoraTerm, float]]] = {}
        self._renames = renames
        self._look_at(self._slots)
        self._heads_differ = False
        self._used: set[str] = set()
        self._used_before = 0
        self._matches: Counter[str] = Counter()
        self._notes: list[str] = []

    def _look_at(self, slots: Mapping[str, Slot]) -> None:
        """Take the slots as they stand for the base that adapters are matched against."""
        self._view = BaseView(
            self._base.path,
            self._base.config,
            frozenset(slots),
            NameResolver(frozenset(slots), self._renames),
            find_embeddings(slots, config=self._base.config),
            self._options.moe_layout,
        )
        self._embeddings = self._view.embeddings

    # one adapter

    def replicate(self, adapter: Adapter, *, is_first: bool) -> None:
        """Give the base the layers that an adapter was trained with.

        Raises:
            PlanError: There is an adapter before it, whose layers have other numbers.
        """
        if not is_first:
            raise PlanError(
                "layer_replication is merged as the first adapter only",
                where=adapter.path,
                hint="merge it by itself, then the others onto the result",
            )
        ranges = adapter.config.layer_replication
        slots = replicate_layers(self._slots, ranges, where=self._base.path)
        self._slots = {name: slot.copy() for name, slot in slots.items()}
        self._edits.update(replication_edits(self._base.config, ranges))
        self._look_at(self._slots)

    def add_adapter(self, adapter: Adapter, *, weight: float) -> None:
        """Apply one adapter on top of what stands."""
        self._used_before += len(self._used)
        self._used = set()
        placement = place_adapter(adapter, base=self._view, slots=self._slots)
        self._matches.update(placement.matches)
        check_tie_is_known(
            self._embeddings,
            placed=placement.placed.keys() | placement.rows.keys(),
            modules=placement.layers,
            tensors=self._base.tensors,
            config=self._base.config,
        )
        tie = self._untie(adapter, placement)
        for name, replacement in placement.placed.items():
            self._use([replacement.tensor])
            is_start = self._options.adapter_weights and self._is_plain_copy(name, replacement)
            if name not in tie.placed_done and not is_start:
                self._replace(name, replacement)
        self._add_layers(adapter, placement.layers, done=tie.modules_done, weight=weight)
        for part in placement.experts:
            for name, term in part.terms:
                self._add_term(name, self._as_peft_merges(adapter, part.module, name, term), weight)
            # what no term reads is lost
            self._use(factor for _, term in part.terms for factor in term.factors)
        # those of the head last, where both ends are one tensor
        for name, rows in sorted(
            placement.rows.items(), key=lambda item: item[0] == self._embeddings.output
        ):
            self._use([rows.tensor])
            if name not in tie.modules_done:
                stored = self._stored_name(name)
                self._slots[stored].add(self._rows_term(stored, rows))
        self._used.update(adapter.twins)
        self._check_ledger(adapter)
        self._note_adapter(adapter, placement.placed)

    def _add_layers(
        self,
        adapter: Adapter,
        layers: Mapping[str, AdapterModule],
        *,
        done: frozenset[str],
        weight: float,
    ) -> None:
        """Let the adapter's tuner say what it does to each layer."""
        described = {
            name: layer_of(
                self._stored_name(name),
                module,
                slots=self._slots,
                base=self._view,
                fan_in_fan_out=adapter.config.fan_in_fan_out,
            )
            for name, module in layers.items()
        }
        tuner, settings = adapter.config.tuner, adapter.config.settings
        shared = Shared(adapter.shared, tuple(described.values()))
        for name, layer in described.items():
            self._use(layer.module.tensors.values())
            if name in done:
                continue
            taken = {tensor.name for tensor in tuner.unused(layer.module)}
            for planned in tuner.plan(layer, settings, shared):
                target = layer.parameters[planned.parameter].name
                term = self._as_peft_merges(adapter, layer.module, target, planned.term)
                self._add_term(target, term, weight)
                taken.update(tensor.name for tensor in (*term.factors, *planned.unused))
            # what the tuner has no use for is lost
            for tensor in layer.module.tensors.values():
                if tensor.name not in taken:
                    self._used.discard(tensor.name)
        self._use(adapter.shared.values())

    def _as_peft_merges(
        self, adapter: Adapter, module: AdapterModule, target: str, term: Term
    ) -> Term:
        """Let a term round where PEFT does, or err where it does if that is asked for."""
        return as_peft_merges(
            term,
            module=module,
            target=target,
            adapter=adapter,
            config=self._base.config,
            reproduces_bugs=self._options.reproduces_bugs,
        )

    def _add_term(self, name: str, term: Term, weight: float) -> None:
        """Add a term to a tensor, as one of a weighted sum if that is what is asked for."""
        if self._options.combining is not None:
            if not isinstance(term, LoraTerm):
                raise not_a_sum(type(term).__name__)
            self._combined.setdefault(name, []).append((term, weight))
            # in its place until all of them are known
            self._slots[name].add(term)
            return
        if self._options.adapter_weights and not term.is_additive:
            raise not_a_sum("DoRA" if isinstance(term, LoraTerm) else type(term).__name__)
        self._slots[name].add(term.scaled(weight))

    def _combine(self, combining: Combining) -> None:
        """Put one term in the place of those of all adapters."""
        for name, terms in self._combined.items():
            slot, every = self._slots[name], [term for term, _ in terms]
            # a whole tensor of a later adapter may stand in their place
            left = [(term, w) for term, w in terms if any(term is one for one in slot.terms)]
            others = [term for term in slot.terms if not any(term is one for one in every)]
            slot.terms = [combine(left, combining, name=name), *others] if left else others

    def _rows_term(self, name: str, rows: RowReplacement) -> RowsTerm:
        shape, highest = self._slots[name].source.shape, max(rows.indices, default=-1)
        if len(shape) != 2 or rows.tensor.shape[1] != shape[1] or highest >= shape[0]:
            raise PlanError(
                "trained token rows do not fit: another base, or a vocabulary that was resized?",
                where=f"key '{rows.tensor.name}' of {rows.tensor.path}",
                expected=f"rows of '{name}' {shape}",
                got=f"{rows.tensor.shape}, the highest of row {highest}",
                hint="resize the base's vocabulary first, as it was for training",
            )
        return RowsTerm(rows.tensor, rows.indices)

    # tied embeddings

    def _stored_name(self, name: str) -> str:
        """Return the tensor that holds a weight: of a tied head, that of the embedding."""
        source = self._embeddings.input
        return source if source is not None and name not in self._slots else name

    def _untie(self, adapter: Adapter, placement: Placement) -> TieDecision:
        """Apply what an adapter makes of a tied pair, before its own tensors are applied."""
        source, head = self._embeddings.input, self._embeddings.output
        placed, modules = placement.placed, placement.layers
        if source is None or head in self._slots or not self._embeddings.is_tied:
            touched = placed.keys() | modules.keys() | placement.rows.keys()
            self._heads_differ |= head in self._slots and not touched.isdisjoint({source, head})
            return TieDecision()
        decision = decide_tie(
            (source, head),
            # PEFT adds to the one tensor whatever is for either end
            replace(placement, layers={}, rows={}) if self._options.reproduces_bugs else placement,
            shared_rows=self._slots[source].source.shape[0],
            trains_as_one=adapter.config.ensure_weight_tying,
            same_bytes=self._same_bytes,
        )
        if decision.start is not None:
            self._replace(source, decision.start)
        settings = adapter.config.settings
        is_residual = isinstance(settings, LoraSettings) and settings.residual is not None
        is_alone = head in modules and decision.start is None and source not in placed
        if is_residual and is_alone and not self._options.reproduces_bugs:
            raise PlanError(
                "adapter takes its start off a head that is tied to the embedding, which would "
                "change too",
                where=modules[head].where,
                hint="save the adapter with save_embedding_layers=True, which keeps what it is",
            )
        if decision.splits:
            own = self._slots[source].copy()
            own.change = "added" if own.change in {"copied", "decoded"} else own.change
            self._slots[head] = own
            if source in self._combined:
                self._combined[head] = list(self._combined[source])
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

    def _replace(self, name: str, replacement: Replacement) -> None:
        tensor, slot = replacement.tensor, self._slots.get(name)
        if slot is None:
            dtype = self._base.main_dtype if tensor.dtype.is_mergeable else tensor.dtype
            self._slots[name] = Slot(tensor, dtype, "added")
            return
        if slot.terms:
            self._notes.append(
                f"'{name}': {tensor.path} replaces what an adapter before it changed"
            )
        self._slots[name] = slot.replaced_by(
            replacement, name=name, rows_may_differ=name in self._vocabulary_names()
        )

    # the ledger and the result

    def _use(self, tensors: Iterable[StoredTensor]) -> None:
        self._used.update(tensor.name for tensor in tensors)

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

    def finish(self) -> TensorPlans:
        """Turn the slots into plans, and derive what config.json must say."""
        if self._options.combining is not None:
            self._combine(self._options.combining)
        output_dtype = self._options.output_dtype
        tensors = tuple(
            slot.finish(name, output_dtype=output_dtype) for name, slot in self._slots.items()
        )
        rows = self._vocabulary_rows()
        edits = edit_config(
            self._base.config,
            tensors,
            vocabulary_rows=rows,
            unties=self._heads_differ and is_declared_tied(self._base.config) is not False,
            output_dtype=output_dtype,
        )
        return TensorPlans(
            tensors,
            {**self._edits, **edits},
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
