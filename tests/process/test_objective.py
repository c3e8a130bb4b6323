from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_snr

from ldm.process import (
    PREDICTION_TYPES,
    WEIGHTINGS,
    NoiseSchedule,
    Objective,
    Prediction,
    PredictionType,
    RectifiedFlow,
    Schedule,
    VarianceExploding,
    debiased_weight,
    from_x0_eps,
    min_snr_weight,
    p2_weight,
    snr_truncated_weight,
    to_x0_eps,
)

SCHEDULE = NoiseSchedule.scaled_linear(0.00085, 0.012, 1000)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_target_leads_back_to_the_data(prediction_type: PredictionType) -> None:
    x0 = torch.randn(6, 4, 8, 8, generator=_generator(1), dtype=torch.float64)
    noised = Objective(SCHEDULE, prediction_type).draw(x0, _generator())
    assert noised.t.dtype == torch.int64 and noised.t.shape == noised.weight.shape == (6,)
    alpha, sigma = SCHEDULE.alpha_sigma(noised.t, like=x0)
    pair = to_x0_eps(noised.target, noised.x_t, alpha, sigma, prediction_type)
    torch.testing.assert_close(pair.x0, x0)
    assert abs(pair.eps.std().item() - 1) < 0.1


def test_noising_is_that_of_diffusers() -> None:
    x0, eps = torch.randn(2, 3, 4, 8, 8, generator=_generator(2))
    noised = Objective(SCHEDULE).noise(x0, eps, torch.tensor([0.0, 0.5, 0.9999]))
    assert noised.t.tolist() == [0, 500, 999]
    oracle = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(noised.x_t, oracle.add_noise(x0, eps, noised.t), atol=1e-5, rtol=1e-5)


def test_draws_depend_on_the_generator_alone() -> None:
    objective, x0 = Objective(SCHEDULE), torch.ones(4, 1, 2, 2)
    torch.manual_seed(1)
    first = objective.draw(x0, _generator(3))
    torch.manual_seed(2)
    again, other = objective.draw(x0, _generator(3)), objective.draw(x0, _generator(4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.x_t, other.x_t)


def test_uniform_timesteps_hit_each_step_alike() -> None:
    u = (torch.arange(5000) + 0.5) / 5000
    t = Objective(NoiseSchedule.linear(1e-3, 0.2, 50)).timesteps(u)
    assert torch.equal(torch.bincount(t), torch.full((50,), 100))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.2, 1.3)])
def test_logit_normal_timesteps_have_its_distribution(mean: float, std: float) -> None:
    u = torch.rand(200_000, generator=_generator(), dtype=torch.float64)
    t = Objective(SCHEDULE, timestep_sampling="logit_normal", logit_mean=mean, logit_std=std).timesteps(u)
    assert t.min() >= 0 and t.max() <= 999
    normal = torch.distributions.Normal(mean, std)
    for cut in (100, 250, 500, 900):
        expected = normal.cdf(torch.logit(torch.tensor(cut / 1000))).item()
        assert (t < cut).double().mean().item() == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_the_ends_of_the_unit_interval_are_inside_the_table(sampling: Any) -> None:
    ends = torch.tensor([0.0, 1 - 2**-24])
    t = Objective(SCHEDULE, timestep_sampling=sampling).timesteps(ends)
    assert t[0] == 0 and 990 <= t[1] <= 999


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_those_of_the_diffusers_training_script(gamma: float) -> None:
    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    t = torch.arange(1000)
    snr = compute_snr(scheduler, t)
    capped = snr.clamp(max=gamma)
    expected: dict[PredictionType, torch.Tensor] = {
        "epsilon": capped / snr,
        "v_prediction": capped / (snr + 1),
        "sample": capped,
    }
    for prediction_type, weight in expected.items():
        ours = Objective(SCHEDULE, prediction_type, snr_gamma=gamma).weight(t)
        torch.testing.assert_close(ours, weight, atol=1e-5, rtol=1e-4)


def test_min_snr_weights_all_types_alike_in_x0() -> None:
    t = torch.tensor([5, 300, 800])
    alpha, sigma = SCHEDULE.alpha_sigma(t, like=torch.zeros(3, 1))
    error_in_x0 = 0.1
    weighted = [
        Objective(SCHEDULE, prediction_type, 5.0).weight(t) * error**2
        for prediction_type, error in [
            ("sample", torch.full((3,), error_in_x0)),
            ("epsilon", error_in_x0 * (alpha / sigma).flatten()),
            ("v_prediction", error_in_x0 / sigma.flatten()),
        ]
    ]
    torch.testing.assert_close(weighted[0], weighted[1])
    torch.testing.assert_close(weighted[0], weighted[2])


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("setting", [{"snr_gamma": 5.0}, *({"weighting": w} for w in WEIGHTINGS)])
def test_weights_are_finite_where_signal_or_noise_is_gone(prediction_type: Any, setting: dict[str, Any]) -> None:
    table = Objective(SCHEDULE.rescale_zero_terminal_snr(), prediction_type, **setting)
    flow = Objective(RectifiedFlow(1000), prediction_type, **setting)
    assert torch.isfinite(table.weight(torch.tensor([0, 999]))).all()
    assert torch.isfinite(flow.weight(torch.tensor([0, 1000]))).all()


SNR = torch.tensor([1e-3, 0.5, 1.0, 7.0, 400.0], dtype=torch.float64)


def test_weights_are_their_published_formulas() -> None:
    torch.testing.assert_close(
        p2_weight(SNR, 0.5, 2.0), torch.tensor([1 / math.sqrt(2 + s) for s in SNR.tolist()]).double()
    )
    torch.testing.assert_close(debiased_weight(SNR) ** 2 * SNR, torch.ones_like(SNR))
    for snr, weight in zip(SNR.tolist(), snr_truncated_weight(SNR).tolist(), strict=True):
        error_in_x0, error_in_eps = 0.1, 0.1 * math.sqrt(snr)
        assert weight * error_in_eps**2 == pytest.approx(max(error_in_x0**2, error_in_eps**2))
    torch.testing.assert_close(min_snr_weight(SNR, math.inf), torch.ones_like(SNR))


@pytest.mark.parametrize("setting", [{"snr_gamma": 5.0}, *({"weighting": w} for w in WEIGHTINGS if w != "none")])
@pytest.mark.parametrize("schedule", [SCHEDULE, RectifiedFlow(1000), VarianceExploding.geometric(0.01, 50, 1000)])
def test_one_error_counts_alike_in_every_prediction_type(schedule: Schedule, setting: dict[str, Any]) -> None:
    t = torch.tensor([5, 300, 800])
    x0, eps, wrong = torch.randn(3, 3, 2, 4, generator=_generator(8), dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(t, like=x0)
    x_t = alpha * x0 + sigma * eps
    off = Prediction(x0=x0 - sigma / alpha * wrong, eps=eps + wrong)
    losses = []
    for prediction_type in PREDICTION_TYPES:
        objective = Objective(schedule, prediction_type, **setting)
        noised = objective.noise_at(x0, eps, t)
        torch.testing.assert_close(noised.x_t, x_t)
        losses.append(objective.loss(from_x0_eps(off.x0, off.eps, alpha, sigma, prediction_type), noised))
    for loss in losses:
        torch.testing.assert_close(loss, losses[0], atol=0, rtol=1e-5)


def test_other_noise_in_the_input_leaves_the_target_alone() -> None:
    objective, t = Objective(SCHEDULE), torch.tensor([7, 600])
    x0, eps, other = torch.randn(3, 2, 1, 4, 4, generator=_generator(9))
    plain, perturbed = objective.noise_at(x0, eps, t), objective.noise_at(x0, eps, t, input_eps=other)
    assert torch.equal(perturbed.target, eps) and torch.equal(plain.target, eps)
    assert torch.equal(perturbed.x_t, objective.noise_at(x0, other, t).x_t)


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_a_time_shift_is_one_of_the_logit(sampling: Any) -> None:
    u = torch.rand(5000, generator=_generator(), dtype=torch.float64)
    flow = RectifiedFlow(1)
    plain = Objective(flow, "flow", timestep_sampling=sampling).timesteps(u).double()
    shifted = Objective(flow, "flow", timestep_sampling=sampling, time_shift=3.0).timesteps(u).double()
    torch.testing.assert_close(shifted.logit(), plain.logit() + math.log(3), atol=1e-3, rtol=1e-5)


def test_loss_is_the_weighted_mean_square_of_each_row() -> None:
    x0 = torch.zeros(3, 2, 4, 4)
    objective = Objective(SCHEDULE, "v_prediction", snr_gamma=5.0)
    noised = objective.draw(x0, _generator())
    offset = torch.tensor([0.0, 1.0, 3.0]).reshape(3, 1, 1, 1)
    expected = noised.weight * torch.tensor([0.0, 1.0, 9.0])
    torch.testing.assert_close(objective.loss(noised.target + offset, noised), expected)
    assert torch.equal(Objective(SCHEDULE).draw(x0, _generator()).weight, torch.ones(3))


def test_the_exact_noise_predictor_of_gaussian_data_reaches_the_bayes_error() -> None:
    std, rows = 0.5, 2000
    x0 = std * torch.randn(rows, 1, 10, 10, generator=_generator(5))
    objective = Objective(SCHEDULE)
    noised = objective.noise(x0, torch.randn(x0.shape, generator=_generator(6)), torch.full((rows,), 0.4))
    alpha, sigma = SCHEDULE.alpha_sigma(noised.t, like=x0)
    variance = alpha**2 * std**2 + sigma**2
    exact = sigma / variance * noised.x_t
    bayes_error = (alpha**2 * std**2 / variance)[0].item()
    assert objective.loss(exact, noised).mean().item() == pytest.approx(bayes_error, rel=0.02)
    assert objective.loss(0.9 * exact, noised).mean().item() > bayes_error * 1.02


@pytest.mark.parametrize(
    "change",
    [
        {"prediction_type": "noise"},
        {"timestep_sampling": "even"},
        {"snr_gamma": 0.0},
        {"snr_gamma": -5.0},
        {"logit_std": 0.0},
        {"weighting": "min_snr"},
        {"weighting": "p2", "snr_gamma": 5.0},
        {"p2_gamma": 0.0},
        {"p2_k": -1.0},
        {"time_shift": 0.0},
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))} is .*; accepted"):
        Objective(SCHEDULE, **change)
