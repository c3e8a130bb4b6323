"""UniPC: a multistep predictor whose next call of the network also corrects it (Zhao et al. 2023)."""

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
    """UniPC-2 in x0 with B(h) = e^h - 1 ("bh2"), h the step in lambda = log(alpha / sigma).

    Every interval is x_next = sigma_next/sigma·x - alpha_next·(e^-h - 1)·D, twice: with D from the x0 of its start
    and of the interval before (UniP, the step of `ldm.sampling.dpmpp`), then, once x0 is known at its end, with that
    too (UniC). The network is called once an interval, at the predicted point. The last step, to sigma = 0, takes
    D = x0. See `Sampler` for arguments; `rng` is not touched. diffusers' solver visits the timesteps that it visits
    for DPM-Solver++.
    """
    alpha_bar = schedule.alpha_bar_path(timesteps, final=1.0)
    alpha, sigma, half_log_snr = alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), finite_log_snr(alpha_bar) / 2
    h = half_log_snr.diff()

    def advance(x: Tensor, step: int, estimate: Tensor) -> Tensor:
        return sigma[step + 1] / sigma[step] * x - alpha[step + 1] * torch.expm1(-h[step]) * estimate

    known: list[Tensor] = []
    start = x
    for step, t in enumerate(timesteps):
        prediction = denoise(x, t.expand(len(x)))
        if callback is not None:
            callback(step, t, x, prediction)
        if step > 0:
            start = advance(start, step - 1, _corrected(known, prediction.x0, h[:step]))
        known = [*known[-1:], prediction.x0]
        x = advance(start, step, _predicted(known, h[: step + 1]) if step + 1 < len(timesteps) else prediction.x0)
    return x


def _predicted(known: Sequence[Tensor], h: Tensor) -> Tensor:
    """UniP: the x0 of an interval of length h[-1] from those at its start and one interval before."""
    if len(known) == 1:
        return known[0]
    before, start = known
    return start + (start - before) * h[-1] / (2 * h[-2])


def _corrected(known: Sequence[Tensor], end: Tensor, h: Tensor) -> Tensor:
    """UniC: the same with x0 at the end too, weighted to be exact for x0 of degree 2 in lambda."""
    if len(known) == 1:
        return known[0] + (end - known[0]) / 2
    before, start = known
    r, phi = -h[-2] / h[-1], torch.expm1(-h[-1])
    first = -phi / h[-1] - 1
    second = -first / h[-1] - 0.5
    of_before = (first - 2 * second) / (phi * (1 - r))
    return start + of_before * (before - start) / r + (first / phi - of_before) * (end - start)
