"""The whole plan of an export: everything that will happen, known before anything does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from streammerge.plan.ops import ApplyTerms, BiasTerm, LoraTerm, TunerTerm, unique_factors

if TYPE_CHECKING:
    from pathlib import Path

    from streammerge.checkpoint.sidecars import Sidecars
    from streammerge.config.tuning import IoChoice
    from streammerge.plan.build import TensorPlans
    from streammerge.plan.layout import ShardPlan
    from streammerge.plan.memory import MemoryPlan, RunShape
    from streammerge.plan.ops import Numerics, TensorPlan, Term

__all__ = ["MergePlan"]


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Every output byte's origin, and what the run will cost."""

    base: Path
    adapters: tuple[Path, ...]
    output: Path
    layout: Literal["safetensors", "torch_bin"]
    numerics: Numerics
    contents: TensorPlans
    shards: tuple[ShardPlan, ...]
    sidecars: Sidecars
    io: IoChoice
    shape: RunShape
    """The threads and buffers that the run would like to have."""
    memory: MemoryPlan
    """The buffers that it will have."""
    base_config: dict[str, Any]
    notes: tuple[str, ...]
    reader_bytes: int = 0
    """What readers hold that make values of what they read; `memory` has it."""

    @property
    def tensors(self) -> tuple[TensorPlan, ...]:
        """Every output tensor."""
        return self.contents.tensors

    @property
    def targets(self) -> tuple[TensorPlan, ...]:
        """The tensors that do not pass through unchanged."""
        return tuple(tensor for tensor in self.tensors if tensor.change != "copied")

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that the run reads, adapters included."""
        terms = [term for tensor in self.tensors for term in tensor.terms]
        factors = [f for term in terms if isinstance(term, LoraTerm) for f in (term.a, term.b)]
        # the targets that take parts of a factor take all of it together
        shared = dict.fromkeys(factor.tensor for factor in factors if factor.is_part)
        whole = [f for t in self.tensors for f in unique_factors(t.terms) if f not in shared]
        read = [*shared, *whole, *(tensor.source for tensor in self.tensors)]
        return sum(tensor.stored_bytes for tensor in read)

    @property
    def bytes_written(self) -> int:
        """Bytes of the output shards."""
        return sum(shard.file_bytes for shard in self.shards)

    def describe(self) -> dict[str, Any]:
        """Give the plan as JSON types."""
        return {
            "base": str(self.base),
            "adapters": [str(path) for path in self.adapters],
            "output_dir": str(self.output),
            "format": self.layout,
            "numerics": self.numerics,
            "tensors_total": len(self.tensors),
            "tensors_changed": len(self.targets),
            "tensors_copied": len(self.tensors) - len(self.targets),
            "adapter_tensors_used": self.contents.adapter_tensors_used,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "predicted_peak_bytes": self.memory.predicted_peak_bytes,
            "least_memory_bytes": self.memory.least_bytes,
            "read_mode": self.io.read_mode,
            "write_mode": self.io.write_mode,
            "shards": [
                {"name": s.name, "bytes": s.file_bytes, "tensors": len(s.tensors)}
                for s in self.shards
            ],
            "targets": [_describe_target(tensor) for tensor in self.targets],
            "names": self.contents.matches,
            "config_edits": self.contents.config_edits,
            "sidecars": [sidecar.name for sidecar in self.sidecars.files],
            "not_copied": list(self.sidecars.left_out),
            "notes": list(self.notes),
        }


def _describe_term(term: Term) -> str:
    if isinstance(term, TunerTerm):
        return type(term).__name__
    if isinstance(term, BiasTerm):
        return "bias"
    return "DoRA" if term.magnitude is not None else "LoRA"


def _describe_target(tensor: TensorPlan) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": tensor.name,
        "change": tensor.change,
        "dtype": tensor.dtype.value,
        "shape": list(tensor.shape),
    }
    if isinstance(tensor.op, ApplyTerms) and tensor.terms:
        described["terms"] = list(dict.fromkeys(map(_describe_term, tensor.terms)))
        scalings = [term.scaling for term in tensor.terms if not isinstance(term, TunerTerm)]
        # of the experts of a fused tensor they are one and the same
        described["scalings"] = list(dict.fromkeys(scalings))
    return described
