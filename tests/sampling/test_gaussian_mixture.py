"""A two-mode mixture in one dimension: nonlinear, with score, denoiser and flow known."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm.process import NoiseSchedule, Prediction
from ldm.sampling import SAMPLERS, sigma_spaced_timesteps

SCHEDULE = NoiseSchedule.scaled_linear(0.00085, 0.012, 1000)
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEANS = torch.tensor([-1.2, 0.8], dtype=torch.float64)
STDS = torch.tensor([0.2, 0.3], dtype=torch.float64)
BETWEEN = -0.4
LEFT = float((WEIGHTS * torch.special.ndtr((BETWEEN - MEANS) / STDS)).sum())


def _log_joint(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """log of weight times density of every mode at x_t, with a last axis for the modes."""
    variance = alpha[..., None] ** 2 * STDS**2 + sigma[..., None] ** 2
    return WEIGHTS.log() - variance.log() / 2 - (x[..., None] - alpha[..., None] * MEANS) ** 2 / (2 * variance)


def _exact(x: Tensor, t: Tensor) -> Prediction:
    """E[x0 | x_t] over the modes, each of which is Gaussian."""
    alpha, sigma = SCHEDULE.alpha_sigma(t, like=x)
    wide = alpha[..., None]
    gain = wide * STDS**2 / (wide**2 * STDS**2 + sigma[..., None] ** 2)
    of_mode = MEANS + gain * (x[..., None] - wide * MEANS)
    x0 = (_log_joint(x, alpha, sigma).softmax(-1) * of_mode).sum(-1)
    return Prediction(x0, (x - alpha * x0) / sigma)


def _score(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    with torch.enable_grad():
        variable = x.detach().requires_grad_()
        density = _log_joint(variable, alpha, sigma).logsumexp(-1)
        return torch.autograd.grad(density.sum(), variable)[0]


@pytest.mark.parametrize("t", [0, 50, 400, 999])
def test_the_score_is_minus_eps_over_sigma(t: int) -> None:
    x = torch.linspace(-3, 3, 41, dtype=torch.float64)[:, None]
    steps = torch.full((41,), t)
    alpha, sigma = SCHEDULE.alpha_sigma(steps, like=x)
    torch.testing.assert_close(-_exact(x, steps).eps / sigma, _score(x, alpha, sigma), atol=1e-10, rtol=1e-10)


def _flow(x: Tensor, steps: int = 2000) -> Tensor:
    """dx / d lambda = sigma²·(x + score), lambda = log(alpha / sigma), by Runge-Kutta from t = 999 to 0.

    This is the probability-flow ODE of the variance preserving SDE (Song et al. 2021b, eq. 13).
    """
    first, last = SCHEDULE.log_snr(torch.tensor([999, 0]), torch.float64) / 2
    h = (last - first) / steps

    def slope(x: Tensor, place: Tensor) -> Tensor:
        alpha, sigma = torch.sigmoid(2 * place).sqrt(), torch.sigmoid(-2 * place).sqrt()
        return sigma**2 * (x + _score(x, alpha, sigma))

    for step in range(steps):
        at = first + step * h
        k1 = slope(x, at)
        k2 = slope(x + h / 2 * k1, at + h / 2)
        k3 = slope(x + h / 2 * k2, at + h / 2)
        k4 = slope(x + h * k3, at + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


START = torch.tensor([[-1.7], [-0.9], [0.1], [1.3]], dtype=torch.float64)
AT_ZERO = torch.zeros(4, dtype=torch.int64)


@pytest.fixture(scope="module")
def flowed() -> Tensor:
    return _flow(START, steps=600)


@pytest.mark.parametrize(
    ("name", "order"), [("ddim", 0.8), ("euler", 0.8), ("heun", 1.7), ("dpmpp_2m", 1.7), ("unipc", 1.8)]
)
def test_samplers_approach_the_probability_flow(name: str, order: float, flowed: Tensor) -> None:
    """`ddim` ends at t = 0; the others take x0 there."""
    expected = flowed if name == "ddim" else _exact(flowed, AT_ZERO).x0
    errors = []
    for count in (80, 160, 320):
        t = sigma_spaced_timesteps(SCHEDULE, count, "exponential")
        errors.append((SAMPLERS[name](_exact, START, SCHEDULE, t, []) - expected).abs().max().item())
    for coarse, fine in pairwise(errors):
        assert coarse / fine > 2**order
    assert errors[-1] < 0.02


def test_ddim_and_euler_come_together_as_steps_grow() -> None:
    """They end at t = 0 and at no noise at all, so what is left is the noise of the first level, sigma_0·eps."""
    for count in (10, 100):
        t = sigma_spaced_timesteps(SCHEDULE, count, "karras")
        pair = [SAMPLERS[name](_exact, START, SCHEDULE, t, []) for name in ("ddim", "euler")]
        torch.testing.assert_close(_exact(pair[0], AT_ZERO).x0, pair[1])


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "ddpm"])
def test_the_modes_have_their_weights(name: str) -> None:
    """Within four standard errors of 5000 samples, 0.026, and 0.01 for the length of the steps."""
    rng = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    x = torch.randn(2, 1, 50, 50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    t = sigma_spaced_timesteps(SCHEDULE, 80, "exponential")
    x0 = SAMPLERS[name](_exact, x, SCHEDULE, t, rng)
    error = 4 * (LEFT * (1 - LEFT) / 5000) ** 0.5
    assert (x0 < BETWEEN).double().mean().item() == pytest.approx(LEFT, abs=error + 0.01)
