"""Networks that learn their variance, and Algorithm 1 of classifier guidance, in the ancestral sampler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ldm.process import DiffusionConfig, Prediction, VarianceType, posterior_mean, posterior_variance
from ldm.sampling import SAMPLERS, Guidance, named_sampler

CONFIG = DiffusionConfig(variance_type="learned_range")
SCHEDULE = CONFIG.schedule()


def _rng(count: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row) for row in range(count)]


def _net(x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
    """eps, then the place between the bounds; both depend on the context."""
    shift = 0 if context is None else context.reshape(-1, 1, 1, 1)
    return torch.cat([torch.tanh(x) + shift, (x + 2 * shift).sin()], dim=1)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_ancestral_steps_are_those_of_diffusers(variance_type: VarianceType) -> None:
    config = DiffusionConfig(variance_type=variance_type, steps_offset=0)
    scheduler = DDPMScheduler.from_config(config.to_dict(), variance_type=variance_type)
    scheduler.set_timesteps(10)
    learned = variance_type == "learned_range"
    generator, x = torch.Generator().manual_seed(3), torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    ours = x
    for t in scheduler.timesteps:
        raw = _net(x, t) if learned else _net(x, t)[:, :3]
        x = scheduler.step(raw, t, x, generator=generator).prev_sample
    denoise = Guidance().denoiser(_net if learned else lambda x, t: _net(x, t)[:, :3], SCHEDULE, "epsilon", {}, {})
    sampler = named_sampler("ddpm", kind="fixed_large" if variance_type == "fixed_large" else "fixed_small")
    ours = sampler(denoise, ours, SCHEDULE, scheduler.timesteps, [torch.Generator().manual_seed(3)])
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


def test_guidance_leaves_the_conditional_variance() -> None:
    x, t = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([500, 500])
    cond, uncond = {"context": torch.tensor([0.5, 0.7])}, {"context": torch.zeros(2)}
    guided = Guidance(4.0).denoiser(_net, SCHEDULE, "epsilon", cond, uncond)(x, t)
    plain = Guidance(1.0).denoiser(_net, SCHEDULE, "epsilon", cond, uncond)(x, t)
    assert guided.variance is not None and plain.variance is not None
    torch.testing.assert_close(guided.variance, plain.variance)
    assert (guided.eps - plain.eps).abs().max() > 0.5


@pytest.mark.parametrize("sampler", sorted(SAMPLERS.keys() - {"ddpm"}))
def test_other_samplers_read_the_prediction_alone(sampler: str) -> None:
    x, t = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), CONFIG.timesteps(6)
    whole = Guidance().denoiser(_net, SCHEDULE, "epsilon", {}, {})
    half = Guidance().denoiser(lambda x, t: _net(x, t)[:, :3], SCHEDULE, "epsilon", {}, {})
    a, b = (SAMPLERS[sampler](denoise, x, SCHEDULE, t, _rng()) for denoise in (whole, half))
    assert torch.equal(a, b)


def test_other_numbers_of_channels_are_refused() -> None:
    denoise = Guidance().denoiser(lambda x, t: x.repeat(1, 3, 1, 1), SCHEDULE, "epsilon", {}, {})
    with pytest.raises(ValueError, match="raw output has 9 channels; accepted: 3 or 6"):
        denoise(torch.zeros(1, 3, 2, 2), torch.tensor([5]))


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
def test_algorithm_1_draws_from_the_mean_moved_by_the_gradient_times_the_variance(kind: Any) -> None:
    """N(mu + s·Sigma·grad log p(y | x_t), Sigma) (Dhariwal & Nichol 2021, algorithm 1), step by step by hand."""
    t = torch.tensor([600, 300])
    start = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 = torch.full_like(start, 0.2)
    moved = named_sampler("ddpm", kind=kind, gradient=lambda x, t: 1.5 * x)(
        lambda x, t: Prediction(x0, x), start, SCHEDULE, t, _rng()
    )
    here, after = SCHEDULE.alphas_cumprod[t]
    variance = posterior_variance(here, after) if kind == "fixed_small" else 1 - here / after
    noise = torch.stack([torch.randn(1, 3, 3, generator=g) for g in _rng()]).double()
    x = posterior_mean(x0, start, here, after) + 1.5 * variance * start + variance.sqrt() * noise
    one = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(moved, posterior_mean(x0, x, after, one), atol=1e-6, rtol=1e-6)


def test_eta_belongs_to_ddim() -> None:
    with pytest.raises(ValueError, match=r"eta is 0\.5 with sampler 'euler'; only ddim has it"):
        named_sampler("euler", eta=0.5)
