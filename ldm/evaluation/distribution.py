"""Distances between two sets of pictures in a feature space, each with a bootstrap confidence interval.

The intervals say how much a figure would move with other pictures of the same number drawn by the same model: the
generated set is drawn again with replacement (Efron 1979), the reference stays. A resampled set is a vector of weights
[N], how often each picture is taken, so that every measure here is a function of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.evaluation.metrics import FeatureStatistics, covariance_root
from ldm.seeds import generator

Z_95 = 1.959964
"""The standard normal distribution has 95 % of its mass within so many standard deviations."""
ROWS_AT_ONCE = 1024
BY_PRODUCTS = "use_mm_for_euclid_dist"
"""How torch computes distances: in float64 copies of a picture are then about 1e-7 of its norm apart."""


@dataclass(frozen=True)
class Figure:
    """A measured value and the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def resamplings(count: int, times: int, seed: int = 0) -> Tensor:
    """Weights of `times` bootstrap samples of `count` pictures: float64 [times, count], each row summing to `count`."""
    drawn = torch.randint(count, (times, count), generator=generator(seed, "bootstrap", count))
    return torch.zeros(times, count, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(times, count, dtype=torch.float64)
    )


def figure(value: float, replicates: Tensor, low: float = float("-inf"), high: float = float("inf")) -> Figure:
    """The value, plus and minus 1.96 standard deviations of its bootstrap replicates [R], within the metric's range.

    A bootstrap sample holds a picture several times, which raises a Frechet distance: the spread of the replicates is
    that of the metric, their level is not, so percentiles would miss it. Samples of few pictures may hold one of them
    alone, which has no distance to another; such a replicate is not finite and left out.
    """
    replicates = replicates[replicates.isfinite()]
    spread = Z_95 * float(replicates.std()) if len(replicates) > 1 else 0.0
    return Figure(value, max(low, value - spread), min(high, value + spread))


def measured(measure: Callable[[Tensor], Tensor], weights: Tensor, low: float, high: float = float("inf")) -> Figure:
    """A measure of weights [R, N] -> [R], at equal weights and with the spread over the bootstrap samples [R, N]."""
    values = measure(torch.cat([weights.new_ones(1, weights.shape[1]), weights]))
    return figure(float(values[0]), values[1:], low, high)


def mean_figure(values: Tensor, weights: Tensor, low: float, high: float) -> Figure:
    """The mean of one number a picture, [N], in a range."""
    return measured(lambda w: w @ values.double() / len(values), weights, low, high)


def frechet_figure(generated: Tensor, reference: Tensor, weights: Tensor) -> Figure:
    """Squared Frechet distance of Gaussians fitted to features [N, D] and [M, D] (Heusel et al. 2017, equation 6).

    The cross term tr (A^1/2 B A^1/2)^1/2 is the sum of the singular values of X B^1/2 / sqrt(N - 1), where the rows of
    X are the centred generated features: B^1/2 is computed once, and a bootstrap sample weighs rows.

    Raises:
        ValueError: fewer than two pictures on a side.
    """
    statistics = FeatureStatistics()
    statistics.add(reference)
    covariance, count = statistics.covariance(), len(generated)
    if count < 2:
        raise ValueError(f"a covariance needs at least 2 examples, got {count}")
    x = generated.double() - statistics.mean
    y = x @ covariance_root(covariance)
    trace = float(covariance.trace())

    def distance(w: Tensor) -> Tensor:
        mean = w @ x / count
        spread = (w @ x.square().sum(1) - count * mean.square().sum()) / (count - 1)
        rows = w.sqrt()[:, None] * (y - w @ y / count)
        gram = rows @ rows.T if count < y.shape[1] else rows.T @ rows
        cross = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum() / (count - 1) ** 0.5
        squared: Tensor = mean.square().sum() + spread + trace - 2 * cross
        return squared

    return measured(lambda rows: torch.stack([distance(w) for w in rows]).clamp(min=0), weights, 0.0)


def kernel_figure(generated: Tensor, reference: Tensor, weights: Tensor) -> Figure:
    """Kernel distance: unbiased squared MMD under k(x, y) = (x.y / D + 1)^3 (Binkowski et al. 2018, section 4).

    Over all pairs, not over blocks of 1,000 pictures: the same expectation, less variance. Negative values occur.

    Raises:
        ValueError: fewer than two pictures on a side.
    """
    x, y = generated.double(), reference.double()
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError(f"a kernel distance needs at least 2 pictures on each side, got {n} and {m}")
    within_reference = -float(_kernel_of_itself(y).sum())
    for rows in torch.split(y, ROWS_AT_ONCE):
        within_reference += float(_kernel(rows, y).sum())
    cross = torch.cat([_kernel(rows, y).mean(1) for rows in torch.split(x, ROWS_AT_ONCE)])

    def distance(w: Tensor) -> Tensor:
        pairs = torch.zeros(len(w), dtype=torch.float64)
        for rows, part in zip(torch.split(x, ROWS_AT_ONCE), torch.split(w, ROWS_AT_ONCE, 1), strict=True):
            pairs += (part @ _kernel(rows, x) * w).sum(1)
        pairs -= w.square() @ _kernel_of_itself(x)  # no picture is paired with itself or with its copy
        within: Tensor = pairs / (n * n - w.square().sum(1))
        return within + within_reference / (m * (m - 1)) - 2 * (w @ cross) / n

    return measured(distance, weights, float("-inf"))


def precision_recall(generated: Tensor, reference: Tensor, neighbours: int = 3) -> tuple[Tensor, Tensor]:
    """Which generated pictures lie in the reference's manifold, and the other way round: bool [N] and [M].

    A manifold is the union of balls about the pictures of a set, each reaching to its `neighbours`-th nearest other one
    (Kynkaanniemi et al. 2019, equation 1); precision and recall are the means (equation 2).

    Raises:
        ValueError: a set has no more pictures than `neighbours`.
    """
    if min(len(generated), len(reference)) <= neighbours:
        raise ValueError(
            f"precision and recall need more than {neighbours} pictures on each side, "
            f"got {len(generated)} and {len(reference)}"
        )
    return _inside(generated, reference, neighbours), _inside(reference, generated, neighbours)


def nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of [N, D] its distance to the nearest row of [M, D], and which that is: [N] and int64 [N]."""
    found = [block.min(1) for block in _distances(x, y)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def _inside(points: Tensor, centres: Tensor, neighbours: int) -> Tensor:
    # the nearest of the centres to a centre is itself
    radii = torch.cat([block.kthvalue(neighbours + 1).values for block in _distances(centres, centres)])
    return torch.cat([(block <= radii).any(1) for block in _distances(points, centres)])


def _distances(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Euclidean distances [n, M] of the rows of [N, D] to those of [M, D] in float64, some rows at a time."""
    for rows in torch.split(x.double(), ROWS_AT_ONCE):
        yield torch.cdist(rows, y.double(), compute_mode=BY_PRODUCTS)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kernel_of_itself(x: Tensor) -> Tensor:
    return (x.square().mean(1) + 1) ** 3
