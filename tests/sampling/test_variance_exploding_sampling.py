"""Samplers along a variance exploding process: Euler's steps by hand, and Gaussians whose flow is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.process import Prediction, VeConfig, at_unit_variance
from ldm.sampling import SAMPLERS, Guidance, named_sampler, sigma_spaced_timesteps

CONFIG = VeConfig("ve", sigma_max=80.0)
PROCESS = CONFIG.schedule()
VIEW = at_unit_variance(PROCESS)
MEAN, STD = 0.3, 0.6


def _net(x: Tensor, t: Tensor, **condition: Any) -> Tensor:
    """Noise of no particular meaning."""
    return torch.tanh(x.roll(1, -1)) + (t / 1000).reshape(-1, 1, 1, 1) * x.cos()


def _exact(x: Tensor, t: Tensor) -> Prediction:
    """E[x0 | x_t] of N(MEAN, STD²)."""
    alpha, sigma = PROCESS.alpha_sigma(t, like=x)
    score_scale = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
    return Prediction(MEAN + alpha * STD**2 * score_scale, sigma * score_scale)


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_steps_are_those_along_the_noise_level(sampler: str) -> None:
    """x + (sigma_next - sigma)·eps (Karras et al. 2022, algorithm 1 without the correction), from sigma_max·noise."""
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    timesteps = CONFIG.timesteps(9)
    sigmas = [0.01 * 8000 ** (t / 999) for t in timesteps.tolist()] + [0.0]
    x = math.hypot(1, sigmas[0]) * noise
    for t, sigma, following in zip(timesteps, sigmas, sigmas[1:], strict=False):
        x = x + (following - sigma) * _net(x / math.hypot(1, sigma), t.expand(2))
    denoise = Guidance().denoiser(_net, PROCESS, "epsilon", {}, {})
    torch.testing.assert_close(SAMPLERS[sampler](denoise, noise, VIEW, timesteps, []), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS.keys() - {"langevin"}))
@pytest.mark.parametrize("spacing", ["linspace", "karras"])
def test_every_sampler_ends_at_the_data(sampler: str, spacing: str) -> None:
    steps = 150
    t = CONFIG.timesteps(steps) if spacing == "linspace" else sigma_spaced_timesteps(VIEW, steps, "karras")
    assert t[-1] == 0
    x = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = SAMPLERS[sampler](_exact, x, VIEW, t, [torch.Generator().manual_seed(1)])
    assert float(z.mean()) == pytest.approx(MEAN, abs=0.05) and float(z.std()) == pytest.approx(STD, abs=0.06)


def test_langevin_dynamics_reach_the_data_level_by_level() -> None:
    x = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = named_sampler("langevin")(_exact, x, VIEW, CONFIG.timesteps(100), [torch.Generator().manual_seed(1)])
    assert float(z.mean()) == pytest.approx(MEAN, abs=0.05) and float(z.std()) == pytest.approx(STD, abs=0.06)
