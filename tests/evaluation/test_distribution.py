"""Distances between sets of pictures against closed forms and against torch-fidelity and torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.kid import poly_mmd

from ldm.evaluation.distribution import (
    Z_95,
    figure,
    frechet_figure,
    kernel_figure,
    mean_figure,
    nearest,
    precision_recall,
    resamplings,
)
from ldm.evaluation.metrics import FeatureStatistics, frechet_distance


def normal(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(count: int, mean: Tensor, deviations: Tensor, seed: int) -> Tensor:
    """Features whose sample mean and covariance (diagonal) are exactly these."""
    x = normal(count, len(mean), seed)
    x = torch.linalg.qr(x - x.mean(0)).Q * math.sqrt(count - 1)
    return mean + x * deviations


def none(count: int) -> Tensor:
    return resamplings(count, 0)


@pytest.mark.parametrize(("count", "width"), [(40, 6), (7, 6)], ids=["more pictures", "as many as features and one"])
def test_gaussians_of_known_moments(count: int, width: int) -> None:
    """Commuting covariances: |m1 - m2|^2 + sum (s1 - s2)^2."""
    means = torch.zeros(width).double(), torch.arange(width).double()
    deviations = torch.linspace(0.1, 3, width).double(), torch.linspace(2, 0.5, width).double()
    x, y = (with_moments(count, m, s, i) for i, (m, s) in enumerate(zip(means, deviations, strict=True)))
    expected = float((means[1] ** 2).sum() + (deviations[0] - deviations[1]).square().sum())
    assert frechet_figure(x, y, none(count)).value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("n", "m", "width"), [(30, 20, 8), (5, 50, 8), (6, 4, 16)])
def test_the_weighted_distance_is_the_plain_one_of_the_resampled_set(n: int, m: int, width: int) -> None:
    x, y, weights = normal(n, width, 0), normal(m, width, 1) * 2 + 1, resamplings(n, 5, seed=3)

    def plain(rows: Tensor) -> float:
        sums = FeatureStatistics(), FeatureStatistics()
        sums[0].add(rows)
        sums[1].add(y)
        return frechet_distance(*sums)

    repeated = torch.tensor([plain(x.repeat_interleave(w.long(), 0)) for w in weights])
    found = frechet_figure(x, y, weights)
    assert found.value == pytest.approx(plain(x), rel=1e-6)
    assert found.high - found.value == pytest.approx(Z_95 * float(repeated.std()), rel=1e-4)


def test_a_set_is_at_no_frechet_distance_from_itself() -> None:
    x = normal(12, 20, 0)
    assert frechet_figure(x, x, none(12)).value == pytest.approx(0.0, abs=1e-5)


def test_the_kernel_distance_is_that_of_torchmetrics() -> None:
    x, y = normal(1100, 5, 0).float(), normal(900, 5, 1).float() + 0.3
    expected = float(poly_mmd(y[:900].double(), x[:900].double()))
    assert kernel_figure(x[:900], y, none(900)).value == pytest.approx(expected, rel=1e-6)
    assert kernel_figure(x, y, none(1100)).value > 0  # over several blocks of rows, sets of different sizes


def test_the_kernel_distance_of_equal_distributions_is_zero_on_average() -> None:
    """Unbiased, down to the smallest sets: the mean of many is zero within its standard error, and some are negative."""
    drawn = [kernel_figure(normal(4, 3, 2 * i), normal(5, 3, 2 * i + 1), none(4)).value for i in range(600)]
    mean, error = np.mean(drawn), np.std(drawn) / math.sqrt(len(drawn))
    assert abs(mean) < 4 * error and min(drawn) < 0 < max(drawn)


def test_copies_in_a_bootstrap_sample_are_not_paired() -> None:
    """A pair of copies would raise the within-set similarity; without them the replicates stay about the value."""
    x, y = normal(60, 4, 5), normal(60, 4, 6)
    weights = resamplings(60, 400, seed=1)
    kernel = (x @ x.T / 4 + 1) ** 3
    cross = ((x @ y.T / 4 + 1) ** 3).mean(1)
    w = weights[0]
    pairs = [(i, j) for i in range(60) for j in range(60) if i != j]
    mass = sum(float(w[i] * w[j]) for i, j in pairs)
    within = sum(float(w[i] * w[j] * kernel[i, j]) for i, j in pairs) / mass
    own = (y @ y.T / 4 + 1) ** 3
    reference = (own.sum() - own.trace()) / (60 * 59)
    expected = within + float(reference) - 2 * float(w @ cross) / 60
    one = kernel_figure(x, y, torch.stack([w, torch.ones(60)]))  # two replicates: this one and the value itself
    assert one.high - one.value == pytest.approx(Z_95 * abs(expected - one.value) / math.sqrt(2), rel=1e-6)


def test_precision_and_recall_of_equal_and_of_disjoint_sets() -> None:
    x = normal(30, 4, 0)
    assert [bool(inside.all()) for inside in precision_recall(x, x)] == [True, True]
    assert [bool(inside.any()) for inside in precision_recall(x, x + 100)] == [False, False]


def test_a_model_that_draws_one_mode_is_precise_and_recalls_half() -> None:
    modes = torch.cat([normal(20, 3, 1), normal(20, 3, 2) + 100])
    precise, recalled = precision_recall(modes[:20], modes)
    assert precise.float().mean() == 1 and recalled.float().mean() == 0.5
    assert recalled[:20].all() and not recalled[20:].any()


@pytest.mark.parametrize("neighbours", [3, 5])
def test_precision_and_recall_are_those_of_torch_fidelity(neighbours: int) -> None:
    x, y = normal(1100, 8, 3), normal(700, 8, 4) * 1.2 + 0.3
    expected = prc_features_to_metric(x, y, prc_neighborhood=neighbours, verbose=False)
    precise, recalled = precision_recall(x, y, neighbours)
    assert float(precise.double().mean()) == pytest.approx(expected["precision"], abs=1e-6)
    assert float(recalled.double().mean()) == pytest.approx(expected["recall"], abs=1e-6)


def test_nearest_rows() -> None:
    x, y = normal(1030, 3, 0), normal(50, 3, 1)
    y[7] = x[1029]
    distances, indices = nearest(x, y)
    assert int(indices[1029]) == 7 and float(distances[1029]) < 1e-6
    gaps = (x[:, None] - y[None]).norm(dim=2)
    assert torch.equal(indices, gaps.argmin(1))
    assert_close(distances, gaps.amin(1), atol=1e-6, rtol=1e-6)


def test_bootstrap_samples_have_the_size_of_the_set() -> None:
    weights = resamplings(50, 2000, seed=1)
    assert torch.equal(weights.sum(1), torch.full((2000,), 50.0, dtype=torch.float64))
    assert torch.equal(weights, resamplings(50, 2000, seed=1))
    assert not torch.equal(weights, resamplings(50, 2000, seed=2))
    assert float(weights.var()) == pytest.approx(49 / 50, rel=0.05)  # binomial


def test_the_interval_of_a_share_is_that_of_the_binomial_distribution() -> None:
    right = torch.arange(200) < 60
    found = mean_figure(right, resamplings(200, 4000), 0.0, 1.0)
    assert found.value == pytest.approx(0.3)
    assert (found.high - found.low) / 2 == pytest.approx(Z_95 * math.sqrt(0.3 * 0.7 / 200), rel=0.06)


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(300):
        x = normal(80, 1, seed)[:, 0] + 5
        found = mean_figure(x, resamplings(80, 100, seed), -100.0, 100.0)
        hits += found.low <= 5 <= found.high
    assert 0.90 <= hits / 300 <= 0.99


def test_intervals_stay_in_range_and_need_samples() -> None:
    wide = torch.tensor([-5.0, 5.0])
    assert figure(0.5, wide, 0.0, 1.0).low == 0.0 and figure(0.5, wide, 0.0, 1.0).high == 1.0
    alone = mean_figure(torch.tensor([0.0, 1.0]), none(2), 0.0, 1.0)
    assert (alone.value, alone.low, alone.high) == (0.5, 0.5, 0.5)


def test_sets_that_are_too_small_are_refused() -> None:
    one, two, three = (normal(n, 4, 0) for n in (1, 2, 3))
    for measure in (frechet_figure, kernel_figure):
        for x, y in ((one, two), (two, one)):
            with pytest.raises(ValueError, match="at least 2"):
                measure(x, y, none(len(x)))
    with pytest.raises(ValueError, match="more than 3 pictures on each side, got 3 and 2"):
        precision_recall(three, two)


def test_a_bootstrap_sample_of_one_picture_alone_widens_no_interval() -> None:
    x, y = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mixed, alone = torch.tensor([[1.0, 1.0]] * 3).double(), torch.tensor([[2.0, 0.0]]).double()
    assert kernel_figure(x, y, torch.cat([mixed, alone])) == kernel_figure(x, y, mixed)
