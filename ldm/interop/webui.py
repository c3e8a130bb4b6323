"""The `<name>.yaml` that AUTOMATIC1111 reads beside a single file whose architecture it would not guess."""

from __future__ import annotations

from typing import Any

from autoencoder import AutoencoderConfig
from ldm.networks.config import UNetConfig
from ldm.process import DiffusionConfig

DOWNSAMPLE_FACTOR, LATENT_CHANNELS = 8, 4
"""Fixed in AUTOMATIC1111, whatever the file says."""
BETA_SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear"}
"""Our names, which are diffusers', to those of the original code."""
TEXT_TOWERS: dict[str, dict[str, Any]] = {
    "sd1": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
    "sd2": {
        "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
        "params": {"freeze": True, "layer": "penultimate"},
    },
}


def webui_config(
    layout: str, unet: UNetConfig, vae: AutoencoderConfig, diffusion: DiffusionConfig, scale: float
) -> dict[str, Any]:
    """The configuration in the original code's terms, for the layouts "sd1" and "sd2".

    Raises:
        ValueError: the original code has no words for this model; the sentence says for what.
    """
    _require(layout in TEXT_TOWERS, "a file with two text encoders is read at SDXL's own architecture only")
    _require(
        vae.downsample_factor == DOWNSAMPLE_FACTOR, f"the autoencoder reduces by {vae.downsample_factor}, not by 8"
    )
    _require(vae.latent_channels == LATENT_CHANNELS, f"the latents have {vae.latent_channels} channels, not 4")
    _require(diffusion.prediction_type != "sample", "the U-Net predicts the sample, not the noise or v")
    _require(diffusion.beta_schedule in BETA_SCHEDULES, f"the noise schedule is {diffusion.beta_schedule}")
    inpaints = unet.in_channels == 2 * LATENT_CHANNELS + 1
    _require(inpaints or unet.in_channels == LATENT_CHANNELS, f"the U-Net takes {unet.in_channels} channels")
    params = {
        "linear_start": diffusion.beta_start,
        "linear_end": diffusion.beta_end,
        "beta_schedule": BETA_SCHEDULES[diffusion.beta_schedule],
        "timesteps": diffusion.num_train_timesteps,
        "num_timesteps_cond": 1,
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": unet.sample_size or 64,
        "channels": LATENT_CHANNELS,
        "cond_stage_trainable": False,
        "conditioning_key": "hybrid" if inpaints else "crossattn",
        "scale_factor": scale,
        "use_ema": False,
        "parameterization": "v" if diffusion.prediction_type == "v_prediction" else "eps",
        "unet_config": _unet(unet),
        "first_stage_config": _vae(vae),
        "cond_stage_config": TEXT_TOWERS[layout],
    }
    kind = "LatentInpaintDiffusion" if inpaints else "LatentDiffusion"
    return {"model": {"target": f"ldm.models.diffusion.ddpm.{kind}", "params": params}}


def _unet(unet: UNetConfig) -> dict[str, Any]:
    levels = unet.down_levels()
    first = unet.block_out_channels[0]
    attending = [i for i, level in enumerate(levels) if level.depth]
    depths = {level.depth for level in levels if level.depth} | {unet.mid_level().depth}
    contexts = {level.context_dim for level in unet.levels() if level.depth}
    _require(len(contexts) == 1, "its levels read text of several widths, or none of any")
    _require(all(width % first == 0 for width in unet.block_out_channels), "its widths are no multiples of the first")
    _require(len(depths) == 1 and depths != {0}, "its transformers are not equally deep at all levels")
    _require(
        [bool(u.depth) for u in unet.up_levels()][::-1] == [bool(d.depth) for d in levels], "its two halves differ"
    )
    _require(unet.class_embed_type is None and not unet.num_class_embeds, "it has a class embedding")
    _require(unet.norm_num_groups == 32 and unet.act_fn in ("silu", "swish"), "its normalisation or activation differs")
    return {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": {
            "image_size": 32,
            "in_channels": unet.in_channels,
            "out_channels": unet.out_channels,
            "model_channels": first,
            "attention_resolutions": [2**i for i in attending],
            "num_res_blocks": [level.layers for level in levels],
            "channel_mult": [width // first for width in unet.block_out_channels],
            **_heads(unet),
            "use_spatial_transformer": True,
            "use_linear_in_transformer": unet.use_linear_projection,
            "transformer_depth": depths.pop(),
            "context_dim": contexts.pop(),
            "use_scale_shift_norm": unet.resnet_time_scale_shift == "scale_shift",
            "use_checkpoint": False,
            "legacy": False,
        },
    }


def _heads(unet: UNetConfig) -> dict[str, int]:
    heads = {level.heads for level in unet.down_levels()}
    sizes = {level.channels // level.heads for level in unet.down_levels()}
    _require(1 in (len(heads), len(sizes)), "neither the number nor the size of its heads is the same at all levels")
    return {"num_heads": heads.pop()} if len(heads) == 1 else {"num_head_channels": sizes.pop()}


def _vae(vae: AutoencoderConfig) -> dict[str, Any]:
    first = vae.block_out_channels[0]
    _require(all(width % first == 0 for width in vae.block_out_channels), "the autoencoder's widths are no multiples")
    _require(
        vae.use_quant_conv and vae.use_post_quant_conv, "the autoencoder lacks the convolutions around the latents"
    )
    _require(vae.mid_block_add_attention, "the autoencoder's middle has no attention")
    _require(not any("Attn" in kind for kind in vae.down_block_types), "the autoencoder attends outside of its middle")
    return {
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {
            "embed_dim": vae.latent_channels,
            "ddconfig": {
                "double_z": True,
                "z_channels": vae.latent_channels,
                "resolution": vae.sample_size,
                "in_channels": vae.in_channels,
                "out_ch": vae.out_channels,
                "ch": first,
                "ch_mult": [width // first for width in vae.block_out_channels],
                "num_res_blocks": vae.layers_per_block,
                "attn_resolutions": [],
                "dropout": 0.0,
            },
            "lossconfig": {"target": "torch.nn.Identity"},
        },
    }


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(reason)
