"""The training objective: DDPM's Algorithm 1 (Ho et al. 2020) for any prediction type, with weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ldm.process.posterior import q_sample
from ldm.process.prediction import PREDICTION_TYPES, PredictionType, check_choice, from_x0_eps
from ldm.process.schedule import NoiseSchedule

TimestepSampling = Literal["uniform", "logit_normal"]
TIMESTEP_SAMPLINGS: tuple[TimestepSampling, ...] = get_args(TimestepSampling)


class NoisedExample(NamedTuple):
    """A noised batch: `x_t` and `target` [B, ...] as x0, `t` int64 [B], `weight` [B], all on x0's device."""

    x_t: Tensor
    t: Tensor
    target: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Objective:
    """Draws noised examples and scores the network on them.

    `snr_gamma` caps the signal-to-noise ratio in the weight (Min-SNR-gamma); None weighs all timesteps
    equally, which is L_simple (Ho et al. 2020, eq. 14). `logit_mean` and `logit_std` belong to "logit_normal"; a
    positive mean trains the noisy timesteps more. Raises ValueError for a setting out of range.
    """

    schedule: NoiseSchedule
    prediction_type: PredictionType = "epsilon"
    snr_gamma: float | None = None
    timestep_sampling: TimestepSampling = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def __post_init__(self) -> None:
        check_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        check_choice("timestep_sampling", self.timestep_sampling, TIMESTEP_SAMPLINGS)
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            raise ValueError(f"snr_gamma is {self.snr_gamma}; accepted: a positive number or None")
        if not self.logit_std > 0:
            raise ValueError(f"logit_std is {self.logit_std}; accepted: a positive number")

    def draw(self, x0: Tensor, generator: torch.Generator) -> NoisedExample:
        """Noise x0 [B, ...] at random timesteps. All randomness comes from `generator`, a CPU generator."""
        u = torch.rand(len(x0), generator=generator)
        return self.noise(x0, torch.randn(x0.shape, generator=generator).to(x0), u)

    def noise(self, x0: Tensor, eps: Tensor, u: Tensor) -> NoisedExample:
        """Noise x0 [B, ...] with given eps ~ N(0, I) like it, at the timesteps of u ~ U[0, 1) [B]."""
        t = self.timesteps(u)
        alpha, sigma = self.schedule.alpha_sigma(t, like=x0)
        x_t = q_sample(x0, eps, alpha, sigma)
        target = from_x0_eps(x0, eps, alpha, sigma, self.prediction_type)
        return NoisedExample(x_t, t.to(x0.device), target, self.weight(t).to(x0.device))

    def timesteps(self, u: Tensor) -> Tensor:
        """The quantiles u [B] in [0, 1) of the timestep distribution: int64 [B].

        "uniform" is floor(T·u); "logit_normal" floor(T·sigmoid(logit_mean + logit_std·n)), n the
        standard normal quantile of u (Esser et al. 2024, eq. 19).
        """
        if self.timestep_sampling == "logit_normal":
            u = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u.double()))
        steps = self.schedule.num_train_timesteps
        return (u.double() * steps).long().clamp(max=steps - 1)

    def weight(self, t: Tensor) -> Tensor:
        """Min-SNR-gamma (Hang et al. 2023, section 3.4) at t [B]: float32 [B], ones if `snr_gamma` is None.

        As a weight on the squared error of x0 it is min(snr, gamma); of eps this over snr; of v over snr + 1.
        """
        if self.snr_gamma is None:
            return torch.ones(t.shape, device=t.device)
        alpha_bar = self.schedule.alpha_bar(t, torch.float64)
        snr = alpha_bar / (1 - alpha_bar)
        match self.prediction_type:
            case "epsilon":
                weight = (self.snr_gamma / snr).clamp(max=1)
            case "v_prediction":
                weight = snr.clamp(max=self.snr_gamma) / (snr + 1)
            case "sample":
                weight = snr.clamp(max=self.snr_gamma)
        return weight.float()

    def loss(self, raw: Tensor, noised: NoisedExample) -> Tensor:
        """weight · mean of (raw - target)² over all but the batch: [B], from raw network output [B, ...]."""
        return noised.weight * (raw - noised.target).square().flatten(1).mean(1)
