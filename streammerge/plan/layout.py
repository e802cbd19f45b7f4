"""Divide the output into shards: names, offsets and headers, fixed before any write."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Literal

from streammerge.checkpoint.header import encode_header

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from streammerge.checkpoint.header import TensorSpec
    from streammerge.plan.ops import TensorPlan

__all__ = ["Layout", "PlacedTensor", "ShardPlan", "encode_index", "lay_out"]

Layout = Literal["safetensors", "torch_bin"]


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A weight and its place in its shard."""

    tensor: TensorPlan
    offsets: tuple[int, ...]
    """Of each stored tensor of it; in the file for safetensors, through the tensors' data alone for
    `.bin` files.
    """


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One output file."""

    name: str
    tensors: tuple[PlacedTensor, ...]
    head: bytes
    """What goes before the data; empty for `.bin` files, whose writer makes it."""
    data_bytes: int

    @property
    def specs(self) -> list[TensorSpec]:
        """What is stored, weight after weight."""
        return [spec for placed in self.tensors for spec in placed.tensor.specs]

    @property
    def is_sequential(self) -> bool:
        """Whether its bytes are made in their order in the file."""
        starts = [offset for placed in self.tensors for offset in placed.offsets]
        return all(earlier <= later for earlier, later in pairwise(starts))

    @property
    def file_bytes(self) -> int:
        """Size of the file; without the archive's own few bytes for `.bin` files."""
        return len(self.head) + self.data_bytes


def lay_out(
    tensors: Sequence[TensorPlan],
    *,
    max_shard_bytes: int | None,
    layout: Layout,
    base_shards: Mapping[str, Path] | None = None,
) -> tuple[ShardPlan, ...]:
    """Divide tensors into shards, in their order.

    Args:
        tensors: Every output tensor.
        max_shard_bytes: Most bytes of tensors in a shard; a larger tensor gets a shard of its own.
            None keeps the base's own division: a new shard where the source file changes.
        layout: The format of the files.
        base_shards: Where the base has each tensor, for its own division.
    """
    groups = (
        _keep(tensors, base_shards or {})
        if max_shard_bytes is None
        else _fill(tensors, max_shard_bytes)
    )
    return tuple(
        _place(group, name=_shard_name(number, len(groups), layout), layout=layout)
        for number, group in enumerate(groups, start=1)
    )


def encode_index(shards: Sequence[ShardPlan]) -> str:
    """Return the index file's text; `total_size` counts bytes of tensors."""
    index = {
        "metadata": {"total_size": sum(shard.data_bytes for shard in shards)},
        "weight_map": {spec.name: shard.name for shard in shards for spec in shard.specs},
    }
    return json.dumps(index, indent=2, ensure_ascii=False) + "\n"


def _fill(tensors: Sequence[TensorPlan], max_shard_bytes: int) -> list[list[TensorPlan]]:
    groups: list[list[TensorPlan]] = []
    filled = 0
    for tensor in tensors:
        if not groups or filled + tensor.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    return groups


def _keep(tensors: Sequence[TensorPlan], base_shards: Mapping[str, Path]) -> list[list[TensorPlan]]:
    groups: list[list[TensorPlan]] = []
    current: Path | None = None
    for tensor in tensors:
        # a tensor that the base does not have stays with its neighbours
        is_new = tensor.change in {"replaced", "added"}
        home = base_shards.get(tensor.name, current if is_new else tensor.source.path)
        if not groups or (home != current and current is not None):
            groups.append([])
        current = home
        groups[-1].append(tensor)
    return groups


def _place(group: list[TensorPlan], *, name: str, layout: Layout) -> ShardPlan:
    specs = [spec for tensor in group for spec in tensor.specs]
    position = 0
    is_misaligned = False
    for spec in specs:
        is_misaligned |= bool(position % spec.dtype.item_bytes)
        position += spec.nbytes
    if is_misaligned:
        # the format has no padding: wider items first keeps every tensor on its own boundary
        specs.sort(key=lambda spec: -spec.dtype.item_bytes)
    if layout == "torch_bin":
        head, offsets = b"", list(accumulate((spec.nbytes for spec in specs), initial=0))[:-1]
    else:
        head, offsets = encode_header(specs)
    at = {spec.name: offset for spec, offset in zip(specs, offsets, strict=True)}
    placed = [PlacedTensor(t, tuple(at[spec.name] for spec in t.specs)) for t in group]
    if is_misaligned:
        # in the order of the file; what is empty has the offset of what comes after it
        order = {spec.name: number for number, spec in enumerate(specs)}
        placed.sort(key=lambda one: order[one.tensor.specs[0].name])
    return ShardPlan(name, tuple(placed), head, position)


def _shard_name(number: int, count: int, layout: Layout) -> str:
    stem, suffix = ("model", "safetensors") if layout == "safetensors" else ("pytorch_model", "bin")
    return f"{stem}.{suffix}" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.{suffix}"
