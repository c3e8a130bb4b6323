"""Rectified flow: x_t on the straight line from data to noise (Liu et al. 2022; Lipman et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ldm.process.prediction import check_choice
from ldm.process.spacing import TIMESTEP_SPACINGS, TimestepSpacing
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

    @property
    def ends(self) -> tuple[float, float]:
        """T - 1 and 1."""
        return float(self.num_train_timesteps - 1), 1.0

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


FLOW_CLASS = "FlowMatchEulerDiscreteScheduler"
FIXED_FLOW_KEYS: Mapping[str, object] = {
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}
"""Keys of diffusers' flow scheduler that are read at this value only."""


@dataclass(frozen=True)
class FlowConfig:
    """A rectified flow as the process of a model: `RectifiedFlow` with its velocity as the network's prediction.

    `shift` moves the timesteps of samplers, see `time_shift`; those of training have `objective.time_shift`. `type`
    tells it from a beta table in a config file. Raises ValueError for values out of range.
    """

    type: Literal["flow"]
    num_train_timesteps: int = 1000
    shift: float = 1.0
    timestep_spacing: TimestepSpacing = "linspace"
    prediction_type: ClassVar[Literal["flow"]] = "flow"
    variance_type: ClassVar[Literal["fixed_small"]] = "fixed_small"

    def __post_init__(self) -> None:
        check_choice("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        if self.num_train_timesteps < 1 or not self.shift > 0:
            raise ValueError(
                f"num_train_timesteps is {self.num_train_timesteps} and shift {self.shift}; "
                "accepted: at least 1 and a positive number"
            )

    def schedule(self) -> RectifiedFlow:
        """The process."""
        return RectifiedFlow(self.num_train_timesteps)

    def timesteps(self, num_steps: int, spacing: TimestepSpacing | None = None) -> Tensor:
        """The timesteps of a sampler, falling from T: float32 [num_steps]; `spacing` None is the model's own.

        "linspace" ends at the first of T trained times, shifted, as diffusers' scheduler does; "trailing" at 1 of
        `num_steps` equal parts; "leading" begins one part before T. All are then shifted. Raises ValueError for another
        spacing or number of steps.
        """
        if not 1 <= num_steps <= self.num_train_timesteps:
            raise ValueError(f"num_steps is {num_steps}; accepted: 1 to {self.num_train_timesteps}")
        check_choice("spacing", spacing or self.timestep_spacing, TIMESTEP_SPACINGS)
        part, first = 1 / num_steps, torch.tensor(1 / self.num_train_timesteps, dtype=torch.float64)
        match spacing or self.timestep_spacing:
            case "linspace":
                ends = 1.0, float(time_shift(first, self.shift))
            case "trailing":
                ends = 1.0, part
            case "leading":
                ends = 1 - part + float(first), float(first)
        times = torch.linspace(*ends, num_steps, dtype=torch.float64)
        return (time_shift(times, self.shift) * self.num_train_timesteps).float()

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> FlowConfig:
        """Read a scheduler_config.json of diffusers' FlowMatchEulerDiscreteScheduler.

        Raises ValueError for another class, and for settings that move the timesteps in other ways than `shift`.
        """
        check_choice("_class_name", config.get("_class_name"), (FLOW_CLASS,))
        if config.get("prediction_type", "flow_prediction") != "flow_prediction":
            raise ValueError(f"prediction_type is {config['prediction_type']!r}; accepted: flow_prediction or absent")
        for key, accepted in FIXED_FLOW_KEYS.items():
            if config.get(key, accepted) != accepted:
                raise ValueError(f"{key} is {config[key]!r}; accepted: {accepted!r}")
        known = {key: config[key] for key in ("num_train_timesteps", "shift", "timestep_spacing") if key in config}
        return cls(type="flow", **known)

    def to_dict(self) -> dict[str, Any]:
        """The scheduler_config.json of diffusers' FlowMatchEulerDiscreteScheduler; the spacing is our own key."""
        spacing = {} if self.timestep_spacing == "linspace" else {"timestep_spacing": self.timestep_spacing}
        values = {"num_train_timesteps": self.num_train_timesteps, "shift": self.shift}
        return {"_class_name": FLOW_CLASS, **values, **spacing, **FIXED_FLOW_KEYS}
