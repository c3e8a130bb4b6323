"""Both training scripts on a folder of tall, wide and square pictures in buckets; stage two reads it as a stream."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file

from ldm.data.latents import LatentCache

ROOT = Path(__file__).parent.parent
SIZES = ((48, 24), (24, 48), (32, 32))
DATA = {"resolution": 32, "max_validation_samples": 2, "buckets": {"step": 8, "max_aspect_ratio": 2.0}}
TRAINING = {"max_train_steps": 4, "train_batch_size": 4, "checkpointing_steps": 2, "report_to": "none"}


def pictures(folder: Path) -> Path:
    folder.mkdir()
    for n in range(18):
        Image.new("RGB", SIZES[n % 3], (12 * n, 90, 255 - 12 * n)).save(folder / f"{n:02d}.png")
        (folder / f"{n:02d}.txt").write_text(f"picture {n}")
    return folder


def train(script: str, config: dict[str, Any], *overrides: str) -> None:
    path = Path(config["output_dir"]).with_suffix(".yaml")
    path.write_text(json.dumps(config))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_DATASETS_CACHE": str(path.parent / "cache")}
    command = [sys.executable, script, "--config", str(path), *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage one, then stage two."""
    workshop = tmp_path_factory.mktemp("bucketed")
    data = {**DATA, "source": str(pictures(workshop / "pictures"))}
    vae = {"block_out_channels": [8, 16], "layers_per_block": 1, "latent_channels": 2, "norm_num_groups": 8}
    one = {
        "output_dir": str(workshop / "autoencoder"),
        "data": data,
        "autoencoder": vae,
        "loss": {"perceptual": 0.0, "discriminator_start": 2},
        "perceptual": {"type": "none"},
        "discriminator": {"num_layers": 1, "base_channels": 8, "norm": "group"},
        "statistics_samples": 16,
        "training": TRAINING,
        "validation": {"steps": 4, "num_images": 2},
    }
    train("train_autoencoder.py", one)
    two = {
        "output_dir": str(workshop / "ldm"),
        "autoencoder": str(workshop / "autoencoder/export"),
        "data": {**data, "streaming": True},
        "text_encoder": {
            "type": "clip_from_scratch",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 520,
            "max_length": 8,
        },
        "unet": {
            "in_channels": 2,
            "out_channels": 2,
            "block_out_channels": [8, 16],
            "layers_per_block": 1,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "cross_attention_dim": 16,
            "norm_num_groups": 8,
            "attention_head_dim": 2,
        },
        "training": TRAINING,
        "validation": {
            "steps": 4,
            "num_loss_samples": 0,
            "validation_prompts": ["picture 1"],
            "num_inference_steps": 1,
        },
    }
    train("train_ldm.py", two)
    return workshop


def test_both_stages_train_in_buckets(runs: Path) -> None:
    for name in ("autoencoder", "ldm"):
        assert (runs / name / "state/step_000004").is_dir() and (runs / name / "export").is_dir()
    weights = load_file(runs / "ldm/export/unet/diffusion_pytorch_model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_the_cache_holds_one_shape_of_latents_a_bucket(runs: Path) -> None:
    shapes, kinds = LatentCache(runs / "ldm/latents").shapes()
    assert shapes == [(12, 20), (16, 16), (20, 12)]
    assert [int((kinds == kind).sum()) for kind in range(3)] == [6, 6, 6]
