"""Ancestral sampling: Algorithm 2 of DDPM (Ho et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.process.posterior import model_variance, posterior_mean
from ldm.process.schedule import NoiseSchedule
from ldm.sampling.denoiser import Callback, Denoiser
from ldm.sampling.noise import randn_rows


def sample(
    denoise: Denoiser,
    x: Tensor,
    schedule: NoiseSchedule,
    timesteps: Tensor,
    rng: Sequence[torch.Generator],
    callback: Callback | None = None,
) -> Tensor:
    """x_{t-1} = mu-tilde(x_t, x0) + sqrt(beta-tilde)·z with the estimated x0 (eq. 7).

    beta-tilde is the smaller of the two variances of section 3.2 ("fixed_small"). The last step
    takes the mean (z = 0), which is x0. See `Sampler` for arguments.
    """
    alpha_bar = schedule.alpha_bar_path(timesteps, final=1.0)
    for step, t in enumerate(timesteps):
        prediction = denoise(x, t.expand(len(x)))
        if callback is not None:
            callback(step, t, x, prediction)
        x = posterior_mean(prediction.x0, x, alpha_bar[step], alpha_bar[step + 1])
        if step + 1 < len(timesteps):
            variance = model_variance(alpha_bar[step], alpha_bar[step + 1], "fixed_small")
            x = x + variance.sqrt() * randn_rows(x.shape, rng, x.device, x.dtype)
    return x
