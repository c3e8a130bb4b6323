"""Text-to-image, image-to-image and inpainting draw what diffusers' pipelines draw, with guidance, after five steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders import vae as diffusers_vae
from diffusers.pipelines.stable_diffusion import (
    pipeline_stable_diffusion_img2img,
    pipeline_stable_diffusion_inpaint,
)
from diffusers.pipelines.stable_diffusion_xl import (
    pipeline_stable_diffusion_xl_img2img,
    pipeline_stable_diffusion_xl_inpaint,
)
from PIL import Image, ImageDraw

from ldm import TextToImage
from ldm.data.shapes import ShapesDataset
from ldm.interop.checkpoint import Checkpoint, write_folder
from ldm.process import DiffusionConfig
from ldm.single_file import write_single_file

Sibling = Callable[..., Checkpoint]
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
CASES = [
    ("sd1", "ddim"),
    ("sd1", "euler"),
    ("sd1", "heun"),
    ("sd2", "ddim"),
    ("sd2", "euler"),
    ("sd2", "dpmpp_2m"),
    ("sd2", "unipc"),
    ("sdxl", "ddim"),
    ("sdxl", "euler"),
    ("sdxl", "heun"),
    ("sdxl_trailing", "dpmpp_2m"),
    ("sdxl_trailing", "unipc"),
]
"""diffusers' multistep solvers place "leading" timesteps elsewhere than its others, so they run on trailing
ones only. Its DDIM goes down by a constant stride, which is ours where the steps divide 1000."""
PIPELINES = {
    "text": (diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline),
    "image": (diffusers.StableDiffusionImg2ImgPipeline, diffusers.StableDiffusionXLImg2ImgPipeline),
    "inpainting": (diffusers.StableDiffusionInpaintPipeline, diffusers.StableDiffusionXLInpaintPipeline),
}
GIVEN: dict[str, Any] = {"prompt": "a large red circle", "negative_prompt": "a green star", "guidance_scale": 4.0}
NOISE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folders(sibling: Sibling, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SD 1 with epsilon and leading steps, SD 2 with v and trailing ones, SDXL, and SD 1's inpainting model."""
    root = tmp_path_factory.mktemp("parity")
    models = {family: sibling(family) for family in ("sd1", "sd2", "sdxl")}
    trailing = replace(DiffusionConfig(), timestep_spacing="trailing", steps_offset=0)
    models["sdxl_trailing"] = replace(models["sdxl"], scheduler=trailing.to_dict())
    models["inpainting"] = sibling("sd1", unet={"in_channels": 9})
    models["inpainting_trailing"] = replace(models["inpainting"], scheduler=trailing.to_dict())
    for name, checkpoint in models.items():
        write_folder(checkpoint, root / name)
    return {name: root / name for name in models}


@pytest.fixture
def fixed_noise(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """diffusers draws `NOISE` where it noises the picture, and takes the posterior's mean where it encodes one."""
    for module in (
        pipeline_stable_diffusion_img2img,
        pipeline_stable_diffusion_inpaint,
        pipeline_stable_diffusion_xl_img2img,
        pipeline_stable_diffusion_xl_inpaint,
    ):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: NOISE.clone())
    monkeypatch.setattr(diffusers_vae, "randn_tensor", lambda shape, **kwargs: torch.zeros(shape))
    yield


def picture() -> Image.Image:
    return ShapesDataset("train", 4, 32)[3]["image"]


def mask() -> Image.Image:
    """A disc that no grid of latents fits."""
    image = Image.new("L", (32, 32), 0)
    ImageDraw.Draw(image).ellipse((7, 5, 26, 23), fill=255)
    return image


def reference(task: str, folder: Path, sampler: str) -> Any:
    plain, xl = PIPELINES[task]
    pipe = xl.from_pretrained(folder) if "sdxl" in folder.name else plain.from_pretrained(folder, safety_checker=None)
    pipe.scheduler = SCHEDULERS[sampler].from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def apart(a: Image.Image, b: Image.Image) -> int:
    assert a.size == b.size
    difference = np.asarray(a).astype(int) - np.asarray(b).astype(int)
    assert np.asarray(a).std() > 10
    return int(np.abs(difference).max())


@pytest.mark.parametrize(("model", "sampler"), CASES)
def test_text_to_image(folders: dict[str, Path], model: str, sampler: str) -> None:
    pipe = reference("text", folders[model], sampler)
    noise = NOISE
    if sampler in ("euler", "heun"):
        # their state is x / alpha, which starts at noise · sqrt(1 + s²); the pipeline multiplies by init_noise_sigma
        pipe.scheduler.set_timesteps(5)
        noise = NOISE * float((1 + pipe.scheduler.sigmas[0] ** 2).sqrt() / pipe.scheduler.init_noise_sigma)
    theirs = pipe(**GIVEN, latents=noise, num_inference_steps=5).images[0]
    (ours,) = TextToImage.from_pretrained(folders[model])(**GIVEN, latents=NOISE, steps=5, sampler=sampler)
    assert apart(ours, theirs) <= 2


@pytest.mark.parametrize(("model", "sampler"), CASES)
@pytest.mark.usefixtures("fixed_noise")
def test_image_to_image(folders: dict[str, Path], model: str, sampler: str) -> None:
    pipe = reference("image", folders[model], sampler)
    theirs = pipe(**GIVEN, image=picture(), strength=0.5, num_inference_steps=10).images[0]
    (ours,) = TextToImage.from_pretrained(folders[model])(
        **GIVEN, latents=NOISE, steps=10, sampler=sampler, init_image=picture(), strength=0.5
    )
    assert apart(ours, theirs) <= 2


@pytest.mark.parametrize(("model", "sampler"), CASES)
@pytest.mark.usefixtures("fixed_noise")
def test_inpainting_with_a_plain_model(folders: dict[str, Path], model: str, sampler: str) -> None:
    pipe = reference("inpainting", folders[model], sampler)
    given = {**GIVEN, "strength": 0.5}
    theirs = pipe(**given, image=picture(), mask_image=mask(), num_inference_steps=10, height=32, width=32).images[0]
    (ours,) = TextToImage.from_pretrained(folders[model])(
        **given, latents=NOISE, steps=10, sampler=sampler, init_image=picture(), mask=mask()
    )
    assert apart(ours, theirs) <= 2


@pytest.mark.parametrize(
    ("model", "sampler", "strength"),
    [
        ("inpainting", "ddim", 0.8),
        ("inpainting", "ddim", 1.0),
        ("inpainting", "euler", 0.8),
        ("inpainting", "heun", 0.8),
        ("inpainting_trailing", "dpmpp_2m", 0.8),
        ("inpainting_trailing", "unipc", 0.8),
    ],
)
@pytest.mark.usefixtures("fixed_noise")
def test_inpainting_with_an_inpainting_model(
    folders: dict[str, Path], model: str, sampler: str, strength: float
) -> None:
    pipe = reference("inpainting", folders[model], sampler)
    given = {**GIVEN, "strength": strength}
    theirs = pipe(**given, image=picture(), mask_image=mask(), num_inference_steps=6, height=32, width=32).images[0]
    ours_pipe = TextToImage.from_pretrained(folders[model])
    rest = {"latents": NOISE, "steps": 6, "sampler": sampler, "init_image": picture()}
    (ours,) = ours_pipe(**given, **rest, mask=mask())
    (elsewhere,) = ours_pipe(**given, **rest, mask=mask().transpose(Image.Transpose.ROTATE_180))
    assert apart(ours, theirs) <= 2
    assert apart(ours, elsewhere) > 5


def test_an_inpainting_model_asks_for_picture_and_mask(folders: dict[str, Path]) -> None:
    pipe = TextToImage.from_pretrained(folders["inpainting"])
    for given in ({}, {"init_image": picture()}):
        with pytest.raises(ValueError, match="it needs init_image and mask"):
            pipe("a red circle", **given)
    with pytest.raises(ValueError, match="mask needs init_image"):
        pipe("a red circle", mask=picture())


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_single_file_draws_what_its_folder_draws(
    sibling: Sibling, folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    write_single_file(sibling(family), tmp_path / "x.safetensors")
    drawn = [TextToImage.from_pretrained(path)("two", seed=3) for path in (folders[family], tmp_path / "x.safetensors")]
    assert apart(drawn[0][0], drawn[1][0]) <= 1  # where a tensor lies in its file decides how products are summed
