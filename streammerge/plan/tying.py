"""Embedding and output head in one tensor: what an adapter makes of the pair.

A trained model reads the two ends through different adapter tensors, so the faithful merge gives
each end a tensor of its own where they differ. PEFT adds every delta to the one tensor that both
share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge.errors import PlanError
from streammerge.plan.family import is_declared_tied

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from streammerge.adapters.adapter import Replacement, RowReplacement
    from streammerge.adapters.tuners.base import AdapterModule
    from streammerge.checkpoint.header import StoredTensor
    from streammerge.plan.family import Embeddings
    from streammerge.plan.place import Placement

__all__ = ["TieDecision", "check_tie_is_known", "decide_tie"]


@dataclass(frozen=True, slots=True)
class TieDecision:
    """What happens to a pair that is one tensor so far."""

    start: Replacement | None = None
    """What takes the place of the shared tensor first, for both ends."""
    splits: bool = False
    """Whether the head then gets a tensor of its own."""
    placed_done: frozenset[str] = frozenset()
    """Names whose whole tensors `start` accounts for."""
    modules_done: frozenset[str] = frozenset()
    """Names whose factors the other end carries."""


def decide_tie(
    pair: tuple[str, str],
    parts: Placement,
    *,
    shared_rows: int,
    trains_as_one: bool,
    same_bytes: Callable[[StoredTensor, StoredTensor], bool],
) -> TieDecision:
    """Decide what one adapter makes of a tied pair.

    Args:
        pair: Name of the tensor that both ends share, and the name that the head's own
            tensor would have.
        parts: What the adapter has for either end.
        shared_rows: Rows of the shared tensor as it stands.
        trains_as_one: Whether the adapter was trained with `ensure_weight_tying`.
        same_bytes: Says whether two stored tensors hold the same bytes.
    """
    source, head = pair
    placed, modules, rows = parts.placed, parts.layers, parts.rows
    ours, theirs = placed.get(source), placed.get(head)
    start, splits, done = None, False, frozenset[str]()
    if ours is not None and theirs is not None:
        if same_bytes(ours.tensor, theirs.tensor):
            start, done = ours, frozenset({source, head})
        else:
            splits = True
    elif ours is not None:
        # a copy to start from is of the shared tensor, and a vocabulary is resized as a whole
        if ours.is_base_copy or ours.tensor.shape[:1] != (shared_rows,):
            start, done = ours, frozenset({source})
        else:
            splits = True
    elif theirs is not None:
        if theirs.is_base_copy:
            start, done = theirs, frozenset({head})
        else:
            splits = True
    same_rows = _have_same_rows(rows, source, head, same_bytes)
    # rows of the embedding alone are those of a tied head too
    splits = splits or (head in rows and not same_rows)
    both = frozenset({head}) if same_rows else frozenset[str]()
    if splits or (source not in modules and head not in modules):
        return TieDecision(start, splits, done, frozenset() if splits else both)
    if source in modules and head in modules and trains_as_one:
        return TieDecision(start, splits, done, frozenset({head}))
    return TieDecision(start, splits=True, placed_done=done)


def _have_same_rows(
    rows: Mapping[str, RowReplacement],
    source: str,
    head: str,
    same_bytes: Callable[[StoredTensor, StoredTensor], bool],
) -> bool:
    if source not in rows or head not in rows:
        return False
    ours, theirs = rows[source], rows[head]
    return ours.indices == theirs.indices and same_bytes(ours.tensor, theirs.tensor)


def check_tie_is_known(
    embeddings: Embeddings,
    *,
    placed: Collection[str],
    modules: Mapping[str, AdapterModule],
    tensors: Mapping[str, StoredTensor],
    config: Mapping[str, Any],
) -> None:
    """Refuse a change to a matrix over the vocabulary that may share storage under other names.

    Args:
        embeddings: What is known of the base's embeddings.
        placed: Names of the tensors that the adapter replaces, all of them or some rows.
        modules: Its modules, by the names of their weights.
        tensors: The base's tensors.
        config: The base's config.json.

    Raises:
        PlanError: The adapter changes such a matrix.
    """
    if embeddings.is_known:
        return
    vocabulary, is_untied = config.get("vocab_size"), is_declared_tied(config) is False
    for name in (*placed, *modules):
        stored = tensors.get(name)
        if stored is None or len(stored.shape) != 2 or (is_untied and name == embeddings.output):
            continue
        is_embedding = name in modules and modules[name].is_embedding
        if stored.shape[0] == vocabulary or (is_embedding and vocabulary is None):
            raise PlanError(
                "adapter changes a matrix over the vocabulary that this family may share with "
                "others under names that are not known",
                where=f"'{name}' of {stored.path.parent}",
                hint="merge it with PEFT, or train without the embedding and the head",
            )
