"""Denoising diffusion implicit models (Song et al. 2021a)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.process.noise import randn_rows
from ldm.process.posterior import posterior_variance, q_sample
from ldm.process.schedule import VariancePreserving
from ldm.sampling.denoiser import Callback, Denoiser


def sample(
    denoise: Denoiser,
    x: Tensor,
    schedule: VariancePreserving,
    timesteps: Tensor,
    rng: Sequence[torch.Generator],
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """x_prev = alpha_prev·x0 + sqrt(sigma_prev² - s²)·eps + s·z, s = eta·sqrt(beta-tilde) (eq. 12, 16).

    eta = 0 is deterministic, eta = 1 ancestral. Each step goes to the next of the timesteps (diffusers goes
    down by a constant stride, which is the same but for "linspace" and uneven "trailing" spacing), and the
    last step to the first entry of the table, as Stable Diffusion does (set_alpha_to_one = false). See
    `Sampler` for arguments. Raises ValueError for eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; accepted: 0 to 1")
    alpha_bar = schedule.alpha_bar_path(timesteps, final=schedule.final_alpha_bar)
    for step, t in enumerate(timesteps):
        prediction = denoise(x, t.expand(len(x)))
        if callback is not None:
            callback(step, t, x, prediction)
        variance = eta**2 * posterior_variance(alpha_bar[step], alpha_bar[step + 1])
        direction = (1 - alpha_bar[step + 1] - variance).sqrt()
        x = q_sample(prediction.x0, prediction.eps, alpha_bar[step + 1].sqrt(), direction)
        if eta > 0:
            x = x + variance.sqrt() * randn_rows(x.shape, rng, x.device, x.dtype)
    return x
