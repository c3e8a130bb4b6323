"""Guidance: classifier-free (Ho & Salimans 2022), by a classifier, within an interval, with x0 kept in range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.process.prediction import Prediction, PredictionType, split_variance, to_x0_eps
from ldm.process.schedule import Schedule, VariancePreserving
from ldm.process.unit_variance import UnitVariance, at_unit_variance
from ldm.sampling.denoiser import Conditioning, Denoiser, Network, network_denoiser, unit_variance_denoiser

LogProb = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, ...], t [B]) -> log p(y | x_t) [B], differentiable in x_t; the class or text y is already bound."""


@dataclass(frozen=True)
class ClassifierGuidance:
    """What a classifier adds: `scale` times the gradient of its log p(y | x_t) (Dhariwal & Nichol 2021, section 4)."""

    log_prob: LogProb
    scale: float


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance and what is done to its result; the defaults are the plain conditional model.

    `rescale`, `interval` (in sigma / alpha), `dynamic_threshold` (a quantile) and `threshold_limit` are explained at
    `guided_denoiser`, `interval_denoiser` and `thresholded_denoiser`; latents have about unit variance, so the limit is
    three standard deviations.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] | None = None
    dynamic_threshold: float | None = None
    threshold_limit: float = 3.0

    def denoiser(
        self,
        net: Network,
        process: Schedule,
        prediction_type: PredictionType,
        cond_kwargs: Conditioning,
        uncond_kwargs: Conditioning,
        dtype: torch.dtype | None = None,
    ) -> Denoiser:
        """The guided denoiser of a network of any process, along its `at_unit_variance` view.

        Arguments as in `guided_denoiser`. Raises ValueError for a setting out of range.
        """
        view = at_unit_variance(process)
        guided = guided_denoiser(
            net, process, prediction_type, cond_kwargs, uncond_kwargs, self.scale, self.rescale, dtype
        )
        denoise = unit_variance_denoiser(guided, view)
        if self.interval is not None:
            plain = network_denoiser(net, process, prediction_type, cond_kwargs, dtype)
            denoise = interval_denoiser(denoise, unit_variance_denoiser(plain, view), view, self.interval)
        if self.dynamic_threshold is not None:
            denoise = thresholded_denoiser(denoise, view, self.dynamic_threshold, self.threshold_limit)
        return denoise


def guided_denoiser(
    net: Network,
    schedule: Schedule,
    prediction_type: PredictionType,
    cond_kwargs: Conditioning,
    uncond_kwargs: Conditioning,
    scale: float,
    rescale: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Denoiser:
    """A denoiser guided by `scale`, with both passes in one batch [unconditional, conditional] of 2B.

    scale = 1 is the plain conditional model and runs that pass alone. A learned variance is the conditional pass's.
    `rescale` in [0, 1] is phi of Lin et al. (2024), `dtype` as in `network_denoiser`. Raises ValueError for another
    rescale, or where the two conditions do not hold the same keys.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale is {rescale}; accepted: 0 to 1")
    if scale == 1:
        return network_denoiser(net, schedule, prediction_type, cond_kwargs, dtype)
    both = _concatenate(uncond_kwargs, cond_kwargs)

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        double_x, double_t = torch.cat([x, x]).to(dtype or x.dtype), torch.cat([t, t]).to(x.device)
        raw, variance = split_variance(net(double_x, double_t, **both).to(x.dtype), x)
        uncond, cond = raw.chunk(2)
        guided = rescale_to_std(guide(uncond, cond, scale), cond, rescale)
        prediction = to_x0_eps(guided, x, *schedule.alpha_sigma(t, like=x), prediction_type)
        return prediction._replace(variance=None if variance is None else variance.chunk(2)[1])

    return denoise


def interval_denoiser(
    inside: Denoiser, outside: Denoiser, schedule: VariancePreserving, interval: tuple[float, float]
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
        a, b = inside(x, t), outside(x, t)
        variance = None
        if a.variance is not None and b.variance is not None:
            variance = torch.where(within, a.variance, b.variance)
        return Prediction(torch.where(within, a.x0, b.x0), torch.where(within, a.eps, b.eps), variance)

    return denoise


def thresholded_denoiser(
    denoise: Denoiser, schedule: VariancePreserving, percentile: float = 0.995, limit: float = 1.0
) -> Denoiser:
    """Dynamic thresholding: x0 clamped to [-s, s] and multiplied by limit / s (Saharia et al. 2022, section 2.3).

    s is the given quantile of |x0| over an image, and at least `limit`, the data's largest value: 1 for pixels, more
    for latents. eps follows from the new x0. Raises ValueError for percentile outside (0, 1] and limit <= 0.
    """
    if not 0 < percentile <= 1 or limit <= 0:
        raise ValueError(f"percentile is {percentile} and limit {limit}; accepted: within (0, 1], and above 0")

    def thresholded(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = schedule.alpha_sigma(t, like=x)
        prediction = denoise(x, t)
        x0 = dynamic_threshold(prediction.x0, percentile, limit)
        return prediction._replace(x0=x0, eps=(x - alpha * x0) / sigma)

    return thresholded


def classifier_guided_denoiser(
    denoise: Denoiser, gradient: Callable[[Tensor, Tensor], Tensor], schedule: VariancePreserving
) -> Denoiser:
    """eps - sigma·gradient for any sampler (Dhariwal & Nichol 2021, algorithm 2); `gradient` is `classifier_gradient`.

    In an ancestral sampler this moves the mean by beta/sqrt(1 - beta)·gradient, where their algorithm 1, which
    `ldm.sampling.ddpm` has, moves it by the step's variance times that. x0 follows from the new eps, except at zero
    terminal SNR, where x_t says nothing about y and the prediction stays.
    """

    def guided(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = schedule.alpha_sigma(t, like=x)
        prediction = denoise(x, t)
        shift = torch.where(alpha > 0, sigma * gradient(x, t), 0)
        x0 = prediction.x0 + sigma * shift / torch.where(alpha > 0, alpha, 1)
        return prediction._replace(x0=x0, eps=prediction.eps - shift)

    return guided


def classifier_gradient(
    log_prob: LogProb, scale: float, schedule: VariancePreserving
) -> Callable[[Tensor, Tensor], Tensor]:
    """(x_t, t) -> scale·grad log p(y | x_t), the gradient with respect to x_t.

    `log_prob` sees x_t as its process has it, the gradient is that along the process' `at_unit_variance` view.
    """

    def gradient(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            variable = x.detach().requires_grad_()
            seen = variable * schedule.norm(t, like=x) if isinstance(schedule, UnitVariance) else variable
            (gradient,) = torch.autograd.grad(log_prob(seen, t).sum(), variable)
        return scale * gradient

    return gradient


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
