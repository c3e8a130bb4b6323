"""Processes by their config: what diffusers makes of the file, and that nothing is lost on the way back."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from ldm.process import (
    DiffusionConfig,
    FlowConfig,
    NoiseSchedule,
    RectifiedFlow,
    UnitVariance,
    VarianceExploding,
    at_unit_variance,
    process_from_dict,
)

SD = NoiseSchedule.scaled_linear(0.00085, 0.012, 1000)
TABLES: list[tuple[dict[str, Any], NoiseSchedule]] = [
    ({"beta_schedule": "sigmoid"}, NoiseSchedule.sigmoid(1000)),
    ({"shift": 4.0}, SD.shifted(64, 256)),
    ({"beta_schedule": "squaredcos_cap_v2", "shift": 0.5}, NoiseSchedule.cosine(1000).shifted(2, 1)),
    (
        {"rescale_betas_zero_snr": True, "shift": 2.0, "prediction_type": "v_prediction"},
        SD.shifted(1, 2).rescale_zero_terminal_snr(),
    ),
    (
        {"num_train_timesteps": 3, "trained_betas": (0.1, 0.2, 0.4)},
        NoiseSchedule.from_betas(torch.tensor([0.1, 0.2, 0.4])),
    ),
]


@pytest.mark.parametrize(("settings", "expected"), TABLES)
def test_a_table_is_that_of_the_library_and_of_diffusers(settings: dict[str, Any], expected: NoiseSchedule) -> None:
    config = DiffusionConfig(**settings)
    torch.testing.assert_close(config.schedule().alphas_cumprod, expected.alphas_cumprod, atol=1e-7, rtol=1e-6)
    theirs = diffusers.DDIMScheduler.from_config(config.to_dict())
    torch.testing.assert_close(theirs.alphas_cumprod.double(), expected.alphas_cumprod, atol=2e-6, rtol=0)
    again = process_from_dict(config.to_dict())
    assert isinstance(again, DiffusionConfig) and again.prediction_type == config.prediction_type
    torch.testing.assert_close(again.schedule().alphas_cumprod, config.schedule().alphas_cumprod)


@pytest.mark.parametrize("variance_type", ["fixed_large", "learned_range"])
def test_a_variance_is_written_for_the_scheduler_that_reads_it(variance_type: Any) -> None:
    config = DiffusionConfig(variance_type=variance_type)
    written = config.to_dict()
    assert written["_class_name"] == "DDPMScheduler"
    assert diffusers.DDPMScheduler.from_config(written).config.variance_type == variance_type
    assert process_from_dict(written) == config


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_flow_timesteps_are_those_of_diffusers(shift: float, steps: int) -> None:
    config = FlowConfig("flow", shift=shift)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config.to_dict())
    theirs.set_timesteps(steps)
    torch.testing.assert_close(config.timesteps(steps), theirs.timesteps, atol=1e-3, rtol=0)
    theirs.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    torch.testing.assert_close(config.timesteps(steps, "trailing"), theirs.timesteps, atol=1e-3, rtol=0)


@pytest.mark.parametrize("config", [FlowConfig("flow"), FlowConfig("flow", 500, 2.5, "trailing")])
def test_a_flow_survives_the_way_through_the_file(config: FlowConfig) -> None:
    assert process_from_dict(config.to_dict()) == config
    assert config.schedule() == RectifiedFlow(config.num_train_timesteps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting is True; accepted: False"),
        ({"shift_terminal": 0.1}, "shift_terminal is 0.1; accepted: None"),
        ({"shift": -1.0}, "shift -1.0; accepted"),
        ({"prediction_type": "epsilon"}, "prediction_type is 'epsilon'; accepted: flow_prediction"),
    ],
)
def test_flows_that_move_time_in_other_ways_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        process_from_dict(FlowConfig("flow").to_dict() | change)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift": 0.0}, "shift is 0.0; accepted: a positive number"),
        ({"trained_betas": (0.1,)}, "trained_betas has 1 values; accepted: 1000"),
        ({"num_train_timesteps": 1, "trained_betas": (1.5,)}, "trained_betas run from 1.5 to 1.5; accepted"),
        ({"variance_type": "learned"}, "variance_type is 'learned'; accepted: fixed_small, fixed_large, learned_range"),
    ],
)
def test_tables_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**settings)


@pytest.mark.parametrize("process", [RectifiedFlow(1000), VarianceExploding.geometric(0.01, 50.0, 1000)])
def test_every_process_is_seen_at_unit_variance(process: Any) -> None:
    view = UnitVariance(process)
    t = torch.tensor([1, 300, 998])
    alpha, sigma = view.alpha(t, torch.float64), view.sigma(t, torch.float64)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(2 * (alpha / sigma).log(), process.log_snr(t, torch.float64))
    like = torch.zeros(3, 2, 1, dtype=torch.float64)
    norm = view.norm(t, like)
    for ours, theirs in zip(view.alpha_sigma(t, like), process.alpha_sigma(t, like), strict=True):
        torch.testing.assert_close(ours * norm, theirs)
    path = view.alpha_bar_path(t.flip(0), final=1.0)
    torch.testing.assert_close(path, torch.cat([alpha.square().flip(0), torch.ones(1, dtype=torch.float64)]))


def test_a_table_is_its_own_view_and_a_clean_end_is_refused() -> None:
    assert at_unit_variance(SD) is SD
    for timesteps in ([10.0, 0.0], [3.0, 5.0]):
        with pytest.raises(ValueError, match="accepted: falling strictly, above the clean end"):
            UnitVariance(RectifiedFlow(10)).alpha_bar_path(torch.tensor(timesteps), final=1.0)
