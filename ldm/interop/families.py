"""The published architectures that other tools recognise, and how near a model is to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from autoencoder import AutoencoderConfig
from conditioning import ClipTextConfig
from ldm.interop.checkpoint import is_clip
from ldm.networks.config import UNetConfig
from ldm.process import DiffusionConfig

SD_VAE = AutoencoderConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512)
UPSCALER_VAE = AutoencoderConfig(block_out_channels=(128, 256, 512), layers_per_block=2, sample_size=512)
"""Of Stable Diffusion's upscaler: a quarter of the side."""
VIT_L = ClipTextConfig(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
)
VIT_H = ClipTextConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
)
VIT_BIG_G = ClipTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
)
SD1_UNET = UNetConfig(sample_size=64, cross_attention_dim=768)
SD2_UNET = UNetConfig(
    sample_size=64, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
)
SDXL_UNET = UNetConfig(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
UNETS: Mapping[str, UNetConfig] = {"sd1": SD1_UNET, "sd2": SD2_UNET, "sdxl": SDXL_UNET}
TOWERS: Mapping[str, Mapping[str, ClipTextConfig]] = {
    "sd1": {"text_encoder": VIT_L},
    "sd2": {"text_encoder": VIT_H},
    "sdxl": {"text_encoder": VIT_L, "text_encoder_2": VIT_BIG_G},
}
SCALES: Mapping[str, float] = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
"""What tools that read single files multiply each family's latents with, whatever the autoencoder's config says."""


def layout_of(texts: Mapping[str, Mapping[str, Any]]) -> str:
    """Which original layout keeps these text towers: two are SDXL's, OpenCLIP's has another activation than CLIP's."""
    if "text_encoder_2" in texts:
        return "sdxl"
    act = texts["text_encoder"].get("hidden_act", "quick_gelu")
    return "sd2" if act == "gelu" else "sd1"


def is_unet(unet: UNetConfig, layout: str) -> bool:
    """Whether this is the published U-Net of the layout, for any size of picture, also with inpainting's channels."""
    known = UNETS[layout]
    free = {name: getattr(known, name) for name in ("sample_size", "upcast_attention", "in_channels")}
    return replace(unet, **{**free, **_alike(unet, known)}) == known


def _alike(unet: UNetConfig, known: UNetConfig) -> dict[str, Any]:
    """The known spelling of per-level fields that say the same, such as 8 and (8, 8, 8, 8) heads."""
    names = ("layers_per_block", "cross_attention_dim", "transformer_layers_per_block", "attention_head_dim")
    same = unet.block_out_channels == known.block_out_channels and unet.down_levels() == known.down_levels()
    return {name: getattr(known, name) for name in names} if same else {}


def is_vae(vae: AutoencoderConfig, known: AutoencoderConfig = SD_VAE) -> bool:
    """Whether this is Stable Diffusion's autoencoder, or another known one, whatever its scale."""
    free = ("sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")
    return replace(vae, **{name: getattr(known, name) for name in free}) == known


def is_tower(config: Mapping[str, Any], known: ClipTextConfig) -> bool:
    """Whether a text config.json describes the known tower; ids and projection do not count."""
    if not is_clip(config):
        return False
    tower = ClipTextConfig.from_dict(config)
    free = ("projection_dim", "bos_token_id", "eos_token_id", "pad_token_id")
    return replace(tower, **{name: getattr(known, name) for name in free}) == known


def is_process(diffusion: DiffusionConfig) -> bool:
    """Whether this is Stable Diffusion's noise schedule, which tools that read single files take for granted."""
    known = DiffusionConfig()
    names = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "rescale_betas_zero_snr")
    return all(getattr(diffusion, name) == getattr(known, name) for name in names)
