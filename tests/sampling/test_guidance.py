from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from ldm.process import PREDICTION_TYPES, NoiseSchedule, PredictionType, to_x0_eps
from ldm.sampling import guided_denoiser, network_denoiser

SCHEDULE = NoiseSchedule.scaled_linear(0.00085, 0.012, 1000)


class Net:
    """A linear map of x and the context that keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        self.calls.append({"x": x, "t": t, **kwargs})
        raw = 0.5 * x * (1 + t.reshape(-1, 1, 1, 1) / 1000) + kwargs["context"].mean((1, 2)).reshape(-1, 1, 1, 1)
        return raw.float()


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


X, T = _randn(2, 4, 8, 8), torch.tensor([700, 30])
COND_CONTEXT, UNCOND_CONTEXT = _randn(2, 7, 5), _randn(2, 7, 6)[..., :5]
COND = {"context": COND_CONTEXT, "context_mask": torch.ones(2, 7, dtype=torch.bool), "pooled": None}
UNCOND = {
    "context": UNCOND_CONTEXT,
    "context_mask": torch.zeros(2, 7, dtype=torch.bool),
    "pooled": None,
}


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("scale", [0.0, 3.0, 7.5])
def test_guidance_is_that_of_the_diffusers_pipeline(
    prediction_type: PredictionType, rescale: float, scale: float
) -> None:
    net = Net()
    ours = guided_denoiser(net, SCHEDULE, prediction_type, COND, UNCOND, scale, rescale)(X, T)
    assert len(net.calls) == 1
    uncond, cond = net(X, T, **UNCOND), net(X, T, **COND)
    raw = uncond + scale * (cond - uncond)
    if rescale > 0:
        raw = rescale_noise_cfg(raw, cond, guidance_rescale=rescale)
    expected = to_x0_eps(raw, X, *SCHEDULE.alpha_sigma(T, like=X), prediction_type)
    torch.testing.assert_close(ours.x0, expected.x0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.eps, expected.eps, atol=1e-5, rtol=1e-5)


def test_the_batch_is_unconditional_then_conditional() -> None:
    net = Net()
    guided_denoiser(net, SCHEDULE, "epsilon", COND, UNCOND, 2.0)(X, T)
    (call,) = net.calls
    assert torch.equal(call["context"], torch.cat([UNCOND_CONTEXT, COND_CONTEXT]))
    assert call["context_mask"].tolist() == [[False] * 7] * 2 + [[True] * 7] * 2
    assert call["t"].tolist() == [700, 30, 700, 30] and call["pooled"] is None


def test_scale_one_is_the_conditional_pass_alone() -> None:
    net = Net()
    guided = guided_denoiser(net, SCHEDULE, "v_prediction", COND, UNCOND, 1.0, rescale=0.5)(X, T)
    assert len(net.calls) == 1 and len(net.calls[0]["x"]) == 2
    plain = network_denoiser(net, SCHEDULE, "v_prediction", COND)(X, T)
    assert torch.equal(guided.x0, plain.x0) and torch.equal(guided.eps, plain.eps)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_network_runs_in_its_own_dtype_and_the_sampler_in_full_precision(scale: float) -> None:
    net = Net()
    prediction = guided_denoiser(net, SCHEDULE, "epsilon", COND, UNCOND, scale, dtype=torch.bfloat16)(X, T)
    assert net.calls[0]["x"].dtype == torch.bfloat16
    assert prediction.x0.dtype == prediction.eps.dtype == torch.float32
    alpha, sigma = SCHEDULE.alpha_sigma(T, like=X)
    torch.testing.assert_close(alpha * prediction.x0 + sigma * prediction.eps, X)


def test_conditions_of_different_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="accepted: those of cond_kwargs"):
        guided_denoiser(Net(), SCHEDULE, "epsilon", COND, {"context": UNCOND["context"]}, 2.0)
    with pytest.raises(ValueError, match="'pooled' is None in one condition only"):
        guided_denoiser(Net(), SCHEDULE, "epsilon", COND | {"pooled": X}, UNCOND, 2.0)
    with pytest.raises(ValueError, match=r"rescale is 1\.5; accepted: 0 to 1"):
        guided_denoiser(Net(), SCHEDULE, "epsilon", COND, UNCOND, 2.0, rescale=1.5)
