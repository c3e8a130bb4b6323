"""Annealed Langevin dynamics (Song & Ermon 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.process.noise import randn_rows
from ldm.process.schedule import VariancePreserving
from ldm.sampling.denoiser import Callback, Denoiser


def sample(
    denoise: Denoiser,
    x: Tensor,
    schedule: VariancePreserving,
    timesteps: Tensor,
    rng: Sequence[torch.Generator],
    callback: Callback | None = None,
    substeps: int = 5,
    step_size: float = 1.0,
) -> Tensor:
    """Algorithm 1: at each noise level `substeps` Langevin steps of size a = step_size·sigma², then the next level.

    The paper adds noise to unscaled data, y = x / alpha, and keeps y between levels; so x is multiplied by
    alpha_next / alpha, except from zero terminal SNR, where it is noise alone. `step_size` is its epsilon /
    sigma_L²: 0.2 with 100 substeps there, too little for few substeps to follow the levels. One call more than
    substeps·S turns the last x into x0 (Jolicoeur-Martineau et al. 2021). See `Sampler` for arguments. Raises
    ValueError for substeps < 1 and for step_size outside (0, 4), where the steps move away from the data.
    """
    if substeps < 1 or not 0 < step_size < 4:
        raise ValueError(f"substeps is {substeps} and step_size {step_size}; accepted: at least 1, and within (0, 4)")
    alpha_bar = schedule.alpha_bar_path(timesteps, final=1.0)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    for step, t in enumerate(timesteps):
        if step > 0 and alpha[step - 1] > 0:
            x = x * (alpha[step] / alpha[step - 1])
        for substep in range(substeps):
            prediction = denoise(x, t.expand(len(x)))
            if callback is not None and substep == 0:
                callback(step, t, x, prediction)
            noise = randn_rows(x.shape, rng, x.device, x.dtype)
            x = langevin_step(x, prediction.eps, noise, sigma[step], step_size * sigma[step] ** 2)
    return denoise(x, timesteps[-1].expand(len(x))).x0


def langevin_step(x: Tensor, eps: Tensor, noise: Tensor, sigma: Tensor, size: Tensor) -> Tensor:
    """x + (a/2)·score + sqrt(a)·z with a = `size` and score = -eps / sigma (Song & Ermon 2019, eq. 4)."""
    return x - size / (2 * sigma) * eps + size.sqrt() * noise
