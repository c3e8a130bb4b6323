from __future__ import annotations

import diffusers
import pytest
import torch

from ldm.process import Objective, VarianceExploding, VeConfig, process_from_dict, to_x0_eps


def test_the_levels_are_those_of_the_diffusers_scheduler() -> None:
    oracle = diffusers.ScoreSdeVeScheduler(50, sigma_min=0.01, sigma_max=20.0)
    oracle.set_sigmas(50)
    schedule = VarianceExploding.geometric(0.01, 20.0, 50)
    torch.testing.assert_close(schedule.sigmas, oracle.discrete_sigmas.double(), atol=1e-5, rtol=1e-5)
    assert schedule.prior_std == pytest.approx(20) and schedule.num_train_timesteps == 50


def test_neighbours_have_one_ratio_and_the_log_is_linear_between_them() -> None:
    schedule = VarianceExploding.geometric(0.1, 1.6, 5)
    torch.testing.assert_close(schedule.sigmas, torch.tensor([0.1, 0.2, 0.4, 0.8, 1.6]).double())
    t = torch.tensor([0.0, 1.5, 4.0], dtype=torch.float64)
    sigma = schedule.sigma(t, torch.float64)
    torch.testing.assert_close(sigma, 0.1 * 2**t)
    torch.testing.assert_close(schedule.log_snr(t, torch.float64), -2 * sigma.log())
    torch.testing.assert_close(schedule.timestep_of_log_snr(-2 * sigma.log()), t)
    assert schedule.alpha(t).tolist() == [1, 1, 1]


def test_noising_adds_and_leads_back() -> None:
    x0, eps = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    schedule = VarianceExploding.geometric(0.01, 50.0, 10)
    noised = Objective(schedule, "score").noise(x0, eps, torch.tensor([0.0, 0.55, 0.99]))
    assert noised.t.tolist() == [0, 5, 9]
    sigma = schedule.sigmas[noised.t].reshape(3, 1, 1, 1)
    torch.testing.assert_close(noised.x_t, x0 + sigma * eps)
    torch.testing.assert_close(noised.target, -(noised.x_t - x0) / sigma**2)
    pair = to_x0_eps(noised.target, noised.x_t, *schedule.alpha_sigma(noised.t, like=x0), "score")
    torch.testing.assert_close(pair.x0, x0)


@pytest.mark.parametrize(
    "sigmas",
    [
        torch.tensor([0.1, 1.0]),
        torch.tensor([1.0], dtype=torch.float64),
        torch.tensor([1.0, 0.1], dtype=torch.float64),
        torch.tensor([0.0, 0.1], dtype=torch.float64),
        torch.tensor([0.1, torch.inf], dtype=torch.float64),
    ],
)
def test_tables_that_do_not_rise_are_refused(sigmas: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"sigmas .*; accepted"):
        VarianceExploding(sigmas)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="accepted: 0 < sigma_min < sigma_max"):
        VarianceExploding.geometric(1.0, 0.1, 10)
    with pytest.raises(ValueError, match="accepted: 0 to 9"):
        VarianceExploding.geometric(0.1, 1.0, 10).sigma(torch.tensor([10]))


def test_a_model_comes_back_from_the_file_that_diffusers_reads() -> None:
    config = VeConfig("ve", 50, 0.02, 30.0, "v_prediction", "trailing")
    assert process_from_dict(config.to_dict()) == config
    theirs = diffusers.ScoreSdeVeScheduler.from_config(config.to_dict())
    theirs.set_sigmas(50)
    log_snr = config.schedule().log_snr(torch.arange(50), torch.float64)
    torch.testing.assert_close((-log_snr / 2).exp(), theirs.discrete_sigmas.double(), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="prediction_type is None; accepted: epsilon, v_prediction, sample"):
        process_from_dict(dict(diffusers.ScoreSdeVeScheduler().config) | {"_class_name": "ScoreSdeVeScheduler"})


def test_the_loss_on_noise_is_score_matching_weighted_by_the_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps, raw = torch.randn(3, 8, 2, 3, 3, generator=generator, dtype=torch.float64)
    schedule, u = VarianceExploding.geometric(0.01, 50.0, 1000), torch.rand(8, generator=generator)
    noised, scored = (Objective(schedule, kind).noise(x0, eps, u) for kind in ("epsilon", "score"))
    sigma = schedule.sigmas[noised.t].reshape(-1, 1, 1, 1)
    score_loss = (-raw / sigma - scored.target).square().flatten(1).mean(1)
    expected = sigma.flatten() ** 2 * score_loss
    torch.testing.assert_close(Objective(schedule).loss(raw, noised), expected)
    seen = Objective(VeConfig("ve").schedule()).noise(x0, eps, u)
    torch.testing.assert_close(seen.x_t, noised.x_t / (1 + sigma**2).sqrt())
    torch.testing.assert_close(Objective(VeConfig("ve").schedule()).loss(raw, seen), expected)
