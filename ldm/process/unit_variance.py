"""Every Gaussian process as a variance preserving one, so that each sampler is written once.

With norm = sqrt(alpha² + sigma²), x_t / norm has the factors alpha / norm and sigma / norm, hence the same x0, eps and
log-SNR at the same timestep (Karras et al. 2022, section 2: only sigma / alpha matters to the flow).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.process.schedule import NoiseSchedule, Schedule, VariancePreserving
from ldm.process.tables import over


@dataclass(frozen=True)
class UnitVariance:
    """`process` seen through x_t / norm; timesteps stay what its network is told."""

    process: Schedule

    @property
    def num_train_timesteps(self) -> int:
        return self.process.num_train_timesteps

    @property
    def prior_std(self) -> float:
        """The standard deviation of x_t at the last timestep, where sampling starts."""
        return 1.0

    @property
    def final_alpha_bar(self) -> float:
        """1: times go down to clean data."""
        return 1.0

    @property
    def ends(self) -> tuple[float, float]:
        """Those of the process."""
        return self.process.ends

    def norm(self, t: Tensor, like: Tensor) -> Tensor:
        """sqrt(alpha² + sigma²) at t [B], as [B, 1, ...] to broadcast over `like` [B, ...], and like it."""
        alpha, sigma = self.process.alpha(t, torch.float64), self.process.sigma(t, torch.float64)
        return over(torch.hypot(alpha, sigma), like).to(like)

    def alpha(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """alpha / norm, the factor of x0, of t's shape and device."""
        return self._alpha_bar(t).sqrt().to(t.device, dtype)

    def sigma(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """sigma / norm, the factor of eps, of t's shape and device."""
        return (1 - self._alpha_bar(t)).sqrt().to(t.device, dtype)

    def log_snr(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """That of the process."""
        return self.process.log_snr(t, dtype)

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t [B], each [B, 1, ...] to broadcast over `like` [B, ...], and like it."""
        alpha_bar = over(self._alpha_bar(t), like)
        return alpha_bar.sqrt().to(like), (1 - alpha_bar).sqrt().to(like)

    def timestep(self, u: Tensor) -> Tensor:
        """That of the process."""
        return self.process.timestep(u)

    def timestep_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """That of the process."""
        return self.process.timestep_of_log_snr(log_snr)

    def alpha_bar_path(self, timesteps: Tensor, final: float) -> Tensor:
        """alpha_bar at a sampler's timesteps [S], and `final` after the last one: float64 [S + 1] on the CPU.

        Raises ValueError unless `timesteps` fall strictly and the last one still has noise.
        """
        falls = timesteps.ndim == 1 and len(timesteps) > 0 and (timesteps[1:] < timesteps[:-1]).all()
        path = self._alpha_bar(timesteps) if falls else torch.ones(1)
        if not path[-1] < 1:
            raise ValueError(f"timesteps are {timesteps.tolist()}; accepted: falling strictly, above the clean end")
        return torch.cat([path, torch.tensor([final], dtype=torch.float64)])

    def _alpha_bar(self, t: Tensor) -> Tensor:
        t = t.detach().cpu()
        alpha, sigma = self.process.alpha(t, torch.float64), self.process.sigma(t, torch.float64)
        return alpha.square() / (alpha.square() + sigma.square())


def at_unit_variance(schedule: Schedule) -> VariancePreserving:
    """The schedule itself if it is a table, else its `UnitVariance` view."""
    return schedule if isinstance(schedule, NoiseSchedule) else UnitVariance(schedule)
