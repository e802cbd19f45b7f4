"""The arithmetic of a merge on a device: kernels, and torch for what none of them does.

Both take rows as they are stored and write merged ones. With `numerics: peft` every term is rounded
to the weight's dtype, as PEFT does, else all of them once. So the result differs from the CPU's by
the order of F32 sums alone: with T roundings, e the error bound of such a sum, u the unit roundoff
of the weight's dtype, and V_t the weight after t terms,

    |GPU - CPU| <= sum over t of (2 u |V_t| + 2 e)

which is one unit in the last place per rounding, where F32 is much finer than the dtype.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from streammerge.codecs.tensors import torch_dtype
from streammerge.plan.ops import ApplyTerms

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streammerge.backends.device_terms import DeviceTerm
    from streammerge.config.tuning import KernelShape
    from streammerge.plan.ops import Numerics, TensorPlan

__all__ = ["RANKS", "SCRATCH_STEPS", "STEP_BYTES", "Kernels", "Part", "load_kernels",
           "merge_with_kernels", "merge_with_torch", "shape_key"]  # fmt: skip

# a weight that takes a launch of its own; smaller ones share one
GROUPED_BYTES = 4 << 20
# the highest ranks that share a shape of tiles
RANKS = (16, 64, 256)
# of rows in the compute dtype that torch has in hand; it takes SCRATCH_STEPS times as much
STEP_BYTES = 16 << 20
SCRATCH_STEPS = 6


@dataclass(frozen=True, slots=True)
class Kernels:
    """The launchers that a merge needs."""

    merge: Any
    dora: Any
    grouped: Any
    shapes: Mapping[str, Any] = field(default_factory=dict)
    """Measured shapes of tiles, by `shape_key`; what is not here has the kernels' own."""

    def with_shapes(self, shapes: Mapping[str, KernelShape]) -> Kernels:
        """Return the launchers with shapes that were measured."""
        from streammerge_kernels.tile import TileConfig  # noqa: PLC0415 (imports triton)

        return replace(self, shapes={k: TileConfig(**asdict(s)) for k, s in shapes.items()})

    def shape(self, operation: str, a: torch.Tensor) -> Any:
        """Return the shape of tiles for a factor (R, K); None for that of the kernel's tables."""
        return self.shapes.get(shape_key(operation, a.dtype, len(a)))


def shape_key(operation: str, dtype: torch.dtype, rank: int) -> str:
    """Name what has a shape of tiles of its own."""
    width = "fp32" if dtype is torch.float32 else "half"
    return f"{operation} {width} {next((r for r in RANKS if rank <= r), RANKS[-1])}"


class Part(NamedTuple):
    """Rows of one target on the device."""

    target: TensorPlan
    terms: Sequence[DeviceTerm]
    begin: int
    """Number of the first row."""
    rows: torch.Tensor
    """(n, columns) as stored."""
    out: torch.Tensor
    """(n, columns) of the result."""


class _Launch(NamedTuple):
    """One term on those rows of its region that are here."""

    weight: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None
    rounds_delta: bool
    out: torch.Tensor


def load_kernels() -> Kernels:
    """Import the kernels.

    Raises:
        ModuleNotFoundError: Triton is not installed.
    """
    from streammerge_kernels import (  # noqa: PLC0415 (of the extra `gpu`)
        dora_merge_,
        grouped_lora_merge_,
        lora_merge_,
    )

    return Kernels(lora_merge_, dora_merge_, grouped_lora_merge_)


def merge_with_kernels(kernels: Kernels, parts: Sequence[Part]) -> None:
    """Merge parts of targets, the first term of all of them, then the second, and so on."""
    for number in range(max(len(part.terms) for part in parts)):
        launches = []
        for part in parts:
            if number < len(part.terms):
                launches += _launch_of(part, number)
        _run(kernels, launches)


def _launch_of(part: Part, number: int) -> list[_Launch]:
    """Return what a term does to the rows that are here; the first one moves them to the output."""
    term = part.terms[number]
    weight = part.out if number else part.rows
    if term.rows is None or term.columns is None:
        b = term.b[part.begin : part.begin + len(part.rows)]
        magnitude = term.magnitude
        if magnitude is not None:
            magnitude = magnitude[part.begin : part.begin + len(part.rows)]
        return [_Launch(weight, term.a, b, term.scaling, magnitude, term.rounds_delta, part.out)]
    if not number:
        part.out.copy_(part.rows)
    inside = _inside(part, term)
    if not inside:
        return []
    place, b = part.out[inside.start - part.begin : inside.stop - part.begin], term.b
    place = place[:, term.columns.start : term.columns.stop]
    b = b[inside.start - term.rows.start : inside.stop - term.rows.start]
    return [_Launch(place, term.a, b, term.scaling, None, term.rounds_delta, place)]


def _inside(part: Part, term: DeviceTerm) -> range:
    """Return the rows of a term's region that are here."""
    here = range(part.begin, part.begin + len(part.rows))
    if term.rows is None:
        return here
    return range(max(here.start, term.rows.start), min(here.stop, term.rows.stop))


def _run(kernels: Kernels, launches: list[_Launch]) -> None:
    """Launch kernels: one for all small weights that are alike, and one for each other."""
    groups: dict[tuple[Any, ...], list[_Launch]] = {}
    deltas = []
    for wanted in launches:
        launch = wanted
        if wanted.rounds_delta:
            # merged into zeros, a delta is rounded as the result would be
            zeros = torch.zeros(wanted.out.shape, dtype=wanted.out.dtype, device=wanted.out.device)
            launch = wanted._replace(weight=zeros, out=zeros)
            deltas.append((wanted, zeros))
        if launch.magnitude is None and launch.weight.is_contiguous():
            size = launch.weight.nbytes
            if size <= GROUPED_BYTES:
                key = (launch.weight.dtype, launch.a.dtype, launch.b.dtype, len(launch.a))
                groups.setdefault(key, []).append(launch)
                continue
        _run_one(kernels, launch)
    for group in groups.values():
        if len(group) == 1:
            _run_one(kernels, group[0])
        else:
            kernels.grouped(
                [launch.weight for launch in group],
                [(launch.a, launch.b, launch.scaling) for launch in group],
                out=[launch.out for launch in group],
                config=kernels.shape("grouped", group[0].a),
            )

    for wanted, delta in deltas:
        torch.add(wanted.weight, delta, out=wanted.out)


def _run_one(kernels: Kernels, launch: _Launch) -> None:
    terms = [(launch.a, launch.b, launch.scaling)]
    if launch.magnitude is None:
        config = kernels.shape("merge", launch.a)
        kernels.merge(launch.weight, terms, out=launch.out, config=config)
    else:
        config = kernels.shape("dora", launch.a)
        kernels.dora(launch.weight, terms, launch.magnitude, out=launch.out, config=config)


def merge_with_torch(part: Part, numerics: Numerics) -> None:
    """Merge rows as the CPU's backend does, operation by operation."""
    op = part.target.op
    assert isinstance(op, ApplyTerms)
    work = torch_dtype(op.work_dtype)
    compute = torch.float64 if work is torch.float64 else torch.float32
    count = max(1, STEP_BYTES // max(1, part.target.columns * compute.itemsize))
    for at in range(0, len(part.rows), count):
        rows, out = part.rows[at : at + count], part.out[at : at + count]
        step = part._replace(begin=part.begin + at, rows=rows, out=out)
        wide = rows.to(work).to(compute)
        rounded = work if numerics == "peft" and work is not compute else None
        for term in part.terms:
            _add(step, term, wide, rounded)
        out.copy_(wide.to(work) if numerics == "peft" else wide)


def _add(part: Part, term: DeviceTerm, wide: torch.Tensor, rounded: torch.dtype | None) -> None:
    """Add a term to those of its rows that are here.

    Args:
        part: The rows.
        term: The term.
        wide: The rows in the compute dtype; changed in place.
        rounded: The dtype to which PEFT rounds, if that is not the compute dtype.
    """
    inside = _inside(part, term)
    if not inside:
        return
    place = wide[inside.start - part.begin : inside.stop - part.begin]
    if term.columns is not None:
        place = place[:, term.columns.start : term.columns.stop : term.columns.step]
    if rounded is not None:
        # what the term before this one left
        place.copy_(place.to(rounded))
    first = inside.start - (term.rows.start if term.rows is not None else 0)
    delta = term.b[first : first + len(inside)].to(wide.dtype) @ term.a.to(wide.dtype)
    delta *= term.scaling
    if term.rounds_delta:
        delta = delta.to(rounded)
    place += delta
    if term.magnitude is not None:
        norm = torch.linalg.vector_norm(place, dim=1)
        place *= (term.magnitude[first : first + len(inside)] / norm).view(-1, 1)
