"""RoAd: pairs of a layer's outputs are rotated and scaled; so are the rows of W, and the bias.

    W'[i] = f[i] * W[i] - s[i] * W[j]
    W'[j] = s[j] * W[i] + f[j] * W[j]       j = i + g / 2, in each group of g outputs

    f = alpha * cos(theta), s = alpha * sin(theta), rounded to W's dtype

    road_1    a pair has one theta and one alpha
    road_2    each output has its own
    road_4    f and s have their own, those of f first in each group

PEFT multiplies by a matrix (N, N) of these numbers. A product of two rows alone gives the same
bits: of a narrow W because the two products are exact in float32; of others because BLAS adds one
of them up with the other in the order of the columns, unless it divides the sum between them (MKL
does where a group lies across a multiple of 384, or is wider than that). A tile may have one row of
a pair without the other, which is then read again. PEFT's product with a bias adds up in another
order, so that whole rows of the matrix are taken for it, some at a time.

Paper: Liao and Monz 2024, "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient
Batching and Composability". Source: peft.tuners.road.layer. Shapes: N out_features, K in_features,
g group size.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from streammerge.adapters.terms import TunerTerm
from streammerge.adapters.tuners.base import PlannedTerm, Tuner
from streammerge.adapters.tuners.dense import linear_size
from streammerge.errors import AdapterError, PlanError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from streammerge.adapters.options import Options
    from streammerge.adapters.terms import Weight
    from streammerge.adapters.tuners.base import AdapterModule, Layer, Shared
    from streammerge.checkpoint.header import StoredTensor

__all__ = ["TUNERS", "Road", "RoadTerm"]

# pairs that are multiplied at a time; always as many, so that the kernel is the same
PAIRS = 16
# rows of the matrix that a bias is multiplied by at a time
MATRIX_ROWS = 64
# numbers per output, by variant
_NUMBERS = {"road_1": 0.5, "road_2": 1, "road_4": 2}


@dataclass(frozen=True, slots=True)
class RoadSettings:
    """What a RoAd configuration says of the merge."""

    variant: str
    group_size: int

    def size(self, outputs: int) -> int:
        """Return how many angles a layer of some outputs has."""
        return int(outputs * _NUMBERS[self.variant])


@dataclass(frozen=True, slots=True)
class _Pairs:
    """What every output is made of: of the first and of the second of its pair, and how much."""

    of_first: torch.Tensor
    """(N,)"""
    of_second: torch.Tensor
    """(N,)"""
    weight: Weight
    """To read rows again from that are in another tile."""


@dataclass(frozen=True, slots=True)
class RoadTerm(TunerTerm):
    """Rotate pairs of rows, or of a bias's values."""

    theta: StoredTensor
    alpha: StoredTensor
    settings: RoadSettings

    @property
    def factors(self) -> tuple[StoredTensor, ...]:
        """Angles and scales."""
        return (self.theta, self.alpha)

    def work_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what the numbers of all rows hold, and what is multiplied at a time."""
        columns = prod(shape[1:])
        rows = 2 * min(MATRIX_ROWS, shape[0]) * shape[0] if columns == 1 else 3 * PAIRS * columns
        return 8 * (12 * shape[0] + rows)

    def prepare(self, factors: list[torch.Tensor], weight: Weight) -> Any:
        """Compute what every row is made of, and a whole bias."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        theta, alpha = factors
        f, s = _numbers(theta, alpha, self.settings)
        half = self.settings.group_size // 2
        is_first = torch.arange(len(f)) // half % 2 == 0
        # rounded as PEFT rounds its matrix, and exact in the compute dtype
        of_first = torch.where(is_first, f, s).to(weight.dtype).to(f.dtype)
        of_second = torch.where(is_first, -s, f).to(weight.dtype).to(f.dtype)
        pairs = _Pairs(of_first, of_second, weight)
        return _whole(pairs, half) if prod(weight.shape[1:]) == 1 else pairs

    def apply(self, rows: torch.Tensor, begin: int, state: Any) -> torch.Tensor:
        """Rotate these rows with their partners."""
        import torch  # noqa: PLC0415 (planning needs no torch)

        if isinstance(state, torch.Tensor):
            return state[begin : begin + len(rows)]
        half = self.settings.group_size // 2
        # a copy: reading other rows writes over what these may lie in
        wide = torch.empty(rows.shape, dtype=state.of_first.dtype).copy_(rows)
        result = torch.empty_like(wide)
        for first, last, is_first in _runs(begin, begin + len(rows), half):
            own = wide[first - begin : last - begin]
            at = first + (half if is_first else -half)
            if begin <= at and at + len(own) <= begin + len(wide):
                other = wide[at - begin : at - begin + len(own)]
            else:
                other = state.weight.rows(at, at + len(own)).to(wide.dtype)
            pair = (own, other) if is_first else (other, own)
            result[first - begin : last - begin] = _mix(
                pair, state.of_first[first:last], state.of_second[first:last]
            )
        return result.to(rows.dtype)


class Road(Tuner):
    """`peft_type: ROAD`."""

    peft_type = "ROAD"
    title = "RoAd (road_1, road_2, road_4)"
    formula = "R @ W and R @ bias, R rotating and scaling pairs of outputs"
    factors = frozenset({"road_theta", "road_alpha"})
    options = frozenset({"group_size", "variant"})

    def read(self, options: Options) -> RoadSettings:
        """Read variant and group size.

        Raises:
            AdapterError: They are not sound.
        """
        variant = options.choice("variant", "road_1", "road_2", "road_4")
        group_size = options.count("group_size", 64)
        if group_size % 2:
            raise options.bad("group_size", expected="an even number")
        return RoadSettings(variant, group_size)

    def check(self, module: AdapterModule, settings: RoadSettings) -> None:
        """Check that there are as many scales as angles.

        Raises:
            AdapterError: There are not.
        """
        del settings
        theta, alpha = module.need("road_theta", "road_alpha")
        if len(theta.shape) != 1 or theta.shape != alpha.shape or not theta.shape[0]:
            raise AdapterError(
                "angles and scales of the adapter do not belong together",
                where=module.where,
                expected="two vectors of the same length",
                got=f"road_theta {theta.shape}, road_alpha {alpha.shape}",
            )

    def plan(self, layer: Layer, settings: RoadSettings, shared: Shared) -> Sequence[PlannedTerm]:
        """Plan the rotation of the weight, and of the bias if there is one.

        Raises:
            PlanError: It is of another size.
        """
        del shared
        outputs, _ = linear_size(layer)
        theta, alpha = layer.module.need("road_theta", "road_alpha")
        if theta.shape[0] != settings.size(outputs):
            raise layer.mismatch(f"{settings.variant} with {theta.shape[0]} angles")
        if outputs % settings.group_size:
            raise PlanError(
                "layer cannot be divided into the groups of adapter_config.json",
                where=layer.module.where,
                expected=f"a multiple of group_size {settings.group_size}",
                got=f"{outputs} outputs",
                hint="adapter_config.json belongs to another adapter?",
            )
        term = RoadTerm(theta, alpha, settings)
        return [PlannedTerm(name, term) for name in ("weight", "bias") if name in layer.parameters]

    def variants(self, settings: RoadSettings) -> tuple[str, ...]:
        """Name the variant."""
        return (settings.variant,)

    def describe(self, module: AdapterModule, settings: RoadSettings) -> dict[str, Any]:
        """Give the number of angles and the size of the groups."""
        (theta,) = module.need("road_theta")
        return {
            "angles": theta.shape[0],
            "group_size": settings.group_size,
            "dtype": theta.dtype.value,
        }


TUNERS: tuple[Tuner, ...] = (Road(),)


def _numbers(
    theta: torch.Tensor, alpha: torch.Tensor, settings: RoadSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return f and s, each (N,)."""
    group = settings.group_size
    if settings.variant == "road_4":
        angles, scales = (vector.reshape(-1, 2, group) for vector in (theta, alpha))
        f = scales[:, 0].flatten() * angles[:, 0].cos().flatten()
        return f, scales[:, 1].flatten() * angles[:, 1].sin().flatten()
    if settings.variant == "road_1":
        theta, alpha = (
            vector.reshape(-1, group // 2).repeat_interleave(2, dim=0).flatten()
            for vector in (theta, alpha)
        )
    return alpha * theta.cos(), alpha * theta.sin()


def _runs(begin: int, end: int, half: int) -> Iterator[tuple[int, int, bool]]:
    """Yield ranges of rows in the same half of a group, and whether it is the first half."""
    while begin < end:
        number = begin // half
        last = min(end, (number + 1) * half)
        yield begin, last, number % 2 == 0
        begin = last


def _mix(
    pair: tuple[torch.Tensor, torch.Tensor], of_first: torch.Tensor, of_second: torch.Tensor
) -> torch.Tensor:
    """Return `of_first * pair[0] + of_second * pair[1]` for rows (n, K), rounded as BLAS rounds."""
    import torch  # noqa: PLC0415 (planning needs no torch)

    first, second = pair
    result = torch.empty_like(first)
    factor = first.new_zeros(PAIRS, 2 * PAIRS)
    rows = first.new_zeros(2 * PAIRS, first.shape[1])
    for at in range(0, len(first), PAIRS):
        part = slice(at, at + PAIRS)
        count = len(first[part])
        factor[:, :PAIRS].diagonal()[:count] = of_first[part]
        factor[:, PAIRS:].diagonal()[:count] = of_second[part]
        rows[:count] = first[part]
        rows[PAIRS : PAIRS + count] = second[part]
        # what the part before left behind in the rows below is not used
        result[part] = torch.mm(factor, rows)[:count]
    return result


def _whole(pairs: _Pairs, half: int) -> torch.Tensor:
    """Return all rows of a matrix of one column, or of a vector."""
    import torch  # noqa: PLC0415 (planning needs no torch)

    values = pairs.weight.whole().view(-1).to(pairs.of_first.dtype)
    count = len(values)
    step = min(MATRIX_ROWS, count)
    result = torch.empty_like(values)
    for begin in range(0, count, step):
        rows = torch.arange(begin, min(begin + step, count))
        first = rows - rows // half % 2 * half
        matrix = values.new_zeros(step, count)
        matrix[rows - begin, first] = pairs.of_first[rows]
        matrix[rows - begin, first + half] = pairs.of_second[rows]
        result[rows] = torch.mv(matrix, values)[: len(rows)]
    return result.to(pairs.weight.dtype).view(-1, 1)
