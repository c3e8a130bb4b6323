from __future__ import annotations

import diffusers
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from ldm.process import (
    NoiseSchedule,
    interpolated_log_variance,
    log_variance_table,
    model_variance,
    p_mean_from_eps,
    posterior_mean,
    posterior_variance,
    q_sample,
    q_step,
)

SCHEDULE = NoiseSchedule.linear(1e-3, 0.2, 40)
PAIRS = [(1, 0), (20, 19), (39, 38), (30, 10)]
ZERO = torch.zeros((), dtype=torch.float64)


def _alpha_bars(t: int, prev: int) -> tuple[Tensor, Tensor]:
    return SCHEDULE.alphas_cumprod[t], SCHEDULE.alphas_cumprod[prev]


def _values(seed: int) -> Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_forward_steps_compose_to_the_closed_form_marginal() -> None:
    mean, variance = torch.ones((), dtype=torch.float64), ZERO
    for t, beta in enumerate(SCHEDULE.betas):
        mean = q_step(mean, ZERO, beta)
        variance = q_step(variance.sqrt(), ZERO, beta) ** 2 + q_step(ZERO, ZERO + 1, beta) ** 2
        index = torch.tensor(t)
        alpha, sigma = SCHEDULE.alpha(index, torch.float64), SCHEDULE.sigma(index, torch.float64)
        torch.testing.assert_close(mean, q_sample(ZERO + 1, ZERO, alpha, sigma))
        torch.testing.assert_close(variance, q_sample(ZERO, ZERO + 1, alpha, sigma) ** 2)


def test_marginal_of_gaussian_data() -> None:
    count = 400_000
    generator = torch.Generator().manual_seed(0)
    x0 = 0.7 + 0.4 * torch.randn(count, generator=generator)
    alpha, sigma = SCHEDULE.alpha(torch.tensor(12)), SCHEDULE.sigma(torch.tensor(12))
    x_t = q_sample(x0, torch.randn(count, generator=generator), alpha, sigma)
    torch.testing.assert_close(x_t.mean(), 0.7 * alpha, atol=5e-3, rtol=0)
    torch.testing.assert_close(x_t.std(), (0.16 * alpha**2 + sigma**2).sqrt(), atol=5e-3, rtol=0)


@pytest.mark.parametrize(("t", "prev"), PAIRS)
def test_bayes_rule(t: int, prev: int) -> None:
    alpha_bar, alpha_bar_prev = _alpha_bars(t, prev)
    beta = 1 - alpha_bar / alpha_bar_prev
    x0, x_prev, x_t = _values(1), _values(2), _values(3)
    likelihood = Normal(q_step(x_prev, ZERO, beta), beta.sqrt()).log_prob(x_t)
    prior = Normal(alpha_bar_prev.sqrt() * x0, (1 - alpha_bar_prev).sqrt()).log_prob(x_prev)
    evidence = Normal(alpha_bar.sqrt() * x0, (1 - alpha_bar).sqrt()).log_prob(x_t)
    mean = posterior_mean(x0, x_t, alpha_bar, alpha_bar_prev)
    posterior = Normal(mean, posterior_variance(alpha_bar, alpha_bar_prev).sqrt()).log_prob(x_prev)
    torch.testing.assert_close(likelihood + prior, posterior + evidence, atol=1e-6, rtol=1e-10)


@pytest.mark.parametrize(("t", "prev"), PAIRS)
def test_mean_from_noise_is_the_posterior_mean(t: int, prev: int) -> None:
    alpha_bar, alpha_bar_prev = _alpha_bars(t, prev)
    x0, eps = _values(4), _values(5)
    x_t = q_sample(x0, eps, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
    expected = posterior_mean(x0, x_t, alpha_bar, alpha_bar_prev)
    torch.testing.assert_close(p_mean_from_eps(x_t, eps, alpha_bar, alpha_bar_prev), expected)


def test_variances_bracket_that_of_the_exact_reverse_step() -> None:
    alpha_bar, alpha_bar_prev = _alpha_bars(20, 19)
    small = model_variance(alpha_bar, alpha_bar_prev, "fixed_small")
    large = model_variance(alpha_bar, alpha_bar_prev, "fixed_large")
    torch.testing.assert_close(large, SCHEDULE.betas[20])
    for data_variance in (0.0, 0.3, 1.0):
        alpha_t = alpha_bar / alpha_bar_prev
        before = alpha_bar_prev * data_variance + 1 - alpha_bar_prev
        exact = before * (1 - alpha_t) / (alpha_t * before + 1 - alpha_t)
        assert small - 1e-12 <= exact <= large + 1e-12


def test_the_first_step_has_no_variance_left() -> None:
    one = torch.ones((), dtype=torch.float64)
    assert posterior_variance(SCHEDULE.alphas_cumprod[0], one) == 0
    torch.testing.assert_close(posterior_mean(_values(6), _values(7), SCHEDULE.alphas_cumprod[0], one), _values(6))


def test_learned_variances_are_those_of_diffusers() -> None:
    scheduler = diffusers.DDPMScheduler(40, 1e-3, 0.2, variance_type="learned_range")
    small, large = (log_variance_table(SCHEDULE.alphas_cumprod, kind) for kind in ("fixed_small", "fixed_large"))
    raw = _values(8).clamp(-1, 1)
    for t in (1, 20, 39):
        log_variance = interpolated_log_variance(raw, small[t], large[t])
        expected = scheduler._get_variance(t, predicted_variance=raw.float())
        torch.testing.assert_close(log_variance.float(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(interpolated_log_variance(raw.sign(), small[9], large[9]).amax(), large[9])
    torch.testing.assert_close(interpolated_log_variance(raw.sign(), small[9], large[9]).amin(), small[9])


def test_the_table_of_log_variances_is_finite_from_the_first_step() -> None:
    small, large = (log_variance_table(SCHEDULE.alphas_cumprod, kind) for kind in ("fixed_small", "fixed_large"))
    alpha_bar, before = SCHEDULE.alphas_cumprod[1:], SCHEDULE.alphas_cumprod[:-1]
    torch.testing.assert_close(small[1:].exp(), posterior_variance(alpha_bar, before))
    torch.testing.assert_close(large.exp(), SCHEDULE.betas)
    assert small[0] == small[1]
    single = NoiseSchedule.linear(0.3, 0.3, 1)
    torch.testing.assert_close(log_variance_table(single.alphas_cumprod, "fixed_small").exp(), single.betas)


def test_unknown_variances_are_refused() -> None:
    with pytest.raises(ValueError, match="'learned'; accepted: fixed_small, fixed_large"):
        model_variance(ZERO, ZERO, "learned")  # type: ignore[arg-type]
