"""Ancestral sampling with Euler steps ("Euler a"): DDPM's chain (Ho et al. 2020) in s = sigma / alpha."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.process.noise import randn_rows
from ldm.process.posterior import q_sample
from ldm.process.schedule import VariancePreserving
from ldm.sampling.denoiser import Callback, Denoiser


def sample(
    denoise: Denoiser,
    x: Tensor,
    schedule: VariancePreserving,
    timesteps: Tensor,
    rng: Sequence[torch.Generator],
    callback: Callback | None = None,
) -> Tensor:
    """Euler's step down to s_down = s_next² / s, then noise up to s_next; the last step is x0.

    s_down² + s_up² = s_next², where s_up² is beta-tilde (eq. 7) divided by alpha_next². Hence it draws from the
    Gaussians of `ldm.sampling.ddpm`, step by step. See `Sampler` for arguments.
    """
    alpha_bar = schedule.alpha_bar_path(timesteps, final=1.0)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    for step, t in enumerate(timesteps):
        prediction = denoise(x, t.expand(len(x)))
        if callback is not None:
            callback(step, t, x, prediction)
        fall = alpha[step] * sigma[step + 1] / (alpha[step + 1] * sigma[step])
        x = q_sample(prediction.x0, prediction.eps, alpha[step + 1], fall * sigma[step + 1])
        if step + 1 < len(timesteps):
            x = x + (1 - fall**2).sqrt() * sigma[step + 1] * randn_rows(x.shape, rng, x.device, x.dtype)
    return x
