"""Langevin dynamics on Gaussian data, where every step is affine and the moments of the whole chain are known."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from ldm.process import NoiseSchedule, Prediction, timesteps
from ldm.sampling import Sampler, langevin, predictor_corrector, randn_rows
from ldm.sampling.predictor_corrector import Predictor, ancestral, correct, reverse_diffusion

MEAN, STD = 0.3, 0.6
SCHEDULE = NoiseSchedule.scaled_linear(0.00085, 0.012, 1000)
LEVELS = timesteps(12, 1000, "trailing")


def _exact(x: Tensor, t: Tensor) -> Prediction:
    alpha, sigma = SCHEDULE.alpha_sigma(t, like=x)
    score_scale = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
    return Prediction(MEAN + alpha * STD**2 * score_scale, sigma * score_scale)


def _moments(sample: Sampler) -> tuple[float, float]:
    """Mean and standard deviation of 40,000 samples, of relative error 0.005 and 0.0035."""
    rng = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    x = torch.randn(2, 1, 140, 143, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x0 = sample(_exact, x, SCHEDULE, LEVELS, rng)
    return x0.mean().item(), x0.std().item()


def _level(index: int) -> tuple[float, float, float]:
    """alpha, sigma and the variance of x_t for data N(MEAN, STD²)."""
    alpha_bar = float(SCHEDULE.alphas_cumprod[LEVELS[index]])
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5, alpha_bar * STD**2 + 1 - alpha_bar


@pytest.mark.parametrize(("substeps", "step_size"), [(5, 0.2), (3, 0.05), (2, 1.0)])
def test_annealed_langevin_has_the_moments_of_its_chain(substeps: int, step_size: float) -> None:
    mean, variance = 0.0, 1.0
    for index in range(len(LEVELS)):
        alpha, sigma, full = _level(index)
        growth = alpha / _level(index - 1)[0] if index else 1.0
        mean, variance = growth * mean, growth**2 * variance
        for _ in range(substeps):
            pull = step_size * sigma**2 / (2 * full)
            mean += pull * (alpha * MEAN - mean)
            variance = (1 - pull) ** 2 * variance + step_size * sigma**2
    gain = alpha * STD**2 / full
    measured = _moments(partial(langevin.sample, substeps=substeps, step_size=step_size))
    expected = MEAN + gain * (mean - alpha * MEAN), gain * variance**0.5
    assert measured[0] == pytest.approx(expected[0], abs=4 * expected[1] / 40_000**0.5)
    assert measured[1] == pytest.approx(expected[1], rel=4 / 80_000**0.5)


def _predicted(predict: Predictor, index: int, mean: float, variance: float) -> tuple[float, float]:
    """One predictor step from level `index`, in closed form."""
    alpha, sigma, full = _level(index)
    last = index + 1 == len(LEVELS)
    prev = 1.0 if last else _level(index + 1)[0] ** 2
    keep = alpha**2 / prev
    beta = 1 - keep
    if predict is reverse_diffusion:
        slope, shift = 2 - keep**0.5 - beta / full, beta * alpha * MEAN / full
        noise = 0.0 if last else beta
    else:
        of_x0 = prev**0.5 * beta / sigma**2
        gain = alpha * STD**2 / full
        slope, shift = of_x0 * gain + keep**0.5 * (1 - prev) / sigma**2, of_x0 * MEAN * (1 - gain * alpha)
        noise = (1 - prev) / sigma**2 * beta
    return slope * mean + shift, slope**2 * variance + noise


@pytest.mark.parametrize("predict", [ancestral, reverse_diffusion])
@pytest.mark.parametrize(("corrections", "snr"), [(0, 0.16), (1, 0.16), (3, 0.3)])
def test_predictor_corrector_has_the_moments_of_its_chain(predict: Predictor, corrections: int, snr: float) -> None:
    """In a large image |z|² and |eps|² are their expectations times the number of pixels."""
    mean, variance = 0.0, 1.0
    for index in range(len(LEVELS)):
        mean, variance = _predicted(predict, index, mean, variance)
        if index + 1 == len(LEVELS):
            break
        alpha, _, full = _level(index + 1)
        prev = _level(index + 2)[0] ** 2 if index + 2 < len(LEVELS) else 1.0
        for _ in range(corrections):
            score_squared = (variance + (mean - alpha * MEAN) ** 2) / full**2
            size = 2 * alpha**2 / prev * snr**2 / score_squared
            mean += size / full * (alpha * MEAN - mean)
            variance = (1 - size / full) ** 2 * variance + 2 * size
    measured = _moments(partial(predictor_corrector.sample, predict=predict, corrections=corrections, snr=snr))
    assert measured[0] == pytest.approx(mean, abs=5 * variance**0.5 / 40_000**0.5)
    assert measured[1] == pytest.approx(variance**0.5, rel=5 / 80_000**0.5)


def test_the_corrector_leads_any_start_to_the_marginal() -> None:
    """To within four standard errors of 20,000 samples, and a variance larger by e / 2 = r² for the step's length."""
    rng = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    x = 2 + 1.5 * torch.randn(2, 1, 100, 100, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    t = torch.tensor([400, 400])
    before, after = SCHEDULE.alphas_cumprod[400], SCHEDULE.alphas_cumprod[399]
    for _ in range(400):
        x = correct(x, _exact(x, t).eps, randn_rows(x.shape, rng, dtype=x.dtype), before, after, snr=0.1)
    deviation = float(before * STD**2 + 1 - before) ** 0.5
    assert x.mean().item() == pytest.approx(float(before) ** 0.5 * MEAN, abs=4 * deviation / 20_000**0.5)
    assert x.std().item() == pytest.approx(deviation * (1 + 0.1**2) ** 0.5, rel=4 / 40_000**0.5)


def test_the_two_predictors_agree_for_small_steps() -> None:
    """Their means differ by terms in beta², their noise by the same ones relative to sigma²."""
    x = torch.tensor([[0.7], [-1.1]], dtype=torch.float64)
    prediction = _exact(x, torch.tensor([600, 600]))
    alpha_bar = SCHEDULE.alphas_cumprod[600]
    gaps = []
    for beta in (0.02, 0.01, 0.005):
        pair = [
            f(x, prediction, alpha_bar, alpha_bar / (1 - beta), torch.zeros_like(x))
            for f in (ancestral, reverse_diffusion)
        ]
        gaps.append((pair[0] - pair[1]).abs().max().item())
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.1) and gaps[1] / gaps[2] == pytest.approx(4, rel=0.1)


def test_settings_out_of_range_are_named() -> None:
    x = torch.zeros(1, 1)
    for kwargs in ({"substeps": 0}, {"step_size": 0.0}, {"step_size": 4.0}):
        with pytest.raises(ValueError, match=r"accepted: at least 1, and within \(0, 4\)"):
            langevin.sample(_exact, x, SCHEDULE, LEVELS, [], **kwargs)
    with pytest.raises(ValueError, match=r"corrections is -1 and snr 0\.16; accepted: at least 0"):
        predictor_corrector.sample(_exact, x, SCHEDULE, LEVELS, [], corrections=-1)
