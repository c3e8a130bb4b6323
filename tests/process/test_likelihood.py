from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import MixtureSameFamily, Normal
from torch.distributions.categorical import Categorical

from ldm.process import (
    PROBES,
    NoiseSchedule,
    Prediction,
    Probe,
    RectifiedFlow,
    Schedule,
    VarianceExploding,
    bits_per_dim,
    draw_probe,
    ode_log_likelihood,
    to_x0_eps,
)

MEAN, STD = 0.3, 0.8
SCHEDULES: dict[str, Schedule] = {
    "linear": NoiseSchedule.linear(1e-4, 0.03, 1000),
    "cosine": NoiseSchedule.cosine(1000),
    "sigmoid": NoiseSchedule.sigmoid(4000),
    "zero terminal snr": NoiseSchedule.linear(1e-4, 0.02, 1000).rescale_zero_terminal_snr(),
    "exploding": VarianceExploding.geometric(0.005, 2000, 100),
    "flow": RectifiedFlow(1000),
}

FINE = VarianceExploding.geometric(0.002, 2000, 100)
"""Its lowest noise level hardly blurs the densities below."""


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def _gaussian_denoiser(schedule: Schedule) -> Callable[[Tensor, Tensor], Prediction]:
    """The exact one of N(MEAN, STD²·I), whose eps is finite where alpha or sigma is 0."""

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = schedule.alpha_sigma(t, like=x)
        residual = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        return Prediction(MEAN + alpha * STD**2 * residual, sigma * residual)

    return denoise


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_flow_of_gaussian_data_has_its_density(name: str) -> None:
    schedule, x0 = SCHEDULES[name], MEAN + STD * _randn(4, 3, 2, 2)
    probe = draw_probe(x0, "rademacher", torch.Generator().manual_seed(0))
    ours = ode_log_likelihood(_gaussian_denoiser(schedule), x0, schedule, 40, probe)
    exact = Normal(MEAN, STD).log_prob(x0).flatten(1).sum(1)
    difference = bits_per_dim(ours, 12, levels=None) - bits_per_dim(exact, 12, levels=None)
    assert difference.abs().max() < 1e-3


def test_the_error_falls_with_the_fourth_power_of_the_steps_or_faster() -> None:
    schedule, x0 = VarianceExploding.geometric(0.005, 200, 100), MEAN + STD * _randn(8, 1)
    probe = torch.ones_like(x0)
    finest = ode_log_likelihood(_gaussian_denoiser(schedule), x0, schedule, 64, probe)
    errors = [
        (ode_log_likelihood(_gaussian_denoiser(schedule), x0, schedule, n, probe) - finest).abs().max() for n in (8, 16)
    ]
    assert torch.log2(errors[0] / errors[1]) > 3.5


@pytest.mark.parametrize("schedule", [NoiseSchedule.cosine(4000), FINE], ids=["cosine", "exploding"])
def test_the_flow_of_a_mixture_has_its_density(schedule: Schedule) -> None:
    means, std = torch.tensor([-1.0, 0.6], dtype=torch.float64), 0.3
    parts = Categorical(torch.tensor([0.4, 0.6], dtype=torch.float64))

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = schedule.alpha_sigma(t, like=x)
        variance = alpha**2 * std**2 + sigma**2
        logits = parts.logits - (x - alpha * means) ** 2 / (2 * variance)
        x0 = (logits.softmax(1) * (means + alpha * std**2 / variance * (x - alpha * means))).sum(1, keepdim=True)
        return to_x0_eps(x0, x, alpha, sigma, "sample")

    x0 = torch.linspace(-1.8, 1.4, 9, dtype=torch.float64)[:, None]
    ours = ode_log_likelihood(denoise, x0, schedule, 60, torch.ones_like(x0))
    exact = MixtureSameFamily(parts, Normal(means, torch.full_like(means, std))).log_prob(x0[:, 0])
    assert (bits_per_dim(ours, 1, levels=None) - bits_per_dim(exact, 1, levels=None)).abs().max() < 1e-3


@pytest.mark.parametrize("kind", PROBES)
def test_probes_estimate_the_trace_without_bias(kind: Probe) -> None:
    matrix = _randn(5, 5)
    probe = draw_probe(torch.zeros(40_000, 5, dtype=torch.float64), kind, torch.Generator().manual_seed(2))
    torch.testing.assert_close(probe.T @ probe / 40_000, torch.eye(5, dtype=torch.float64), atol=0.03, rtol=0)
    estimate = ((probe @ matrix) * probe).sum(1)
    assert estimate.mean().item() == pytest.approx(matrix.trace().item(), abs=5 * estimate.std().item() / 200)
    if kind == "rademacher":
        assert torch.equal(probe.abs(), torch.ones_like(probe))


def test_gaussian_probes_give_the_density_in_the_mean() -> None:
    schedule = SCHEDULES["cosine"]
    x0 = (MEAN + STD * _randn(1, 4)).expand(3000, 4)
    probe = draw_probe(x0, "gaussian", torch.Generator().manual_seed(3))
    ours = ode_log_likelihood(_gaussian_denoiser(schedule), x0, schedule, 12, probe)
    signs = ode_log_likelihood(_gaussian_denoiser(schedule), x0[:1], schedule, 12, torch.ones(1, 4).double())
    assert ours.std() > 0.1
    assert ours.mean().item() == pytest.approx(signs.item(), abs=4 * ours.std().item() / math.sqrt(3000))


def test_correlated_dimensions_share_their_density() -> None:
    """x0 = A·z of correlated dimensions: the exact flow's Jacobian is no multiple of the identity."""
    schedule = FINE
    factor = torch.tensor([[0.8, 0.0], [0.5, 0.4]], dtype=torch.float64)
    covariance = factor @ factor.T

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = schedule.alpha_sigma(t, like=x)
        alpha, sigma = alpha[0], sigma[0]
        gain = sigma * torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=torch.float64))
        return to_x0_eps(x @ gain, x, alpha, sigma, "epsilon")

    x0 = _randn(3, 2) @ factor.T
    signs = [torch.tensor([1.0, s], dtype=torch.float64).expand(3, 2) for s in (1.0, -1.0)]
    ours = sum(ode_log_likelihood(denoise, x0, schedule, 40, probe) for probe in signs) / 2
    exact = torch.distributions.MultivariateNormal(torch.zeros(2).double(), covariance).log_prob(x0)
    assert (bits_per_dim(ours, 2, levels=None) - bits_per_dim(exact, 2, levels=None)).abs().max() < 1e-3


def test_bits_of_dequantised_data() -> None:
    """Data spread evenly over [-1, 1] has log2(levels) bits, and one bit a dimension as a density."""
    log_likelihood = torch.tensor([12 * math.log(0.5)])
    torch.testing.assert_close(bits_per_dim(log_likelihood, 12, levels=256), torch.tensor([8.0]))
    torch.testing.assert_close(bits_per_dim(log_likelihood, 12, levels=None), torch.tensor([1.0]))


def test_settings_out_of_range_are_refused() -> None:
    x0, schedule = torch.zeros(1, 2), SCHEDULES["cosine"]
    with pytest.raises(ValueError, match="num_steps is 0; accepted: at least 1"):
        ode_log_likelihood(_gaussian_denoiser(schedule), x0, schedule, 0, x0)
    with pytest.raises(ValueError, match="kind is 'signs'; accepted: rademacher, gaussian"):
        draw_probe(x0, "signs", torch.Generator())  # type: ignore[arg-type]
