"""Predictor-corrector sampling of the reverse SDE (Song et al. 2021b)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.process.noise import randn_rows
from ldm.process.posterior import posterior_mean, posterior_variance
from ldm.process.prediction import Prediction
from ldm.process.schedule import VariancePreserving
from ldm.sampling.denoiser import Callback, Denoiser
from ldm.sampling.langevin import langevin_step

Predictor = Callable[[Tensor, Prediction, Tensor, Tensor, Tensor], Tensor]
"""(x_t, its prediction, alpha_bar, alpha_bar_prev, z ~ N(0, I)) -> x_{t-1}."""


def ancestral(x: Tensor, prediction: Prediction, alpha_bar: Tensor, alpha_bar_prev: Tensor, noise: Tensor) -> Tensor:
    """DDPM's ancestral step (Ho et al. 2020, eq. 7), exact for a known x0 whatever the length of the step."""
    mean = posterior_mean(prediction.x0, x, alpha_bar, alpha_bar_prev)
    return mean + posterior_variance(alpha_bar, alpha_bar_prev).sqrt() * noise


def reverse_diffusion(
    x: Tensor, prediction: Prediction, alpha_bar: Tensor, alpha_bar_prev: Tensor, noise: Tensor
) -> Tensor:
    """(2 - sqrt(1 - beta))·x + beta·score + sqrt(beta)·z (algorithm 3); for small beta."""
    beta = 1 - alpha_bar / alpha_bar_prev
    score = -prediction.eps / (1 - alpha_bar).sqrt()
    return (2 - (1 - beta).sqrt()) * x + beta * score + beta.sqrt() * noise


def sample(
    denoise: Denoiser,
    x: Tensor,
    schedule: VariancePreserving,
    timesteps: Tensor,
    rng: Sequence[torch.Generator],
    callback: Callback | None = None,
    predict: Predictor = ancestral,
    corrections: int = 1,
    snr: float = 0.16,
) -> Tensor:
    """A step of the predictor to the next noise level, then `corrections` Langevin steps there (algorithm 3).

    The two predictors agree for a fine division of time; the paper's own for this process is `reverse_diffusion`,
    while `ancestral` stays right in few steps. The last step, to sigma = 0, is the predictor's mean. `snr` is r of
    algorithm 5. See `Sampler` for arguments. Raises ValueError for negative corrections or snr.
    """
    if corrections < 0 or snr < 0:
        raise ValueError(f"corrections is {corrections} and snr {snr}; accepted: at least 0")
    alpha_bar = schedule.alpha_bar_path(timesteps, final=1.0)
    for step, t in enumerate(timesteps):
        prediction = denoise(x, t.expand(len(x)))
        if callback is not None:
            callback(step, t, x, prediction)
        last = step + 1 == len(timesteps)
        noise = torch.zeros_like(x) if last else randn_rows(x.shape, rng, x.device, x.dtype)
        x = predict(x, prediction, alpha_bar[step], alpha_bar[step + 1], noise)
        for _ in range(0 if last else corrections):
            eps = denoise(x, timesteps[step + 1].expand(len(x))).eps
            noise = randn_rows(x.shape, rng, x.device, x.dtype)
            x = correct(x, eps, noise, alpha_bar[step + 1], alpha_bar[step + 2], snr)
    return x


def correct(x: Tensor, eps: Tensor, noise: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor, snr: float) -> Tensor:
    """The Langevin corrector: x + e·score + sqrt(2e)·z, e = 2·alpha_t·(r·|z| / |score|)² (algorithm 5).

    The norms are an image's own, so that it does not depend on its batch; alpha_t = alpha_bar / alpha_bar_prev.
    """
    sigma, dims = (1 - alpha_bar).sqrt(), tuple(range(1, x.ndim))
    lengths = [torch.linalg.vector_norm(a, dim=dims, keepdim=True) for a in (noise, eps / sigma)]
    size = 4 * alpha_bar / alpha_bar_prev * (snr * lengths[0] / lengths[1]) ** 2
    return langevin_step(x, eps, noise, sigma, size)
