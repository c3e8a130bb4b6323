"""Classifier-free guidance (Ho & Salimans 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.process.prediction import Prediction, PredictionType, to_x0_eps
from ldm.process.schedule import NoiseSchedule
from ldm.sampling.denoiser import Conditioning, Denoiser, Network, network_denoiser


def guided_denoiser(
    net: Network,
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    cond_kwargs: Conditioning,
    uncond_kwargs: Conditioning,
    scale: float,
    rescale: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Denoiser:
    """A denoiser guided by `scale`, with both passes in one batch [unconditional, conditional] of 2B.

    scale = 1 is the plain conditional model and runs that pass alone. `rescale` in [0, 1] is phi of Lin et
    al. (2024), `dtype` as in `network_denoiser`. Raises ValueError for another rescale, or where the two
    conditions do not hold the same keys.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale is {rescale}; accepted: 0 to 1")
    if scale == 1:
        return network_denoiser(net, schedule, prediction_type, cond_kwargs, dtype)
    both = _concatenate(uncond_kwargs, cond_kwargs)

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        double_x, double_t = torch.cat([x, x]).to(dtype or x.dtype), torch.cat([t, t]).to(x.device)
        uncond, cond = net(double_x, double_t, **both).to(x.dtype).chunk(2)
        raw = rescale_to_std(guide(uncond, cond, scale), cond, rescale)
        return to_x0_eps(raw, x, *schedule.alpha_sigma(t, like=x), prediction_type)

    return denoise


def guide(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """uncond + scale·(cond - uncond) (Ho & Salimans 2022, eq. 6, with scale = 1 + w)."""
    return uncond + scale * (cond - uncond)


def rescale_to_std(guided: Tensor, cond: Tensor, rescale: float) -> Tensor:
    """Pull each image's standard deviation back to the conditional one's (Lin et al. 2024, eq. 14-16)."""
    if rescale == 0:
        return guided
    dims = tuple(range(1, guided.ndim))
    matched = guided * (cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
    return rescale * matched + (1 - rescale) * guided


def _concatenate(first: Conditioning, second: Conditioning) -> dict[str, Tensor | None]:
    if first.keys() != second.keys():
        raise ValueError(
            f"uncond_kwargs has the keys {sorted(first)}; accepted: those of cond_kwargs, {sorted(second)}"
        )
    return {key: _concatenate_values(key, first[key], second[key]) for key in second}


def _concatenate_values(key: str, first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None and second is None:
        return None
    if first is None or second is None:
        raise ValueError(f"{key!r} is None in one condition only; accepted: a tensor in both, or None in both")
    return torch.cat([first, second])
