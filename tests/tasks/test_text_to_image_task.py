"""One training step of stage two under each setting of the config, against the library function that it stands for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autoencoder import LatentCodec
from ldm.build import build_objective, build_timesteps, build_training_noise, build_unet, vlb_weight
from ldm.config import ConfigError, LdmTraining
from ldm.config.file import dump_config, load_config
from ldm.data.latents import LatentBatch
from ldm.pretrained import read_model
from ldm.process import (
    DiffusionConfig,
    FlowConfig,
    LossHistory,
    Objective,
    VeConfig,
    hybrid_loss,
    offset_noise,
    perturbed_noise,
    time_shift,
)
from ldm.process.importance import HISTORY
from ldm.seeds import generator
from ldm.tasks.captions import TokenizedCaptions
from ldm.tasks.text_to_image import DenoisingLoss, TextToImageTask
from ldm.tasks.timesteps import FixedTimesteps, ImportanceTimesteps

ROWS, SHAPE = 4, (4, 8, 8)


class Recorder(torch.nn.Module):
    """A network of no particular meaning that keeps what it was given."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-0.5, 0.5, 4 * channels).reshape(channels, 4, 1, 1))
        self.x_t, self.t, self.raw = torch.empty(0), torch.empty(0), torch.empty(0)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        self.x_t, self.t = x, t
        self.raw = torch.nn.functional.conv2d(x, self.weight)
        return self.raw


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., LdmTraining]:
    """A config of the given overrides, by way of a file as a user writes it."""

    def load(*overrides: str) -> LdmTraining:
        (tmp_path / "config.yaml").write_text("output_dir: out\nautoencoder: vae\n")
        return load_config(LdmTraining, tmp_path / "config.yaml", overrides)

    return load


@pytest.fixture
def step(tiny_model_folder: Path) -> Callable[..., tuple[TextToImageTask, Recorder, DenoisingLoss, Tensor]]:
    """The task of a config, its network, the loss of step 5 and the clean latents."""
    model = read_model(tiny_model_folder)
    moments = torch.randn(ROWS, 8, 8, 8, generator=torch.Generator().manual_seed(0))

    def run(config: LdmTraining) -> tuple[TextToImageTask, Recorder, DenoisingLoss, Tensor]:
        network = Recorder(8 if config.diffusion.variance_type == "learned_range" else 4)
        objective, codec = build_objective(config), LatentCodec.from_config(model.vae)
        task = TextToImageTask(
            network,
            TokenizedCaptions(model.text_encoder),
            codec,
            objective,
            build_training_noise(config),
            build_timesteps(config, objective, lambda value: value),
            vlb_weight(config),
            0.1,
            False,
            3,
        )
        terms = task.loss(LatentBatch(moments, ("two",) * ROWS, tuple(range(ROWS))), 5, ROWS)
        terms.loss.backward()
        assert network.weight.grad is not None and network.weight.grad.isfinite().all()
        return task, network, terms, codec.from_moments(moments)

    return run


def draws() -> tuple[list[torch.Generator], Tensor, Tensor]:
    """The generators of the rows, the noise that they give first, and the quantiles of the timesteps."""
    rows = [generator(3, "noise", 5, row) for row in range(ROWS)]
    eps = torch.stack([torch.randn(SHAPE, generator=row) for row in rows])
    u = (torch.rand((), generator=generator(3, "timestep", 5)) + torch.arange(ROWS) / ROWS) % 1.0
    return rows, eps, u


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_class_pictures_are_compared_with_the_teacher_and_the_others_with_the_noise(
    config: Any, step: Any, variance: str
) -> None:
    settings = config("--diffusion.variance_type", variance, "--objective.vlb_weight", "0")
    task, network, _, x0 = step(settings)
    teacher = Recorder(len(network.weight)).requires_grad_(False)
    teacher.weight *= 3
    moments, prior = torch.cat([x0 / task.codec.scale, torch.zeros_like(x0)], dim=1), (False, True) * (ROWS // 2)
    batch = LatentBatch(moments, ("two",) * ROWS, tuple(range(ROWS)), (2.0, 6.0) * (ROWS // 2), prior)
    terms = dataclasses.replace(task, teacher=teacher).loss(batch, 5, ROWS)
    _, eps, _ = draws()
    taught = torch.nn.functional.conv2d(network.x_t, 3 * network.weight)[:, : x0.shape[1]].detach()
    own = network.raw[:, : x0.shape[1]]
    mean = (own - eps)[0::2].square().mean() + 3 * (own - taught)[1::2].square().mean()
    torch.testing.assert_close(terms.loss, mean)
    torch.testing.assert_close(teacher.x_t, network.x_t[1::2])


def test_the_plain_step_is_l_simple(config: Any, step: Any) -> None:
    task, network, terms, x0 = step(config())
    _, eps, u = draws()
    noised = task.objective.noise(x0, eps, u)
    torch.testing.assert_close(network.x_t, noised.x_t)
    torch.testing.assert_close(terms.loss, (network.raw - eps).square().mean())


def test_noise_offset_and_input_perturbation(config: Any, step: Any) -> None:
    task, network, terms, x0 = step(config("--objective.noise_offset", "0.2", "--objective.input_perturbation", "0.1"))
    rows, eps, u = draws()
    eps = offset_noise(eps, 0.2, rows)
    noised = task.objective.noise_at(x0, eps, task.objective.timesteps(u), perturbed_noise(eps, 0.1, rows))
    torch.testing.assert_close(network.x_t, noised.x_t)
    torch.testing.assert_close(terms.loss, (network.raw - eps).square().mean())


def test_a_rectified_flow_with_shifted_times(config: Any, step: Any) -> None:
    chosen = config("--diffusion.type", "flow", "--diffusion.shift", "3", "--objective.time_shift", "2")
    assert chosen.diffusion == FlowConfig("flow", shift=3.0)
    _, network, terms, x0 = step(chosen)
    _, eps, u = draws()
    time = time_shift(u.double(), 2.0).float().reshape(-1, 1, 1, 1)
    torch.testing.assert_close(network.t, 1000 * time.flatten())
    torch.testing.assert_close(network.x_t, (1 - time) * x0 + time * eps)
    torch.testing.assert_close(terms.loss, (network.raw - (eps - x0)).square().mean())


def test_a_variance_exploding_process(config: Any, step: Any) -> None:
    flags = ["--diffusion.type", "ve", "--diffusion.num_train_timesteps", "41", "--diffusion.sigma_max", "40"]
    chosen = config(*flags, "--diffusion.prediction_type", "epsilon")
    assert chosen.diffusion == VeConfig("ve", num_train_timesteps=41, sigma_max=40.0, prediction_type="epsilon")
    _, network, terms, x0 = step(chosen)
    _, eps, u = draws()
    assert torch.equal(network.t, (u.double() * 41).long())
    sigma = (0.01 * 4000 ** (network.t / 40)).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(network.x_t, (x0 + sigma * eps) / (1 + sigma**2).sqrt())
    torch.testing.assert_close(terms.loss, (network.raw - eps).square().mean())


@pytest.mark.parametrize("beta_schedule", ["sigmoid", "squaredcos_cap_v2"])
def test_other_tables(config: Any, step: Any, beta_schedule: str) -> None:
    flags = ["--diffusion.beta_schedule", beta_schedule, "--diffusion.shift", "2"]
    flags += ["--diffusion.rescale_betas_zero_snr", "true", "--diffusion.prediction_type", "v_prediction"]
    task, network, _, x0 = step(config(*flags))
    _, eps, _ = draws()
    alpha_bar = task.objective.schedule.alphas_cumprod[network.t][:, None, None, None].float()
    assert task.objective.schedule.alphas_cumprod[-1] == 0
    torch.testing.assert_close(network.x_t, alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps)


def test_a_learned_variance_is_trained_by_the_hybrid_loss(config: Any, step: Any) -> None:
    task, network, terms, x0 = step(
        config(
            "--diffusion.variance_type", "learned_range", "--objective.vlb_weight", "0.01", "--objective.snr_gamma", "5"
        )
    )
    _, eps, u = draws()
    noised = task.objective.noise(x0, eps, u)
    expected = hybrid_loss(task.objective, network.raw, x0, noised, levels=None, vlb_weight=0.01)
    torch.testing.assert_close(terms.loss, expected.mean())


def test_importance_sampling_learns_from_the_losses_of_all_processes(config: Any, step: Any) -> None:
    task, network, terms, _ = step(config("--objective.timestep_sampling", "importance"))
    assert isinstance(task.timesteps, ImportanceTimesteps)
    _, eps, _ = draws()
    losses = (network.raw - eps).square().flatten(1).mean(1)
    torch.testing.assert_close(terms.loss, losses.mean())
    expected = LossHistory.empty(1000).updated(network.t, losses)
    torch.testing.assert_close(task.timesteps.history.squares, expected.squares)
    assert torch.equal(task.timesteps.history.counts, expected.counts)


def test_the_curriculum_begins_at_the_noisiest_timesteps_and_ends_at_all_of_them() -> None:
    timesteps = FixedTimesteps(Objective(DiffusionConfig().schedule()), curriculum_steps=4, curriculum_start=1 / 16)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for step, part in enumerate((1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 1)):
        drawn, weight = timesteps.draw(u, step)
        noisiest = math.floor(1000 * (1 - part))
        assert (int(drawn.min()), int(drawn.max())) == (noisiest, 999) and weight.eq(1).all()
        torch.testing.assert_close(drawn.double().mean(), torch.tensor((noisiest + 999) / 2).double(), atol=1, rtol=0)


def test_importance_weights_undo_the_distribution() -> None:
    timesteps = ImportanceTimesteps(3, lambda value: torch.cat([value, value + torch.tensor([4.0, 0, 0])]))
    for _ in range(HISTORY):
        timesteps.learn([2, 0, 1, 3], torch.tensor([0, 1, 2, 2]), torch.tensor([1.0, 2.0, 5.0, float("nan")]))
    assert timesteps.history.counts.tolist() == [2 * HISTORY] * 3
    u = (torch.arange(3000) + 0.5) / 3000
    t, weight = timesteps.draw(u, 0)
    share = t.bincount() / 3000
    torch.testing.assert_close(share, torch.tensor([1.0, 2.0, 5.0]) / 8, atol=2e-3, rtol=0)
    torch.testing.assert_close(
        (weight * torch.tensor([1.0, 2.0, 5.0])[t]).mean(), torch.tensor(8 / 3), atol=1e-2, rtol=0
    )
    again = ImportanceTimesteps(3, lambda value: value)
    again.load_state_dict(timesteps.state_dict())
    assert torch.equal(again.draw(u, 0)[0], t)


@pytest.mark.parametrize("process", ["flow", "ve"])
def test_settings_survive_the_way_into_a_run_folder(config: Any, tmp_path: Path, process: str) -> None:
    chosen = config("--diffusion.type", process, "--diffusion.num_train_timesteps", "500")
    (tmp_path / "again.yaml").write_text(dump_config(chosen))
    assert load_config(LdmTraining, tmp_path / "again.yaml") == chosen


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--diffusion.type", "sde"], "`diffusion.type` is 'sde'; it must be one of flow, ve"),
        (["--diffusion.type", "flow", "--diffusion.beta_start", "0.1"], "`diffusion.beta_start` is not a key"),
        (["--diffusion.type", "ve", "--diffusion.beta_end", "0.1"], "`diffusion.beta_end` is not a key"),
        (
            ["--diffusion.type", "ve", "--diffusion.prediction_type", "flow"],
            "`diffusion.prediction_type` is 'flow'; it must be one of epsilon, v_prediction, sample",
        ),
        (
            ["--diffusion.type", "ve", "--diffusion.variance_type", "learned_range"],
            "`diffusion.variance_type` is not a key",
        ),
        (
            ["--diffusion.type", "ve", "--diffusion.sigma_max", "0.001"],
            "`diffusion`: sigma_min is 0.01 and sigma_max 0.001; accepted: 0 < sigma_min < sigma_max",
        ),
        (["--diffusion.type", "ve", "--diffusion.num_train_timesteps", "1"], "num_train_timesteps is 1; accepted"),
        (
            ["--diffusion.type", "flow", "--objective.timestep_sampling", "importance"],
            "`objective.timestep_sampling` is importance with `diffusion.type` flow",
        ),
        (
            ["--diffusion.variance_type", "learned_range", "--objective.timestep_sampling", "logit_normal"],
            "`objective.timestep_sampling` is logit_normal and `objective.time_shift` 1.0 with `diffusion.variance_type`",
        ),
        (
            ["--objective.time_shift", "2", "--objective.timestep_sampling", "importance"],
            "`objective.time_shift` is 2.0 with `objective.timestep_sampling` importance; it must be 1",
        ),
        (["--objective.noise_offset", "-1"], "`objective.noise_offset` is -1.0; it must be at least 0"),
        (["--diffusion.shift", "0"], "shift is 0.0; accepted: a positive number"),
    ],
)
def test_combinations_that_cannot_be_are_refused(config: Any, flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        config(*flags)


def test_a_network_of_classes_is_refused_before_it_trains(config: Any, tiny_model_folder: Path) -> None:
    encoder = read_model(tiny_model_folder).text_encoder
    with pytest.raises(ConfigError, match=r"`unet\.num_class_embeds` is 10; it must be null, stage two has no classes"):
        build_unet(config("--unet.num_class_embeds", "10"), 4, encoder)


def test_a_learned_variance_needs_twice_the_channels(config: Any, tiny_model_folder: Path) -> None:
    encoder = read_model(tiny_model_folder).text_encoder
    chosen = config(
        "--diffusion.variance_type", "learned_range", "--unet.cross_attention_dim", str(encoder.context_dim)
    )
    with pytest.raises(ConfigError, match=r"`unet\.out_channels` is 4, but the double of .* is 8"):
        build_unet(chosen, 4, encoder)
    small = dataclasses.replace(chosen.unet, block_out_channels=(32, 32, 32, 32), out_channels=8)
    assert build_unet(dataclasses.replace(chosen, unet=small), 4, encoder).config.out_channels == 8
