from __future__ import annotations

import math

import diffusers
import pytest
import torch

from ldm.process import NoiseSchedule, Objective, RectifiedFlow, time_shift, to_x0_eps


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_noising_and_velocity_are_those_of_the_diffusers_scheduler() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(1000)
    x0, eps = _randn(3, 2, 4), _randn(3, 2, 5)[..., :4]
    noised = Objective(RectifiedFlow(1000), "flow").noise(x0, eps, torch.tensor([0.001, 0.25, 0.9]))
    assert noised.t.dtype == torch.float32 and noised.t.tolist() == [1, 250, 900]
    torch.testing.assert_close(noised.x_t, scheduler.scale_noise(x0, noised.t, eps), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(noised.target, eps - x0)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_the_time_shift_is_that_of_the_diffusers_scheduler(shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    times = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    torch.testing.assert_close(time_shift(times, shift), scheduler.sigmas.double(), atol=1e-6, rtol=0)


def test_an_euler_step_along_the_exact_velocity_is_that_of_the_diffusers_scheduler() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(1000)
    scheduler.set_timesteps(4)
    x0, eps = _randn(2, 3).float(), _randn(2, 4)[..., :3].float()
    x = eps
    for t in scheduler.timesteps:
        x = scheduler.step(eps - x0, t, x).prev_sample
    alpha, sigma = RectifiedFlow(1000).alpha_sigma(scheduler.timesteps[:1].expand(2), like=x0)
    torch.testing.assert_close(x, to_x0_eps(eps - x0, eps, alpha, sigma, "flow").x0)


def test_the_time_shift_and_the_resolution_shift_are_one() -> None:
    flow, times = RectifiedFlow(1000), torch.tensor([0.01, 0.3, 0.8], dtype=torch.float64)
    before, after = (
        flow.log_snr(1000 * times, torch.float64),
        flow.log_snr(1000 * time_shift(times, 2.0), torch.float64),
    )
    torch.testing.assert_close(after, before + 2 * math.log(64 / 128))
    table = NoiseSchedule(torch.sigmoid(before)).shifted(64, 128)
    torch.testing.assert_close(after, table.log_snr(torch.arange(3), torch.float64))


def test_alpha_sigma_and_log_snr_agree() -> None:
    flow, t = RectifiedFlow(50), torch.tensor([[0.5, 10.0], [49.0, 50.0]])
    alpha, sigma = flow.alpha(t, torch.float64), flow.sigma(t, torch.float64)
    torch.testing.assert_close(alpha + sigma, torch.ones(2, 2, dtype=torch.float64))
    inside = t < 50
    torch.testing.assert_close(flow.log_snr(t, torch.float64)[inside], 2 * torch.log(alpha / sigma)[inside])
    ends = flow.log_snr(torch.tensor([0, 50]), torch.float64)
    assert torch.isfinite(ends).all() and ends[0] == -ends[1]
    torch.testing.assert_close(flow.timestep_of_log_snr(flow.log_snr(t, torch.float64))[inside], t.double()[inside])


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="num_train_timesteps is 0; accepted: at least 1"):
        RectifiedFlow(0)
    with pytest.raises(ValueError, match="accepted: 0 to 10"):
        RectifiedFlow(10).sigma(torch.tensor([10.5]))
    with pytest.raises(ValueError, match=r"shift is 0\.0; accepted: a positive number"):
        time_shift(torch.ones(1), 0.0)
