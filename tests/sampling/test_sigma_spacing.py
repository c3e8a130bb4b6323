from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.process import NoiseSchedule
from ldm.sampling import SIGMA_SPACINGS, SigmaSpacing, sigma_spaced_timesteps

SCHEDULE = NoiseSchedule.scaled_linear(0.00085, 0.012, 1000)


def _s(t: Tensor, schedule: NoiseSchedule = SCHEDULE) -> Tensor:
    return (schedule.log_snr(t, torch.float64) / -2).exp()


@pytest.mark.parametrize("num_steps", [2, 9, 50])
def test_exponential_has_one_ratio_from_level_to_level(num_steps: int) -> None:
    s = _s(sigma_spaced_timesteps(SCHEDULE, num_steps, "exponential"))
    ratio = (s[-1] / s[0]) ** (1 / (num_steps - 1))
    torch.testing.assert_close(s[1:] / s[:-1], ratio.expand(num_steps - 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_karras_is_even_in_the_root(rho: float) -> None:
    s = _s(sigma_spaced_timesteps(SCHEDULE, 20, "karras", rho))
    expected = torch.linspace(float(s[0] ** (1 / rho)), float(s[-1] ** (1 / rho)), 20, dtype=torch.float64) ** rho
    torch.testing.assert_close(s, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", SIGMA_SPACINGS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_timesteps_fall_over_the_whole_schedule(kind: SigmaSpacing, zero_snr: bool) -> None:
    schedule = SCHEDULE.rescale_zero_terminal_snr() if zero_snr else SCHEDULE
    for num_steps in (2, 10, 1000):
        t = sigma_spaced_timesteps(schedule, num_steps, kind)
        assert t.dtype == torch.float32 and len(t) == num_steps
        assert (t[1:] < t[:-1]).all()
        assert t[0] == 999 and 0 <= t[-1] < 1e-6
    assert sigma_spaced_timesteps(schedule, 1, kind).tolist() == [999]


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="kind is 'linear'; accepted: karras, exponential"):
        sigma_spaced_timesteps(SCHEDULE, 5, "linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"num_steps is 0 and rho 7\.0; accepted: at least 1, and above 0"):
        sigma_spaced_timesteps(SCHEDULE, 0, "karras")
    with pytest.raises(ValueError, match="rho 0"):
        sigma_spaced_timesteps(SCHEDULE, 5, "karras", rho=0)
