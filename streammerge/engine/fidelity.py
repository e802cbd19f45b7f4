"""How much of what an adapter adds is still there once weights are codes.

With W a weight of the base, M the merged one and Q what its codes stand for, `d = M - W`:

    kept  = <Q - W, d> / <d, d>    1 if Q is M; 0 if the codes are those of W
    noise = ||Q - M|| / ||d||      how large the error of the codes is against what was added
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from streammerge.checkpoint.header import read_header
from streammerge.checkpoint.reader import ReaderPool
from streammerge.codecs.decoded import DecodedTensor, read_whole
from streammerge.codecs.registry import find_codec
from streammerge.plan.ops import kind_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from streammerge.checkpoint.header import StoredTensor
    from streammerge.dtypes import Dtype
    from streammerge.plan.merge_plan import MergePlan
    from streammerge.plan.ops import TensorPlan

__all__ = ["DeltaShare", "measure_deltas"]

# looked at of each weight, from its middle; and weights of each kind, evenly over the layers
SAMPLE_ROWS = 64
SAMPLE_WEIGHTS = 48


@dataclass(slots=True)
class DeltaShare:
    """What became of the deltas of one kind of module."""

    weights: int = 0
    """How many were looked at."""
    _along: float = 0.0
    _squares: float = 0.0
    _error: float = 0.0

    @property
    def kept(self) -> float:
        """Share of the delta that the codes hold."""
        return self._along / self._squares if self._squares else 0.0

    @property
    def noise(self) -> float:
        """Size of the codes' error against that of the delta."""
        return (self._error / self._squares) ** 0.5 if self._squares else 0.0

    def add(self, base: torch.Tensor, merged: torch.Tensor, coded: torch.Tensor) -> None:
        """Count rows, each (n, K)."""
        delta = merged.double() - base.double()
        self._along += float(((coded.double() - base.double()) * delta).sum())
        self._squares += float(delta.square().sum())
        self._error += float((coded.double() - merged.double()).square().sum())

    def describe(self) -> dict[str, float]:
        """Give it as JSON types."""
        return {"weights": self.weights, "kept": self.kept, "noise": self.noise}


def measure_deltas(plan: MergePlan, folder: Path) -> dict[str, DeltaShare]:
    """Compare rows of the written codes with the merge and with the base.

    Args:
        plan: What was done.
        folder: Where the shards and config.json are.

    Returns:
        By the last part of a module's path, such as `q_proj`; empty if nothing was merged into
        weights that are codes.

    Raises:
        StreamMergeError: The written codes cannot be decoded.
    """
    targets = _sample([t for t in plan.tensors if t.encoding is not None and t.terms])
    if not targets:
        return {}
    from streammerge.quantize.source import MergedSource  # noqa: PLC0415 (planning needs no torch)

    shares: dict[str, DeltaShare] = {}
    # what is merged, not what is stored
    plain = tuple(replace(tensor, encoding=None) for tensor in plan.tensors)
    contents = replace(plan.contents, tensors=plain)
    merge_plan = replace(plan, contents=contents)
    with MergedSource(merge_plan) as merge, ReaderPool(mode="buffered") as pool:
        assert targets[0].encoding is not None
        written = _decode(plan, folder, pool, dtype=targets[0].encoding.dtype)
        for target in targets:
            begin = max(0, (target.rows - SAMPLE_ROWS) // 2)
            end = min(target.rows, begin + SAMPLE_ROWS)
            share = shares.setdefault(kind_of(target.name), DeltaShare())
            share.weights += 1
            for at, merged in merge.pieces(target.name, begin, end):
                rows = at, at + len(merged)
                base = _rows(target.source, rows, pool)
                share.add(base, merged, _rows(written[target.name], rows, pool))
    return shares


def _sample(targets: Sequence[TensorPlan]) -> list[TensorPlan]:
    """Take some of each kind."""
    kinds: dict[str, list[TensorPlan]] = {}
    for target in targets:
        kinds.setdefault(kind_of(target.name), []).append(target)
    return [
        target for found in kinds.values() for target in found[:: -(-len(found) // SAMPLE_WEIGHTS)]
    ]


def _decode(
    plan: MergePlan, folder: Path, pool: ReaderPool, *, dtype: Dtype
) -> dict[str, DecodedTensor]:
    """Return the weights that written codes stand for."""
    section = plan.contents.config_edits.get("quantization_config")
    codec = find_codec(section or plan.base_config["quantization_config"], dtype)
    tensors = [tensor for shard in plan.shards for tensor in read_header(folder / shard.name)[0]]
    return {
        weight.name: DecodedTensor.of(weight)
        for weight in codec.find(tensors, read_whole(pool)).weights
    }


def _rows(tensor: StoredTensor, rows: tuple[int, int], pool: ReaderPool) -> torch.Tensor:
    import torch  # noqa: PLC0415 (planning needs no torch)

    from streammerge.codecs.tensors import torch_dtype  # noqa: PLC0415

    begin, end = rows
    width = tensor.dtype.nbytes(tensor.shape[-1])
    data = bytearray((end - begin) * width)
    pool.reader(tensor.file).read_into(tensor.offset + begin * width, memoryview(data))
    return torch.frombuffer(data, dtype=torch_dtype(tensor.dtype)).view(end - begin, -1)
