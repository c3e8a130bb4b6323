from __future__ import annotations

import diffusers
import pytest
import torch

from ldm.process import TIMESTEP_SPACINGS, TimestepSpacing, timesteps


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize(("trained", "offset"), [(1000, 0), (1000, 1), (250, 1)])
def test_timesteps_are_those_of_diffusers(spacing: TimestepSpacing, trained: int, offset: int) -> None:
    scheduler = diffusers.DDIMScheduler(trained, timestep_spacing=spacing, steps_offset=offset)
    for num_steps in [*range(1, 61), 100, trained // 2, trained - 1]:
        scheduler.set_timesteps(num_steps)
        assert torch.equal(timesteps(num_steps, trained, spacing, offset), scheduler.timesteps), num_steps


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps_always_fall_within_the_table(spacing: TimestepSpacing, offset: int) -> None:
    for num_steps in range(1, 1001):
        t = timesteps(num_steps, 1000, spacing, offset)
        assert len(t) == num_steps and t[0] <= 999 and t[-1] >= 0
        assert bool((t.diff() < 0).all())


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_as_many_steps_as_trained_visit_every_one(spacing: TimestepSpacing) -> None:
    assert torch.equal(timesteps(1000, 1000, spacing, 1), torch.arange(999, -1, -1))


@pytest.mark.parametrize("num_steps", [0, -1, 101])
def test_impossible_numbers_of_steps_are_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_steps is {num_steps}; accepted: 1 to 100"):
        timesteps(num_steps, 100, "leading")


def test_unknown_spacings_are_refused() -> None:
    with pytest.raises(ValueError, match="'even'; accepted: leading, trailing, linspace"):
        timesteps(10, 100, "even")  # type: ignore[arg-type]
