"""The training objective: DDPM's Algorithm 1 (Ho et al. 2020) for any process and prediction type, with weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ldm.process.flow import time_shift
from ldm.process.posterior import q_sample
from ldm.process.prediction import PREDICTION_TYPES, PredictionType, check_choice, from_x0_eps
from ldm.process.schedule import Schedule
from ldm.process.weighting import (
    WEIGHTINGS,
    Weighting,
    debiased_weight,
    min_snr_weight,
    p2_weight,
    per_target,
    snr_truncated_weight,
)

TimestepSampling = Literal["uniform", "logit_normal"]
TIMESTEP_SAMPLINGS: tuple[TimestepSampling, ...] = get_args(TimestepSampling)


class NoisedExample(NamedTuple):
    """A noised batch: `x_t` and `target` [B, ...] as x0, `t` [B], `weight` [B], all on x0's device.

    `t` is int64 for a table, float32 for a rectified flow.
    """

    x_t: Tensor
    t: Tensor
    target: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Objective:
    """Draws noised examples and scores the network on them.

    `weighting` "none" weighs all timesteps equally, which is L_simple (Ho et al. 2020, eq. 14), unless `snr_gamma` is
    given, which caps the signal-to-noise ratio in the weight (Min-SNR-gamma); the others are those of
    `ldm.process.weighting`, and `p2_gamma` and `p2_k` belong to "p2". `logit_mean` and `logit_std` belong to
    "logit_normal"; a positive mean trains the noisy timesteps more, and so does a `time_shift` above 1. Raises
    ValueError for a setting out of range, and for two weightings at once.
    """

    schedule: Schedule
    prediction_type: PredictionType = "epsilon"
    snr_gamma: float | None = None
    timestep_sampling: TimestepSampling = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    weighting: Weighting = "none"
    p2_gamma: float = 1.0
    p2_k: float = 1.0
    time_shift: float = 1.0

    def __post_init__(self) -> None:
        check_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        check_choice("timestep_sampling", self.timestep_sampling, TIMESTEP_SAMPLINGS)
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            raise ValueError(f"snr_gamma is {self.snr_gamma}; accepted: a positive number or None")
        check_choice("weighting", self.weighting, WEIGHTINGS)
        if self.snr_gamma is not None and self.weighting != "none":
            raise ValueError(
                f"weighting is {self.weighting!r} with snr_gamma {self.snr_gamma}; accepted: one of the two"
            )
        for name in ("logit_std", "p2_gamma", "p2_k", "time_shift"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: a positive number")

    def draw(self, x0: Tensor, generator: torch.Generator) -> NoisedExample:
        """Noise x0 [B, ...] at random timesteps. All randomness comes from `generator`, a CPU generator."""
        u = torch.rand(len(x0), generator=generator)
        return self.noise(x0, torch.randn(x0.shape, generator=generator).to(x0), u)

    def noise(self, x0: Tensor, eps: Tensor, u: Tensor) -> NoisedExample:
        """Noise x0 [B, ...] with given eps ~ N(0, I) like it, at the timesteps of u ~ U[0, 1) [B]."""
        return self.noise_at(x0, eps, self.timesteps(u))

    def noise_at(self, x0: Tensor, eps: Tensor, t: Tensor, input_eps: Tensor | None = None) -> NoisedExample:
        """Noise x0 [B, ...] with given eps at given timesteps t [B]; `input_eps`, like eps, is x_t's noise instead."""
        alpha, sigma = self.schedule.alpha_sigma(t, like=x0)
        x_t = q_sample(x0, eps if input_eps is None else input_eps, alpha, sigma)
        target = from_x0_eps(x0, eps, alpha, sigma, self.prediction_type)
        return NoisedExample(x_t, t.to(x0.device), target, self.weight(t).to(x0.device))

    def timesteps(self, u: Tensor) -> Tensor:
        """The quantiles u [B] in [0, 1) of the timestep distribution: [B], int64 for a table, float32 for a flow.

        They are the schedule's timesteps at the part u of all, floor(T·u) in a table; "logit_normal" takes
        sigmoid(logit_mean + logit_std·n) for u, n the standard normal quantile of u (Esser et al. 2024, eq. 19), and
        `time_shift` moves the result (eq. 23).
        """
        if self.timestep_sampling == "logit_normal":
            u = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u.double()))
        return self.schedule.timestep(time_shift(u.double(), self.time_shift))

    def weight(self, t: Tensor) -> Tensor:
        """The weight of each timestep t [B] on the squared error of the raw output: float32 [B].

        Ones for "none". The others are defined on the error of eps and converted to the prediction type, so that all
        types are weighted alike.
        """
        root_snr = (self.schedule.log_snr(t, torch.float64) / 2).exp()
        weight = self._eps_weight(root_snr.square())
        if weight is None:
            return torch.ones(t.shape, device=t.device)
        alpha, sigma = self.schedule.alpha(t, torch.float64), self.schedule.sigma(t, torch.float64)
        alpha = torch.where(alpha > 0, alpha, sigma * root_snr)
        sigma = torch.where(sigma > 0, sigma, alpha / root_snr)
        return per_target(weight, alpha, sigma, self.prediction_type).float()

    def _eps_weight(self, snr: Tensor) -> Tensor | None:
        if self.snr_gamma is not None:
            return min_snr_weight(snr, self.snr_gamma)
        match self.weighting:
            case "none":
                return None
            case "p2":
                return p2_weight(snr, self.p2_gamma, self.p2_k)
            case "debiased":
                return debiased_weight(snr)
            case "snr_truncated":
                return snr_truncated_weight(snr)

    def loss(self, raw: Tensor, noised: NoisedExample) -> Tensor:
        """weight · mean of (raw - target)² over all but the batch: [B], from raw network output [B, ...]."""
        return noised.weight * (raw - noised.target).square().flatten(1).mean(1)
