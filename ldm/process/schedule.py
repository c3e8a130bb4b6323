"""The noise schedule: alpha(t), sigma(t) and log-SNR(t) of the forward process x_t = alpha·x0 + sigma·eps.

Time is the index t = 0 ... T-1 of the trained table, as in Stable Diffusion; index t is step t + 1 of the
papers, which count from 1. The process of a table is variance preserving: alpha² + sigma² = 1, alpha² = alpha_bar.
`Schedule` is what it has in common with `ldm.process.flow` and `ldm.process.ve`, where that does not hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm.process.tables import check_timesteps, over, timestep_of, value_at

ZERO_SNR_ALPHA_BAR = 2.0**-24
"""Stands in for alpha_bar = 0 where a finite log-SNR is needed; the value that diffusers' solvers use."""


class Schedule(Protocol):
    """A Gaussian process x_t = alpha(t)·x0 + sigma(t)·eps; t are the timesteps that the network is told."""

    @property
    def num_train_timesteps(self) -> int:
        """T, the scale of the timesteps."""
        ...

    @property
    def prior_std(self) -> float:
        """The standard deviation of x_t at the last timestep, where sampling starts."""
        ...

    @property
    def ends(self) -> tuple[float, float]:
        """The noisiest and the cleanest timestep of finite signal-to-noise ratio that the network was trained on."""
        ...

    def alpha(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The factor of x0, of t's shape and device."""
        ...

    def sigma(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The factor of eps, of t's shape and device."""
        ...

    def log_snr(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """log(alpha² / sigma²), falling and finite, of t's shape and device."""
        ...

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t [B], each [B, 1, ...] to broadcast over `like` [B, ...], and like it."""
        ...

    def timestep(self, u: Tensor) -> Tensor:
        """The timestep at the part u in [0, 1] of all of them, shaped as u."""
        ...

    def timestep_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr`: float64, shaped as `log_snr`, on the CPU."""
        ...


class VariancePreserving(Schedule, Protocol):
    """A schedule with alpha² + sigma² = 1, alpha² = alpha_bar, which is what samplers walk along.

    A table is one itself; `ldm.process.unit_variance` shows any other process as one.
    """

    @property
    def final_alpha_bar(self) -> float:
        """Where DDIM's last step ends."""
        ...

    def alpha_bar_path(self, timesteps: Tensor, final: float) -> Tensor:
        """alpha_bar at falling timesteps [S], and `final` after the last one: float64 [S + 1] on the CPU."""
        ...


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A discrete-time variance preserving schedule.

    `alphas_cumprod` is the table of alpha_bar, float64 [T] on the CPU, non-increasing, in [0, 1); only its
    last entry may be 0 (zero terminal SNR). Raises ValueError for any other table.
    """

    alphas_cumprod: Tensor

    def __post_init__(self) -> None:
        table = self.alphas_cumprod
        if table.dtype != torch.float64 or table.ndim != 1 or len(table) == 0 or table.device.type != "cpu":
            raise ValueError(
                f"alphas_cumprod is {table.dtype} {list(table.shape)} on {table.device}; accepted: float64 [T] on cpu"
            )
        falls = (table[1:] <= table[:-1]).all()
        if not (falls and (table < 1).all() and (table[:-1] > 0).all() and table[-1] >= 0):
            raise ValueError(
                f"alphas_cumprod runs from {float(table[0])} to {float(table[-1])}; "
                "accepted: falling within [0, 1), 0 at the end only"
            )

    @classmethod
    def from_betas(cls, betas: Tensor) -> NoiseSchedule:
        """alpha_bar_t = prod_{s<=t} (1 - beta_s) (Ho et al. 2020, section 2) from betas [T] in (0, 1)."""
        return cls(torch.cumprod(1 - betas.to("cpu", torch.float64), dim=0))

    @classmethod
    def linear(cls, beta_start: float, beta_end: float, num_train_timesteps: int) -> NoiseSchedule:
        """betas evenly spaced (Ho et al. 2020, section 4: from 1e-4 to 0.02 in 1000 steps)."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64))

    @classmethod
    def scaled_linear(cls, beta_start: float, beta_end: float, num_train_timesteps: int) -> NoiseSchedule:
        """Square roots of the betas evenly spaced (Rombach et al. 2022; from 0.00085 to 0.012 there)."""
        first, last = math.sqrt(beta_start), math.sqrt(beta_end)
        return cls.from_betas(torch.linspace(first, last, num_train_timesteps, dtype=torch.float64) ** 2)

    @classmethod
    def cosine(cls, num_train_timesteps: int, max_beta: float = 0.999) -> NoiseSchedule:
        """alpha_bar = cos²(pi/2·(u + 0.008) / 1.008), beta <= max_beta (Nichol & Dhariwal 2021, eq. 17)."""
        u = torch.linspace(0, 1, num_train_timesteps + 1, dtype=torch.float64)
        alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return cls.from_betas((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta))

    @classmethod
    def sigmoid(
        cls, num_train_timesteps: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0, floor: float = 1e-9
    ) -> NoiseSchedule:
        """alpha_bar = (S(end) - S(start + (end - start)·u)) / (S(end) - S(start)), S(z) = sigmoid(z/tau), u = t/T.

        Jabri et al. 2022, the schedule function "sigmoid", at u = 1/T ... 1, not below `floor`. (diffusers' beta
        schedule of this name is another function.) Raises ValueError unless start < end, tau > 0 and floor > 0.
        """
        if not (start < end and tau > 0 and floor > 0):
            raise ValueError(
                f"start is {start}, end {end}, tau {tau} and floor {floor}; accepted: start < end, tau and floor > 0"
            )
        u = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        first, last = torch.sigmoid(torch.tensor([start / tau, end / tau], dtype=torch.float64))
        middle = torch.sigmoid((start + (end - start) * u) / tau)
        return cls(((last - middle) / (last - first)).clamp(min=floor))

    def shifted(self, base: float, resolution: float) -> NoiseSchedule:
        """The log-SNR of every step moved by 2·log(base / resolution) (Hoogeboom et al. 2023, section 3.1).

        A schedule tuned on pictures of side `base` then destroys pictures of side `resolution` as much, seen at the
        base's size. Raises ValueError unless both are positive.
        """
        if not (base > 0 and resolution > 0):
            raise ValueError(f"base is {base} and resolution {resolution}; accepted: positive numbers")
        return NoiseSchedule(torch.sigmoid(torch.logit(self.alphas_cumprod) + 2 * math.log(base / resolution)))

    def rescale_zero_terminal_snr(self) -> NoiseSchedule:
        """Alpha shifted and scaled: the last value becomes 0, the first stays (Lin et al. 2024, alg. 1)."""
        alpha = self.alphas_cumprod.sqrt()
        return NoiseSchedule(((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2)

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def prior_std(self) -> float:
        """The standard deviation of x_t at the last timestep, where sampling starts."""
        return 1.0

    @property
    def final_alpha_bar(self) -> float:
        """That of the table's first entry, as in Stable Diffusion (set_alpha_to_one = false)."""
        return float(self.alphas_cumprod[0])

    @property
    def ends(self) -> tuple[float, float]:
        """T - 1 and 0."""
        return float(self.num_train_timesteps - 1), 0.0

    @property
    def betas(self) -> Tensor:
        """beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}, float64 [T] on the CPU."""
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        return 1 - self.alphas_cumprod / before

    def alpha_bar(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """alpha_bar at t in [0, T-1], of t's shape and device. Between integers log-SNR is linear in t."""
        return self._alpha_bar64(t).to(t.device, dtype)

    def alpha(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """sqrt(alpha_bar_t), the factor of x0; shape, device and range of t as in `alpha_bar`."""
        return self._alpha_bar64(t).sqrt().to(t.device, dtype)

    def sigma(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """sqrt(1 - alpha_bar_t), the factor of eps; shape, device and range of t as in `alpha_bar`."""
        return (1 - self._alpha_bar64(t)).sqrt().to(t.device, dtype)

    def log_snr(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """log(alpha² / sigma²), finite also at zero terminal SNR; shape and device as in `alpha_bar`."""
        return finite_log_snr(self._alpha_bar64(t)).to(t.device, dtype)

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t [B], each [B, 1, ...] to broadcast over `like` [B, ...], and like it."""
        alpha_bar = over(self._alpha_bar64(t), like)
        return alpha_bar.sqrt().to(like), (1 - alpha_bar).sqrt().to(like)

    def timestep(self, u: Tensor) -> Tensor:
        """The index floor(T·u) of quantiles u in [0, 1]: int64, shaped as u, at most T - 1."""
        return (u.double() * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)

    def timestep_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr`: float64 timesteps in [0, T - 1], shaped as `log_snr`, on the CPU."""
        return timestep_of(finite_log_snr(self.alphas_cumprod), log_snr.cpu().double())

    def alpha_bar_path(self, timesteps: Tensor, final: float) -> Tensor:
        """alpha_bar at a sampler's timesteps [S], and `final` after the last one: float64 [S + 1] on the CPU.

        Raises ValueError unless `timesteps`, integers or floats, fall strictly within [0, T - 1].
        """
        last = self.num_train_timesteps - 1
        falls = timesteps.ndim == 1 and len(timesteps) > 0 and (timesteps[1:] < timesteps[:-1]).all()
        if not (falls and timesteps[0] <= last and timesteps[-1] >= 0):
            raise ValueError(f"timesteps are {timesteps.tolist()}; accepted: falling strictly within [0, {last}]")
        return torch.cat([self._alpha_bar64(timesteps), torch.tensor([final], dtype=torch.float64)])

    def _alpha_bar64(self, t: Tensor) -> Tensor:
        t = t.detach().cpu()
        check_timesteps(t, self.num_train_timesteps - 1)
        below = self.alphas_cumprod[t.long()]
        if not t.is_floating_point():
            return below
        between = torch.sigmoid(value_at(finite_log_snr(self.alphas_cumprod), t))
        return torch.where(t == t.floor(), below, between)


def finite_log_snr(alpha_bar: Tensor) -> Tensor:
    """log(alpha_bar / (1 - alpha_bar)), with `ZERO_SNR_ALPHA_BAR` in the place of alpha_bar = 0."""
    return torch.logit(torch.where(alpha_bar == 0, ZERO_SNR_ALPHA_BAR, alpha_bar))
