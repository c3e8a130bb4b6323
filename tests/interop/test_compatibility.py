"""What `ldm-convert --check` predicts, for diffusers against what happens when it opens the folder and draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from autoencoder import AutoencoderConfig
from conditioning import ClipTokenizer
from ldm.cli.convert import describe, report
from ldm.interop.checkpoint import Checkpoint, read_folder, write_folder
from ldm.interop.clip_vocabulary import clip_tokenizer_files, is_clip_tokenizer
from ldm.interop.compatibility import Description, verdicts
from ldm.interop.families import SD1_UNET, SD2_UNET, SD_VAE, SDXL_UNET, VIT_BIG_G, VIT_H, VIT_L
from ldm.interop.networks import build_tokenizer
from ldm.networks import UNetConfig
from ldm.process import DiffusionConfig

Sibling = Callable[..., Checkpoint]


def model(
    unet: UNetConfig = SD1_UNET,
    vae: AutoencoderConfig = SD_VAE,
    texts: dict[str, Any] | None = None,
    diffusion: DiffusionConfig = DiffusionConfig(),
    pipeline: str = "StableDiffusionPipeline",
    clip_vocabulary: bool = True,
) -> Description:
    texts = texts or {"text_encoder": VIT_L.to_dict()}
    return Description("folder", pipeline, unet, vae, texts, diffusion, clip_vocabulary)


def levels(*widths: int, **changes: Any) -> UNetConfig:
    """SD 1's U-Net at other widths, attending at every level."""
    n = len(widths)
    kinds = {"down_block_types": ("CrossAttnDownBlock2D",) * n, "up_block_types": ("CrossAttnUpBlock2D",) * n}
    return replace(SD1_UNET, block_out_channels=widths, **{**kinds, **changes})


V = DiffusionConfig(prediction_type="v_prediction", timestep_spacing="trailing")
H = {"text_encoder": VIT_H.to_dict()}
XL = {"text_encoder": VIT_L.to_dict(), "text_encoder_2": VIT_BIG_G.to_dict()}
XL_PIPELINE = "StableDiffusionXLPipeline"
SMALL_TOWER = {"text_encoder": replace(VIT_L, hidden_size=128, num_attention_heads=2).to_dict()}
SD2_SHORT = replace(
    SD2_UNET,
    block_out_channels=(320, 640, 1280),
    attention_head_dim=(5, 10, 20),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
)
F4 = replace(SD_VAE, block_out_channels=(128, 256, 512), down_block_types=(), up_block_types=())
ARCHITECTURES: dict[str, tuple[Description, str]] = {
    "SD 1.5": (model(), "yes yes yes yes"),
    "SD 1.5, v": (model(diffusion=V), "yes yes yes yes"),
    "SD 1.5, cosine": (model(diffusion=DiffusionConfig(beta_schedule="squaredcos_cap_v2")), "yes no no yes"),
    "SD 1.5, zero SNR": (model(diffusion=replace(V, rescale_betas_zero_snr=True)), "yes no no yes"),
    "SD 1.5, sample": (model(diffusion=DiffusionConfig(prediction_type="sample")), "yes no no no"),
    "SD 1.5 inpainting": (
        model(replace(SD1_UNET, in_channels=9), pipeline="StableDiffusionInpaintPipeline"),
        "yes yes yes yes",
    ),
    "320 x 1-1, one block": (model(levels(320, 320, layers_per_block=1)), "yes yes yes yes"),
    "320 x 1-2, one block": (model(levels(320, 640, layers_per_block=1)), "yes yes yes yes"),
    "320 x 1-1.5": (model(levels(320, 480)), "yes no no yes"),
    "widths from 128": (model(levels(128, 256)), "yes no yes yes"),
    "widths from 192": (model(levels(192, 384)), "yes no yes yes"),
    "four heads": (model(replace(SD1_UNET, attention_head_dim=4)), "yes no yes yes"),
    "linear projections": (model(replace(SD1_UNET, use_linear_projection=True)), "yes no yes yes"),
    "no attention in the middle": (model(replace(SD1_UNET, mid_block_type="UNetMidBlock2D")), "yes no no yes"),
    "transformer in the middle alone": (
        model(levels(320, 640, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)),
        "yes no yes yes",
    ),
    "text of two widths": (model(replace(SD1_UNET, cross_attention_dim=(768, 768, 512, 768))), "no no no no"),
    "class labels": (model(replace(SD1_UNET, num_class_embeds=10)), "no no no no"),
    "other context": (model(replace(SD1_UNET, cross_attention_dim=1024)), "no no yes no"),
    "T5 of width 512": (
        model(replace(SD1_UNET, cross_attention_dim=512), texts={"text_encoder": {"model_type": "t5", "d_model": 512}}),
        "yes no no no",
    ),
    "own text tower": (
        model(levels(320, 640, cross_attention_dim=128), texts=SMALL_TOWER, clip_vocabulary=False),
        "yes no no no",
    ),
    "own vocabulary": (model(clip_vocabulary=False), "yes no no yes"),
    "f4 autoencoder": (model(vae=F4), "yes yes no yes"),
    "narrow f4 autoencoder": (model(vae=replace(F4, block_out_channels=(64, 128, 256))), "yes no no yes"),
    "f16 autoencoder": (
        model(vae=replace(F4, block_out_channels=(128, 256, 512, 512, 512), down_block_types=(), up_block_types=())),
        "yes no no yes",
    ),
    "no 1x1 convolutions, the family's scale": (
        model(vae=replace(SD_VAE, use_quant_conv=False, use_post_quant_conv=False)),
        "yes yes no yes",
    ),
    "one 1x1 convolution": (model(vae=replace(SD_VAE, use_quant_conv=False)), "yes no no yes"),
    "8 latent channels": (
        model(replace(SD1_UNET, in_channels=8, out_channels=8), replace(SD_VAE, latent_channels=8)),
        "yes no no no",
    ),
    "8 latent channels, U-Net of 4": (model(vae=replace(SD_VAE, latent_channels=8)), "no no no no"),
    "no 1x1 convolutions": (
        model(vae=replace(SD_VAE, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.5)),
        "yes no no yes",
    ),
    "measured scale": (model(vae=replace(SD_VAE, scaling_factor=0.9, shift_factor=0.1)), "yes yes yes yes"),
    "SD 2.1": (model(SD2_UNET, texts=H, diffusion=V), "yes yes yes yes"),
    "SD 2 of three levels": (model(SD2_SHORT, texts=H), "yes yes yes yes"),
    "SDXL": (model(SDXL_UNET, texts=XL, pipeline=XL_PIPELINE), "yes yes yes yes"),
    "SDXL, v": (model(SDXL_UNET, texts=XL, diffusion=V, pipeline=XL_PIPELINE), "yes yes no yes"),
    "SDXL, distilled": (
        model(replace(SDXL_UNET, transformer_layers_per_block=(1, 2, 4)), texts=XL, pipeline=XL_PIPELINE),
        "yes yes no yes",
    ),
    "SDXL, shallow": (
        model(replace(SDXL_UNET, transformer_layers_per_block=(1, 1, 1)), texts=XL, pipeline=XL_PIPELINE),
        "yes no no yes",
    ),
    "SDXL, distilled to one block": (
        model(replace(SDXL_UNET, layers_per_block=1, transformer_layers_per_block=(1, 2, 6)), texts=XL, pipeline=XL_PIPELINE),
        "yes yes no yes",
    ),
    "SDXL, other multiples of 320": (
        model(replace(SDXL_UNET, block_out_channels=(320, 320, 640), attention_head_dim=(5, 5, 10)), texts=XL, pipeline=XL_PIPELINE),
        "yes yes no yes",
    ),
    "SDXL, eight heads": (model(replace(SDXL_UNET, attention_head_dim=8), texts=XL, pipeline=XL_PIPELINE), "yes no no yes"),
    "SDXL, 8 channels": (model(replace(SDXL_UNET, in_channels=8), texts=XL, pipeline=XL_PIPELINE), "no no no no"),
    "SDXL, size numbers of 128": (
        model(
            replace(SDXL_UNET, addition_time_embed_dim=128, projection_class_embeddings_input_dim=1280 + 6 * 128),
            texts=XL,
            pipeline=XL_PIPELINE,
        ),
        "yes no no yes",
    ),
    "SDXL, v and zero SNR": (
        model(SDXL_UNET, texts=XL, diffusion=replace(V, rescale_betas_zero_snr=True), pipeline=XL_PIPELINE),
        "yes yes no yes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_four_tools_on_an_architecture(name: str) -> None:
    described, expected = ARCHITECTURES[name]
    found = verdicts(described)
    assert [verdict.tool for verdict in found] == ["diffusers", "ComfyUI", "AUTOMATIC1111", "InvokeAI"]
    assert " ".join("yes" if verdict.opens else "no" for verdict in found) == expected, found


def test_a_damaged_model_opens_nowhere_and_every_line_says_why() -> None:
    found = verdicts(replace(model(), damage="the file is torn"))
    assert all(verdict.reasons[0] == "the file is torn" for verdict in found)


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        (model(diffusion=V), "set v_prediction"),
        (model(SD2_UNET, texts=H, diffusion=V), "it guesses v-prediction"),
        (model(SD2_SHORT, texts=H, diffusion=V), "set v_prediction"),
        (model(replace(SD2_UNET, in_channels=9), texts=H, diffusion=V), "set v_prediction"),
        (model(SD2_SHORT, texts=H), None),
        (model(SDXL_UNET, texts=XL, diffusion=V), None),
        (model(vae=F4), "its node EmptyLatentImage gives pictures of half the side"),
    ],
)
def test_what_to_know_of_a_model_that_comfyui_opens(described: Description, expected: str | None) -> None:
    notes = verdicts(described)[1].notes
    assert notes == () if expected is None else notes[0].startswith(expected) and len(notes) == 1


def test_a_reason_names_what_is_found_and_what_is_wanted() -> None:
    comfy = verdicts(model(levels(192, 384)))[1]
    assert "the U-Net's first width is 192, not 320" in comfy.reasons


# --- diffusers, by really opening


@pytest.mark.parametrize(
    ("family", "unet", "vae", "opens"),
    [
        ("sd1", {}, {}, True),
        ("sd2", {}, {}, True),
        ("sdxl", {}, {}, True),
        ("sd1", {"layers_per_block": 1}, {}, True),
        ("sd1", {"layers_per_block": (1, 2, 1)}, {}, True),
        ("sd1", {"mid_block_type": "UNetMidBlock2D"}, {}, True),
        ("sd1", {"mid_block_type": None}, {}, True),
        ("sd1", {"resnet_time_scale_shift": "scale_shift"}, {}, True),
        ("sd1", {"attention_head_dim": (1, 2, 2)}, {}, True),
        ("sd1", {"addition_embed_type": "text", "addition_embed_type_num_heads": 4}, {}, True),
        ("sd1", {"in_channels": 9}, {}, True),
        ("sd1", {"in_channels": 8, "out_channels": 8}, {"latent_channels": 8}, True),
        ("sd1", {}, {"use_quant_conv": False, "use_post_quant_conv": False}, True),
        ("sd1", {}, {"block_out_channels": (32, 32)}, True),
        ("sd1", {}, {"latent_channels": 8}, False),
        ("sd1", {"in_channels": 8}, {}, False),
        ("sd1", {"out_channels": 8}, {}, False),
        ("sd1", {"cross_attention_dim": 32}, {}, False),
        ("sd1", {"num_class_embeds": 5}, {}, False),
        ("sd1", {"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                 "projection_class_embeddings_input_dim": 112}, {}, False),
        ("sdxl", {"cross_attention_dim": 64}, {}, False),
        ("sdxl", {"addition_embed_type": None}, {}, False),
    ],
)  # fmt: skip
def test_the_prediction_for_diffusers_is_what_happens(
    sibling: Sibling, family: str, unet: dict[str, Any], vae: dict[str, Any], opens: bool, tmp_path: Path
) -> None:
    write_folder(sibling(family, unet=unet, vae=vae), tmp_path / "model")
    verdict = verdicts(describe(read_folder(tmp_path / "model"), tmp_path / "model"))[0]
    assert verdict.opens is opens, verdict.reasons
    assert really_draws(tmp_path / "model") is opens


def really_draws(folder: Path) -> bool:
    """Whether diffusers opens a folder and draws one step."""
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        side = pipe.vae_scale_factor * 8
        given = {"prompt": "a red circle", "num_inference_steps": 1, "height": side, "width": side}
        if "Inpaint" in type(pipe).__name__:
            picture = Image.new("RGB", (side, side))
            given |= {"image": picture, "mask_image": picture.convert("L"), "strength": 1.0}
        with torch.no_grad():
            pipe(**given)
    except (ValueError, RuntimeError, TypeError, OSError, AttributeError):
        return False
    return True


def test_weights_that_do_not_fit_are_seen_by_both(sibling: Sibling, tmp_path: Path) -> None:
    checkpoint = sibling("sd1")
    unet = checkpoint.parts["unet"]
    torn = replace(unet, state={**unet.state, "conv_out.weight": torch.zeros(4, 16, 3, 3)})
    write_folder(replace(checkpoint, parts={**checkpoint.parts, "unet": torn}), tmp_path / "model")
    said = report(str(tmp_path / "model"))
    assert said.count("`conv_out.weight` has shape [4, 16, 3, 3]; the config asks for [4, 32, 3, 3]") == 4
    assert [line.split()[1] for line in said.splitlines()] == ["no"] * 4
    assert not really_draws(tmp_path / "model")


# --- CLIP's vocabulary


def test_clips_own_vocabulary_is_at_hand_and_recognised() -> None:
    pytest.importorskip("open_clip")
    for pad, wanted in (("<|endoftext|>", 49407), ("!", 0)):
        tokenizer = build_tokenizer(clip_tokenizer_files(pad), Path("memory"))
        assert is_clip_tokenizer(tokenizer) and tokenizer.pad_token_id == wanted


def test_another_vocabulary_is_not_taken_for_clips(vocabulary: dict[str, str]) -> None:
    assert not is_clip_tokenizer(build_tokenizer(vocabulary, Path("memory")))
    assert not is_clip_tokenizer(ClipTokenizer.train(["a photo of a cat"], 514))
