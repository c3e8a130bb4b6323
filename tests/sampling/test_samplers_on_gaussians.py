"""Samplers against closed forms: E[x0 | x_t] and the probability flow are known for data N(MEAN, STD²)."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm.process import NoiseSchedule, Prediction, timesteps
from ldm.sampling import SAMPLERS, Denoiser, Sampler, ddim, ddpm, euler_ancestral

MEAN, STD = 0.3, 0.6
SCHEDULE = NoiseSchedule.scaled_linear(0.00085, 0.012, 1000)
START = torch.tensor([[-1.5], [-0.2], [0.9]], dtype=torch.float64)


def _exact(schedule: NoiseSchedule) -> Denoiser:
    def denoise(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = schedule.alpha_sigma(t, like=x)
        score_scale = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        return Prediction(MEAN + alpha * STD**2 * score_scale, sigma * score_scale)

    return denoise


def _marginal(t: int) -> tuple[Tensor, Tensor]:
    alpha_bar = SCHEDULE.alphas_cumprod[t]
    return alpha_bar.sqrt() * MEAN, (alpha_bar * STD**2 + 1 - alpha_bar).sqrt()


def _flow(x: Tensor, start: int, end: int) -> Tensor:
    """The probability-flow ODE keeps (x - mean_t) / std_t (Song et al. 2021b, section 4.3)."""
    (mean, std), (end_mean, end_std) = _marginal(start), _marginal(end)
    return end_mean + (x - mean) / std * end_std


def _even_in_log_snr(count: int) -> Tensor:
    table = SCHEDULE.log_snr(torch.arange(1000), torch.float64)
    wanted = torch.linspace(table[-1], table[0], count, dtype=torch.float64)[1:-1]
    right = torch.searchsorted(-table, -wanted)
    t = right - (table[right] - wanted) / (table[right] - table[right - 1])
    return torch.cat([torch.tensor([999.0]), t, torch.tensor([0.0])])


def _error(name: str, count: int) -> float:
    result = SAMPLERS[name](_exact(SCHEDULE), START, SCHEDULE, _even_in_log_snr(count), [])
    at_zero = _flow(START, 999, 0)
    expected = at_zero if name == "ddim" else _exact(SCHEDULE)(at_zero, torch.zeros(3)).x0
    return (result - expected).abs().max().item()


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 3)])
def test_deterministic_samplers_converge_to_the_flow_with_their_order(name: str, order: int) -> None:
    errors = [_error(name, count) for count in (41, 81, 161)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.1)
    assert errors[-1] < 0.01


def test_deterministic_samplers_map_noise_to_the_data_distribution() -> None:
    t = timesteps(100, 1000, "trailing")
    noise = torch.randn(1, 1, 100, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name in ("ddim", "euler", "heun", "dpmpp_2m", "unipc"):
        x0 = SAMPLERS[name](_exact(SCHEDULE), noise, SCHEDULE, t, [])
        assert x0.mean().item() == pytest.approx(MEAN, abs=0.03), name
        assert x0.std().item() == pytest.approx(STD, abs=0.02), name


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_ancestral_sampling_over_every_step_gives_the_data_distribution(name: str) -> None:
    x0 = _ancestral_sample(name, num_steps=1000)
    assert x0.mean().item() == pytest.approx(MEAN, abs=0.015)
    assert x0.std().item() == pytest.approx(STD, rel=0.02)


@pytest.mark.parametrize(
    ("name", "levels"), [("euler_a", 800), ("dpmpp_2m_sde", 100), ("langevin", 600), ("predictor_corrector", 200)]
)
def test_stochastic_samplers_give_the_data_distribution(name: str, levels: int) -> None:
    """Within four standard errors of 20,000 samples, 0.017 of the mean and 0.012 of the deviation."""
    rng = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    x = torch.randn(2, 1, 100, 100, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x0 = SAMPLERS[name](_exact(SCHEDULE), x, SCHEDULE, _even_in_log_snr(levels), rng)
    assert x0.mean().item() == pytest.approx(MEAN, abs=4 * STD / 20_000**0.5)
    assert x0.std().item() == pytest.approx(STD, abs=4 * STD / 40_000**0.5)


def test_ancestral_sampling_in_few_steps_has_the_moments_of_its_gaussian_chain() -> None:
    alpha_bar = torch.cat([SCHEDULE.alphas_cumprod[timesteps(10, 1000, "leading", 1)], torch.ones(1)]).tolist()
    mean, variance = 0.0, 1.0
    for now, prev in pairwise(alpha_bar):
        gain = now**0.5 * STD**2 / (now * STD**2 + 1 - now)
        of_x0 = prev**0.5 * (1 - now / prev) / (1 - now)
        slope = of_x0 * gain + (now / prev) ** 0.5 * (1 - prev) / (1 - now)
        mean = slope * mean + of_x0 * MEAN * (1 - gain * now**0.5)
        variance = slope**2 * variance + (1 - prev) / (1 - now) * (1 - now / prev)
    x0 = _ancestral_sample("ddpm", num_steps=10)
    assert x0.mean().item() == pytest.approx(mean, abs=0.015)
    assert x0.std().item() == pytest.approx(variance**0.5, rel=0.015)


def _ancestral_sample(name: str, num_steps: int) -> Tensor:
    rng = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    x = torch.randn(2, 1, 100, 100, generator=torch.Generator().manual_seed(3))
    t = timesteps(num_steps, 1000, "leading", 1)
    if name == "ddim":
        return ddim.sample(_exact(SCHEDULE), x, SCHEDULE, t, rng, eta=1.0)
    return ddpm.sample(_exact(SCHEDULE), x, SCHEDULE, t, rng)


@pytest.mark.parametrize("same", [partial(ddim.sample, eta=1.0), euler_ancestral.sample], ids=["ddim", "euler_a"])
def test_ddpm_is_ddim_with_full_noise_and_euler_a(same: Sampler) -> None:
    x, t = START.reshape(3, 1, 1, 1), timesteps(20, 1000, "leading", 1)
    paths: list[list[Tensor]] = []
    for sample in (ddpm.sample, same):
        path: list[Tensor] = []
        rng = [torch.Generator().manual_seed(seed) for seed in range(3)]
        sample(_seen_by(path), x, SCHEDULE, t, rng)
        paths.append(path)
    for a, b in zip(*paths, strict=True):
        torch.testing.assert_close(a, b)


def _seen_by(path: list[Tensor]) -> Denoiser:
    def denoise(x: Tensor, t: Tensor) -> Prediction:
        path.append(x)
        return _exact(SCHEDULE)(x, t)

    return denoise


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_callback_sees_every_step_before_it_is_taken(name: str) -> None:
    calls: list[tuple[int, int]] = []
    t = timesteps(8, 1000, "trailing")
    exact = _exact(SCHEDULE)

    def check(step: int, t: Tensor, x: Tensor, prediction: Prediction) -> None:
        calls.append((step, int(t)))
        alpha, sigma = SCHEDULE.alpha_sigma(t, like=x)
        torch.testing.assert_close(alpha * prediction.x0 + sigma * prediction.eps, x)

    rng = [torch.Generator().manual_seed(seed) for seed in range(3)]
    SAMPLERS[name](exact, START, SCHEDULE, t, rng, check)
    assert calls == list(enumerate(t.tolist()))


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    t = timesteps(6, 1000, "leading", 1)
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    def run(rows: list[int]) -> Tensor:
        rng = [torch.Generator().manual_seed(100 + row) for row in rows]
        return SAMPLERS[name](_exact(SCHEDULE), x[rows], SCHEDULE, t, rng)

    together = run([0, 1, 2])
    assert torch.equal(run([1])[0], together[1])
    assert torch.equal(run([2, 0])[0], together[2])


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_is_finite_at_zero_terminal_snr(name: str) -> None:
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    rng = [torch.Generator().manual_seed(seed) for seed in range(3)]
    x0 = SAMPLERS[name](_exact(schedule), START, schedule, timesteps(30, 1000, "trailing"), rng)
    assert ((x0 - MEAN).abs() < 6 * STD).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_timesteps_that_do_not_fall_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="accepted: falling strictly"):
        SAMPLERS[name](_exact(SCHEDULE), START, SCHEDULE, torch.tensor([1, 500]), [])


def test_eta_outside_the_unit_interval_is_refused() -> None:
    with pytest.raises(ValueError, match=r"eta is 1\.5; accepted: 0 to 1"):
        ddim.sample(_exact(SCHEDULE), START, SCHEDULE, torch.tensor([500]), [], eta=1.5)
