from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ldm.process import NoiseSchedule, Prediction
from ldm.process.posterior import p_mean_from_eps
from ldm.sampling import (
    SAMPLERS,
    Denoiser,
    classifier_gradient,
    classifier_guided_denoiser,
    guided_denoiser,
    interval_denoiser,
    network_denoiser,
    sigma_spaced_timesteps,
    thresholded_denoiser,
)

SCHEDULE = NoiseSchedule.scaled_linear(0.00085, 0.012, 1000)
S = (SCHEDULE.log_snr(torch.arange(1000), torch.float64) / -2).exp()
MEAN, STD = 0.3, 0.6


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _gaussian(mean: float, std: float) -> Denoiser:
    def denoise(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = SCHEDULE.alpha_sigma(t, like=x)
        score_scale = (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        return Prediction(mean + alpha * std**2 * score_scale, sigma * score_scale)

    return denoise


# --- interval


class Net:
    """Counts the rows of every call."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        self.rows.append(len(x))
        return 0.5 * x + context.reshape(-1, 1, 1, 1)


def _pair(net: Net, rows: int) -> tuple[Denoiser, Denoiser]:
    cond, uncond = {"context": torch.ones(rows)}, {"context": torch.zeros(rows)}
    guided = guided_denoiser(net, SCHEDULE, "epsilon", cond, uncond, 3.0)
    return guided, network_denoiser(net, SCHEDULE, "epsilon", cond)


def test_guidance_acts_inside_the_interval_only_and_costs_nothing_outside() -> None:
    net = Net()
    guided, plain = _pair(net, 2)
    limited = interval_denoiser(guided, plain, SCHEDULE, (float(S[300]), float(S[700])))
    x = _randn(2, 3, 4, 4)
    for t, inside in ((0, False), (299, False), (301, True), (500, True), (699, True), (701, False), (999, False)):
        net.rows.clear()
        prediction = limited(x, torch.tensor([t, t]))
        assert net.rows == [4 if inside else 2]
        assert torch.equal(prediction.eps, (guided if inside else plain)(x, torch.tensor([t, t])).eps)


def test_rows_on_both_sides_each_get_their_own() -> None:
    guided, plain = _pair(Net(), 3)
    limited = interval_denoiser(guided, plain, SCHEDULE, (float(S[300]), float(S[700])))
    x, t = _randn(3, 3, 4, 4), torch.tensor([100, 500, 900])
    prediction = limited(x, t)
    for row, expected in enumerate((plain, guided, plain)):
        assert torch.equal(prediction.x0[row], expected(x, t).x0[row])
        assert torch.equal(prediction.eps[row], expected(x, t).eps[row])


def test_an_interval_over_everything_or_nothing() -> None:
    guided, plain = _pair(Net(), 2)
    x = _randn(2, 3, 4, 4)
    t = torch.tensor([999, 999])
    assert torch.equal(interval_denoiser(guided, plain, SCHEDULE, (0, 1e9))(x, t).eps, guided(x, t).eps)
    assert torch.equal(interval_denoiser(guided, plain, SCHEDULE, (1e8, 1e9))(x, t).eps, plain(x, t).eps)


def test_the_infinite_level_of_zero_terminal_snr_is_inside_an_open_end() -> None:
    guided, plain = _pair(Net(), 2)
    x, t = _randn(2, 3, 4, 4), torch.tensor([999, 999])
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    assert torch.equal(interval_denoiser(guided, plain, schedule, (1, float("inf")))(x, t).eps, guided(x, t).eps)
    assert torch.equal(interval_denoiser(guided, plain, schedule, (1, 1e9))(x, t).eps, plain(x, t).eps)


@pytest.mark.parametrize("interval", [(-1.0, 2.0), (2.0, 2.0), (3.0, 1.0)])
def test_an_interval_that_is_none_is_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"interval is .*; accepted: 0 <= low < high, in sigma / alpha"):
        interval_denoiser(_gaussian(0, 1), _gaussian(0, 1), SCHEDULE, interval)


# --- dynamic thresholding


@pytest.mark.parametrize("percentile", [0.9, 0.995, 1.0])
@pytest.mark.parametrize("size", [0.5, 4.0])
def test_thresholding_is_that_of_diffusers(percentile: float, size: float) -> None:
    x, t = _randn(2, 3, 8, 8), torch.tensor([600, 20])
    x0 = size * _randn(2, 3, 9, 8)[:, :, :8]
    prediction = thresholded_denoiser(lambda x, t: Prediction(x0, x), SCHEDULE, percentile)(x, t)
    scheduler = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=percentile, sample_max_value=1e6)
    torch.testing.assert_close(prediction.x0, scheduler._threshold_sample(x0))
    alpha, sigma = SCHEDULE.alpha_sigma(t, like=x)
    torch.testing.assert_close(alpha * prediction.x0 + sigma * prediction.eps, x)


def test_latents_have_their_own_limit() -> None:
    x0 = torch.tensor([[[-9.0, 3.0, 1.0, 6.0]], [[-2.0, 1.5, 0.5, 3.5]]])
    prediction = thresholded_denoiser(lambda x, t: Prediction(x0, x), SCHEDULE, 1.0, limit=4.0)(
        x0, torch.tensor([5, 5])
    )
    torch.testing.assert_close(prediction.x0[0], x0[0] * 4 / 9)
    torch.testing.assert_close(prediction.x0[1], x0[1])


def test_thresholds_out_of_range_are_named() -> None:
    for percentile, limit in ((0.0, 1.0), (99.5, 1.0), (0.9, 0.0)):
        with pytest.raises(ValueError, match=r"accepted: within \(0, 1\], and above 0"):
            thresholded_denoiser(_gaussian(0, 1), SCHEDULE, percentile, limit)


# --- a classifier

TAU, Y = 0.5, 1.1
"""The label is y = x0 + TAU·noise, and Y is asked for: p(x0 | Y) is Gaussian too."""
GAIN = STD**2 / (STD**2 + TAU**2)
POSTERIOR = _gaussian(MEAN + GAIN * (Y - MEAN), (STD**2 * TAU**2 / (STD**2 + TAU**2)) ** 0.5)


def _log_prob(x: Tensor, t: Tensor) -> Tensor:
    """log p(Y | x_t), which is normal about E[x0 | x_t]."""
    alpha, sigma = SCHEDULE.alpha_sigma(t, like=x)
    full = alpha**2 * STD**2 + sigma**2
    mean = MEAN + alpha * STD**2 / full * (x - alpha * MEAN)
    variance = STD**2 * sigma**2 / full + TAU**2
    return -((Y - mean) ** 2 / (2 * variance)).flatten(1).sum(1)


def test_the_exact_classifier_gives_the_exact_conditional_model() -> None:
    x, t = _randn(3, 2, 4, 4).double(), torch.tensor([999, 400, 2])
    with torch.no_grad():
        guided = classifier_guided_denoiser(
            _gaussian(MEAN, STD), classifier_gradient(_log_prob, 1.0, SCHEDULE), SCHEDULE
        )(x, t)
    expected = POSTERIOR(x, t)
    torch.testing.assert_close(guided.x0, expected.x0)
    torch.testing.assert_close(guided.eps, expected.eps)
    assert not guided.eps.requires_grad


def test_classifier_guidance_draws_the_asked_for() -> None:
    t = sigma_spaced_timesteps(SCHEDULE, 40, "exponential")
    x = _randn(2, 1, 8, 8).double()
    guided = classifier_guided_denoiser(_gaussian(MEAN, STD), classifier_gradient(_log_prob, 1.0, SCHEDULE), SCHEDULE)
    pair = [SAMPLERS["dpmpp_2m"](denoise, x, SCHEDULE, t, []) for denoise in (guided, POSTERIOR)]
    torch.testing.assert_close(pair[0], pair[1])


def test_the_ancestral_mean_moves_by_the_gradient_times_about_the_variance() -> None:
    """By beta / sqrt(1 - beta), where algorithm 1 has the variance, beta (Dhariwal & Nichol 2021)."""
    x, t, scale = _randn(2, 1, 4, 4).double(), torch.tensor([500, 500]), 2.5
    plain = _gaussian(MEAN, STD)
    guided = classifier_guided_denoiser(plain, classifier_gradient(_log_prob, scale, SCHEDULE), SCHEDULE)
    before, after = SCHEDULE.alphas_cumprod[500], SCHEDULE.alphas_cumprod[499]
    moved = p_mean_from_eps(x, guided(x, t).eps, before, after) - p_mean_from_eps(x, plain(x, t).eps, before, after)
    gradient = torch.func.grad(lambda x: _log_prob(x, t).sum())(x)
    beta = 1 - before / after
    torch.testing.assert_close(moved, scale * beta / (1 - beta).sqrt() * gradient)


def test_pure_noise_says_nothing_about_the_class() -> None:
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    x, t = _randn(2, 1, 4, 4), torch.tensor([999, 500])
    plain = Prediction(torch.full_like(x, MEAN), x)
    gradient = classifier_gradient(lambda x, t: x.flatten(1).sum(1), 3.0, schedule)
    guided = classifier_guided_denoiser(lambda x, t: plain, gradient, schedule)(x, t)
    assert torch.equal(guided.x0[0], plain.x0[0]) and torch.equal(guided.eps[0], plain.eps[0])
    assert (guided.x0[1] > plain.x0[1]).all()
