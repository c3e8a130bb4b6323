"""Heun's method on the probability-flow ODE (Karras et al. 2022, algorithm 1)."""

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
    """An Euler step, then the same step with the mean of the slopes at both ends: two calls an interval.

    Second order in s = sigma / alpha. The last step, to sigma = 0, is Euler's, and so is one from zero
    terminal SNR, where s is infinite. See `Sampler` for arguments; `rng` is not touched.
    """
    alpha_bar = schedule.alpha_bar_path(timesteps, final=1.0)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    for step, t in enumerate(timesteps):
        prediction = denoise(x, t.expand(len(x)))
        if callback is not None:
            callback(step, t, x, prediction)
        x = q_sample(prediction.x0, prediction.eps, alpha[step + 1], sigma[step + 1])
        if alpha[step] > 0 and step + 1 < len(timesteps):
            slope = denoise(x, timesteps[step + 1].expand(len(x))).eps
            stride = sigma[step + 1] - alpha[step + 1] * sigma[step] / alpha[step]
            x = x + stride * (slope - prediction.eps) / 2
    return x
