"""The mathematics of diffusion: pure functions and frozen dataclasses on tensors."""

from ldm.process.objective import NoisedExample, Objective
from ldm.process.posterior import (
    model_variance,
    p_mean_from_eps,
    posterior_mean,
    posterior_variance,
    q_sample,
    q_step,
)
from ldm.process.prediction import PREDICTION_TYPES, Prediction, PredictionType, from_x0_eps, to_x0_eps
from ldm.process.schedule import BETA_SCHEDULES, BetaSchedule, DiffusionConfig, NoiseSchedule, finite_log_snr
from ldm.process.spacing import TIMESTEP_SPACINGS, TimestepSpacing, timesteps

__all__ = [
    "BETA_SCHEDULES",
    "PREDICTION_TYPES",
    "TIMESTEP_SPACINGS",
    "BetaSchedule",
    "DiffusionConfig",
    "NoiseSchedule",
    "NoisedExample",
    "Objective",
    "Prediction",
    "PredictionType",
    "TimestepSpacing",
    "finite_log_snr",
    "from_x0_eps",
    "model_variance",
    "p_mean_from_eps",
    "posterior_mean",
    "posterior_variance",
    "q_sample",
    "q_step",
    "timesteps",
    "to_x0_eps",
]
