"""`TextToImage`: the same pictures as diffusers, the same picture whatever is drawn with it, and the ways to start."""

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

from autoencoder import LatentCodec, LatentStatistics, fold_into_convolutions
from ldm import TextToImage
from ldm.data.shapes import ShapesDataset
from ldm.data.transforms import to_images, to_tensor
from ldm.pretrained import ModelError, read_model, read_vae, write_model, write_vae
from ldm.process import DiffusionConfig
from ldm.sampling import SAMPLERS

PROMPTS = [
    "a red circle",
    "a small blue square above a large green star",
    "",
    "two",
    "a large yellow triangle on a black background",
]
DIFFUSERS_SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}


@pytest.fixture(scope="module")
def pipe(tiny_model_folder: Path) -> TextToImage:
    return TextToImage.from_pretrained(tiny_model_folder)


@pytest.fixture
def variant(tiny_model_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """The tiny model with another diffusion process, as a folder."""

    def write(**diffusion: Any) -> Path:
        model = dataclasses.replace(read_model(tiny_model_folder), diffusion=DiffusionConfig(**diffusion))
        write_model(model, tmp_path / "variant")
        return tmp_path / "variant"

    return write


def array(image: Image.Image) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.asarray(image).astype(np.int64)


def apart(a: Image.Image, b: Image.Image) -> int:
    """Largest difference in levels of 255."""
    return int(np.abs(array(a) - array(b)).max())


def picture(size: int = 32) -> Image.Image:
    return ShapesDataset("train", 4, size)[3]["image"]


# --- diffusers as the second implementation


def drawn_by_diffusers(
    folder: Path, sampler: str, noise: torch.Tensor, steps: int, scale: float
) -> tuple[Any, list[float]]:
    reference = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    reference.set_progress_bar_config(disable=True)
    scheduler = DIFFUSERS_SCHEDULERS[sampler].from_config(reference.scheduler.config)
    reference.scheduler = scheduler
    scheduler.set_timesteps(steps)
    visited = [float(t) for t in scheduler.timesteps]
    if sampler == "euler":
        # its state is x / alpha, which starts at noise · sqrt(1 + s²); the pipeline multiplies by init_noise_sigma
        noise = noise * float((1 + scheduler.sigmas[0] ** 2).sqrt() / scheduler.init_noise_sigma)
    out = reference(
        PROMPTS[:2],
        negative_prompt=["a green star"] * 2,
        latents=noise,
        num_inference_steps=steps,
        guidance_scale=scale,
        output_type="pil",
    )
    return out.images, visited


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("sampler", "spacing"),
    [("ddim", "leading"), ("ddim", "trailing"), ("euler", "leading"), ("euler", "trailing"), ("dpmpp_2m", "trailing")],
)
def test_diffusers_draws_the_same_pictures_from_the_folder(
    variant: Callable[..., Path], sampler: str, spacing: str, prediction_type: str
) -> None:
    folder = variant(prediction_type=prediction_type, timestep_spacing=spacing)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    theirs, visited = drawn_by_diffusers(folder, sampler, noise, steps=8, scale=4.0)
    ours_pipe = TextToImage.from_pretrained(folder)
    seen: list[float] = []
    ours = ours_pipe(
        PROMPTS[:2],
        negative_prompt="a green star",
        latents=noise,
        steps=8,
        guidance_scale=4.0,
        sampler=sampler,
        callback=lambda step, t, x, prediction: seen.append(float(t)),
    )
    assert seen == visited
    assert np.std(array(ours[0])) > 20
    for a, b in zip(ours, theirs, strict=True):
        assert apart(a, b) <= 2


def test_other_timesteps_would_have_been_noticed(pipe: TextToImage) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    (eight,), (seven,) = (pipe("a red circle", latents=noise, steps=steps) for steps in (8, 7))
    assert apart(eight, seven) > 10


# --- the folder


def test_a_saved_model_is_bit_equal_when_read_again(pipe: TextToImage, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "again")
    again = TextToImage.from_pretrained(tmp_path / "again")
    for name in ("vae", "unet", "text_encoder"):
        before, after = (getattr(p.model, name).state_dict() for p in (pipe, again))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert again.model.diffusion == pipe.model.diffusion
    assert again.model.settings == pipe.model.settings
    assert again.model.unet.config == pipe.model.unet.config and again.model.vae.config == pipe.model.vae.config
    (a,), (b,) = pipe("a red circle", seed=3), again("a red circle", seed=3)
    assert a.tobytes() == b.tobytes()


def test_half_precision_weights_are_stored_without_changing_the_model(pipe: TextToImage, tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in pipe.model.unet.state_dict().items()}
    pipe.save_pretrained(tmp_path / "half", torch.float16)
    assert all(torch.equal(before[key], value) for key, value in pipe.model.unet.state_dict().items())
    half = TextToImage.from_pretrained(tmp_path / "half")
    assert all(torch.equal(value, before[key].half().float()) for key, value in half.model.unet.state_dict().items())


def test_the_models_own_settings_are_its_defaults(pipe: TextToImage) -> None:
    (default,) = pipe("a red circle", seed=1)
    (said,) = pipe("a red circle", seed=1, steps=3, guidance_scale=3.0, sampler="ddim", height=32, width=32)
    assert default.size == (32, 32) and default.tobytes() == said.tobytes()


@pytest.mark.parametrize(("key", "value"), [("in_channels", 8), ("cross_attention_dim", 16)])
def test_parts_that_do_not_fit_each_other_are_named(
    tiny_model_folder: Path, tmp_path: Path, key: str, value: int
) -> None:
    model = read_model(tiny_model_folder)
    misfit = type(model.unet)(dataclasses.replace(model.unet.config, **{key: value}))
    write_model(dataclasses.replace(model, unet=misfit), tmp_path / "misfit")
    with pytest.raises(ModelError, match=f"unet/config.json: {key} is {value}, but the"):
        TextToImage.from_pretrained(tmp_path / "misfit")


# --- the same picture whatever is drawn with it


@pytest.fixture(scope="module", params=[("ddim", 3.0), ("ddpm", 3.0), ("heun", 1.0)], ids=lambda p: f"{p[0]}-{p[1]}")
def alone(request: pytest.FixtureRequest, pipe: TextToImage) -> tuple[dict[str, Any], list[bytes]]:
    """Settings, and the pictures of all prompts drawn one by one."""
    sampler, scale = request.param
    settings = {"sampler": sampler, "guidance_scale": scale, "steps": 4}
    return settings, [pipe(text, seed=10 + i, **settings)[0].tobytes() for i, text in enumerate(PROMPTS)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_a_picture_does_not_depend_on_the_batch_size(
    pipe: TextToImage, alone: tuple[dict[str, Any], list[bytes]], batch_size: int
) -> None:
    settings, expected = alone
    images = pipe(PROMPTS, seed=10, batch_size=batch_size, **settings)
    assert [image.tobytes() for image in images] == expected


def test_a_picture_does_not_depend_on_its_place_in_the_batch(
    pipe: TextToImage, alone: tuple[dict[str, Any], list[bytes]]
) -> None:
    settings, expected = alone
    for place in range(1, len(PROMPTS)):
        others = [*PROMPTS[:place][::-1], PROMPTS[0]]
        assert pipe(others, seed=10 - place, **settings)[place].tobytes() == expected[0]


@pytest.mark.parametrize("size", [(32, 64), (64, 64)])
def test_larger_pictures_do_not_depend_on_the_batch_size_either(pipe: TextToImage, size: tuple[int, int]) -> None:
    height, width = size
    images = pipe(PROMPTS[:3], seed=2, height=height, width=width)
    alone = [pipe(text, seed=2 + i, height=height, width=width)[0] for i, text in enumerate(PROMPTS[:3])]
    assert [i.size for i in images] == [(width, height)] * 3
    assert [i.tobytes() for i in images] == [i.tobytes() for i in alone]


def test_num_images_counts_seeds_on_and_goes_prompt_by_prompt(pipe: TextToImage) -> None:
    images = pipe(PROMPTS[:2], num_images=2, seed=4)
    wanted = [pipe(PROMPTS[i // 2], seed=4 + i)[0] for i in range(4)]
    assert [i.tobytes() for i in images] == [i.tobytes() for i in wanted]
    assert len({i.tobytes() for i in images}) == 4


def test_a_seed_stands_for_noise_that_anyone_can_draw(pipe: TextToImage) -> None:
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(7))
    (given,), (drawn,) = pipe("two", latents=noise[None]), pipe("two", seed=7)
    assert given.tobytes() == drawn.tobytes()


def test_guidance_and_negative_prompt_matter(pipe: TextToImage) -> None:
    (plain,), (strong,) = pipe("two", guidance_scale=1.0), pipe("two", guidance_scale=6.0)
    (away,) = pipe("two", guidance_scale=6.0, negative_prompt="a red circle")
    assert apart(plain, strong) > 2 and apart(strong, away) > 2


def test_callback_and_progress_are_called(pipe: TextToImage) -> None:
    steps: list[int] = []
    done: list[int] = []
    pipe(
        PROMPTS[:3],
        steps=4,
        batch_size=2,
        callback=lambda step, t, x, prediction: steps.append(step),
        progress=done.append,
    )
    assert steps == [0, 1, 2, 3] * 2 and done == [2, 1]


# --- starting from a picture


@pytest.fixture
def silent(variant: Callable[..., Path]) -> TextToImage:
    """v = 0 everywhere, so that x0 = alpha·x_t and eps = sigma·x_t: everything has a closed form."""
    pipe = TextToImage.from_pretrained(variant(prediction_type="v_prediction"))
    torch.nn.init.zeros_(pipe.model.unet.conv_out.weight)
    torch.nn.init.zeros_(pipe.model.unet.conv_out.bias)
    return pipe


def encoded(pipe: TextToImage, image: Image.Image) -> torch.Tensor:
    with torch.no_grad():
        return pipe.codec.encode(to_tensor(image)[None])


def decoded(pipe: TextToImage, z: torch.Tensor) -> Image.Image:
    with torch.no_grad():
        return to_images(pipe.codec.decode(z))[0]


def test_a_small_strength_gives_the_reconstruction_with_a_little_noise(silent: TextToImage) -> None:
    (image,) = silent("a red circle", init_image=picture(), strength=1e-6, steps=50, seed=3)
    alpha_bar = silent.schedule.alphas_cumprod[:2].float()
    (alpha_0, alpha), (sigma_0, sigma) = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3))
    x = alpha * encoded(silent, picture()) + sigma * noise
    assert apart(image, decoded(silent, (alpha_0 * alpha + sigma_0 * sigma) * x)) <= 1
    reconstruction = decoded(silent, encoded(silent, picture()))
    (anew,) = silent("a red circle", seed=3)
    near, far = (np.abs(array(i) - array(reconstruction)).mean() for i in (image, anew))
    assert near < far / 3


def test_strength_one_visits_every_timestep(pipe: TextToImage) -> None:
    for strength, expected in ((1.0, 10), (0.5, 5), (0.04, 1)):
        seen: list[int] = []
        pipe(
            "two",
            steps=10,
            init_image=picture(),
            strength=strength,
            callback=lambda step, t, x, p, seen=seen: seen.append(int(t)),
        )
        assert len(seen) == expected and seen[-1] == 1


def test_an_input_of_another_size_or_mode_is_fitted(pipe: TextToImage) -> None:
    (wide,) = pipe("two", init_image=picture(64).resize((128, 64)), width=64, height=32, strength=0.5)
    assert wide.size == (64, 32)
    grey = picture().convert("L")
    (a,), (b,) = (pipe("two", init_image=i, strength=0.5) for i in (grey, grey.convert("RGBA")))
    assert a.tobytes() == b.tobytes()


def test_nothing_to_redraw_gives_the_reconstruction(pipe: TextToImage) -> None:
    (image,) = pipe("two", init_image=picture(), strength=0.7, mask=Image.new("L", (32, 32), 0))
    assert apart(image, decoded(pipe, encoded(pipe, picture()))) <= 1


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_the_black_part_of_the_mask_keeps_its_latents(
    pipe: TextToImage, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished: list[torch.Tensor] = []
    decode = LatentCodec.decode
    monkeypatch.setattr(LatentCodec, "decode", lambda codec, z, *rest: decode(codec, finished.append(z) or z, *rest))
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (16, 0, 32, 32))
    pipe("a red circle", init_image=picture(), strength=1.0, mask=mask, sampler=sampler)
    z, start = finished[0], encoded(pipe, picture())
    torch.testing.assert_close(z[..., :4], start[..., :4])
    assert (z[..., 4:] - start[..., 4:]).abs().mean() > 0.1


def test_a_mask_of_white_alone_changes_nothing(pipe: TextToImage) -> None:
    (masked,) = pipe("two", init_image=picture(), mask=Image.new("L", (32, 32), 255), seed=1)
    (plain,) = pipe("two", init_image=picture(), seed=1)
    assert apart(masked, plain) <= 1


# --- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 33}, "height is 33; it must be a positive multiple of 8 for this model"),
        ({"width": 20}, "width is 20; it must be a positive multiple of 8"),
        ({"height": 0}, "height is 0; it must be a positive multiple of 8"),
        ({"width": -8}, "width is -8; it must be a positive multiple of 8"),
        ({"steps": 0}, "steps is 0; this model accepts 1 to 1000"),
        ({"steps": 1001}, "steps is 1001; this model accepts 1 to 1000"),
        ({"sampler": "dimm"}, "sampler is 'dimm'; accepted: ddim, ddpm, euler, heun, dpmpp_2m"),
        ({"num_images": 0}, "num_images is 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be an integer of 64 bits"),
        ({"latents": torch.zeros(1, 4, 8, 4)}, r"latents has shape \[1, 4, 8, 4\]; this call needs \[1, 4, 8, 8\]"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"latents has shape \[2, 4, 8, 8\]; this call needs \[1, 4, 8, 8\]"),
        ({"init_image": picture(), "strength": 0.0}, r"strength is 0.0; it must lie in \(0, 1\]"),
        ({"init_image": picture(), "strength": 1.5}, "strength is 1.5"),
        ({"mask": picture()}, "mask needs init_image"),
    ],
)
def test_what_is_out_of_range_is_named(pipe: TextToImage, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe("two", **settings)


# --- the exported autoencoder


def test_diffusers_reads_centred_latents_of_unit_variance(tiny_model_folder: Path, tmp_path: Path) -> None:
    vae = read_vae(tiny_model_folder)
    images = torch.stack([to_tensor(ShapesDataset("train", 16, 32)[i]["image"]) for i in range(16)])
    with torch.no_grad():
        assert vae.quant_conv is not None and vae.quant_conv.bias is not None
        vae.quant_conv.bias[:4] += torch.tensor([3.0, -2.0, 0.5, 1.0])
        before = vae.decode(vae.encode(images).mode())
        statistics = LatentStatistics.of(vae.moments(images))
        fold_into_convolutions(vae, statistics.channel_mean)
    std = float(statistics.channel_std.square().mean().sqrt())
    vae.config = dataclasses.replace(vae.config, scaling_factor=1 / std)
    write_vae(vae, tmp_path / "export", "# Card\n", {})
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "export" / "vae")
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
        after = theirs.decode(posterior.mean).sample
    assert theirs.config.shift_factor is None
    assert posterior.mean.mean((0, 2, 3)).abs().max() < 1e-4
    z = (posterior.mean.square() + posterior.var).mean() * theirs.config.scaling_factor**2
    torch.testing.assert_close(float(z), 1.0, atol=1e-3, rtol=0)
    torch.testing.assert_close(after, before, atol=2e-4, rtol=1e-4)


def test_decoding_in_pieces(pipe: TextToImage) -> None:
    """Strips give the picture of a whole decode; tiles of 64 latent positions hold this one as a whole."""
    whole, strips, tiles = (
        pipe(PROMPTS[:2], steps=2, height=64, width=32, tiled=how)  # type: ignore[arg-type]
        for how in (None, "strips", "tiles")
    )
    for one, two, three in zip(whole, strips, tiles, strict=True):
        assert apart(one, two) <= 1 and one.tobytes() == three.tobytes()
    with pytest.raises(ValueError, match="tiled is 'rows'; it must be 'strips', 'tiles' or None"):
        pipe(PROMPTS[0], tiled="rows")  # type: ignore[arg-type]
