"""What shapes the sampler's way in `TextToImage`: spacing, eta, guidance, classifiers, interpolation, previews."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm import TextToImage
from ldm.cli import options
from ldm.data.shapes import ShapesDataset
from ldm.data.transforms import to_images, to_tensor
from ldm.networks import ClassifierConfig, LatentClassifier, UNet
from ldm.pipeline import SPACINGS
from ldm.pretrained import read_model, write_model
from ldm.process import DiffusionConfig, FlowConfig, Prediction, ProcessConfig, timesteps
from ldm.sampling import ClassifierGuidance, sigma_spaced_timesteps

PROMPTS = ("a red circle", "a small blue square above a large green star")


@pytest.fixture(scope="module")
def pipe(tiny_model_folder: Path) -> TextToImage:
    return TextToImage.from_pretrained(tiny_model_folder)


@pytest.fixture
def variant(tiny_model_folder: Path, tmp_path: Path) -> Callable[[ProcessConfig], Path]:
    """The tiny model with another process, its U-Net's outputs doubled for a learned variance, as a folder."""

    def write(diffusion: ProcessConfig) -> Path:
        model = read_model(tiny_model_folder)
        unet = model.unet
        if diffusion.variance_type == "learned_range":
            unet = UNet(dataclasses.replace(unet.config, out_channels=8))
            state = model.unet.state_dict()
            for name in ("conv_out.weight", "conv_out.bias"):
                state[name] = torch.cat([state[name], state[name].flip(0)])
            unet.load_state_dict(state)
        write_model(dataclasses.replace(model, diffusion=diffusion, unet=unet), tmp_path / "variant")
        return tmp_path / "variant"

    return write


def apart(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


def seen(pipe: TextToImage, **settings: Any) -> tuple[list[float], list[Prediction]]:
    """The timesteps and predictions of one drawing."""
    visited: list[float] = []
    found: list[Prediction] = []
    pipe("two", callback=lambda step, t, x, p: (visited.append(float(t)), found.append(p)), **settings)
    return visited, found


# --- spacing and eta


def test_the_spacings_are_those_of_the_command() -> None:
    assert options.SPACINGS == SPACINGS


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_spacing_is_visited(pipe: TextToImage, spacing: Any) -> None:
    visited, _ = seen(pipe, steps=5, spacing=spacing, guidance_scale=1)
    if spacing in ("karras", "exponential"):
        expected = sigma_spaced_timesteps(pipe.schedule, 5, spacing)
    else:
        expected = timesteps(5, 1000, spacing, 1)
    assert visited == expected.tolist()


def test_eta_is_noise_from_the_pictures_own_generator(pipe: TextToImage) -> None:
    (plain,), (zero,), (one,) = (pipe("two", steps=4, seed=2, **kw) for kw in ({}, {"eta": 0.0}, {"eta": 1.0}))
    assert plain.tobytes() == zero.tobytes() and apart(plain, one) > 5
    pair = pipe(["a red circle", "two"], steps=4, seed=1, eta=1.0)
    assert pair[1].tobytes() == one.tobytes()


# --- guidance


def test_rescaled_guidance_is_that_of_diffusers(pipe: TextToImage, tiny_model_folder: Path) -> None:
    reference = diffusers.StableDiffusionPipeline.from_pretrained(tiny_model_folder, safety_checker=None)
    reference.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    theirs = reference(
        PROMPTS[0], latents=noise, num_inference_steps=6, guidance_scale=7.0, guidance_rescale=0.7
    ).images[0]
    (ours,) = pipe(PROMPTS[0], latents=noise, steps=6, guidance_scale=7.0, guidance_rescale=0.7)
    (plain,) = pipe(PROMPTS[0], latents=noise, steps=6, guidance_scale=7.0)
    assert apart(ours, theirs) <= 2 and apart(ours, plain) > 5


def test_guidance_acts_within_its_interval(pipe: TextToImage) -> None:
    (guided,), (plain,) = (pipe("two", guidance_scale=scale, steps=4) for scale in (6.0, 1.0))
    (whole,), (none,), (half,) = (
        pipe("two", guidance_scale=6.0, steps=4, guidance_interval=interval)
        for interval in ((0.0, 1e6), (1e6, 1e7), (0.0, 1.0))
    )
    assert whole.tobytes() == guided.tobytes() and none.tobytes() == plain.tobytes()
    assert half.tobytes() not in (guided.tobytes(), plain.tobytes())


def test_a_threshold_keeps_predictions_in_range(pipe: TextToImage) -> None:
    _, loose = seen(pipe, steps=4, guidance_scale=9.0)
    _, tight = seen(pipe, steps=4, guidance_scale=9.0, dynamic_threshold=1.0, threshold_limit=0.5)
    assert max(p.x0.abs().max() for p in loose) > 1 and max(p.x0.abs().max() for p in tight) <= 0.5 + 1e-6


# --- a classifier


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
def test_a_classifier_is_followed(pipe: TextToImage, sampler: str) -> None:
    config = ClassifierConfig(("a", "b"), block_out_channels=(8,), norm_num_groups=4)
    classifier = LatentClassifier.from_scratch(config, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(classifier.linear_out.weight, generator=torch.Generator().manual_seed(1))
    sure = []
    for scale in (0.0, 30.0):
        guidance = ClassifierGuidance(classifier.log_prob("b"), scale)
        _, found = seen(pipe, sampler=sampler, steps=10, guidance_scale=1, classifier=guidance)
        sure.append(float(classifier.log_prob("b")(found[-1].x0, torch.zeros(1)).detach()))
    assert sure[1] > sure[0]
    (without,), (zero,) = (
        pipe("two", sampler=sampler, steps=3, **kw)
        for kw in ({}, {"classifier": ClassifierGuidance(classifier.log_prob("a"), 0.0)})
    )
    assert apart(without, zero) <= 1


# --- interpolation and previews


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_the_way_between_two_pictures_has_them_at_its_ends(pipe: TextToImage, sampler: str) -> None:
    settings = {"sampler": sampler, "steps": 4, "guidance_scale": 3.0}
    way = pipe.interpolate(PROMPTS, (3, 8), [0.0, 0.5, 1.0], batch_size=2, **settings)
    (first,), (last,) = pipe(PROMPTS[0], seed=3, **settings), pipe(PROMPTS[1], seed=8, **settings)
    assert apart(way[0], first) <= 1 and apart(way[2], last) <= 1
    (alone,) = pipe.interpolate(PROMPTS, (3, 8), [0.5], **settings)
    assert alone.tobytes() == way[1].tobytes()
    assert min(apart(way[1], first), apart(way[1], last)) > 5


def test_a_place_off_the_way_is_refused(pipe: TextToImage) -> None:
    with pytest.raises(ValueError, match=r"parts are \[0.0, 1.2\]; each must lie in \[0, 1\]"):
        pipe.interpolate(PROMPTS, (0, 0), [0.0, 1.2])


def test_previews_of_the_bundled_model_show_the_colours_of_its_pictures() -> None:
    """More than half of the variance of real pictures, seen at the latents' resolution, without the decoder."""
    bundled = TextToImage.from_pretrained("shapes")
    side = bundled.default_size
    pictures = torch.stack([to_tensor(ShapesDataset("validation", 8, side)[i]["image"]) for i in range(8)])
    with torch.no_grad():
        z = torch.cat([bundled.codec.encode(row) for row in pictures.split(1)])
    small = torch.nn.functional.adaptive_avg_pool2d(pictures, z.shape[-2:])
    left = (bundled.preview(z) - small).square().mean()
    assert left < 0.5 * (small - small.mean((0, 2, 3), keepdim=True)).square().mean()


# --- other processes


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_model_comes_back_and_draws_what_the_diffusers_scheduler_draws(
    variant: Callable[[ProcessConfig], Path], shift: float
) -> None:
    folder = variant(FlowConfig("flow", shift=shift))
    pipe = TextToImage.from_pretrained(folder)
    assert pipe.model.diffusion == FlowConfig("flow", shift=shift)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(5)
    noise = x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    encoder = pipe.model.text_encoder
    with torch.no_grad():
        context = encoder.encode(encoder.tokenize(["two"])).context
        for t in scheduler.timesteps:
            velocity: Tensor = pipe.model.unet(x, t.expand(1), context)
            x = scheduler.step(velocity, t, x).prev_sample
        expected = to_images(pipe.codec.decode(x))[0]
    for sampler in ("euler", "ddim"):
        (image,) = pipe("two", latents=noise, steps=5, guidance_scale=1, sampler=sampler)
        assert apart(image, expected) <= 1
    picture = Image.new("RGB", (32, 32), "red")
    for settings in ({"sampler": "unipc"}, {"sampler": "ddpm", "spacing": "karras"}, {"init_image": picture}):
        pipe("two", steps=4, guidance_scale=3.0, **settings)


def test_a_model_with_a_learned_variance_comes_back_and_draws(
    variant: Callable[[ProcessConfig], Path], pipe: TextToImage
) -> None:
    learned = TextToImage.from_pretrained(variant(DiffusionConfig(variance_type="learned_range")))
    assert learned.model.diffusion.variance_type == "learned_range"
    (a,), (b,) = (p("two", steps=4, seed=1, sampler="ddim") for p in (learned, pipe))
    assert apart(a, b) <= 1
    (c,), (d,) = (p("two", steps=4, seed=1, sampler="ddpm") for p in (learned, pipe))
    assert apart(c, d) > 1


def test_the_fixed_variance_of_the_model_is_used(variant: Callable[[ProcessConfig], Path], pipe: TextToImage) -> None:
    large = TextToImage.from_pretrained(variant(DiffusionConfig(variance_type="fixed_large")))
    (a,), (b,) = (p("two", steps=4, seed=1, sampler="ddpm") for p in (large, pipe))
    assert apart(a, b) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spacing": "even"}, "spacing is 'even'; accepted: leading, trailing, linspace, karras, exponential"),
        ({"eta": 0.5, "sampler": "heun"}, "eta is 0.5 with sampler 'heun'; only ddim has it"),
        ({"eta": 1.5}, "eta is 1.5; accepted: 0 to 1"),
        ({"guidance_rescale": 2.0}, "rescale is 2.0; accepted: 0 to 1"),
        ({"guidance_interval": (3.0, 1.0)}, "interval is 3.0 to 1.0; accepted"),
        ({"dynamic_threshold": 99.5}, "percentile is 99.5"),
    ],
)
def test_what_is_out_of_range_is_named(pipe: TextToImage, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        pipe("two", steps=2, **settings)
