"""SSIM, running moments and the Fréchet distance against torchmetrics, numpy, scipy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.testing import assert_close
from torchmetrics.functional.image import structural_similarity_index_measure

from ldm.evaluation.metrics import FeatureStatistics, frechet_distance, ssim


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def statistics(features: Tensor, size: int = 1000) -> FeatureStatistics:
    sums = FeatureStatistics()
    for batch in features.split(size):
        sums.add(batch)
    return sums


def with_moments(mean: Tensor, covariance: Tensor, count: int, seed: int) -> Tensor:
    """Features whose sample mean and unbiased sample covariance are exactly these."""
    noise = torch.randn(count, len(mean), generator=rng(seed), dtype=torch.float64)
    noise -= noise.mean(0)
    white = noise @ torch.linalg.inv(torch.linalg.cholesky(noise.T @ noise / (count - 1))).T
    return mean + white @ torch.linalg.cholesky(covariance).T


@pytest.mark.parametrize("size", [(11, 11), (16, 24), (64, 64)])
@pytest.mark.parametrize("noise", [0.01, 0.3, 2.0])
def test_ssim_is_that_of_torchmetrics_away_from_its_padding(size: tuple[int, int], noise: float) -> None:
    coarse = torch.rand(3, 3, 4, 4, generator=rng(1)) * 2 - 1
    x = torch.nn.functional.interpolate(coarse, size, mode="bilinear")
    y = (x + noise * torch.randn(x.shape, generator=rng(2))).clamp(-1, 1)
    _, maps = structural_similarity_index_measure(
        (y.double() + 1) / 2, (x.double() + 1) / 2, data_range=1.0, reduction="none", return_full_image=True
    )
    assert_close(ssim(x, y), maps[..., 5:-5, 5:-5].mean((1, 2, 3)), atol=1e-6, rtol=1e-6)
    assert_close(ssim(x, y), ssim(y, x))


def test_ssim_by_hand() -> None:
    """Equal pictures have 1; two flat ones of levels a, b differ in luminance only: (2ab + C1) / (a^2 + b^2 + C1)."""
    x = torch.rand(2, 3, 16, 16, generator=rng(3)) * 2 - 1
    assert_close(ssim(x, x), torch.ones(2).double())
    flat = torch.full((1, 3, 12, 12), -0.5), torch.full((1, 3, 12, 12), 0.5)
    assert ssim(*flat).item() == pytest.approx((2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4), rel=1e-9)


def test_ssim_refuses_pictures_smaller_than_its_window() -> None:
    with pytest.raises(ValueError, match="at least 11 x 11 pixels, got 16 x 10"):
        ssim(torch.zeros(1, 3, 10, 16), torch.zeros(1, 3, 10, 16))


@pytest.mark.parametrize("size", [1, 7, 40, 1000])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_running_moments_are_those_of_all_features(size: int, offset: float) -> None:
    features = torch.randn(100, 5, generator=rng(4), dtype=torch.float64) @ torch.randn(
        5, 5, generator=rng(5), dtype=torch.float64
    )
    sums = statistics(features + offset, size)
    assert sums.count == 100
    assert_close(sums.mean - offset, features.mean(0), atol=1e-8, rtol=1e-8)
    assert_close(sums.covariance().numpy(), np.cov(features.numpy(), rowvar=False), atol=1e-7, rtol=1e-7)


def test_a_covariance_needs_two_examples() -> None:
    with pytest.raises(ValueError, match="at least 2 examples, got 0"):
        FeatureStatistics().covariance()
    with pytest.raises(ValueError, match="at least 2 examples, got 1"):
        statistics(torch.ones(1, 3)).covariance()


def test_gaussians_whose_covariances_commute() -> None:
    """Closed form: |m1 - m2|^2 + sum (sqrt a - sqrt b)^2 over the common eigenvectors."""
    a, b = torch.tensor([4.0, 1.0, 9.0, 0.25]).double(), torch.tensor([1.0, 1.0, 16.0, 4.0]).double()
    turn = torch.linalg.qr(torch.randn(4, 4, generator=rng(6), dtype=torch.float64)).Q
    means = torch.zeros(4).double(), torch.tensor([3.0, 0.0, 4.0, 0.0]).double()
    sums = [
        statistics(with_moments(mean, (turn * values) @ turn.T, 50, seed))
        for seed, (mean, values) in enumerate(zip(means, (a, b), strict=True), 7)
    ]
    expected = 25 + float((a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(*sums) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(*reversed(sums)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("count", [10, 400], ids=["fewer than dimensions", "more"])
def test_a_set_is_at_no_distance_from_itself_and_a_shift_is_its_length(count: int) -> None:
    features = torch.randn(count, 32, generator=rng(9), dtype=torch.float64) * torch.logspace(-4, 2, 32).double()
    assert frechet_distance(statistics(features), statistics(features, 3)) == pytest.approx(0.0, abs=1e-9)
    shifted = frechet_distance(statistics(features), statistics(features + 0.5))
    assert shifted == pytest.approx(0.25 * 32, rel=1e-9)


@pytest.mark.parametrize("width", [2, 16, 48])
def test_the_distance_is_that_of_a_general_matrix_root(width: int) -> None:
    x = torch.randn(200, width, generator=rng(10), dtype=torch.float64)
    y = torch.randn(300, width, generator=rng(11), dtype=torch.float64) @ torch.randn(
        width, width, generator=rng(12), dtype=torch.float64
    )
    a, b = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    step = x.numpy().mean(0) - y.numpy().mean(0)
    expected = step @ step + np.trace(a) + np.trace(b) - 2 * np.trace(scipy.linalg.sqrtm(a @ b)).real
    assert frechet_distance(statistics(x), statistics(y)) == pytest.approx(float(expected), rel=1e-8)


def test_a_singular_covariance_is_no_obstacle() -> None:
    """All spread on one axis, variances 4 and 9: (3 - 2)^2."""
    line = torch.linspace(-1, 1, 20, dtype=torch.float64)
    line /= line.std()
    sums = [statistics(torch.outer(line * scale, torch.tensor([1.0, 0.0, 0.0]).double())) for scale in (2.0, 3.0)]
    assert frechet_distance(*sums) == pytest.approx(1.0, rel=1e-9)
