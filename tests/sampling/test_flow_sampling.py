"""Every sampler along a rectified flow: diffusers' own steps, and Gaussians whose flow is known."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from ldm.process import FlowConfig, Prediction, RectifiedFlow, UnitVariance
from ldm.sampling import SAMPLERS, Denoiser, Guidance, named_sampler, sigma_spaced_timesteps, unit_variance_denoiser

FLOW = RectifiedFlow(1000)
VIEW = UnitVariance(FLOW)
MEAN, STD = 0.3, 0.6


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _net(x: Tensor, t: Tensor, **condition: Any) -> Tensor:
    """A velocity of no particular meaning."""
    return torch.tanh(x.roll(1, -1)) + (t / 1000).reshape(-1, 1, 1, 1) * x.cos()


def _exact(x: Tensor, t: Tensor) -> Prediction:
    """E[x0 | x_t] of N(MEAN, STD²) along the flow itself."""
    alpha, sigma = FLOW.alpha_sigma(t, like=x)
    score_scale = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
    return Prediction(MEAN + alpha * STD**2 * score_scale, sigma * score_scale)


EXACT: Denoiser = unit_variance_denoiser(_exact, VIEW)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_euler_is_the_diffusers_scheduler(sampler: str, shift: float) -> None:
    config = FlowConfig("flow", shift=shift)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config.to_dict())
    scheduler.set_timesteps(9)
    x = noise = _randn(2, 3, 4, 4)
    for t in scheduler.timesteps:
        x = scheduler.step(_net(x, t.expand(2)), t, x).prev_sample
    denoise = Guidance().denoiser(_net, FLOW, "flow", {}, {})
    ours = SAMPLERS[sampler](denoise, noise, VIEW, config.timesteps(9), [])
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 2)])
def test_deterministic_samplers_follow_the_flow_of_a_gaussian(sampler: str, order: int) -> None:
    """The flow carries x0 = MEAN + STD·x_T; between 1/50 and 49/50 nothing is infinite."""
    x = _randn(4, 1, 4, 4).double()
    errors = []
    for steps in (40, 80):
        t = FLOW.timestep(torch.sigmoid(torch.linspace(4, -4, steps + 1, dtype=torch.float64)))
        alpha, sigma = VIEW.alpha_sigma(t[[0, -1]], like=torch.zeros(2, 1, 1, 1, dtype=torch.float64))
        spread = (alpha.square() * STD**2 + sigma.square()).sqrt()
        z = SAMPLERS[sampler](EXACT, alpha[0] * MEAN + spread[0] * x, VIEW, t, [])
        end = _exact(
            ((1 - t[-1] / 1000).square() + (t[-1] / 1000).square()).sqrt() * (alpha[1] * MEAN + spread[1] * x),
            t[-1:].expand(4),
        )
        errors.append(float((z - end.x0).abs().max()))
    assert errors[0] / errors[1] > 2 ** (order - 0.25), errors


@pytest.mark.parametrize("sampler", sorted(SAMPLERS.keys() - {"langevin"}))
@pytest.mark.parametrize("spacing", ["linspace", "karras", "exponential"])
def test_every_sampler_ends_at_the_data(sampler: str, spacing: str) -> None:
    steps = 150
    t = FlowConfig("flow").timesteps(steps) if spacing == "linspace" else sigma_spaced_timesteps(VIEW, steps, spacing)  # type: ignore[arg-type]
    x = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = SAMPLERS[sampler](EXACT, x, VIEW, t, [torch.Generator().manual_seed(1)])
    assert float(z.mean()) == pytest.approx(MEAN, abs=0.05) and float(z.std()) == pytest.approx(STD, abs=0.06)


def test_a_diffusers_solver_walks_along_the_flow_too() -> None:
    pytest.importorskip("diffusers")
    x, t = _randn(2, 1, 4, 4), sigma_spaced_timesteps(VIEW, 30, "exponential")
    theirs = named_sampler("diffusers:DPMSolverMultistepScheduler")(EXACT, x, VIEW, t, [])
    torch.testing.assert_close(theirs, SAMPLERS["dpmpp_2m"](EXACT, x, VIEW, t, []), atol=1e-3, rtol=1e-3)
