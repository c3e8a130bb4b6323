from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from ldm.process import (
    NoiseSchedule,
    Objective,
    Prediction,
    RectifiedFlow,
    ReverseModel,
    ReverseStep,
    bound_term,
    discretized_log_likelihood,
    eps_error_weight,
    fixed_variance,
    gaussian_kl,
    gaussian_log_density,
    hybrid_loss,
    learned_variance,
    model_variance,
    p_mean_from_eps,
    posterior_mean,
    posterior_variance,
    prior_term,
    q_sample,
    to_x0_eps,
    variational_bound,
)
from ldm.process.posterior import MODEL_VARIANCES

SCHEDULE = NoiseSchedule.linear(1e-3, 0.4, 12)
MEAN, STD = 0.4, 0.5


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _exact_moments(count: int) -> tuple[Tensor, Tensor]:
    """Data [N, 1] of mean MEAN and deviation STD, and noise [N, 1], whose sample moments up to second order are exact.

    Every expectation of a quadratic form in them is then a mean over the sample.
    """
    draws = _randn(count, 2)
    draws = draws - draws.mean(0)
    factor = torch.linalg.cholesky(draws.T @ draws / count)
    x0, eps = torch.linalg.solve_triangular(factor, draws.T, upper=False)
    return (MEAN + STD * x0)[:, None], eps[:, None]


def exact_denoiser(x_t: Tensor, t: Tensor) -> Prediction:
    """E[x0 | x_t] of N(MEAN, STD²)."""
    alpha, sigma = SCHEDULE.alpha_sigma(t, like=x_t)
    x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * MEAN)
    return Prediction(x0, (x_t - alpha * x0) / sigma)


def exact_reverse(x_t: Tensor, t: Tensor) -> ReverseStep:
    """q(x_{t-1} | x_t) of N(MEAN, STD²), by Bayes' rule on its own marginals."""
    table = torch.cat([torch.ones(1, dtype=torch.float64), SCHEDULE.alphas_cumprod])
    before, here = table[t][:, None], table[t + 1][:, None]
    keep = (here / before).sqrt()
    prior_mean, prior_variance = before.sqrt() * MEAN, before * STD**2 + 1 - before
    variance = 1 / (1 / prior_variance + keep**2 / (1 - keep**2))
    return ReverseStep(variance * (prior_mean / prior_variance + keep / (1 - keep**2) * x_t), variance.log())


def _bound(model: ReverseModel, x0: Tensor, eps: Tensor) -> Tensor:
    """The data's mean bound with the same noise in every step, which its terms do not mind."""
    total = prior_term(x0, SCHEDULE).mean()
    for index in range(SCHEDULE.num_train_timesteps):
        t = torch.full((len(x0),), index)
        x_t = q_sample(x0, eps, *SCHEDULE.alpha_sigma(t, like=x0))
        total = total + bound_term(x0, x_t, t, model(x_t, t), SCHEDULE, levels=None).mean()
    return total


def _end() -> Normal:
    alpha_bar = SCHEDULE.alphas_cumprod[-1]
    return Normal(alpha_bar.sqrt() * MEAN, (alpha_bar * STD**2 + 1 - alpha_bar).sqrt())


def test_divergence_and_density_are_those_of_torch() -> None:
    means, others, deviations, scales = _randn(4, 20)
    deviations, scales = deviations.exp(), scales.exp()
    first, second = Normal(means, deviations), Normal(others, scales)
    kl = gaussian_kl(means, 2 * deviations.log(), others, 2 * scales.log())
    torch.testing.assert_close(kl, kl_divergence(first, second))
    torch.testing.assert_close(gaussian_log_density(others, means, 2 * deviations.log()), first.log_prob(others))


def test_the_exact_reverse_process_makes_the_bound_tight() -> None:
    """Then it is the entropy of the data plus the divergence of q(x_T) from the prior, with no slack."""
    one = torch.ones((), dtype=torch.float64)
    slack = kl_divergence(_end(), Normal(0 * one, one))
    expected = (Normal(MEAN * one, STD * one).entropy() + slack) / math.log(2)
    torch.testing.assert_close(_bound(exact_reverse, *_exact_moments(100)), expected)


@pytest.mark.parametrize("kind", MODEL_VARIANCES)
def test_the_bound_of_gaussian_data_under_the_exact_denoiser_is_its_closed_form(kind: str) -> None:
    bits = 0.0
    for index, alpha_bar in enumerate(SCHEDULE.alphas_cumprod.tolist()):
        before = SCHEDULE.alphas_cumprod[index - 1].item() if index else 1.0
        beta, sigma2 = 1 - alpha_bar / before, 1 - alpha_bar
        error = STD**2 * sigma2 / (alpha_bar * STD**2 + sigma2)
        if index == 0:
            second = SCHEDULE.alphas_cumprod[1].item()
            variance = beta if kind == "fixed_large" else sigma2 / (1 - second) * (1 - second / alpha_bar)
            bits += 0.5 * (math.log(2 * math.pi * variance) + error / variance)
        else:
            small = (1 - before) / sigma2 * beta
            variance = beta if kind == "fixed_large" else small
            mean_error = before * beta**2 / sigma2**2 * error
            bits += 0.5 * (math.log(variance / small) + small / variance - 1 + mean_error / variance)
    end = SCHEDULE.alphas_cumprod[-1].item()
    bits += 0.5 * (end * (MEAN**2 + STD**2) - end - math.log(1 - end))
    model = fixed_variance(exact_denoiser, SCHEDULE, kind)  # type: ignore[arg-type]
    assert _bound(model, *_exact_moments(100)).item() == pytest.approx(bits / math.log(2), abs=1e-9)


@pytest.mark.parametrize("kind", MODEL_VARIANCES)
def test_a_term_is_its_weight_times_the_error_of_the_noise(kind: str) -> None:
    """Above what is left where eps is known, which is 0 where p has the variance of q."""
    x0, eps, guess = _randn(3, 50)
    here, before = SCHEDULE.alphas_cumprod[7], SCHEDULE.alphas_cumprod[6]
    x_t = q_sample(x0, eps, here.sqrt(), (1 - here).sqrt())
    truth = posterior_mean(x0, x_t, here, before), posterior_variance(here, before).log()
    variance = model_variance(here, before, kind)  # type: ignore[arg-type]
    terms = [gaussian_kl(*truth, p_mean_from_eps(x_t, e, here, before), variance.log()) for e in (guess, eps)]
    weight = eps_error_weight(here, before, variance)
    torch.testing.assert_close(terms[0] - terms[1], weight * (eps - guess).square())
    assert kind == "fixed_large" or terms[1].abs().max() < 1e-12


def test_the_whole_bound_is_the_sum_of_its_terms() -> None:
    x0 = MEAN + STD * _randn(4000, 1, seed=3)
    bound = variational_bound(exact_reverse, x0, SCHEDULE, torch.Generator().manual_seed(4), levels=None)
    assert bound.steps.shape == (4000, 12) and bound.prior.shape == (4000,)
    assert torch.equal(bound.total, bound.prior + bound.steps.sum(1))
    one = torch.ones((), dtype=torch.float64)
    expected = -Normal(MEAN * one, STD * one).log_prob(x0).mean() + kl_divergence(_end(), Normal(0 * one, one))
    assert bound.total.mean().item() == pytest.approx(expected.item() / math.log(2), abs=0.03)
    assert (bound.steps[:, 1:] >= 0).all()


def test_pictures_are_averaged_over_their_dimensions() -> None:
    x0, x_t, t = _randn(2, 3, 4, 4), _randn(2, 3, 4, 4, seed=1), torch.tensor([0, 7])
    model = fixed_variance(exact_denoiser, SCHEDULE, "fixed_large")
    whole = bound_term(x0, x_t, t, model(x_t, t), SCHEDULE, levels=None)
    flat_t = t.repeat_interleave(48)
    step = model(x_t.reshape(-1, 1), flat_t)
    each = bound_term(x0.reshape(-1, 1), x_t.reshape(-1, 1), flat_t, step, SCHEDULE, levels=None)
    torch.testing.assert_close(whole, each.reshape(2, 48).mean(1))


@pytest.mark.parametrize("levels", [2, 256])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.3), (0.98, 0.01), (-3.0, 0.2), (0.1, 30.0)])
def test_the_levels_share_all_the_mass(levels: int, mean: float, std: float) -> None:
    x = torch.linspace(-1, 1, levels, dtype=torch.float64)
    log_variance = torch.tensor(2 * math.log(std), dtype=torch.float64)
    log_mass = discretized_log_likelihood(x, torch.full_like(x, mean), log_variance, levels)
    torch.testing.assert_close(log_mass.exp().sum(), torch.ones((), dtype=torch.float64))
    edges = (x[1:] + x[:-1]) / 2
    cdf = Normal(torch.tensor(mean, dtype=torch.float64), log_variance.exp().sqrt()).cdf(edges)
    mass = torch.cat([cdf[:1], cdf.diff(), 1 - cdf[-1:]])
    torch.testing.assert_close(log_mass.exp(), mass, atol=1e-7, rtol=1e-6)


def test_far_levels_keep_a_finite_mass_and_gradient() -> None:
    x = torch.tensor([-1.0, 0.2, 1.0], dtype=torch.float64)
    mean = torch.tensor([60.0, -60.0, -60.0], dtype=torch.float64, requires_grad=True)
    log_variance = torch.full((3,), -9.0, dtype=torch.float64, requires_grad=True)
    value = discretized_log_likelihood(x, mean, log_variance)
    gradients = torch.autograd.grad(value.sum(), [mean, log_variance])
    assert torch.isfinite(value).all() and all(torch.isfinite(g).all() for g in gradients)
    assert torch.autograd.gradcheck(
        lambda m, v: discretized_log_likelihood(x, m, v), (0.01 * mean.detach().requires_grad_(), log_variance)
    )
    with pytest.raises(ValueError, match="levels is 1; accepted: at least 2"):
        discretized_log_likelihood(x, mean, log_variance, 1)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_learned_variances_at_the_bounds_are_the_fixed_ones(prediction_type: str) -> None:
    raw, x_t, t = _randn(2, 3, 4), _randn(2, 3, 4, seed=2), torch.tensor([0, 8])
    for kind, place in (("fixed_small", -1.0), ("fixed_large", 1.0)):
        both = torch.cat([raw, torch.full_like(raw, place)], dim=1)
        learned = learned_variance(lambda x, t, both=both: both, SCHEDULE, prediction_type)(x_t, t)  # type: ignore
        pair = to_x0_eps(raw, x_t, *SCHEDULE.alpha_sigma(t, like=x_t), prediction_type)  # type: ignore[arg-type]
        fixed = fixed_variance(lambda x, t, pair=pair: pair, SCHEDULE, kind)(x_t, t)  # type: ignore
        torch.testing.assert_close(learned.mean, fixed.mean)
        torch.testing.assert_close(learned.log_variance, fixed.log_variance.expand_as(raw))


def test_steps_of_single_precision_networks_keep_their_digits() -> None:
    """1 - alpha_bar = 1e-7 in the first step, which float32 would round to 1.2e-7 or 0."""
    schedule = NoiseSchedule.linear(1e-7, 1e-2, 5)
    x0, x_t, t = _randn(3, 1, 2, seed=3), _randn(3, 1, 2, seed=4), torch.tensor([0, 1, 4])
    step = fixed_variance(lambda x, t: Prediction(x0.float(), x), schedule, "fixed_small")(x_t.float(), t)
    table = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod])
    here, before = table[t + 1].reshape(3, 1, 1), table[t].reshape(3, 1, 1)
    torch.testing.assert_close(step.mean, posterior_mean(x0, x_t, here, before), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(step.log_variance[1:].exp(), posterior_variance(here, before)[1:])


def test_the_bounds_gradient_reaches_the_variance_alone() -> None:
    objective = Objective(SCHEDULE)
    x0 = _randn(6, 2, 4, 4)
    noised = objective.draw(x0, torch.Generator().manual_seed(1))
    raw = _randn(6, 4, 4, 4, seed=5).requires_grad_()
    (hybrid,) = torch.autograd.grad(hybrid_loss(objective, raw, x0, noised, levels=None, vlb_weight=0.7).sum(), raw)
    (simple,) = torch.autograd.grad(objective.loss(raw[:, :2], noised).sum(), raw)
    torch.testing.assert_close(hybrid[:, :2], simple[:, :2])
    model = learned_variance(lambda x, t: raw, SCHEDULE, "epsilon")
    term = bound_term(x0, noised.x_t, noised.t, model(noised.x_t, noised.t), SCHEDULE, levels=None)
    (bound,) = torch.autograd.grad(0.7 * 12 * term.sum(), raw)
    torch.testing.assert_close(hybrid[:, 2:], bound[:, 2:])
    assert bound[:, :2].abs().max() > 0


def test_the_hybrid_loss_is_an_estimate_of_the_whole_bound() -> None:
    objective = Objective(SCHEDULE)
    x0, eps = _exact_moments(50)
    steps = SCHEDULE.num_train_timesteps
    model: ReverseModel = fixed_variance(exact_denoiser, SCHEDULE, "fixed_large")
    total = torch.zeros((), dtype=torch.float64)
    for index in range(steps):
        noised = objective.noise_at(x0, eps, torch.full((50,), index))
        raw = torch.cat([exact_denoiser(noised.x_t, noised.t).eps, torch.ones_like(x0)], dim=1)
        loss = hybrid_loss(objective, raw, x0, noised, levels=None, vlb_weight=1.0)
        total += (loss - objective.loss(raw[:, :1], noised)).mean() / steps
    torch.testing.assert_close(total, _bound(model, x0, eps) - prior_term(x0, SCHEDULE).mean())


def test_a_learned_variance_improves_the_bound() -> None:
    """The claim of Nichol & Dhariwal 2021, section 3.1: the same mean, fewer bits than either fixed variance."""
    generator = torch.Generator().manual_seed(0)
    objective = Objective(SCHEDULE)

    def data(count: int) -> Tensor:
        sign = torch.randint(2, (count, 1), generator=generator) * 2.0 - 1
        return 0.7 * sign + 0.2 * torch.randn(count, 1, generator=generator)

    layers = nn.Sequential(nn.Linear(3, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 2))
    for parameter in layers.parameters():
        scale = parameter.shape[1] ** -0.5 if parameter.ndim > 1 else 0.0
        nn.init.normal_(parameter, 0, scale, generator)

    def net(x: Tensor, t: Tensor) -> Tensor:
        time = t[:, None] / SCHEDULE.num_train_timesteps
        raw: Tensor = layers(torch.cat([x, time, (8 * time).cos()], dim=1).float())
        return raw

    optimizer = torch.optim.Adam(layers.parameters(), lr=1e-2)
    for _ in range(180):
        x0 = data(256)
        noised = objective.draw(x0, generator)
        loss = hybrid_loss(objective, net(noised.x_t, noised.t), x0, noised, levels=None, vlb_weight=0.01).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    x0 = data(4000)

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        eps = net(x, t)[:, :1]
        alpha, sigma = SCHEDULE.alpha_sigma(t, like=x)
        return Prediction((x - sigma * eps) / alpha, eps)

    models = [learned_variance(net, SCHEDULE, "epsilon")]
    models += [fixed_variance(denoise, SCHEDULE, kind) for kind in MODEL_VARIANCES]
    learned, small, large = (
        variational_bound(model, x0, SCHEDULE, torch.Generator().manual_seed(1), levels=None).total.mean()
        for model in models
    )
    grid = np.linspace(-3, 3, 2001)
    density = sum(np.exp(-((grid - m) ** 2) / 0.08) for m in (-0.7, 0.7)) / (2 * 0.2 * math.sqrt(2 * math.pi))
    entropy = -np.trapezoid(density * np.log2(density), grid)
    assert entropy - 0.03 < learned < min(small, large) - 0.05, (entropy, learned, small, large)


def test_inputs_that_do_not_fit_are_refused() -> None:
    x0 = torch.zeros(2, 3, 4)
    flow = Objective(RectifiedFlow(10), "flow")
    noised = flow.draw(x0, torch.Generator())
    with pytest.raises(ValueError, match="schedule is a RectifiedFlow; accepted: a NoiseSchedule"):
        hybrid_loss(flow, torch.zeros(2, 6, 4), x0, noised, levels=None)
    table = Objective(SCHEDULE)
    for channels in (3, 5, 12):
        with pytest.raises(ValueError, match=f"raw output has {channels} channels; accepted: 6"):
            hybrid_loss(table, torch.zeros(2, channels, 4), x0, table.draw(x0, torch.Generator()), levels=None)
