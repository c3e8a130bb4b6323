"""A beta table as the process of a model: what a scheduler_config.json of diffusers says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ldm.process.prediction import check_choice
from ldm.process.schedule import NoiseSchedule
from ldm.process.spacing import TIMESTEP_SPACINGS, TimestepSpacing
from ldm.process.spacing import timesteps as spaced_timesteps

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]
BETA_SCHEDULES: tuple[BetaSchedule, ...] = get_args(BetaSchedule)
TablePrediction = Literal["epsilon", "v_prediction", "sample"]
TABLE_PREDICTIONS: tuple[TablePrediction, ...] = get_args(TablePrediction)
"""The prediction types that scheduler_config.json of a beta table can name."""
VarianceType = Literal["fixed_small", "fixed_large", "learned_range"]
VARIANCE_TYPES: tuple[VarianceType, ...] = get_args(VarianceType)

_SPACING_OF_CLASS: dict[str, TimestepSpacing] = {
    "DDIMScheduler": "leading",
    "DDPMScheduler": "leading",
    "PNDMScheduler": "leading",
    "LMSDiscreteScheduler": "linspace",
    "EulerDiscreteScheduler": "linspace",
    "EulerAncestralDiscreteScheduler": "linspace",
    "HeunDiscreteScheduler": "linspace",
    "KDPM2DiscreteScheduler": "linspace",
    "KDPM2AncestralDiscreteScheduler": "linspace",
    "DPMSolverMultistepScheduler": "linspace",
    "DPMSolverSinglestepScheduler": "linspace",
    "DPMSolverSDEScheduler": "linspace",
    "DEISMultistepScheduler": "linspace",
    "UniPCMultistepScheduler": "linspace",
}
_DDPM_BETAS: dict[str, Any] = {
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "steps_offset": 0,
}
_KARRAS_BETAS: dict[str, Any] = {**_DDPM_BETAS, "beta_start": 0.00085, "beta_end": 0.012}
_BETAS_OF_CLASS: dict[str, dict[str, Any]] = {
    "HeunDiscreteScheduler": _KARRAS_BETAS,
    "KDPM2DiscreteScheduler": _KARRAS_BETAS,
    "KDPM2AncestralDiscreteScheduler": _KARRAS_BETAS,
    "DPMSolverSDEScheduler": _KARRAS_BETAS,
}


@dataclass(frozen=True)
class DiffusionConfig:
    """The diffusion process of a model; field names are the keys of diffusers' scheduler_config.json.

    The defaults are those of Stable Diffusion 1.x. "squaredcos_cap_v2" and "sigmoid" read neither `beta_start` nor
    `beta_end`. `trained_betas`, where given, are the table itself and `beta_schedule` is not read. `shift` lowers every
    log-SNR by 2·log(shift) (Hoogeboom et al. 2023: the side of the pictures over the side that the schedule was tuned
    for), `rescale_betas_zero_snr` comes after it. Raises ValueError for values out of range, and for epsilon
    prediction at zero terminal SNR, where the noise says nothing about x0 (Lin et al. 2024, section 3.2).
    """

    beta_schedule: BetaSchedule = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    prediction_type: TablePrediction = "epsilon"
    timestep_spacing: TimestepSpacing = "leading"
    steps_offset: int = 1
    rescale_betas_zero_snr: bool = False
    shift: float = 1.0
    trained_betas: tuple[float, ...] | None = None
    variance_type: VarianceType = "fixed_small"

    def __post_init__(self) -> None:
        check_choice("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        check_choice("prediction_type", self.prediction_type, TABLE_PREDICTIONS)
        check_choice("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        check_choice("variance_type", self.variance_type, VARIANCE_TYPES)
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start is {self.beta_start} and beta_end {self.beta_end}; "
                "accepted: 0 < beta_start <= beta_end < 1"
            )
        if self.num_train_timesteps < 1 or self.steps_offset < 0:
            raise ValueError(
                f"num_train_timesteps is {self.num_train_timesteps} and steps_offset {self.steps_offset}; "
                "accepted: at least 1 and at least 0"
            )
        if not self.shift > 0:
            raise ValueError(f"shift is {self.shift}; accepted: a positive number")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError("prediction_type is 'epsilon' with rescale_betas_zero_snr; accepted: v_prediction, sample")
        self._check_trained_betas()

    def _check_trained_betas(self) -> None:
        betas = self.trained_betas
        if betas is None:
            return
        if len(betas) != self.num_train_timesteps:
            raise ValueError(
                f"trained_betas has {len(betas)} values; accepted: {self.num_train_timesteps}, num_train_timesteps"
            )
        if not all(0 < beta < 1 for beta in betas):
            raise ValueError(f"trained_betas run from {min(betas)} to {max(betas)}; accepted: above 0 and below 1")

    def schedule(self) -> NoiseSchedule:
        """The table that these settings describe."""
        schedule = self._before_rescaling()
        return schedule.rescale_zero_terminal_snr() if self.rescale_betas_zero_snr else schedule

    def _before_rescaling(self) -> NoiseSchedule:
        schedule = self._unshifted()
        return schedule if self.shift == 1 else schedule.shifted(1, self.shift)

    def _unshifted(self) -> NoiseSchedule:
        steps = self.num_train_timesteps
        if self.trained_betas is not None:
            return NoiseSchedule.from_betas(torch.tensor(self.trained_betas, dtype=torch.float64))
        match self.beta_schedule:
            case "linear":
                return NoiseSchedule.linear(self.beta_start, self.beta_end, steps)
            case "scaled_linear":
                return NoiseSchedule.scaled_linear(self.beta_start, self.beta_end, steps)
            case "squaredcos_cap_v2":
                return NoiseSchedule.cosine(steps)
            case "sigmoid":
                return NoiseSchedule.sigmoid(steps)

    def timesteps(self, num_steps: int, spacing: TimestepSpacing | None = None) -> Tensor:
        """The timesteps of a sampler, see `ldm.process.spacing`; `spacing` None is the model's own."""
        return spaced_timesteps(
            num_steps, self.num_train_timesteps, spacing or self.timestep_spacing, self.steps_offset
        )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> DiffusionConfig:
        """Read a scheduler_config.json of any discrete-time diffusers scheduler.

        A missing key has the default of the class that `_class_name` names (DDIMScheduler if it is absent).
        Keys that only choose a solver are not read. Raises ValueError for a class of another process (flow
        matching, EDM), for diffusers' own "sigmoid" betas, which are another function than ours, for a variance type
        that we do not have, and for sample clipping or thresholding, which latents do not go through.
        """
        name = config.get("_class_name", "DDIMScheduler")
        check_choice("_class_name", name, tuple(_SPACING_OF_CLASS))
        for key in ("clip_sample", "thresholding"):
            if config.get(key):
                raise ValueError(f"{key} is {config[key]!r}; accepted: false, null or absent")
        found = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        if found.get("trained_betas") is not None:
            found["trained_betas"] = tuple(found["trained_betas"])
        elif found.get("beta_schedule") == "sigmoid":
            raise ValueError("beta_schedule is 'sigmoid' without trained_betas; accepted: the betas as trained_betas")
        # diffusers' solvers write null, and "fixed_small_log" is the same variance by its logarithm
        if found.get("variance_type") in (None, "fixed_small_log"):
            found.pop("variance_type", None)
        defaults = {**_BETAS_OF_CLASS.get(name, _DDPM_BETAS), "timestep_spacing": _SPACING_OF_CLASS[name]}
        return cls(**defaults | found)

    def to_dict(self) -> dict[str, Any]:
        """A scheduler_config.json of diffusers with this process, in classes that stable-diffusion pipelines take.

        DDIMScheduler, or DDPMScheduler where the variance is not the default. Tables that diffusers has no name for
        are written as `trained_betas`.
        """
        named = self.beta_schedule != "sigmoid" and self.shift == 1 and self.trained_betas is None
        values = asdict(self) | {"clip_sample": False, "thresholding": False, "trained_betas": None}
        del values["shift"]
        if not named:
            values |= {"beta_schedule": "linear", "trained_betas": self._before_rescaling().betas.tolist()}
        if self.variance_type == "fixed_small":
            del values["variance_type"]
            return {"_class_name": "DDIMScheduler", **values, "set_alpha_to_one": False}
        return {"_class_name": "DDPMScheduler", **values}
