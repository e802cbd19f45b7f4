"""Choose codebook entries for a weight, group by group, and let the groups behind make up for each.

With U upper triangular, `U^T U = (H + damping)^-1`, and U_g its block of a group g of inputs, what
a row w loses is, when each group's values q_g are fixed in turn,

    e_g  = (w_g - q_g) U_g^-1
    w_j  = w_j - e_g U[g, j]                for the groups j behind g
    lost = sum_g |e_g|^2                    the same as `(w - q) (H + damping) (w - q)^T`

so that the sum up to a group is what is lost even if all groups behind it are chosen freely. Of
each row the choices with the smallest sums survive (a beam, or K-best decoding). Groups whose
inputs are greatest come first: what is left in the end cannot be made up for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Beam", "Triangle", "columns_of", "search"]

# inputs whose effect on those behind is applied by one product
BLOCK = 128
# values in float32 at a time: of rows with their survivors, of distances to entries
CHUNK_VALUES = 1 << 21


@dataclass(frozen=True, slots=True)
class Beam:
    """How many choices are looked at."""

    survivors: int
    """Of a row, from one group to the next."""
    picks: int
    """Sums of entries that are looked at for each, before the last codebook."""


@dataclass(frozen=True, slots=True)
class Triangle:
    """The matrix of inputs as the search takes it."""

    order: torch.Tensor
    """(groups,): numbers of groups, in the order of work."""
    upper: torch.Tensor
    """(K, K) float32: U, in the order of work."""
    metrics: torch.Tensor
    """(groups, G, G) float32: the inverse of each group's block of U, in the order of work."""

    @classmethod
    def of(cls, order: torch.Tensor, upper: torch.Tensor) -> Triangle:
        """Cut a factor into groups of inputs."""
        group_size = len(upper) // len(order)
        blocks = [
            upper[begin : begin + group_size, begin : begin + group_size]
            for begin in range(0, len(upper), group_size)
        ]
        metrics = torch.stack(blocks)
        unit = torch.eye(group_size, dtype=upper.dtype, device=upper.device)
        inverse = torch.linalg.solve_triangular(metrics, unit.expand_as(metrics), upper=True)
        return cls(order, upper, inverse)

    @property
    def step(self) -> int:
        """Inputs whose effect on those behind is applied at once: whole groups."""
        size = self.metrics.shape[-1]
        return max(size, BLOCK // size * size)


def search(
    weight: torch.Tensor,
    books: torch.Tensor,
    scales: torch.Tensor,
    triangle: Triangle,
    beam: Beam,
) -> torch.Tensor:
    """Return entries for each row of a weight.

    Args:
        weight: (N, K), any float dtype; is not changed.
        books: (C, V, G) float32.
        scales: (N,) float32, none of them 0.
        triangle: Of the inputs.
        beam: How many choices are looked at.

    Returns:
        (N, K / G, C) int32: numbers of entries.
    """
    size = max(1, CHUNK_VALUES // (weight.shape[1] * beam.survivors))
    columns = columns_of(triangle.order, books.shape[2])
    codes = torch.empty(
        len(weight), len(triangle.order), len(books), dtype=torch.int32, device=weight.device
    )
    for begin in range(0, len(weight), size):
        rows = slice(begin, begin + size)
        part = weight[rows].to(torch.float32)[:, columns]
        solved = _Rows(part, books, scales[rows], triangle, beam).solve()
        codes[rows, triangle.order] = solved
    return codes


def columns_of(order: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return the inputs of groups, (K,), in the order of the groups."""
    inputs = torch.arange(group_size, device=order.device)
    return (order[:, None] * group_size + inputs).flatten()


class _Rows:
    """Some rows on their way through the groups.

    s is the number of survivors at a place, which grows from 1.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        books: torch.Tensor,
        scales: torch.Tensor,
        triangle: Triangle,
        beam: Beam,
    ) -> None:
        self._left = weight[:, None]
        self._books, self._scales = books, scales[:, None, None]
        self._triangle, self._beam = triangle, beam
        self._index = torch.arange(len(weight), device=weight.device)[:, None]
        self._lost = weight.new_zeros(len(weight), 1)
        self._codes = torch.empty(
            len(weight), 1, 0, len(books), dtype=torch.int32, device=weight.device
        )

    def solve(self) -> torch.Tensor:
        """Return the best entries, (n, groups, C)."""
        features = self._left.shape[2]
        for begin in range(0, features, self._triangle.step):
            self._block(begin, min(begin + self._triangle.step, features))
        return self._codes[self._index[:, 0], self._lost.argmin(dim=1)]

    def _block(self, begin: int, end: int) -> None:
        """Choose entries for the groups of some inputs; afterwards `_left` has those behind."""
        upper, size = self._triangle.upper, self._books.shape[2]
        count, width = len(self._index), end - begin
        parents = torch.zeros_like(self._lost, dtype=torch.int64)
        parents += torch.arange(parents.shape[1], device=parents.device)
        current = self._left[:, :, :width]
        errors = current.new_zeros(count, current.shape[1], width)
        for place in range(0, width, size):
            group = slice(place, place + size)
            target = current[:, :, group]
            if place:
                above = upper[begin : begin + place, begin + place : begin + place + size]
                target = target - errors[:, :, :place] @ above
            number = (begin + place) // size
            chosen, came_from, error = self._group(target, self._triangle.metrics[number])
            kept = self._index, came_from
            errors, current, parents = errors[kept], current[kept], parents[kept]
            self._codes = torch.cat([self._codes[kept], chosen[:, :, None]], dim=2)
            errors[:, :, group] = error
        if end < self._left.shape[2] + begin:
            rest = self._left[:, :, width:][self._index, parents]
            self._left = rest.sub_(errors @ upper[begin:end, end:])

    def _group(
        self, target: torch.Tensor, metric: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose entries for one group of every survivor, of which the best go on.

        Args:
            target: (n, s, G)
            metric: (G, G)

        Returns:
            Of those that go on: entries (n, s', C), whom they come from (n, s'), and their errors
            (n, s', G).
        """
        count, survivors, size = target.shape
        scaled = (target / self._scales).reshape(-1, size) @ metric
        tables = self._books @ metric
        lost, left, entries = _pick(scaled, tables, self._beam.picks)
        picks = lost.shape[1]
        lost = lost.view(count, survivors, picks) + self._lost[:, :, None]
        wanted = min(self._beam.survivors, survivors * picks)
        self._lost, best = lost.flatten(1).topk(wanted, dim=1, largest=False, sorted=False)
        left = left.view(count, survivors * picks, size)[self._index, best]
        chosen = entries.view(count, survivors * picks, -1)[self._index, best]
        if len(tables) > 1:
            # that of the last codebook, of those alone that go on
            entry = _distances(left.flatten(0, 1), tables[-1]).argmin(dim=1).view(count, wanted)
            left = left - tables[-1][entry]
            chosen = torch.cat([chosen, entry[:, :, None].to(torch.int32)], dim=2)
        return chosen, best // picks, left * self._scales


def _pick(
    target: torch.Tensor, tables: torch.Tensor, picks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the best sums of entries, each with its best entry of the last codebook.

    Args:
        target: (m, G)
        tables: (C, V, G)
        picks: Sums that go on from one codebook to the next.

    Returns:
        What they lose (m, p); what they leave of the target (m, p, G), and their entries (m, p, C)
        int32, without the last codebook if there are several.
    """
    most = tables.shape[1] * (picks if len(tables) > 1 else 1)
    parts = torch.split(target, max(1, CHUNK_VALUES // most))
    found = zip(*(_pick_of(part, tables, picks) for part in parts), strict=True)
    lost, left, entries = (torch.cat(part) for part in found)
    return lost, left, entries


def _pick_of(
    target: torch.Tensor, tables: torch.Tensor, picks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    count, size = target.shape
    index = torch.arange(count, device=target.device)[:, None]
    left = target[:, None]
    entries = torch.empty(count, 1, 0, dtype=torch.int32, device=target.device)
    lost = target.square().sum(dim=1, keepdim=True)
    for table in tables[: max(1, len(tables) - 1)]:
        sums, choices = left.shape[1], len(table)
        change = _distances(left.reshape(-1, size), table).view(count, sums, choices)
        total = change.add_(lost[:, :, None]).flatten(1)
        wanted = min(picks, sums * choices)
        lost, best = total.topk(wanted, dim=1, largest=False, sorted=False)
        came_from, entry = best // choices, best % choices
        left = left[index, came_from] - table[entry]
        entries = torch.cat([entries[index, came_from], entry[:, :, None].to(torch.int32)], dim=2)
    if len(tables) > 1:
        # the least without its place takes a fifth of the time
        least = _distances(left.flatten(0, 1), tables[-1]).amin(dim=1)
        lost = lost + least.view(lost.shape)
    return lost, left, entries


def _distances(left: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return by how much each entry of (V, G) changes the squares of (m, G), (m, V)."""
    return torch.addmm(table.square().sum(dim=1), left, table.T, alpha=-2)
