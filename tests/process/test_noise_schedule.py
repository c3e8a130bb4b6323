from __future__ import annotations

import inspect
import math
from typing import Any

import diffusers
import pytest
import torch

from ldm.process import BETA_SCHEDULES, BetaSchedule, DiffusionConfig, NoiseSchedule

SD = {"beta_start": 0.00085, "beta_end": 0.012}
CLASSES = [
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
]


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("steps", [200, 1000])
def test_tables_are_those_of_diffusers(beta_schedule: BetaSchedule, zero_snr: bool, steps: int) -> None:
    config = DiffusionConfig(
        beta_schedule,
        num_train_timesteps=steps,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=zero_snr,
    )
    schedule = config.schedule()
    oracle = diffusers.DDIMScheduler.from_config(config.to_dict())
    torch.testing.assert_close(schedule.alphas_cumprod, oracle.alphas_cumprod.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(schedule.betas, oracle.betas.double(), atol=3e-6, rtol=1e-4)
    assert schedule.num_train_timesteps == steps
    assert (schedule.alphas_cumprod[-1] == 0) == zero_snr


def test_alpha_and_sigma_are_on_the_unit_circle_and_give_the_log_snr() -> None:
    schedule = NoiseSchedule.scaled_linear(**SD, num_train_timesteps=1000)
    t = torch.tensor([[0, 17], [500, 999]])
    alpha, sigma = schedule.alpha(t, torch.float64), schedule.sigma(t, torch.float64)
    assert alpha.shape == t.shape
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(2, 2, dtype=torch.float64))
    torch.testing.assert_close(schedule.log_snr(t, torch.float64), 2 * torch.log(alpha / sigma))
    assert schedule.alpha(t).dtype == torch.float32


def test_log_snr_is_linear_between_integers_and_exact_on_them() -> None:
    schedule = NoiseSchedule.linear(1e-4, 0.02, 100)
    ends = schedule.log_snr(torch.tensor([41, 42]), torch.float64)
    middle = schedule.log_snr(torch.tensor([41.25], dtype=torch.float64), torch.float64)
    torch.testing.assert_close(middle, 0.75 * ends[:1] + 0.25 * ends[1:])
    whole = torch.arange(100)
    assert torch.equal(schedule.alpha(whole.double()), schedule.alpha(whole))


def test_zero_terminal_snr_is_exact_and_leaves_log_snr_finite() -> None:
    schedule = NoiseSchedule.scaled_linear(**SD, num_train_timesteps=1000)
    rescaled = schedule.rescale_zero_terminal_snr()
    last = torch.tensor([999])
    assert rescaled.alpha(last).item() == 0 and rescaled.sigma(last).item() == 1
    assert rescaled.alpha(last.float()).item() == 0
    assert torch.isfinite(rescaled.log_snr(torch.tensor([998.5, 999.0]))).all()
    torch.testing.assert_close(rescaled.alphas_cumprod[0], schedule.alphas_cumprod[0])


def test_alpha_sigma_broadcast_over_images() -> None:
    schedule = NoiseSchedule.cosine(50)
    t = torch.tensor([3, 40])
    alpha, sigma = schedule.alpha_sigma(t, like=torch.zeros(2, 4, 8, 8, dtype=torch.float64))
    assert alpha.shape == sigma.shape == (2, 1, 1, 1) and alpha.dtype == torch.float64
    torch.testing.assert_close(alpha.flatten(), schedule.alpha(t, torch.float64))
    torch.testing.assert_close(sigma.flatten(), schedule.sigma(t, torch.float64))


def test_sigmoid_is_the_published_function() -> None:
    steps, start, end, tau = 200, -2.0, 4.0, 0.7
    schedule = NoiseSchedule.sigmoid(steps, start, end, tau)
    for index in (0, 50, 198):
        u = (index + 1) / steps
        first, last, here = (1 / (1 + math.exp(-z / tau)) for z in (start, end, start + u * (end - start)))
        assert schedule.alphas_cumprod[index].item() == pytest.approx((last - here) / (last - first), rel=1e-12)
    assert schedule.alphas_cumprod[-1] == 1e-9


def test_sigmoid_is_point_symmetric_and_straight_at_a_high_temperature() -> None:
    table = NoiseSchedule.sigmoid(100).alphas_cumprod
    torch.testing.assert_close(table[:-1] + table[:-1].flip(0), torch.ones(99, dtype=torch.float64))
    straight = NoiseSchedule.sigmoid(100, tau=1e4).alphas_cumprod
    torch.testing.assert_close(straight[:-1], 1 - torch.arange(1, 100, dtype=torch.float64) / 100, atol=1e-6, rtol=0)


@pytest.mark.parametrize("change", [{"start": 3.0}, {"tau": 0.0}, {"floor": 0.0}])
def test_sigmoids_that_do_not_fall_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="accepted: start < end, tau and floor > 0"):
        NoiseSchedule.sigmoid(10, **change)


def test_the_resolution_shift_gives_the_pooled_picture_the_noise_of_the_base() -> None:
    """The mean of 4·4 pixels of a constant picture has the signal of one and a sixteenth of its noise variance."""
    base = NoiseSchedule.cosine(100)
    shifted = base.shifted(64, 256)
    t = torch.tensor([0, 30, 99])
    signal, noise = shifted.alpha(t, torch.float64), shifted.sigma(t, torch.float64) / math.sqrt(4 * 4)
    torch.testing.assert_close(2 * torch.log(signal / noise), base.log_snr(t, torch.float64))
    torch.testing.assert_close(shifted.shifted(256, 64).alphas_cumprod, base.alphas_cumprod)
    assert base.rescale_zero_terminal_snr().shifted(64, 256).alphas_cumprod[-1] == 0
    with pytest.raises(ValueError, match="resolution 0; accepted: positive"):
        base.shifted(64, 0)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_timesteps_are_found_again_from_their_log_snr(zero_snr: bool) -> None:
    schedule = NoiseSchedule.scaled_linear(**SD, num_train_timesteps=1000)
    schedule = schedule.rescale_zero_terminal_snr() if zero_snr else schedule
    t = torch.tensor([0.0, 0.25, 41.0, 500.7, 998.9, 999.0], dtype=torch.float64)
    torch.testing.assert_close(schedule.timestep_of_log_snr(schedule.log_snr(t, torch.float64)), t)
    beyond = schedule.timestep_of_log_snr(torch.tensor([100.0, -100.0]))
    assert beyond.tolist() == [0, 999]


def test_the_part_of_all_timesteps_is_an_index() -> None:
    schedule = NoiseSchedule.linear(1e-3, 0.2, 10)
    assert schedule.timestep(torch.tensor([0.0, 0.09, 0.1, 0.55, 1.0])).tolist() == [0, 0, 1, 5, 9]


@pytest.mark.parametrize("t", [torch.tensor([-1]), torch.tensor([10]), torch.tensor([9.5])])
def test_times_outside_the_table_are_refused(t: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="accepted: 0 to 9"):
        NoiseSchedule.linear(1e-3, 0.2, 10).alpha(t)


@pytest.mark.parametrize("timesteps", [[], [3, 3], [1, 2], [10, 3], [3, -1]])
def test_paths_that_do_not_fall_within_the_table_are_refused(timesteps: list[int]) -> None:
    with pytest.raises(ValueError, match=r"within \[0, 9\]"):
        NoiseSchedule.linear(1e-3, 0.2, 10).alpha_bar_path(torch.tensor(timesteps), final=1.0)


@pytest.mark.parametrize(
    "table",
    [
        torch.tensor([0.9, 0.5]),
        torch.tensor([[0.9, 0.5]], dtype=torch.float64),
        torch.tensor([0.5, 0.9], dtype=torch.float64),
        torch.tensor([1.0, 0.9], dtype=torch.float64),
        torch.tensor([0.9, 0.0, 0.0], dtype=torch.float64),
        torch.tensor([0.9, math.nan], dtype=torch.float64),
    ],
)
def test_tables_that_are_no_schedule_are_refused(table: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="alphas_cumprod"):
        NoiseSchedule(table)


@pytest.mark.parametrize("name", CLASSES)
def test_missing_keys_have_the_defaults_of_the_class(name: str) -> None:
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    config = DiffusionConfig.from_dict({"_class_name": name}).to_dict()
    for key in DiffusionConfig.__dataclass_fields__.keys() - {"variance_type"}:
        if key in parameters:
            assert config[key] == parameters[key].default, key


@pytest.mark.parametrize("name", CLASSES)
def test_configs_saved_by_diffusers_are_read_and_ours_are_read_by_it(name: str) -> None:
    config = DiffusionConfig("scaled_linear", 0.001, 0.013, 500, "v_prediction", "trailing", 2)
    scheduler = getattr(diffusers, name).from_config(config.to_dict())
    assert DiffusionConfig.from_dict(dict(scheduler.config) | {"_class_name": name}) == config


def test_the_stable_diffusion_1_config_is_read() -> None:
    released: dict[str, Any] = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    }
    assert DiffusionConfig.from_dict(released) == DiffusionConfig()


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"beta_schedule": "sigmoid"},
        {"prediction_type": "flow"},
        {"timestep_spacing": "even"},
        {"beta_start": 0.5, "beta_end": 0.1},
        {"num_train_timesteps": 0},
        {"steps_offset": -1},
        {"rescale_betas_zero_snr": True},
        {"trained_betas": [0.1, 0.2]},
        {"clip_sample": True},
        {"thresholding": True},
    ],
)
def test_settings_out_of_range_are_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))}.*accepted"):
        DiffusionConfig.from_dict(change)
