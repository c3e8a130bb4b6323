"""Rectified flow: x_t on the straight line from data to noise (Liu et al. 2022; Lipman et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.process.tables import check_timesteps, over

SMALLEST_TIME = 2.0**-24
"""Stands in for the times 0 and 1 (from below) where a finite log-SNR is needed."""


@dataclass(frozen=True)
class RectifiedFlow:
    """x_t = (1 - t)·x0 + t·eps for times t in [0, 1]; the network is told T·t, T = `num_train_timesteps`.

    All methods take timesteps T·t in [0, T], integers or floats, as diffusers' flow schedulers do. The
    network's usual prediction is the velocity dx_t/dt = eps - x0 ("flow"). Raises ValueError for T < 1, and the
    methods for a timestep outside [0, T].
    """

    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        if self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps is {self.num_train_timesteps}; accepted: at least 1")

    @property
    def prior_std(self) -> float:
        """The standard deviation of x_t at the last timestep, where sampling starts."""
        return 1.0

    def alpha(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """1 - t/T, the factor of x0, of t's shape and device."""
        return (1 - self._time(t)).to(t.device, dtype)

    def sigma(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """t/T, the factor of eps, of t's shape and device."""
        return self._time(t).to(t.device, dtype)

    def log_snr(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """log(alpha² / sigma²), finite also at both ends; shape and device as t's."""
        return (-2 * torch.logit(self._time(t), eps=SMALLEST_TIME)).to(t.device, dtype)

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t [B], each [B, 1, ...] to broadcast over `like` [B, ...], and like it."""
        time = over(self._time(t), like)
        return (1 - time).to(like), time.to(like)

    def timestep(self, u: Tensor) -> Tensor:
        """The timestep T·u at times u in [0, 1]: float32, shaped as u."""
        return (u.double() * self.num_train_timesteps).float()

    def timestep_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr`: float64 timesteps, shaped as `log_snr`, on the CPU."""
        return torch.sigmoid(-log_snr.cpu().double() / 2) * self.num_train_timesteps

    def _time(self, t: Tensor) -> Tensor:
        t = t.detach().cpu()
        check_timesteps(t, self.num_train_timesteps)
        return t.double() / self.num_train_timesteps


def time_shift(t: Tensor, shift: float) -> Tensor:
    """Times t in [0, 1] moved towards noise (shift > 1) or data: shift·t / (1 + (shift - 1)·t), as t.

    Esser et al. 2024, eq. 23, where shift = sqrt(m/n) for m pixels instead of n. On a rectified flow it lowers
    the log-SNR by 2·log(shift) everywhere. Raises ValueError unless shift > 0.
    """
    if not shift > 0:
        raise ValueError(f"shift is {shift}; accepted: a positive number")
    return shift * t / (1 + (shift - 1) * t)
