"""Guidance: classifier-free (Ho & Salimans 2022), by a classifier, within an interval, with x0 kept in range."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.process.prediction import Prediction, PredictionType, to_x0_eps
from ldm.process.schedule import NoiseSchedule
from ldm.sampling.denoiser import Conditioning, Denoiser, Network, network_denoiser

LogProb = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, ...], t [B]) -> log p(y | x_t) [B], differentiable in x_t; the class or text y is already bound."""


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


def interval_denoiser(
    inside: Denoiser, outside: Denoiser, schedule: NoiseSchedule, interval: tuple[float, float]
) -> Denoiser:
    """`inside` where low < sigma / alpha <= high, elsewhere `outside` (Kynkäänniemi et al. 2024).

    With `guided_denoiser` inside and the plain `network_denoiser` outside, guidance acts in the middle of sampling
    only, and the steps before and after it run one pass. Only batches with rows on both sides call both. Raises
    ValueError unless 0 <= low < high.
    """
    low, high = interval
    if not 0 <= low < high:
        raise ValueError(f"interval is {low} to {high}; accepted: 0 <= low < high, in sigma / alpha")

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = schedule.alpha_sigma(t, like=x)
        level = sigma / alpha
        within = (low < level) & (level <= high)
        if within.all():
            return inside(x, t)
        if not within.any():
            return outside(x, t)
        pairs = zip(inside(x, t), outside(x, t), strict=True)
        return Prediction(*(torch.where(within, a, b) for a, b in pairs))

    return denoise


def thresholded_denoiser(
    denoise: Denoiser, schedule: NoiseSchedule, percentile: float = 0.995, limit: float = 1.0
) -> Denoiser:
    """Dynamic thresholding: x0 clamped to [-s, s] and multiplied by limit / s (Saharia et al. 2022, section 2.3).

    s is the given quantile of |x0| over an image, and at least `limit`, the data's largest value: 1 for pixels, more
    for latents. eps follows from the new x0. Raises ValueError for percentile outside (0, 1] and limit <= 0.
    """
    if not 0 < percentile <= 1 or limit <= 0:
        raise ValueError(f"percentile is {percentile} and limit {limit}; accepted: within (0, 1], and above 0")

    def thresholded(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = schedule.alpha_sigma(t, like=x)
        x0 = dynamic_threshold(denoise(x, t).x0, percentile, limit)
        return Prediction(x0, (x - alpha * x0) / sigma)

    return thresholded


def classifier_guided_denoiser(denoise: Denoiser, log_prob: LogProb, schedule: NoiseSchedule, scale: float) -> Denoiser:
    """eps - scale·sigma·grad log p(y | x_t), the gradient with respect to x_t (Dhariwal & Nichol 2021, alg. 2).

    In an ancestral sampler this moves the mean by scale·beta/sqrt(1 - beta)·grad, their algorithm 1. x0 follows from
    the new eps, except at zero terminal SNR, where x_t says nothing about y and the prediction stays.
    """

    def guided(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = schedule.alpha_sigma(t, like=x)
        x0, eps = denoise(x, t)
        shift = torch.where(alpha > 0, scale * sigma * _gradient(log_prob, x, t), 0)
        return Prediction(x0 + sigma * shift / torch.where(alpha > 0, alpha, 1), eps - shift)

    return guided


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


def dynamic_threshold(x0: Tensor, percentile: float, limit: float) -> Tensor:
    """x0 [B, ...] pulled into [-limit, limit] image by image; see `thresholded_denoiser`."""
    size = x0.abs().flatten(1).float().quantile(percentile, dim=1).clamp(min=limit)
    size = size.to(x0).reshape(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-size, size) * (limit / size)


def _gradient(log_prob: LogProb, x: Tensor, t: Tensor) -> Tensor:
    with torch.enable_grad():
        variable = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(log_prob(variable, t).sum(), variable)
    return gradient


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
