"""Codebooks to begin with: k-means of a weight's groups, then of what the first leaves, and so on.

Groups of inputs are divided by the scales of their rows, and count by the square of that scale and
the mean square of their inputs. Means start from points that are drawn with a chance in proportion
to their distance from those drawn before (Arthur and Vassilvitskii, "k-means++", 2007).
"""

from __future__ import annotations

import torch

from streammerge.quantize.codebooks import LEAST_SCALE

__all__ = ["start_books", "start_scales"]

# groups that means are looked for in, at least, and per entry of a codebook
SAMPLE, SAMPLE_PER_ENTRY = 1 << 14, 4
ITERATIONS = 10
# drawings of points to begin with, in as many steps
DRAWS = 64
# distances in float32 at a time
CHUNK_VALUES = 1 << 22


def start_scales(weight: torch.Tensor) -> torch.Tensor:
    """Return the root mean square of each row of (N, K), (N,) float32, or the least scale."""
    features = weight.shape[1]
    scales: torch.Tensor = (
        torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32) / features**0.5
    )
    return scales.clamp_(min=LEAST_SCALE)


def start_books(
    weight: torch.Tensor,
    scales: torch.Tensor,
    diagonal: torch.Tensor,
    *,
    shape: tuple[int, int, int],
    generator: torch.Generator,
) -> torch.Tensor:
    """Return codebooks, (C, V, G) float32.

    Args:
        weight: (N, K), any float dtype; is not changed.
        scales: (N,) float32.
        diagonal: (K,) float32: mean squares of the inputs.
        shape: C, V and G.
        generator: Draws the sample and the points to begin with.
    """
    count, entries, size = shape
    points, weights = _sample(
        weight, scales, diagonal.view(-1, size).mean(dim=1), entries, generator
    )
    books = []
    for _ in range(count):
        means = _means(points, weights, entries, generator)
        books.append(means)
        points -= means[_nearest(points, means)[0]]
    return torch.stack(books)


def _sample(
    weight: torch.Tensor,
    scales: torch.Tensor,
    importance: torch.Tensor,
    entries: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return groups (S, G) and what they count (S,), all of them if there are not many."""
    groups = len(importance)
    size, total = weight.shape[1] // groups, len(weight) * groups
    wanted = max(SAMPLE, SAMPLE_PER_ENTRY * entries)
    if total <= wanted:
        places = torch.arange(total)
    else:
        places = torch.randint(total, (wanted,), generator=generator)
    rows, group = places // groups, places % groups
    columns = group[:, None] * size + torch.arange(size)
    points = weight[rows[:, None], columns].to(torch.float32) / scales[rows, None]
    return points, scales[rows].square() * importance[group]


def _means(
    points: torch.Tensor, weights: torch.Tensor, entries: int, generator: torch.Generator
) -> torch.Tensor:
    """Return weighted means, (V, G)."""
    if not bool(weights.any()):
        weights = torch.ones_like(weights)
    means = _draw(points, weights, entries, generator)
    for _ in range(ITERATIONS):
        nearest, distances = _nearest(points, means)
        sums = torch.zeros_like(means).index_add_(0, nearest, points * weights[:, None])
        counts = means.new_zeros(entries).index_add_(0, nearest, weights)
        is_used = counts > 0
        means[is_used] = sums[is_used] / counts[is_used, None]
        # means that nothing is near go to the points that lose most
        unused = (~is_used).nonzero()[:, 0][: len(points)]
        means[unused] = points[(distances * weights).topk(len(unused)).indices]
    return means


def _draw(
    points: torch.Tensor, weights: torch.Tensor, entries: int, generator: torch.Generator
) -> torch.Tensor:
    """Draw points far from each other, (V, G)."""
    step = -(-entries // DRAWS)
    first = torch.randint(len(points), (step,), generator=generator)
    found = [points[first]]
    distances = _nearest(points, found[0])[1]
    for _ in range(step, entries, step):
        chances = distances * weights
        if int((chances > 0).sum()) < step:
            chances = chances + chances.max() * 1e-6 + 1e-30
        drawn = points[torch.multinomial(chances, step, generator=generator)]
        found.append(drawn)
        distances = torch.minimum(distances, _nearest(points, drawn)[1])
    return torch.cat(found)[:entries].clone()


def _nearest(points: torch.Tensor, means: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the number of the nearest mean of each point, and its squared distance."""
    norms = means.square().sum(dim=1)
    nearest, distances = [], []
    for part in torch.split(points, max(1, CHUNK_VALUES // len(means))):
        least, number = torch.addmm(norms, part, means.T, alpha=-2).min(dim=1)
        nearest.append(number)
        distances.append(least.add_(part.square().sum(dim=1)).clamp_(min=0.0))
    return torch.cat(nearest), torch.cat(distances)
