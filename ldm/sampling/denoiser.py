"""The interface between samplers and networks: a Denoiser estimates (x0, eps) from a noisy x_t."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ldm.process.prediction import Prediction, PredictionType, to_x0_eps
from ldm.process.schedule import NoiseSchedule

Denoiser = Callable[[Tensor, Tensor], Prediction]
"""(x_t [B, ...], t [B]) -> Prediction; the condition is already bound."""

Callback = Callable[[int, Tensor, Tensor, Prediction], None]
"""(step from 0, t as a scalar tensor, x_t before the step, the prediction there); called once a step."""

Network = Callable[..., Tensor]
"""net(x [B, ...], t [B], **conditioning) -> raw output [B, ...]."""

Conditioning = Mapping[str, Tensor | None]
"""Keyword arguments of a network: context, context_mask, pooled, ...; tensors [B, ...]."""


class Sampler(Protocol):
    """Solves the reverse process from x_T to x0."""

    def __call__(
        self,
        denoise: Denoiser,
        x: Tensor,
        schedule: NoiseSchedule,
        timesteps: Tensor,
        rng: Sequence[torch.Generator],
        callback: Callback | None = None,
    ) -> Tensor:
        """Carry x [B, ...] from the noise level of timesteps[0] down to data.

        `x` is N(0, I), or data noised to timesteps[0]; `timesteps` [S] fall; `rng` holds one generator an
        image, which a deterministic sampler does not touch. Returns x0 [B, ...]. Raises ValueError for
        timesteps that do not fall within the schedule.
        """
        ...


def network_denoiser(
    net: Network,
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    conditioning: Conditioning,
    dtype: torch.dtype | None = None,
) -> Denoiser:
    """Bind a network to its schedule, prediction type and condition.

    The network sees x in `dtype` (None: as it is); the prediction has the dtype of x.
    """

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        raw = net(x.to(dtype or x.dtype), t.to(x.device), **conditioning).to(x.dtype)
        return to_x0_eps(raw, x, *schedule.alpha_sigma(t, like=x), prediction_type)

    return denoise
