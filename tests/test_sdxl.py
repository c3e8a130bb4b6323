"""Models in SDXL's layout: two text encoders, pooled text and sizes; diffusers draws the same pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers

from conditioning import ClipTokenizer, DualTextEncoder
from ldm import TextToImage
from ldm.data.shapes import captions, scene
from ldm.pretrained import ModelError, read_model

PROMPTS = ["a red circle", "a small blue square above a large green star"]


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL with random weights, written by diffusers."""
    folder = tmp_path_factory.mktemp("sdxl")
    tokenizer = ClipTokenizer.train((c for i in range(100) for c in captions(scene(i, "train"))), 600, 24)
    tokenizer.save_pretrained(folder / "words")
    text = {"vocab_size": tokenizer.vocab_size, "intermediate_size": 64, "num_hidden_layers": 3, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id, "num_attention_heads": 4, "max_position_embeddings": 24}  # fmt: skip
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
        cross_attention_dim=72,
        norm_num_groups=8,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )
    with torch.no_grad():
        unet.conv_out.weight *= 3
        vae.decoder.conv_out.weight *= 8
    diffusers.StableDiffusionXLPipeline(
        vae,
        transformers.CLIPTextModel(transformers.CLIPTextConfig(**text, hidden_size=32)),
        transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(**text, hidden_size=40, projection_dim=20, hidden_act="gelu")
        ),
        transformers.CLIPTokenizer.from_pretrained(folder / "words"),
        transformers.CLIPTokenizer.from_pretrained(folder / "words"),
        unet,
        diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        add_watermarker=False,
    ).save_pretrained(folder / "model")
    return folder / "model"


def drawn_by_diffusers(
    folder: Path, sampler: str, noise: torch.Tensor, negative: str | None, size: tuple[int, int] = (32, 32)
) -> list[Any]:
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    if sampler == "euler":
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        pipe.scheduler.set_timesteps(6)
        # its state is x / alpha, which starts at noise · sqrt(1 + s²); the pipeline multiplies by init_noise_sigma
        noise = noise * float((1 + pipe.scheduler.sigmas[0] ** 2).sqrt() / pipe.scheduler.init_noise_sigma)
    out = pipe(
        PROMPTS,
        negative_prompt=None if negative is None else [negative] * 2,
        latents=noise,
        num_inference_steps=6,
        guidance_scale=4.0,
        height=size[0],
        width=size[1],
    )
    images: list[Any] = out.images
    return images


def apart(a: Any, b: Any) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


@pytest.mark.parametrize(
    ("sampler", "negative", "size"),
    [("ddim", None, (32, 32)), ("euler", None, (32, 32)), ("ddim", "a star", (32, 32)), ("euler", "", (32, 64))],
)
def test_diffusers_draws_the_same_pictures(
    sdxl_folder: Path, tmp_path: Path, sampler: str, negative: str | None, size: tuple[int, int]
) -> None:
    """From the folder that diffusers wrote, and from the one that we write of it."""
    pipe = TextToImage.from_pretrained(sdxl_folder)
    pipe.save_pretrained(tmp_path / "ours")
    noise = torch.randn(2, 4, size[0] // 4, size[1] // 4, generator=torch.Generator().manual_seed(5))
    ours = pipe(
        PROMPTS,
        negative_prompt=negative,
        latents=noise,
        steps=6,
        guidance_scale=4.0,
        sampler=sampler,
        height=size[0],
        width=size[1],
    )
    assert np.std(np.asarray(ours[0])) > 20
    for folder in (sdxl_folder, tmp_path / "ours"):
        theirs = drawn_by_diffusers(folder, sampler, noise, negative, size)
        assert max(apart(a, b) for a, b in zip(ours, theirs, strict=True)) <= 2


def test_pooled_text_sizes_and_null_matter(sdxl_folder: Path) -> None:
    pipe = TextToImage.from_pretrained(sdxl_folder)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    zero = pipe(PROMPTS, latents=noise, steps=4, guidance_scale=4.0)
    empty = pipe(PROMPTS, latents=noise, steps=4, guidance_scale=4.0, negative_prompt="")
    assert apart(zero[0], empty[0]) > 2
    kwargs = pipe.model.text_encoder.encode_text(PROMPTS[0])
    sizes = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
    with torch.no_grad():
        told = {"context": kwargs.context, "pooled": kwargs.pooled, "size_ids": sizes}
        plain, other_sizes, other_pooled = (
            pipe.model.unet(noise[:1], 500, **(told | change))
            for change in ({}, {"size_ids": 2 * sizes}, {"pooled": torch.zeros_like(kwargs.pooled)})
        )
    assert (plain - other_sizes).abs().max() > 1e-4 and (plain - other_pooled).abs().max() > 1e-4


def test_reading_and_writing_keeps_every_weight(sdxl_folder: Path, tmp_path: Path) -> None:
    pipe = TextToImage.from_pretrained(sdxl_folder)
    pipe.save_pretrained(tmp_path / "again")
    again = TextToImage.from_pretrained(tmp_path / "again")
    encoder = again.model.text_encoder
    assert isinstance(encoder, DualTextEncoder) and encoder.zero_null
    before, after = pipe.model.text_encoder.state_dict(), encoder.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline" and index["force_zeros_for_empty_prompt"] is True
    assert index["text_encoder_2"] == ["transformers", "CLIPTextModelWithProjection"]


def test_a_long_prompt_is_drawn_beside_a_short_one(sdxl_folder: Path) -> None:
    pipe = TextToImage.from_pretrained(sdxl_folder)
    texts = ["a red circle", "a red circle above a blue square " * 8]
    together = pipe(texts, seed=3, steps=3)
    alone = [pipe(text, seed=3 + i, steps=3)[0] for i, text in enumerate(texts)]
    assert [image.tobytes() for image in together] == [image.tobytes() for image in alone]


def test_a_missing_second_tokenizer_is_named(sdxl_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sdxl_folder, tmp_path / "broken"))
    shutil.rmtree(folder / "tokenizer_2")
    with pytest.raises(ModelError, match="broken/tokenizer_2"):
        read_model(folder)
