"""Ancestral sampling: Algorithm 2 of DDPM (Ho et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.process.noise import randn_rows
from ldm.process.posterior import (
    MODEL_VARIANCES,
    ModelVariance,
    interpolated_log_variance,
    model_variance,
    posterior_mean,
)
from ldm.process.prediction import Prediction
from ldm.process.schedule import VariancePreserving
from ldm.sampling.denoiser import Callback, Denoiser


def sample(
    denoise: Denoiser,
    x: Tensor,
    schedule: VariancePreserving,
    timesteps: Tensor,
    rng: Sequence[torch.Generator],
    callback: Callback | None = None,
    kind: ModelVariance = "fixed_small",
    gradient: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """x_{t-1} = mu-tilde(x_t, x0) + sqrt(variance)·z with the estimated x0 (eq. 7).

    The variance is the network's own where it learnt one (Nichol & Dhariwal 2021, eq. 15), else `kind`, see
    `model_variance`. `gradient`, s·grad log p(y | x_t) from x_t [B, ...] and t [B], moves the mean by variance·gradient
    (Dhariwal & Nichol 2021, algorithm 1). The last step takes the mean (z = 0) of x0 as it is. See `Sampler` for the
    other arguments.
    """
    alpha_bar = schedule.alpha_bar_path(timesteps, final=1.0)
    for step, t in enumerate(timesteps):
        prediction = denoise(x, t.expand(len(x)))
        if callback is not None:
            callback(step, t, x, prediction)
        mean = posterior_mean(prediction.x0, x, alpha_bar[step], alpha_bar[step + 1])
        if step + 1 == len(timesteps):
            return mean
        variance = step_variance(prediction, alpha_bar[step], alpha_bar[step + 1], kind)
        if gradient is not None:
            mean = mean + variance * gradient(x, t.expand(len(x)))
        x = mean + variance.sqrt() * randn_rows(x.shape, rng, x.device, x.dtype)
    return x


def step_variance(prediction: Prediction, alpha_bar: Tensor, alpha_bar_prev: Tensor, kind: ModelVariance) -> Tensor:
    """The variance of p(x_{t-1} | x_t): the learned one, like x_t, or `kind`, a scalar."""
    if prediction.variance is None:
        return model_variance(alpha_bar, alpha_bar_prev, kind)
    small, large = (model_variance(alpha_bar, alpha_bar_prev, bound).log() for bound in MODEL_VARIANCES)
    place = prediction.variance
    return interpolated_log_variance(place, small.to(place), large.to(place)).exp()
