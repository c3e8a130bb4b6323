from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from ldm.process import NoiseSchedule, Prediction, timesteps
from ldm.sampling import SAMPLERS, Denoiser, diffusers_sampler, named_sampler, network_denoiser, sigma_spaced_timesteps
from ldm.sampling.diffusers_adapter import SCHEDULERS

MEAN, STD = 0.3, 0.6
SCHEDULE = NoiseSchedule.scaled_linear(0.00085, 0.012, 1000)
OURS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
PLACES = {
    "leading": timesteps(12, 1000, "leading", 1),
    "part-way": timesteps(20, 1000, "trailing")[12:],
    "uneven": torch.tensor([999, 700, 690, 222, 40, 3]),
    "continuous": sigma_spaced_timesteps(SCHEDULE, 10, "karras"),
    "one": torch.tensor([640]),
}


def _net(x: Tensor, t: Tensor) -> Tensor:
    time = t.reshape(-1, 1, 1, 1) / 1000
    return 0.9 * torch.tanh(1.2 * x + time) + 0.2 * torch.sin(3 * x.roll(1, 1)) - 0.3 * time


def _noise() -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def _generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (11, 12)]


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("places", PLACES)
def test_it_draws_what_our_sampler_draws(name: str, places: str) -> None:
    denoise = network_denoiser(_net, SCHEDULE, "v_prediction", {})
    pair = []
    for sample in (SAMPLERS[name], named_sampler(f"diffusers:{OURS[name]}")):
        pair.append(sample(denoise, _noise(), SCHEDULE, PLACES[places], _generators()))
    torch.testing.assert_close(pair[0], pair[1], atol=1e-4, rtol=1e-4)


def _exact(schedule: NoiseSchedule) -> Denoiser:
    def denoise(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = schedule.alpha_sigma(t, like=x)
        score_scale = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        return Prediction(MEAN + alpha * STD**2 * score_scale, sigma * score_scale)

    return denoise


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_draws_the_data_distribution(name: str, zero_snr: bool) -> None:
    """Within four standard errors of 20,000 samples, and a tenth for what 40 ancestral steps leave out."""
    schedule = SCHEDULE.rescale_zero_terminal_snr() if zero_snr else SCHEDULE
    rng = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    x = torch.randn(2, 1, 100, 100, generator=torch.Generator().manual_seed(3))
    t = timesteps(40, 1000, "trailing")
    x0 = diffusers_sampler(f"diffusers:{name}")(_exact(schedule), x, schedule, t, rng)
    assert x0.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert x0.std().item() == pytest.approx(STD, abs=0.07)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_callback_sees_every_step_once(name: str) -> None:
    calls: list[tuple[int, float]] = []
    t = PLACES["continuous"]

    def check(step: int, t: Tensor, x: Tensor, prediction: Prediction) -> None:
        calls.append((step, float(t)))
        alpha, sigma = SCHEDULE.alpha_sigma(t, like=x)
        torch.testing.assert_close(alpha * prediction.x0 + sigma * prediction.eps, x, atol=1e-4, rtol=1e-4)

    diffusers_sampler(f"diffusers:{name}")(_exact(SCHEDULE), _noise(), SCHEDULE, t, _generators(), check)
    assert calls == list(enumerate(t.tolist()))


def test_unknown_names_are_refused_with_near_ones() -> None:
    with pytest.raises(ValueError, match=r"is 'diffusers:HeunScheduler'; accepted: .*diffusers:HeunDiscreteScheduler"):
        named_sampler("diffusers:HeunScheduler")
    with pytest.raises(ValueError, match=r"is 'diffusers:LCMScheduler'; accepted: diffusers:"):
        diffusers_sampler("diffusers:LCMScheduler")
    with pytest.raises(
        ValueError, match=r"accepted: diffusers:DDIMParallelScheduler, .*, diffusers:UniPCMultistepScheduler"
    ):
        diffusers_sampler("diffusers:?")
    with pytest.raises(ValueError, match=r"sampler is 'dimm'; accepted: ddim, .*, and diffusers:CLASS"):
        named_sampler("dimm")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="'diffusers:DDIMScheduler', which needs the package diffusers"):
        diffusers_sampler("diffusers:DDIMScheduler")


def test_our_own_names_need_no_adapter() -> None:
    assert {name: named_sampler(name) for name in SAMPLERS} == SAMPLERS
