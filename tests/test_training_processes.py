"""Whole runs of other processes and objectives: a flow, a learned variance with importance sampling, a classifier."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_training_runs import (
    AFTER_UPDATE,
    STAGE_TWO,
    assert_same_curve,
    config_file,
    metrics,
    states,
    train,
    train_on_two,
    weights,
)

from ldm.cli import generate
from ldm.networks import LatentClassifier
from ldm.pretrained import read_diffusion
from ldm.process import DiffusionConfig, FlowConfig

STEPS = 6


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def learned(tiny_model_folder: Path) -> dict[str, Any]:
    """A learned variance over 10 timesteps, so that importance sampling leaves its uniform start within the run."""
    return {
        **STAGE_TWO,
        "autoencoder": str(tiny_model_folder),
        "unet": {**STAGE_TWO["unet"], "out_channels": 8},
        "diffusion": {"num_train_timesteps": 10, "variance_type": "learned_range"},
        "objective": {"timestep_sampling": "importance", "noise_offset": 0.1, "input_perturbation": 0.1},
        "training": {**STAGE_TWO["training"], "train_batch_size": 32},
        "validation": {"num_inference_steps": 2, "steps": STEPS, "sampler": "ddpm"},
    }


@pytest.fixture(scope="module")
def undisturbed(workshop: Path, learned: dict[str, Any]) -> Path:
    done = train("train_ldm.py", "--config", config_file(workshop / "learned", learned))
    assert done.returncode == 0, done.stderr
    return workshop / "learned"


def test_importance_sampling_resumes_with_what_it_had_learnt(
    undisturbed: Path, workshop: Path, learned: dict[str, Any]
) -> None:
    run = workshop / "stopped"
    command = ("train_ldm.py", "--config", config_file(run, learned))
    stopped = train(*command, patch=AFTER_UPDATE.format(updates=5, signal="SIGTERM", rank=0))
    assert stopped.returncode == 143 and states(run)[-1] == "step_000005"
    resumed = train(*command)
    assert resumed.returncode == 0, resumed.stderr
    assert weights(run) == weights(undisturbed)
    assert read_diffusion(run / "export") == DiffusionConfig(num_train_timesteps=10, variance_type="learned_range")


def test_importance_sampling_on_two_processes_is_the_same_training(
    undisturbed: Path, workshop: Path, learned: dict[str, Any]
) -> None:
    run = workshop / "two"
    done = train_on_two("train_ldm.py", "--config", config_file(run, learned), "--training.train_batch_size", "16")
    assert [d.returncode for d in done] == [0, 0], done[0].stderr + done[1].stderr
    assert_same_curve(undisturbed, run)


@pytest.fixture(scope="module")
def flow(workshop: Path, tiny_model_folder: Path) -> Path:
    config = {
        **STAGE_TWO,
        "autoencoder": str(tiny_model_folder),
        "data": {**STAGE_TWO["data"], "shapes_per_image": 1},
        "diffusion": {"type": "flow", "shift": 2.0},
        "objective": {"timestep_sampling": "logit_normal", "time_shift": 2.0},
        "validation": {"num_inference_steps": 2, "steps": STEPS, "sampler": "euler"},
    }
    done = train("train_ldm.py", "--config", config_file(workshop / "flow", config))
    assert done.returncode == 0, done.stderr
    return workshop / "flow"


def test_a_flow_is_trained_and_drawn(flow: Path, tmp_path: Path) -> None:
    assert read_diffusion(flow / "export") == FlowConfig("flow", shift=2.0)
    index = json.loads((flow / "export/model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    report = generate.run(["-p", "two", "-m", str(flow / "export"), "-o", str(tmp_path / "flow.png"), "--json"])
    assert report["settings"]["sampler"] == "euler" and (tmp_path / "flow.png").is_file()


def test_a_classifier_is_trained_on_the_latents_of_a_run_and_followed(
    flow: Path, workshop: Path, tmp_path: Path
) -> None:
    config = {
        "model": str(flow / "export"),
        "latents": str(flow / "latents"),
        "classifier": {"labels": ["circle", "square", "triangle", "star"], "block_out_channels": [16, 16]},
        "optimizer": STAGE_TWO["optimizer"],
        "training": STAGE_TWO["training"],
    }
    run = workshop / "classifier"
    done = train("train_classifier.py", "--config", config_file(run, config))
    assert done.returncode == 0, done.stderr
    assert {"loss", "accuracy", "gradient_norm"} <= metrics(run)[STEPS].keys()
    assert LatentClassifier.from_pretrained(run / "export").config.labels[3] == "star"
    flags = ["--classifier", str(run / "export"), "--class-label", "star", "--classifier-scale", "3"]
    generate.run(["-p", "two", "-m", str(flow / "export"), "-o", str(tmp_path / "star.png"), "--json", *flags])
    assert (tmp_path / "star.png").is_file()
    other = config_file(workshop / "unknown", config)
    unknown = train("train_classifier.py", "--config", other, "--classifier.labels", "[circle, dog]")
    assert unknown.returncode == 2 and unknown.stderr.startswith("error: `classifier.labels` has 'dog', but no caption")
