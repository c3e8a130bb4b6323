"""The models that come with the package: that they may be shipped, and that diffusers draws the same with them."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ldm import TextToImage
from ldm.pretrained import BUNDLED, DEFAULT_MODEL, read_model, resolve
from ldm.training.card import LICENCES

PROMPTS = {"emoji": "a red heart", "shapes": "a large red circle on a white background"}


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.int64)


@pytest.mark.parametrize("name", BUNDLED)
def test_the_name_stands_for_a_folder_of_60_mb_at_most_with_its_licences(name: str) -> None:
    folder = resolve(name)
    assert folder == BUNDLED[name]
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 60e6
    assert LICENCES[name] in (folder / "README.md").read_text()


def test_a_folder_of_that_name_comes_first_but_is_no_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BUNDLED:
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("shapes").resolve() == tmp_path / "shapes"
    assert TextToImage.from_pretrained().default_size == 64


@pytest.mark.parametrize("name", BUNDLED)
def test_diffusers_draws_the_same_picture(name: str) -> None:
    ours, prompt = TextToImage.from_pretrained(name), PROMPTS[name]
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(
        BUNDLED[name], torch_dtype=torch.float32, safety_checker=None
    )
    theirs.set_progress_bar_config(disable=True)
    config = ours.model.unet.config
    side = config.sample_size or 8
    latents = torch.randn(1, config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    given = {"num_inference_steps": 4, "guidance_scale": 3.0}
    expected = theirs(prompt, latents=latents, height=64, width=64, **given).images[0]
    found = ours(prompt, latents=latents, steps=4, guidance_scale=3.0, sampler="ddim")[0]
    assert np.abs(levels(found) - levels(expected)).max() <= 1


def test_a_red_heart_is_red_on_white() -> None:
    """The default model knows what people type first; judged on the mean of eight pictures."""
    images = TextToImage.from_pretrained()("a red heart", num_images=8, seed=0)
    mean = np.mean([levels(image) for image in images], axis=0)
    middle, corner = mean[24:40, 24:40].mean((0, 1)), mean[:4, :4].mean((0, 1))
    assert middle[0] > 180 and middle[1:].max() < 110
    assert corner.min() > 230


def test_the_default_is_one_of_them() -> None:
    assert DEFAULT_MODEL in BUNDLED
    assert read_model(DEFAULT_MODEL).card == (BUNDLED[DEFAULT_MODEL] / "README.md").read_text(encoding="utf-8")
