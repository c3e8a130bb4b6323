"""The variance exploding process of score matching: x_t = x0 + sigma·eps (Song & Ermon 2019; Song et al. 2021b)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ldm.process.prediction import check_choice
from ldm.process.spacing import TIMESTEP_SPACINGS, TimestepSpacing
from ldm.process.spacing import timesteps as spaced_timesteps
from ldm.process.tables import check_timesteps, over, timestep_of, value_at
from ldm.process.unit_variance import UnitVariance


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
        """A constant ratio of neighbours (Song & Ermon 2019, section 4.2; Song et al. 2021b, appendix C)."""
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

    @property
    def ends(self) -> tuple[float, float]:
        """T - 1 and 0."""
        return float(self.num_train_timesteps - 1), 0.0

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


VE_CLASS = "ScoreSdeVeScheduler"
VePrediction = Literal["epsilon", "v_prediction", "sample"]
VE_PREDICTIONS: tuple[VePrediction, ...] = get_args(VePrediction)


@dataclass(frozen=True)
class VeConfig:
    """A variance exploding process of geometric noise levels as the process of a model.

    The network sees x_t / sqrt(1 + sigma²), of unit variance at every level (Karras et al. 2022, table 1, c_in), and is
    told the index t. With "epsilon", L_simple is the denoising score matching loss weighted by sigma² (Song & Ermon
    2019, eq. 5-6), because score = -eps/sigma. `sigma_max` should be about the largest distance of two latents (Song &
    Ermon 2020, technique 1); `type` tells it from a beta table in a config file. Raises ValueError for values out of
    range.
    """

    type: Literal["ve"]
    num_train_timesteps: int = 1000
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    prediction_type: VePrediction = "v_prediction"
    timestep_spacing: TimestepSpacing = "linspace"
    variance_type: ClassVar[Literal["fixed_small"]] = "fixed_small"

    def __post_init__(self) -> None:
        check_choice("prediction_type", self.prediction_type, VE_PREDICTIONS)
        check_choice("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        if self.num_train_timesteps < 2:
            raise ValueError(f"num_train_timesteps is {self.num_train_timesteps}; accepted: at least 2")
        self.schedule()

    def schedule(self) -> UnitVariance:
        """The process as its network sees it."""
        return UnitVariance(VarianceExploding.geometric(self.sigma_min, self.sigma_max, self.num_train_timesteps))

    def timesteps(self, num_steps: int, spacing: TimestepSpacing | None = None) -> Tensor:
        """The timesteps of a sampler, see `ldm.process.spacing`; `spacing` None is the model's own."""
        return spaced_timesteps(num_steps, self.num_train_timesteps, spacing or self.timestep_spacing)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VeConfig:
        """Read a scheduler_config.json of diffusers' ScoreSdeVeScheduler with our `prediction_type`.

        Raises ValueError for another class, and without the `prediction_type`: networks made for that scheduler itself
        see x_t as it is, are told sigma and give the score.
        """
        check_choice("_class_name", config.get("_class_name"), (VE_CLASS,))
        check_choice("prediction_type", config.get("prediction_type"), VE_PREDICTIONS)
        known = ("num_train_timesteps", "sigma_min", "sigma_max", "prediction_type", "timestep_spacing")
        defaults = {"num_train_timesteps": 2000, "sigma_max": 1348.0}
        return cls(type="ve", **defaults | {key: config[key] for key in known if key in config})

    def to_dict(self) -> dict[str, Any]:
        """The scheduler_config.json of diffusers' ScoreSdeVeScheduler; prediction type and spacing are our own keys."""
        values = asdict(self)
        del values["type"]
        return {"_class_name": VE_CLASS, **values}
