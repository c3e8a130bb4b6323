from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from ldm.process import DiffusionConfig, PredictionType, TimestepSpacing, timesteps
from ldm.sampling import SAMPLERS, SigmaSpacing, ddim, network_denoiser, sigma_spaced_timesteps

STEPS = 12
SHAPE = (2, 3, 4, 4)
PREDICTIONS: list[PredictionType] = ["epsilon", "v_prediction"]


def _net(x: Tensor, t: Tensor) -> Tensor:
    """A network without weights: nonlinear in x, changing with t, of about unit output."""
    time = t.reshape(-1, 1, 1, 1) / 1000
    return 0.9 * torch.tanh(1.2 * x + time) + 0.2 * torch.sin(3 * x.roll(1, 1)) - 0.3 * time


def _generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (11, 12)]


def _noise() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def _diffusers_path(scheduler: Any, x: Tensor, **step_kwargs: Any) -> list[Tensor]:
    """The inputs of the network at every call, and the final sample."""
    visited = []
    for t in scheduler.timesteps:
        visited.append(scheduler.scale_model_input(x, t))
        raw = _net(visited[-1], t.expand(len(x)))
        x = scheduler.step(raw, t, x, **step_kwargs).prev_sample
    return [*visited, x]


def _record(sample: Callable[..., Tensor], config: DiffusionConfig, x: Tensor, t: Tensor, **kw: Any) -> list[Tensor]:
    visited: list[Tensor] = []
    schedule = config.schedule()
    bound = network_denoiser(_net, schedule, config.prediction_type, {})

    def denoise(x: Tensor, t: Tensor) -> Any:
        visited.append(x)
        return bound(x, t)

    final = sample(denoise, x, schedule, t, _generators(), **kw)
    return [*visited, final]


def _config(prediction_type: PredictionType, spacing: TimestepSpacing, zero_snr: bool = False) -> DiffusionConfig:
    return DiffusionConfig(prediction_type=prediction_type, timestep_spacing=spacing, rescale_betas_zero_snr=zero_snr)


def _timesteps(config: DiffusionConfig, num_steps: int = STEPS) -> Tensor:
    return timesteps(num_steps, config.num_train_timesteps, config.timestep_spacing, config.steps_offset)


def _assert_same(ours: list[Tensor], theirs: list[Tensor], atol: float = 1e-4) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


def _oracle(name: str, config: DiffusionConfig, num_steps: int = STEPS, **settings: Any) -> Any:
    scheduler = getattr(diffusers, name).from_config(config.to_dict(), **settings)
    scheduler.set_timesteps(num_steps)
    return scheduler


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(("spacing", "num_steps"), [("leading", 12), ("leading", 50), ("trailing", 10)])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim(prediction_type: PredictionType, spacing: TimestepSpacing, num_steps: int, eta: float) -> None:
    config = _config(prediction_type, spacing)
    theirs = _diffusers_path(_oracle("DDIMScheduler", config, num_steps), _noise(), eta=eta, generator=_generators())
    _assert_same(_record(ddim.sample, config, _noise(), _timesteps(config, num_steps), eta=eta), theirs)


def test_ddim_at_zero_terminal_snr() -> None:
    config = _config("v_prediction", "trailing", zero_snr=True)
    theirs = _diffusers_path(_oracle("DDIMScheduler", config, 10), _noise())
    _assert_same(_record(ddim.sample, config, _noise(), _timesteps(config, 10)), theirs)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddpm(prediction_type: PredictionType, spacing: TimestepSpacing) -> None:
    config = _config(prediction_type, spacing)
    theirs = _diffusers_path(_oracle("DDPMScheduler", config), _noise(), generator=_generators())
    _assert_same(_record(SAMPLERS["ddpm"], config, _noise(), _timesteps(config)), theirs)


@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(("spacing", "num_steps"), [("leading", 12), ("trailing", 12), ("linspace", 10)])
def test_euler_and_heun(name: str, prediction_type: PredictionType, spacing: TimestepSpacing, num_steps: int) -> None:
    config = _config(prediction_type, spacing)
    t = _timesteps(config, num_steps)
    scheduler = _oracle(f"{name.title()}DiscreteScheduler", config, num_steps)
    assert scheduler.timesteps.unique().flip(0).tolist() == t.tolist()
    theirs = _diffusers_path(scheduler, _noise() / config.schedule().alpha(t[0]))
    _assert_same(_record(SAMPLERS[name], config, _noise(), t), theirs)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(("spacing", "num_steps"), [("leading", 12), ("trailing", 12), ("linspace", 10)])
def test_euler_a(prediction_type: PredictionType, spacing: TimestepSpacing, num_steps: int) -> None:
    config = _config(prediction_type, spacing)
    t = _timesteps(config, num_steps)
    scheduler = _oracle("EulerAncestralDiscreteScheduler", config, num_steps)
    theirs = _diffusers_path(scheduler, _noise() / config.schedule().alpha(t[0]), generator=_generators())
    _assert_same(_record(SAMPLERS["euler_a"], config, _noise(), t), theirs)


MULTISTEP: dict[str, tuple[str, dict[str, Any], bool]] = {
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}, False),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, True),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"}, False),
}
"""Our name: diffusers' class, its settings, whether it draws."""


@pytest.mark.parametrize("name", MULTISTEP)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [1, 2, 12, 20])
def test_multistep_solvers(
    name: str, prediction_type: PredictionType, spacing: TimestepSpacing, num_steps: int
) -> None:
    config = _config(prediction_type, spacing)
    t = _timesteps(config, num_steps) if spacing == "trailing" else _timesteps(config, num_steps + 1)[:-1]
    oracle, settings, draws = MULTISTEP[name]
    scheduler = _oracle(oracle, config, num_steps, **settings)
    assert scheduler.timesteps.tolist() == t.tolist()
    theirs = _diffusers_path(scheduler, _noise(), **({"generator": _generators()} if draws else {}))
    _assert_same(_record(SAMPLERS[name], config, _noise(), t), theirs)


@pytest.mark.parametrize("kind", ["karras", "exponential"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_euler_over_spaced_noise_levels(kind: SigmaSpacing, prediction_type: PredictionType) -> None:
    config = _config(prediction_type, "linspace")
    scheduler = _oracle("EulerDiscreteScheduler", config, **{f"use_{kind}_sigmas": True})
    t = sigma_spaced_timesteps(config.schedule(), STEPS, kind)
    torch.testing.assert_close(t, scheduler.timesteps, atol=2e-3, rtol=1e-5)
    theirs = _diffusers_path(scheduler, _noise() / config.schedule().alpha(t[0]))
    _assert_same(_record(SAMPLERS["euler"], config, _noise(), t), theirs)


@pytest.mark.parametrize(
    ("name", "oracle", "settings", "atol"),
    [
        ("euler", "EulerDiscreteScheduler", {}, 3e-3),
        ("euler_a", "EulerAncestralDiscreteScheduler", {}, 2e-2),
        *((name, oracle, settings, 3e-3) for name, (oracle, settings, _) in MULTISTEP.items()),
    ],
)
def test_zero_terminal_snr_up_to_the_stand_in_of_diffusers(
    name: str, oracle: str, settings: dict[str, Any], atol: float
) -> None:
    """s starts from 4096 there and from infinity here: Euler a keeps s_next² / 4096 of the noise it replaces."""
    config = _config("v_prediction", "trailing", zero_snr=True)
    x = _noise() * 2**12 if name.startswith("euler") else _noise()
    draws = {"generator": _generators()} if name in ("euler_a", "dpmpp_2m_sde") else {}
    theirs = _diffusers_path(_oracle(oracle, config, **settings), x, **draws)
    _assert_same(_record(SAMPLERS[name], config, _noise(), _timesteps(config)), theirs, atol=atol)


def test_sampling_may_start_part_way() -> None:
    config = _config("epsilon", "leading")
    scheduler = _oracle("DDIMScheduler", config)
    start, clean = 5, torch.tanh(_noise().roll(1, 0))
    x = scheduler.add_noise(clean, _noise(), scheduler.timesteps[start : start + 1])
    ours = _record(ddim.sample, config, x, _timesteps(config)[start:])
    scheduler.timesteps = scheduler.timesteps[start:]
    _assert_same(ours, _diffusers_path(scheduler, x))
