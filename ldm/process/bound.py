"""The variational bound on -log p(x0), term by term: L_T + L_{T-1} + ... + L_0 (Ho et al. 2020, eq. 5).

Index t = 0 of a table is the papers' first step: `steps[:, 0]` is L_0, `steps[:, t]` is the papers' L_t. All values are
bits per dimension. The Gaussians are computed in float64, because 1 - alpha_bar loses its digits in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.process.objective import NoisedExample, Objective
from ldm.process.posterior import (
    MODEL_VARIANCES,
    ModelVariance,
    interpolated_log_variance,
    log_variance_table,
    posterior_mean,
    q_sample,
)
from ldm.process.prediction import Prediction, PredictionType, to_x0_eps
from ldm.process.schedule import NoiseSchedule
from ldm.process.tables import over


class ReverseStep(NamedTuple):
    """p(x_{t-1} | x_t): mean [B, ...] and log-variance, which broadcasts to it, float64."""

    mean: Tensor
    log_variance: Tensor


ReverseModel = Callable[[Tensor, Tensor], ReverseStep]
"""(x_t [B, ...], t int64 [B]) -> ReverseStep."""


class Bound(NamedTuple):
    """`prior` L_T [B] and `steps` L_{t} [B, T], t from 0, in bits per dimension."""

    prior: Tensor
    steps: Tensor

    @property
    def total(self) -> Tensor:
        """The bound on -log2 p(x0) / dimensions: [B]."""
        return self.prior + self.steps.sum(1)


def gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(other...)) of each element in nats; the arguments broadcast."""
    ratio = log_variance - other_log_variance
    return (ratio.exp() - 1 - ratio + (mean - other_mean).square() * (-other_log_variance).exp()) / 2


def gaussian_log_density(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log N(x; mean, exp(log_variance)) of each element in nats; the arguments broadcast."""
    return -((x - mean).square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi)) / 2


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor, levels: int = 256) -> Tensor:
    """log of the mass that N(mean, exp(log_variance)) gives to the level of each x, in nats (Ho et al. 2020, eq. 13).

    x lies on `levels` evenly spaced values in [-1, 1]. A level's cell reaches half way to its neighbours, the outermost
    to infinity. The arguments broadcast. Raises ValueError for fewer than 2 levels.
    """
    if levels < 2:
        raise ValueError(f"levels is {levels}; accepted: at least 2")
    half = 1 / (levels - 1)
    inverse_std = (-log_variance / 2).exp()
    low, high = (x - mean - half) * inverse_std, (x - mean + half) * inverse_std
    left_tail = low + high < 0
    low, high = torch.where(left_tail, low, -high), torch.where(left_tail, high, -low)
    log_high = torch.special.log_ndtr(high)
    inside = log_high + torch.log(-torch.expm1(torch.special.log_ndtr(low) - log_high))
    below = torch.special.log_ndtr((x - mean + half) * inverse_std)
    above = torch.special.log_ndtr(-(x - mean - half) * inverse_std)
    return torch.where(x < half - 1, below, torch.where(x > 1 - half, above, inside))


def fixed_variance(
    denoise: Callable[[Tensor, Tensor], Prediction], schedule: NoiseSchedule, kind: ModelVariance
) -> ReverseModel:
    """p(x_{t-1} | x_t) with the posterior's mean at the estimated x0 and a fixed variance.

    Ho et al. 2020, section 3.2. "fixed_small" takes the second step's variance in the first, see `log_variance_table`.
    """
    table = log_variance_table(schedule.alphas_cumprod, kind)

    def reverse(x_t: Tensor, t: Tensor) -> ReverseStep:
        mean = posterior_mean(denoise(x_t, t).x0.double(), x_t.double(), *_alpha_bars(schedule, t, x_t))
        return ReverseStep(mean, _at(table, t, x_t))

    return reverse


def learned_variance(
    net: Callable[[Tensor, Tensor], Tensor], schedule: NoiseSchedule, prediction_type: PredictionType
) -> ReverseModel:
    """p(x_{t-1} | x_t) of a network with outputs [B, 2C, ...]: prediction, then variance (Nichol & Dhariwal 2021)."""

    def reverse(x_t: Tensor, t: Tensor) -> ReverseStep:
        return learned_step(net(x_t, t), x_t, t, schedule, prediction_type)

    return reverse


def learned_step(
    raw: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule, prediction_type: PredictionType
) -> ReverseStep:
    """p(x_{t-1} | x_t [B, C, ...]) from raw output [B, 2C, ...]: prediction, then variance.

    The latter is the place between the bounds of `interpolated_log_variance`. Raises ValueError for another number of
    channels.
    """
    prediction, place = _halves(raw, x_t)
    alpha_bars = _alpha_bars(schedule, t, x_t)
    alpha, sigma = alpha_bars[0].sqrt(), (1 - alpha_bars[0]).sqrt()
    x0 = to_x0_eps(prediction.double(), x_t.double(), alpha, sigma, prediction_type).x0
    small, large = (_at(log_variance_table(schedule.alphas_cumprod, kind), t, x_t) for kind in MODEL_VARIANCES)
    return ReverseStep(
        posterior_mean(x0, x_t.double(), *alpha_bars), interpolated_log_variance(place.double(), small, large)
    )


def bound_term(
    x0: Tensor, x_t: Tensor, t: Tensor, step: ReverseStep, schedule: NoiseSchedule, *, levels: int | None
) -> Tensor:
    """KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), or -log p(x0 | x_1) where t = 0: bits per dimension, float64 [B].

    `levels` is the number of values that data in [-1, 1] takes, 256 for 8-bit pixels; None for continuous data such as
    latents, whose bits are those of a density and may be negative.
    """
    clean = x0.double()
    mean = posterior_mean(clean, x_t.double(), *_alpha_bars(schedule, t, x0))
    log_variance = _at(log_variance_table(schedule.alphas_cumprod, "fixed_small"), t, x0)
    kl = gaussian_kl(mean, log_variance, *step)
    if levels is None:
        reconstruction = -gaussian_log_density(clean, *step)
    else:
        reconstruction = -discretized_log_likelihood(clean, *step, levels)
    return _bits(torch.where(over(t, x0).to(x0.device) == 0, reconstruction, kl))


def prior_term(x0: Tensor, schedule: NoiseSchedule) -> Tensor:
    """L_T = KL(q(x_T | x0) || N(0, I)) for x0 [B, ...]: bits per dimension, float64 [B]."""
    alpha_bar = schedule.alphas_cumprod[-1]
    zero = torch.zeros_like(alpha_bar)
    return _bits(gaussian_kl(alpha_bar.sqrt() * x0.double(), torch.log1p(-alpha_bar), zero, zero))


@torch.no_grad()
def variational_bound(
    model: ReverseModel, x0: Tensor, schedule: NoiseSchedule, generator: torch.Generator, *, levels: int | None
) -> Bound:
    """The bound on each x0 [B, ...], with one draw of x_t a step from `generator`, a CPU generator.

    T calls of the model. `levels` as in `bound_term`.
    """
    steps = []
    for index in range(schedule.num_train_timesteps):
        t = torch.full((len(x0),), index, device=x0.device)
        eps = torch.randn(x0.shape, generator=generator).to(x0)
        x_t = q_sample(x0, eps, *schedule.alpha_sigma(t, like=x0))
        steps.append(bound_term(x0, x_t, t, model(x_t, t), schedule, levels=levels))
    return Bound(prior_term(x0, schedule), torch.stack(steps, dim=1))


def hybrid_loss(
    objective: Objective,
    raw: Tensor,
    x0: Tensor,
    noised: NoisedExample,
    *,
    levels: int | None,
    vlb_weight: float = 0.001,
) -> Tensor:
    """L_simple + vlb_weight·L_vlb [B] for raw output [B, 2C, ...] (Nichol & Dhariwal 2021, eq. 16), like raw.

    L_vlb is the sum of the bound's T terms, estimated at the drawn one, in bits per dimension; its gradient reaches the
    variance channels alone. `noised` are x0's under uniform timesteps, `levels` as in `bound_term`. Raises
    ValueError for a process other than a table, and for another number of channels.
    """
    schedule = objective.schedule
    if not isinstance(schedule, NoiseSchedule):
        raise ValueError(
            f"schedule is a {type(schedule).__name__}; accepted: a NoiseSchedule, which has the bound's terms"
        )
    prediction, place = _halves(raw, x0)
    frozen = torch.cat([prediction.detach(), place], dim=1)
    step = learned_step(frozen, noised.x_t, noised.t, schedule, objective.prediction_type)
    term = bound_term(x0, noised.x_t, noised.t, step, schedule, levels=levels)
    return objective.loss(prediction, noised) + vlb_weight * schedule.num_train_timesteps * term.to(raw.dtype)


def _halves(raw: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    if raw.shape[1] != 2 * x.shape[1]:
        raise ValueError(f"raw output has {raw.shape[1]} channels; accepted: {2 * x.shape[1]}, twice those of x_t")
    prediction, place = raw.chunk(2, dim=1)
    return prediction, place


def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    return over(table[t.cpu()], like).to(like.device)


def _alpha_bars(schedule: NoiseSchedule, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    table = schedule.alphas_cumprod
    before = torch.cat([torch.ones_like(table[:1]), table[:-1]])
    return _at(table, t, like), _at(before, t, like)


def _bits(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(1) / math.log(2)
