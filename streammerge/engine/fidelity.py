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
    from streammerge.plan.merge_plan import MergePlan
    from streammerge.plan.ops import TensorPlan

__all__ = ["DeltaShare", "measure_deltas", "middle_rows", "read_rows", "sample_by_kind"]

# looked at of each weight, from its middle; and weights of each kind, evenly over the layers
SAMPLE_ROWS = 64
SAMPLE_WEIGHTS = 16


@dataclass(slots=True)
class DeltaShare:
    """What became of the deltas of one kind of module: sums over the rows that were looked at."""

    squares: float = 0.0
    """Of the deltas."""
    _along: float = 0.0
    _error: float = 0.0

    @property
    def kept(self) -> float:
        """Share of the delta that is found."""
        return self._along / self.squares if self.squares else 0.0

    @property
    def noise(self) -> float:
        """Size of the error against that of the delta."""
        return (self._error / self.squares) ** 0.5 if self.squares else 0.0

    def add(self, base: torch.Tensor, meant: torch.Tensor, found: torch.Tensor) -> None:
        """Count rows, each (n, K): of the base, with the delta added, and what it came to."""
        delta, change = meant.double() - base.double(), found.double() - base.double()
        self.squares += float(delta.square().sum())
        self._along += float((change * delta).sum())
        self._error += float((change - delta).square().sum())

    def __iadd__(self, other: DeltaShare) -> DeltaShare:
        self.squares += other.squares
        self._along += other._along
        self._error += other._error
        return self


def measure_deltas(plan: MergePlan, folder: Path) -> dict[str, dict[str, float]]:
    """Compare rows of the written codes with the merge and with the base.

    Args:
        plan: What was done.
        folder: Where the shards and config.json are.

    Returns:
        By the last part of a module's path, such as `q_proj`: how many weights were looked at,
        `kept` and `noise`. Empty if nothing was merged into weights that are codes.

    Raises:
        StreamMergeError: The written codes cannot be decoded.
    """
    kinds = sample_by_kind([t for t in plan.tensors if t.encoding is not None and t.terms])
    if not kinds:
        return {}
    from streammerge.quantize.source import MergedSource  # noqa: PLC0415 (planning needs no torch)

    # what is merged, not what is stored
    plain = tuple(replace(tensor, encoding=None) for tensor in plan.tensors)
    merge_plan = replace(plan, contents=replace(plan.contents, tensors=plain))
    found: dict[str, dict[str, float]] = {}
    with MergedSource(merge_plan) as merge, ReaderPool(mode="buffered") as pool:
        written = _decode(plan, folder, pool)
        for kind, targets in kinds.items():
            share = DeltaShare()
            for target in targets:
                rows = middle_rows(target)
                base, coded = (
                    read_rows(t, rows, pool) for t in (target.source, written[target.name])
                )
                share.add(base, merge.rows_between(target.name, *rows), coded)
            found[kind] = {"weights": len(targets), "kept": share.kept, "noise": share.noise}
    return found


def sample_by_kind(targets: Sequence[TensorPlan]) -> dict[str, list[TensorPlan]]:
    """Return some targets of each kind of module, evenly over the layers."""
    kinds: dict[str, list[TensorPlan]] = {}
    for target in targets:
        kinds.setdefault(kind_of(target.name), []).append(target)
    return {kind: every[:: -(-len(every) // SAMPLE_WEIGHTS)] for kind, every in kinds.items()}


def middle_rows(target: TensorPlan) -> tuple[int, int]:
    """Return the first of the rows that are looked at, and the row after the last."""
    begin = max(0, (target.rows - SAMPLE_ROWS) // 2)
    return begin, min(target.rows, begin + SAMPLE_ROWS)


def read_rows(tensor: StoredTensor, rows: tuple[int, int], pool: ReaderPool) -> torch.Tensor:
    """Return rows of a matrix as they are stored, or decoded."""
    import torch  # noqa: PLC0415 (planning needs no torch)

    from streammerge.codecs.tensors import torch_dtype  # noqa: PLC0415

    begin, end = rows
    width = tensor.dtype.nbytes(tensor.shape[-1])
    data = bytearray((end - begin) * width)
    pool.read_part(tensor, begin * width, memoryview(data))
    return torch.frombuffer(data, dtype=torch_dtype(tensor.dtype)).view(end - begin, -1)


def _decode(plan: MergePlan, folder: Path, pool: ReaderPool) -> dict[str, DecodedTensor]:
    """Return the weights that written codes stand for."""
    dtype = next(tensor.dtype for tensor in plan.tensors if tensor.encoding is not None)
    section = plan.contents.config_edits.get("quantization_config")
    codec = find_codec(section or plan.base_config["quantization_config"], dtype)
    tensors = [tensor for shard in plan.shards for tensor in read_header(folder / shard.name)[0]]
    return {
        weight.name: DecodedTensor.of(weight)
        for weight in codec.find(tensors, read_whole(pool)).weights
    }
