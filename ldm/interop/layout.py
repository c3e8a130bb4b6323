"""State dicts in diffusers' names <-> state dicts in the original Stable Diffusion names, part by part.

Every function takes the part's config and returns new dicts; tensors that need no other shape are the same objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoencoder import AutoencoderConfig
from conditioning import ClipTextConfig, canonical_state_dict
from ldm.interop.names import CLIP, inverted, open_clip_names, renamed, unet_names, vae_names
from ldm.networks.config import UNetConfig

State = Mapping[str, Tensor]
FUSED = ("q_proj", "k_proj", "v_proj")


def unet_to_original(state: State, config: UNetConfig) -> dict[str, Tensor]:
    """`input_blocks`, `middle_block`, `output_blocks` from diffusers' names."""
    return renamed(state, unet_names(config))


def unet_from_original(state: State, config: UNetConfig) -> dict[str, Tensor]:
    """The way back of `unet_to_original`."""
    return renamed(state, inverted(unet_names(config)))


def vae_to_original(state: State, config: AutoencoderConfig) -> dict[str, Tensor]:
    """`encoder.down.0.block.0` and so on; attention projections become 1x1 convolutions [C, C, 1, 1]."""
    moved = renamed(state, vae_names(config))
    return {key: value[:, :, None, None] if _projects(key, value, 2) else value for key, value in moved.items()}


def vae_from_original(state: State, config: AutoencoderConfig) -> dict[str, Tensor]:
    """The way back of `vae_to_original`."""
    flat = {key: value[:, :, 0, 0] if _projects(key, value, 4) else value for key, value in state.items()}
    return renamed(flat, inverted(vae_names(config)))


def _projects(original_key: str, value: Tensor, dims: int) -> bool:
    module = original_key.split(".")[-3:-1]
    return len(module) == 2 and module[1] in ("q", "k", "v", "proj_out") and value.ndim == dims


def clip_to_original(state: State, config: ClipTextConfig) -> dict[str, Tensor]:
    """CLIP towers have transformers' names in the original files too."""
    return renamed(canonical_state_dict(state), CLIP)


def clip_from_original(state: State, config: ClipTextConfig) -> dict[str, Tensor]:
    """The way back of `clip_to_original`; old files lack `text_model.` or carry the constant `position_ids`."""
    return renamed(canonical_state_dict(state), inverted(CLIP))


def open_clip_to_original(state: State, config: ClipTextConfig) -> dict[str, Tensor]:
    """An OpenCLIP tower: q, k, v of a layer fused into `in_proj_weight` [3D, D], the projection transposed."""
    rest = canonical_state_dict(state)
    fused: dict[str, Tensor] = {}
    for n in range(config.num_hidden_layers):
        for kind in ("weight", "bias"):
            keys = [f"text_model.encoder.layers.{n}.self_attn.{name}.{kind}" for name in FUSED]
            _require(rest, keys)
            fused[f"transformer.resblocks.{n}.attn.in_proj_{kind}"] = torch.cat([rest.pop(key) for key in keys])
    return fused | _transposed_projection(renamed(rest, open_clip_names(config)), "text_projection")


def open_clip_from_original(state: State, config: ClipTextConfig) -> dict[str, Tensor]:
    """The way back of `open_clip_to_original`.

    Layers beyond `config.num_hidden_layers` are left out: Stable Diffusion 2 reads the penultimate layer, and its
    files hold the last one too. With it goes the projection, which belongs to the whole tower.
    """
    whole = _layers(state) == config.num_hidden_layers
    dropped = ("logit_scale", "attn_mask", *(() if whole else ("text_projection",)))
    kept = {key: value for key, value in state.items() if key not in dropped and _layer(key) < config.num_hidden_layers}
    split: dict[str, Tensor] = {}
    for n in range(config.num_hidden_layers):
        for kind in ("weight", "bias"):
            fused = f"transformer.resblocks.{n}.attn.in_proj_{kind}"
            _require(kept, [fused])
            for name, value in zip(FUSED, kept.pop(fused).chunk(3), strict=True):
                split[f"text_model.encoder.layers.{n}.self_attn.{name}.{kind}"] = value.clone()
    named = renamed(kept, inverted(open_clip_names(config)))
    return split | _transposed_projection(named, "text_projection.weight")


def _layer(key: str) -> int:
    parts = key.split(".")
    return int(parts[2]) if parts[:2] == ["transformer", "resblocks"] and parts[2].isdigit() else -1


def _layers(state: State) -> int:
    return 1 + max(map(_layer, state), default=-1)


def _transposed_projection(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return state | {key: state[key].T.contiguous()} if key in state else state


def _require(state: State, keys: list[str]) -> None:
    for key in keys:
        if key not in state:
            raise ValueError(f"the key `{key}` is missing")


@dataclass(frozen=True)
class Place:
    """Where the original file keeps a part, and how its names are translated."""

    prefix: str
    to_original: Callable[[State, Any], dict[str, Tensor]]
    from_original: Callable[[State, Any], dict[str, Tensor]]


_UNET = Place("model.diffusion_model.", unet_to_original, unet_from_original)
_VAE = Place("first_stage_model.", vae_to_original, vae_from_original)

LAYOUTS: Mapping[str, Mapping[str, Place]] = {
    "sd1": {
        "unet": _UNET,
        "vae": _VAE,
        "text_encoder": Place("cond_stage_model.transformer.", clip_to_original, clip_from_original),
    },
    "sd2": {
        "unet": _UNET,
        "vae": _VAE,
        "text_encoder": Place("cond_stage_model.model.", open_clip_to_original, open_clip_from_original),
    },
    "sdxl": {
        "unet": _UNET,
        "vae": _VAE,
        "text_encoder": Place("conditioner.embedders.0.transformer.", clip_to_original, clip_from_original),
        "text_encoder_2": Place("conditioner.embedders.1.model.", open_clip_to_original, open_clip_from_original),
    },
}
"""The three original layouts: where each part lies and who translates it."""
