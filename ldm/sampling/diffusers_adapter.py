"""diffusers' schedulers as samplers; diffusers is imported when one is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ldm.process.prediction import from_x0_eps
from ldm.process.schedule import ZERO_SNR_ALPHA_BAR, NoiseSchedule, VariancePreserving
from ldm.sampling.denoiser import Callback, Denoiser, Sampler

PREFIX = "diffusers:"
SCHEDULERS = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
"""Solvers of this process for any model. Left out are those of another process (flow matching, EDM, IPNDM's own
table), of distilled models (LCM, TCD) or one model alone, and those whose noise comes from elsewhere than from the
generators they are given (DPMSolverSDE)."""


def diffusers_sampler(name: str) -> Sampler:
    """The scheduler named "diffusers:CLASS", with the settings that its class has by default, as a sampler.

    Raises ValueError for a class that is not one of `SCHEDULERS`, or where diffusers is not installed.
    """
    accepted = [PREFIX + known for known in SCHEDULERS]
    if name not in accepted:
        near = get_close_matches(name, accepted) or accepted
        raise ValueError(f"sampler is {name!r}; accepted: {', '.join(near)}")
    scheduler_class = _class(name)

    def sample(
        denoise: Denoiser,
        x: Tensor,
        schedule: VariancePreserving,
        timesteps: Tensor,
        rng: Sequence[torch.Generator],
        callback: Callback | None = None,
    ) -> Tensor:
        scheduler = _of_levels(scheduler_class, schedule, timesteps)
        drawing = {"generator": list(rng)} if "generator" in signature(scheduler.step).parameters else {}
        x = x / scheduler.scale_model_input(torch.ones_like(x), scheduler.timesteps[0])
        places = scheduler.timesteps.tolist()
        for call, index in enumerate(scheduler.timesteps):
            x_t = scheduler.scale_model_input(x, index)
            t = _time(schedule, timesteps, places[call])
            prediction = denoise(x_t, t.expand(len(x)))
            if (
                callback is not None
                and places[call] in range(len(timesteps))
                and places[call] not in places[call + 1 :]
            ):
                callback(len(timesteps) - 1 - int(places[call]), t, x_t, prediction)
            v = from_x0_eps(prediction.x0, prediction.eps, *schedule.alpha_sigma(t, like=x), "v_prediction")
            x = scheduler.step(v, index, x, **drawing).prev_sample
        return x

    return sample


def _class(name: str) -> Any:
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise ValueError(f"sampler is {name!r}, which needs the package diffusers: pip install diffusers") from error
    return getattr(diffusers, name.removeprefix(PREFIX))


def _of_levels(scheduler_class: Any, schedule: VariancePreserving, timesteps: Tensor) -> Any:
    """A scheduler whose whole table are the noise levels of `timesteps` [S], all of which it visits.

    So it goes exactly where it is told, from any start, however its class would space its steps (Nichol & Dhariwal
    2021, section 4, eq. 19). It reads v, which unlike eps also holds at zero terminal SNR.
    """
    alpha_bar = schedule.alpha_bar_path(timesteps, final=1.0)[:-1].flip(0)
    betas = NoiseSchedule(alpha_bar.clamp(min=ZERO_SNR_ALPHA_BAR)).betas
    settings = {
        "num_train_timesteps": len(betas),
        "trained_betas": betas.tolist(),
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "skip_prk_steps": True,
        "lower_order_final": True,
    }
    known = signature(scheduler_class).parameters
    scheduler = scheduler_class(**{key: value for key, value in settings.items() if key in known})
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = torch.tensor(schedule.final_alpha_bar)
    if "timesteps" in signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(timesteps=list(range(len(betas)))[::-1])
    else:
        scheduler.set_timesteps(len(betas))
    return scheduler


def _time(schedule: VariancePreserving, timesteps: Tensor, index: float) -> Tensor:
    """Our t, a scalar, for a place in the scheduler's table, between whose entries log-SNR is linear."""
    low = int(index)
    rising = timesteps.flip(0)
    if index == low:
        return rising[low]
    low_snr, high_snr = schedule.log_snr(rising[low : low + 2], torch.float64)
    return schedule.timestep_of_log_snr(torch.lerp(low_snr, high_snr, index - low)).to(timesteps.device, torch.float32)
