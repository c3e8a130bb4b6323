"""The interface between samplers and networks: a Denoiser estimates (x0, eps) from a noisy x_t."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ldm.process.prediction import Prediction, PredictionType, split_variance, to_x0_eps
from ldm.process.schedule import Schedule, VariancePreserving
from ldm.process.unit_variance import UnitVariance

Denoiser = Callable[[Tensor, Tensor], Prediction]
"""(x_t [B, ...], t [B]) -> Prediction; the condition is already bound."""

Callback = Callable[[int, Tensor, Tensor, Prediction], None]
"""(step from 0, t as a scalar tensor, x_t before the step, the prediction there); called once a step.

x_t is that of the variance preserving process, see `ldm.process.unit_variance`."""

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
        schedule: VariancePreserving,
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
    schedule: Schedule,
    prediction_type: PredictionType,
    conditioning: Conditioning,
    dtype: torch.dtype | None = None,
) -> Denoiser:
    """Bind a network to its schedule, prediction type and condition.

    The network sees x in `dtype` (None: as it is); the prediction has the dtype of x. Twice the channels of x are a
    prediction and a learned variance.
    """

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        raw, variance = split_variance(net(x.to(dtype or x.dtype), t.to(x.device), **conditioning).to(x.dtype), x)
        return to_x0_eps(raw, x, *schedule.alpha_sigma(t, like=x), prediction_type)._replace(variance=variance)

    return denoise


def unit_variance_denoiser(denoise: Denoiser, schedule: VariancePreserving) -> Denoiser:
    """A denoiser of a process as one of its `at_unit_variance` view, which is what samplers walk along."""
    if not isinstance(schedule, UnitVariance):
        return denoise

    def seen(x: Tensor, t: Tensor) -> Prediction:
        return denoise(x * schedule.norm(t, like=x), t)

    return seen


def in_chunks(net: Network, rows: int) -> Network:
    """The same network, run on exactly `rows` rows at a time; the last ones are filled up with copies.

    Kernels are chosen by the shapes of their inputs and sum in another order for another batch size, so that a picture
    would otherwise depend, in its last bits, on how many others are drawn with it.
    """

    def run(x: Tensor, t: Tensor, **condition: Tensor | None) -> Tensor:
        filled = torch.arange(len(x) + -len(x) % rows, device=x.device).clamp(max=len(x) - 1)
        given = {name: value for name, value in condition.items() if value is not None}
        parts = torch.split(filled, rows)
        chunks = [net(x[i], t[i], **{name: value[i] for name, value in given.items()}) for i in parts]
        return torch.cat(chunks)[: len(x)]

    return run
