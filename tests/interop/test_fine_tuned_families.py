"""train_ldm.py from a Stable Diffusion 1 single file, a 2.x folder and an SDXL variant: a LoRA that diffusers loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch

from ldm import TextToImage
from ldm.cli import convert
from ldm.pretrained import read_model, write_model

ROOT = Path(__file__).parents[2]
PIPELINES = {"sd1": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}


def train(model: Path, run: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    config = {
        "output_dir": str(run),
        "pretrained": str(model),
        "data": {"source": "shapes", "resolution": 32, "max_train_samples": 4},
        "text_encoder": {"type": "pretrained", "trainable": True},
        "adapter": {"type": "lora", "rank": 2},
        "optimizer": {"learning_rate": 3.0e-2},
        "training": {"max_train_steps": 3, "train_batch_size": 2, "report_to": "none"},
        "validation": {"steps": 3, "num_inference_steps": 2, "num_loss_samples": 2},
    }
    path = run.with_suffix(".yaml")
    path.write_text(json.dumps(config))
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1,1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "train_ldm.py", "--config", str(path), *argv]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("form", ["sd1 file", "sd2 folder", "sdxl variant"])
def test_a_lora_is_trained_on_each_family_and_form(
    sibling_folder: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    family, kind = form.split()
    folder, argv = sibling_folder(family), []
    model = folder
    if kind == "file":
        model = tmp_path / "model.safetensors"
        convert.run([str(folder), str(model), "--to", "single-file"])
    if kind == "variant":
        model, argv = tmp_path / "halves", ["--variant", "fp16"]
        convert.run([str(folder), str(model), "--to", "diffusers", "--variant", "fp16", "--dtype", "float32"])
    done = train(model, tmp_path / "run", *argv)
    assert done.returncode == 0, done.stderr
    adapter = tmp_path / "run" / "adapter"
    pipe = TextToImage.from_pretrained(folder)
    settings = {"seed": 3, "steps": 2, "height": 32, "width": 32}
    (before,) = pipe("a red star", **settings)
    pipe.load_lora(adapter)
    (after,) = pipe("a red star", **settings)
    assert before.tobytes() != after.tobytes(), "nothing was learnt"
    merged = read_model(tmp_path / "run" / "export").unet.state_dict()
    for name, value in pipe.model.unet.state_dict().items():
        torch.testing.assert_close(merged[name], value, msg=name)
    if family in PIPELINES:
        write_model(read_model(folder), tmp_path / "again")
        theirs = PIPELINES[family].from_pretrained(tmp_path / "again")
        theirs.load_lora_weights(adapter)
        layer = theirs.unet.down_blocks[-2].attentions[0].transformer_blocks[0].attn1.to_q
        assert layer.lora_B["default_0"].weight.abs().max() > 0
