"""Figures that compare pictures or sets of pictures; none of them knows a model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
"""Constants of SSIM for pictures in [0, 1] (Wang et al. 2004, section III.C)."""


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair of images [B, 3, H, W] in [-1, 1], whose peak is 2: [B]."""
    mse = (x - y).square().flatten(1).mean(1)
    return 10 * torch.log10(4.0 / mse)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of each pair of images [B, C, H, W] in [-1, 1]: [B], 1 for equal ones.

    Wang et al. 2004, equation 13, on [0, 1] with a Gaussian window of 11 x 11 (sigma 1.5) inside the picture: mean
    over channels and over the window's positions. In float64 on the CPU: on flat ground the variances, differences
    of nearly equal numbers, stand beside C2 = 0.0009.

    Raises:
        ValueError: a side is shorter than the window.
    """
    if min(x.shape[2:]) < WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {WINDOW} x {WINDOW} pixels, got {x.shape[3]} x {x.shape[2]}")
    x, y = (x.cpu().double() + 1) / 2, (y.cpu().double() + 1) / 2
    mean_x, mean_y, xx, yy, xy = _windowed(torch.stack([x, y, x * x, y * y, x * y]))
    variances, covariance = xx - mean_x.square() + yy - mean_y.square(), xy - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1)
    similarity: Tensor = luminance * (2 * covariance + C2) / (variances + C2)
    return similarity.flatten(1).mean(1)


def _windowed(maps: Tensor) -> Tensor:
    """Gaussian means of maps [5, B, C, H, W] over every window that lies inside: [5, B, C, H - 10, W - 10]."""
    offsets = torch.arange(WINDOW, dtype=maps.dtype) - WINDOW // 2
    weights = torch.softmax(-offsets.square() / (2 * SIGMA**2), 0)
    flat = maps.flatten(0, 2).unsqueeze(1)
    means = F.conv2d(F.conv2d(flat, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return means.view(*maps.shape[:3], *means.shape[2:])


class FeatureStatistics:
    """Mean and covariance of features that come in batches, in float64 on the CPU; no feature is kept."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Merges a batch [B, D] into the running sums (Chan et al. 1979, equation 2.1)."""
        features = features.detach().cpu().double()
        size, mean = len(features), features.mean(0)
        if self.count == 0:
            self.mean, self.scatter = torch.zeros_like(mean), mean.new_zeros(len(mean), len(mean))
        centred, step = features - mean, mean - self.mean
        self.scatter += centred.T @ centred + torch.outer(step, step) * (self.count * size / (self.count + size))
        self.mean += step * (size / (self.count + size))
        self.count += size

    def covariance(self) -> Tensor:
        """Unbiased covariance [D, D].

        Raises:
            ValueError: fewer than two examples were added.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 examples, got {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared Fréchet distance of the Gaussians with these moments (Dowson and Landau 1982; Heusel et al. 2017, eq. 6).

    ``|mean_a - mean_b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2``. The last trace is the sum of the singular values
    of ``A^1/2 B^1/2``: it is real for every pair of covariances, singular ones included.

    Raises:
        ValueError: fewer than two examples on a side.
    """
    first, second = a.covariance(), b.covariance()
    cross = torch.linalg.svdvals(covariance_root(first) @ covariance_root(second)).sum()
    squared = (a.mean - b.mean).square().sum() + first.trace() + second.trace() - 2 * cross
    return max(0.0, float(squared))


def covariance_root(covariance: Tensor) -> Tensor:
    """Symmetric square root of a covariance; eigenvalues that rounding made negative count as zero."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root
