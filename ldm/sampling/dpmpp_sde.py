"""SDE-DPM-Solver++(2M): the stochastic second-order multistep solver in log-SNR (Lu et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.process.noise import randn_rows
from ldm.process.schedule import VariancePreserving, finite_log_snr
from ldm.sampling.denoiser import Callback, Denoiser


def sample(
    denoise: Denoiser,
    x: Tensor,
    schedule: VariancePreserving,
    timesteps: Tensor,
    rng: Sequence[torch.Generator],
    callback: Callback | None = None,
) -> Tensor:
    """x_next = sigma_next/sigma·e^-h·x + alpha_next·(1 - e^-2h)·D + sigma_next·sqrt(1 - e^-2h)·z.

    h and D, from the last two x0, are those of `ldm.sampling.dpmpp`, and so are the timesteps that diffusers'
    solver visits. The first step and the last one, to sigma = 0, take D = x0. See `Sampler` for arguments.
    """
    alpha_bar = schedule.alpha_bar_path(timesteps, final=1.0)
    alpha, sigma, half_log_snr = alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), finite_log_snr(alpha_bar) / 2
    h = half_log_snr.diff()
    renewed = -torch.expm1(-2 * h)
    last_x0: Tensor | None = None
    for step, t in enumerate(timesteps):
        prediction = denoise(x, t.expand(len(x)))
        if callback is not None:
            callback(step, t, x, prediction)
        x0, inside = prediction.x0, step + 1 < len(timesteps)
        if last_x0 is not None and inside:
            x0 = x0 + (x0 - last_x0) * h[step] / (2 * h[step - 1])
        x = sigma[step + 1] / sigma[step] * torch.exp(-h[step]) * x + alpha[step + 1] * renewed[step] * x0
        if inside:
            x = x + sigma[step + 1] * renewed[step].sqrt() * randn_rows(x.shape, rng, x.device, x.dtype)
        last_x0 = prediction.x0
    return x
