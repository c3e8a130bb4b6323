"""DPM-Solver++(2M): a second-order multistep solver in log-SNR (Lu et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
    """x_next = sigma_next/sigma·x - alpha_next·(e^-h - 1)·D, D from the last two x0 (algorithm 2).

    h is the step in lambda = log(alpha / sigma). The first step and the last one, to sigma = 0, take D = x0.
    See `Sampler` for arguments; `rng` is not touched. For the timesteps that diffusers' solver visits, drop
    the last one of num_steps + 1 where the spacing is "leading" or "linspace".
    """
    alpha_bar = schedule.alpha_bar_path(timesteps, final=1.0)
    alpha, sigma, half_log_snr = alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), finite_log_snr(alpha_bar) / 2
    h = half_log_snr.diff()
    last_x0: Tensor | None = None
    for step, t in enumerate(timesteps):
        prediction = denoise(x, t.expand(len(x)))
        if callback is not None:
            callback(step, t, x, prediction)
        x0 = prediction.x0
        if last_x0 is not None and step + 1 < len(timesteps):
            x0 = x0 + (x0 - last_x0) * h[step] / (2 * h[step - 1])
        x = sigma[step + 1] / sigma[step] * x - alpha[step + 1] * torch.expm1(-h[step]) * x0
        last_x0 = prediction.x0
    return x
