"""Decide what happens to every tensor, and prove that nothing of an adapter is lost.

The ledger: every adapter tensor is used exactly once, every base tensor is written exactly once.
What does not fit is an error before any write, with the nearest names.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from streammerge.errors import ConfigError, PlanError
from streammerge.plan.config_edits import edit_config
from streammerge.plan.family import (
    VOCABULARY_MODULES,
    find_embeddings,
    is_conv1d,
    is_declared_tied,
)
from streammerge.plan.match import WRAPPER_PREFIXES, Match, NameResolver
from streammerge.plan.ops import ApplyTerms, BiasTerm, CopyBytes, LoraTerm, TensorPlan

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
    _check_quantized(base, adapters, options)
    _check_weights(adapters, options.adapter_weights)
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
        self._matches: dict[str, int] = {}
        self._notes: list[str] = []

    # one adapter

    def add_adapter(self, adapter: Adapter, *, weight: float) -> None:
        """Apply one adapter on top of what stands."""
        self._used_before += len(self._used)
        self._used = set()
        placed, modules, missing = self._place(adapter)
        if missing:
            raise self._unmatched(adapter, missing)
        self._check_tie_is_known(placed, modules)
        skipped = self._untie(adapter, placed, modules)
        for name, replacement in placed.items():
            self._use(replacement.tensor)
            if name not in skipped and not (
                self._is_sum and self._is_plain_copy(name, replacement)
            ):
                self._replace(name, replacement)
        for name, module in modules.items():
            if name in skipped:
                self._use(module.a, module.b)
            else:
                self._add_module(adapter, name, module, weight=weight)
        self._used.update(adapter.twins)
        self._check_ledger(adapter)
        self._note_adapter(adapter, placed)

    def _place(
        self, adapter: Adapter
    ) -> tuple[dict[str, Replacement], dict[str, LoraModule], list[tuple[str, str]]]:
        """Find the tensor that each part of an adapter is for."""
        placed: dict[str, Replacement] = {}
        modules: dict[str, LoraModule] = {}
        missing: list[tuple[str, str]] = []
        for replacement in adapter.replacements:
            # a new head may end like some tensor of the base: its own name is asked for first
            path = replacement.path
            match = (
                self._find_known(path)
                or self._added(adapter, replacement)
                or self._resolver.find(path)
            )
            if match is None:
                missing.append((replacement.tensor.name, replacement.path))
            else:
                self._take(placed, match, replacement, key=replacement.tensor.name)
        for module in adapter.modules:
            path = f"{module.module}.weight"
            match = self._find_known(path) or self._resolver.find(path)
            if match is None:
                missing.append((module.a.name, path))
            else:
                self._take(modules, match, module, key=module.a.name)
        return placed, modules, missing

    def _find_known(self, path: str) -> Match | None:
        match = self._resolver.find_known(path)
        if match is None and path in self._slots:
            # a tensor that an adapter before this one added
            return Match(path, "exact")
        if (
            match is None
            and self._embeddings.is_tied
            and _is_same_head(path, self._embeddings.output)
        ):
            return Match(self._embeddings.output, "exact")
        return match

    def _take(self, into: dict[str, Any], match: Match, value: object, *, key: str) -> None:
        if match.name in into:
            raise PlanError(
                "two modules of the adapter mean the same base tensor",
                where=f"key '{key}'",
                got=match.name,
                hint="adapter of another model family?",
            )
        into[match.name] = value
        self._matches[match.how] = self._matches.get(match.how, 0) + 1

    def _added(self, adapter: Adapter, replacement: Replacement) -> Match | None:
        """Accept a tensor that the base lacks, of a module in modules_to_save that is all new."""
        listed = tuple(adapter.config.modules_to_save)
        module = next(
            (m for m in _ancestors(replacement.path.rpartition(".")[0]) if m.endswith(listed)), None
        )
        if not listed or module is None or replacement.is_base_copy:
            return None
        parent, _, last = module.rpartition(".")
        # inside something that the base names so, or a head of the model's own
        has_home = self._has_tensors(parent) if parent else module not in WRAPPER_PREFIXES
        # a head beside a stored one would be that one under another name
        is_second_head = last in VOCABULARY_MODULES and self._embeddings.output in self._slots
        if not has_home or self._has_tensors(module, of_base=True) or is_second_head:
            return None
        return Match(replacement.path, "exact")

    def _has_tensors(self, module: str, *, of_base: bool = False) -> bool:
        names = self._base.tensors if of_base else self._slots
        return any(name.startswith(module + ".") for name in names)

    def _unmatched(self, adapter: Adapter, missing: list[tuple[str, str]]) -> PlanError:
        key, path = missing[0]
        count = (
            f"{len(missing)} adapter tensors have" if len(missing) > 1 else "an adapter tensor has"
        )
        return PlanError(
            f"{count} no base tensor, the first is '{key}'",
            where=adapter.path,
            expected=f"'{path}' in {self._base.path}",
            got=f"nearest: {', '.join(self._resolver.nearest(path))}",
            hint=f"another base? The adapter names {adapter.config.base_model!r}; "
            "names of a transformers version that renames layers need transformers installed",
        )

    # tied embeddings

    def _check_tie_is_known(
        self, placed: Mapping[str, Replacement], modules: Mapping[str, LoraModule]
    ) -> None:
        """Refuse a change to a matrix over the vocabulary that may share storage unknown to us."""
        if self._embeddings.is_known:
            return
        vocabulary = self._base.config.get("vocab_size")
        is_untied = is_declared_tied(self._base.config) is False
        for name in (*placed, *modules):
            stored = self._base.tensors.get(name)
            if stored is None or (is_untied and name == self._embeddings.output):
                continue
            rows = stored.shape[0] if len(stored.shape) == 2 else None
            is_embedding = name in modules and modules[name].is_embedding
            if rows is not None and (rows == vocabulary or (is_embedding and vocabulary is None)):
                raise PlanError(
                    "adapter changes a matrix over the vocabulary that this family may share with "
                    "others under names that are not known",
                    where=f"'{name}' of {self._base.path}",
                    hint="merge it with PEFT, or train without the embedding and the head",
                )

    def _untie(
        self,
        adapter: Adapter,
        placed: dict[str, Replacement],
        modules: dict[str, LoraModule],
    ) -> set[str]:
        """Give the output head a tensor of its own where an adapter makes it differ.

        The trained model reads the embedding and the head through different adapter tensors, so the
        faithful merge keeps them apart, where PEFT adds each delta to the one shared tensor.

        Returns:
            Names whose parts are already accounted for, because the other end of the pair carries
            them.
        """
        source, head = self._embeddings.input, self._embeddings.output
        if source is None or head in self._slots or not self._embeddings.is_tied:
            if source in placed.keys() | modules.keys() or head in placed.keys() | modules.keys():
                self._heads_differ = head in self._slots
            return set()
        skipped = set()
        ours, theirs = placed.get(source), placed.get(head)
        if ours is not None and theirs is not None:
            if self._same_bytes(ours.tensor, theirs.tensor):
                skipped.add(head)
            else:
                self._split(source, head)
        elif ours is not None and not ours.is_base_copy and not self._is_resized(source, ours):
            self._split(source, head)
        elif theirs is not None and theirs.is_base_copy:
            # the copy is of the shared tensor: both ends start from it
            self._replace(source, theirs)
            skipped.add(head)
        elif theirs is not None:
            self._split(source, head)
        if head not in self._slots and (source in modules or head in modules):
            if source in modules and head in modules and adapter.config.ensure_weight_tying:
                return skipped | {head}
            # both ends start from the shared tensor, as far as this adapter replaces it
            if ours is not None:
                self._replace(source, ours)
            self._split(source, head)
        return skipped if head not in self._slots or head not in modules else skipped - {head}

    def _split(self, source: str, head: str) -> None:
        self._slots[head] = self._slots[source].copy()
        if self._slots[head].change == "copied":
            self._slots[head].change = "added"
        self._heads_differ = True

    def _is_resized(self, name: str, replacement: Replacement) -> bool:
        return replacement.tensor.shape[:1] != self._slots[name].source.shape[:1]

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


def _is_same_head(path: str, head: str) -> bool:
    return path == head or path.rsplit(".", 2)[-2:] == head.rsplit(".", 2)[-2:]


def _ancestors(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def _check_quantized(base: Checkpoint, adapters: Sequence[Adapter], options: PlanOptions) -> None:
    quantized = base.config.get("quantization_config")
    if quantized and (adapters or options.output_dtype is not None):
        method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else "?"
        raise PlanError(
            "base is quantized: a delta cannot be added to its codes",
            where=base.path,
            expected="the unquantized base (16 or 32 bit)",
            got=f"quantization_config of {method}",
            hint="set model_name_or_path to the model that was quantized",
        )


def _check_weights(adapters: Sequence[Adapter], weights: tuple[float, ...]) -> None:
    if not weights:
        return
    if len(weights) != len(adapters):
        raise ConfigError(
            "adapter_weights and adapter_name_or_path differ in length",
            expected=f"{len(adapters)} weights",
            got=len(weights),
        )
    if any(adapter.config.use_dora for adapter in adapters):
        raise PlanError(
            "adapter_weights cannot be used with DoRA: its result is not a sum",
            hint="leave adapter_weights out to merge one adapter after the other",
        )
    if sum(any(not r.is_base_copy for r in adapter.replacements) for adapter in adapters) > 1:
        raise PlanError(
            "adapter_weights cannot be used where several adapters replace whole tensors",
            hint="leave adapter_weights out to merge one adapter after the other",
        )
