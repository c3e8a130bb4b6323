"""Euler's method on the probability-flow ODE (Karras et al. 2022, algorithm 1 without the correction)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
    """One Euler step an interval, the last one to sigma = 0. See `Sampler`; `rng` is not touched.

    In y = x / alpha and s = sigma / alpha the ODE is dy/ds = eps, so y_next = y + (s_next - s)·eps.
    Multiplied by alpha_next this is alpha_next·x0 + sigma_next·eps, which also holds at zero terminal SNR,
    where s is infinite.
    """
    alpha_bar = schedule.alpha_bar_path(timesteps, final=1.0)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    for step, t in enumerate(timesteps):
        prediction = denoise(x, t.expand(len(x)))
        if callback is not None:
            callback(step, t, x, prediction)
        x = q_sample(prediction.x0, prediction.eps, alpha[step + 1], sigma[step + 1])
    return x
