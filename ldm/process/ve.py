"""The variance exploding process of score matching: x_t = x0 + sigma·eps (Song & Ermon 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.process.tables import check_timesteps, over, timestep_of, value_at


@dataclass(frozen=True, eq=False)
class VarianceExploding:
    """Noise levels without a loss of signal: alpha = 1 and sigma grows.

    `sigmas` is float64 [T] on the CPU, positive and rising; index 0 is nearly clean (the papers that count the
    other way have it last). Between integers log sigma is linear in t. Raises ValueError for another table, and
    the methods for a t outside [0, T - 1].
    """

    sigmas: Tensor

    def __post_init__(self) -> None:
        table = self.sigmas
        if table.dtype != torch.float64 or table.ndim != 1 or len(table) < 2 or table.device.type != "cpu":
            raise ValueError(
                f"sigmas is {table.dtype} {list(table.shape)} on {table.device}; accepted: float64 [T] on cpu, T > 1"
            )
        if not (table[0] > 0 and (table[1:] > table[:-1]).all() and table[-1].isfinite()):
            raise ValueError(f"sigmas run from {float(table[0])} to {float(table[-1])}; accepted: positive, rising")

    @classmethod
    def geometric(cls, sigma_min: float, sigma_max: float, num_train_timesteps: int) -> VarianceExploding:
        """A constant ratio of neighbours (Song & Ermon 2019, section 4.2; Song et al. 2021, appendix C)."""
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min is {sigma_min} and sigma_max {sigma_max}; accepted: 0 < sigma_min < sigma_max")
        ends = math.log(sigma_min), math.log(sigma_max)
        return cls(torch.linspace(*ends, num_train_timesteps, dtype=torch.float64).exp())

    @property
    def num_train_timesteps(self) -> int:
        return len(self.sigmas)

    @property
    def prior_std(self) -> float:
        """The standard deviation of x_t at the last timestep, where sampling starts: the largest sigma."""
        return float(self.sigmas[-1])

    def alpha(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """1, the factor of x0, of t's shape and device."""
        return torch.ones_like(self._log_sigma(t)).to(t.device, dtype)

    def sigma(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The factor of eps at t in [0, T - 1], of t's shape and device."""
        return self._log_sigma(t).exp().to(t.device, dtype)

    def log_snr(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """log(alpha² / sigma²) = -2·log(sigma), of t's shape and device."""
        return (-2 * self._log_sigma(t)).to(t.device, dtype)

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t [B], each [B, 1, ...] to broadcast over `like` [B, ...], and like it."""
        sigma = over(self._log_sigma(t).exp(), like).to(like)
        return torch.ones_like(sigma), sigma

    def timestep(self, u: Tensor) -> Tensor:
        """The index floor(T·u) of quantiles u in [0, 1]: int64, shaped as u, at most T - 1."""
        return (u.double() * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)

    def timestep_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr`: float64 timesteps in [0, T - 1], shaped as `log_snr`, on the CPU."""
        return timestep_of(-2 * self.sigmas.log(), log_snr.cpu().double())

    def _log_sigma(self, t: Tensor) -> Tensor:
        t = t.detach().cpu()
        check_timesteps(t, self.num_train_timesteps - 1)
        return value_at(self.sigmas.log(), t)
