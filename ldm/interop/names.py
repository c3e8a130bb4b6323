"""Parameter names of the original Stable Diffusion files beside diffusers' names, as tables of prefix pairs.

A table maps prefixes of our names, which are diffusers', to prefixes of the original names. No prefix in it begins
another, so every name has one place at most, and the inverted table leads back. Tables are driven by a config: a
shallower or wider network has its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from autoencoder import AutoencoderConfig
from conditioning import ClipTextConfig
from ldm.networks.config import UNetConfig

Names = dict[str, str]
Value = TypeVar("Value")

UNET_ENDS: Names = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "class_embedding.weight": "label_emb.weight",
    "class_embedding.linear_1.": "label_emb.0.0.",
    "class_embedding.linear_2.": "label_emb.0.2.",
    "mid_block.attentions.0.": "middle_block.1.",
}
TEXT_TIME: Names = {"add_embedding.linear_1.": "label_emb.0.0.", "add_embedding.linear_2.": "label_emb.0.2."}
UNET_RESNET: Names = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
VAE_ENDS: Names = {
    "quant_conv.": "quant_conv.",
    "post_quant_conv.": "post_quant_conv.",
    **{f"{half}.{end}.": f"{half}.{end}." for half in ("encoder", "decoder") for end in ("conv_in", "conv_out")},
    **{f"{half}.conv_norm_out.": f"{half}.norm_out." for half in ("encoder", "decoder")},
}
VAE_RESNET: Names = {
    "norm1.": "norm1.",
    "conv1.": "conv1.",
    "norm2.": "norm2.",
    "conv2.": "conv2.",
    "conv_shortcut.": "nin_shortcut.",
}
VAE_ATTENTION: Names = {
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
}
CLIP: Names = {"text_model.": "text_model.", "text_projection.": "text_projection."}
OPEN_CLIP_ENDS: Names = {
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
    "text_projection.weight": "text_projection",
}
OPEN_CLIP_LAYER: Names = {
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "self_attn.out_proj.": "attn.out_proj.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
"""q, k and v are one fused matrix in the original, so they are not in this table."""


def unet_names(config: UNetConfig) -> Names:
    """The table of a U-Net. Raises ValueError where the original layout has no place for one of its parts."""
    if config.mid_block_type != "UNetMidBlock2DCrossAttn":
        raise ValueError(
            f"`mid_block_type` is {config.mid_block_type!r}; the original layout has UNetMidBlock2DCrossAttn only"
        )
    if any(level.biggan for level in config.levels()):
        raise ValueError(
            f"`down_block_types` is {list(config.down_block_types)} and `up_block_types` "
            f"{list(config.up_block_types)}; the original layout has no residual blocks that resample"
        )
    if config.addition_embed_type == "text":
        raise ValueError("`addition_embed_type` is 'text'; the original layout has no pooled context")
    table = UNET_ENDS | (TEXT_TIME if config.addition_embed_type else {})
    table |= _nested("mid_block.resnets.0.", "middle_block.0.", UNET_RESNET)
    table |= _nested("mid_block.resnets.1.", "middle_block.2.", UNET_RESNET)
    return table | _down_names(config) | _up_names(config)


def _down_names(config: UNetConfig) -> Names:
    table: Names = {}
    levels, block = config.down_levels(), 1
    for i, level in enumerate(levels):
        for j in range(level.layers):
            table |= _nested(f"down_blocks.{i}.resnets.{j}.", f"input_blocks.{block}.0.", UNET_RESNET)
            if level.depth:
                table[f"down_blocks.{i}.attentions.{j}."] = f"input_blocks.{block}.1."
            block += 1
        if i < len(levels) - 1:
            table[f"down_blocks.{i}.downsamplers.0.conv."] = f"input_blocks.{block}.0.op."
            block += 1
    return table


def _up_names(config: UNetConfig) -> Names:
    table: Names = {}
    levels, block = config.up_levels(), 0
    for i, level in enumerate(levels):
        for j in range(level.layers + 1):
            table |= _nested(f"up_blocks.{i}.resnets.{j}.", f"output_blocks.{block}.0.", UNET_RESNET)
            if level.depth:
                table[f"up_blocks.{i}.attentions.{j}."] = f"output_blocks.{block}.1."
            block += 1
        if i < len(levels) - 1:
            # it follows what the level's last block holds: a residual block, and a transformer where there is one
            table[f"up_blocks.{i}.upsamplers.0.conv."] = f"output_blocks.{block - 1}.{2 if level.depth else 1}.conv."
    return table


def vae_names(config: AutoencoderConfig) -> Names:
    """The table of an autoencoder, whose original decoder counts its levels from the finest."""
    table = dict(VAE_ENDS)
    last = len(config.block_out_channels) - 1
    for half in ("encoder", "decoder"):
        table |= _nested(f"{half}.mid_block.resnets.0.", f"{half}.mid.block_1.", VAE_RESNET)
        table |= _nested(f"{half}.mid_block.resnets.1.", f"{half}.mid.block_2.", VAE_RESNET)
        table |= _nested(f"{half}.mid_block.attentions.0.", f"{half}.mid.attn_1.", VAE_ATTENTION)
    for i in range(last + 1):
        table |= _vae_level(f"encoder.down_blocks.{i}.", f"encoder.down.{i}.", config.layers_per_block)
        table |= _vae_level(f"decoder.up_blocks.{i}.", f"decoder.up.{last - i}.", config.layers_per_block + 1)
    return table


def _vae_level(ours: str, theirs: str, layers: int) -> Names:
    table = {f"{ours}downsamplers.0.": f"{theirs}downsample.", f"{ours}upsamplers.0.": f"{theirs}upsample."}
    for j in range(layers):
        table |= _nested(f"{ours}resnets.{j}.", f"{theirs}block.{j}.", VAE_RESNET)
        table |= _nested(f"{ours}attentions.{j}.", f"{theirs}attn.{j}.", VAE_ATTENTION)
    return table


def open_clip_names(config: ClipTextConfig) -> Names:
    """The table of an OpenCLIP text tower, without the fused attention matrices."""
    table = dict(OPEN_CLIP_ENDS)
    for n in range(config.num_hidden_layers):
        table |= _nested(f"text_model.encoder.layers.{n}.", f"transformer.resblocks.{n}.", OPEN_CLIP_LAYER)
    return table


def inverted(names: Names) -> Names:
    """The table that leads back; of names that share a place, as a class and a size embedding do, the last one."""
    return {theirs: ours for ours, theirs in names.items()}


def renamed(state: Mapping[str, Value], names: Mapping[str, str]) -> dict[str, Value]:
    """The same values under the names that a table gives.

    Raises:
        ValueError: for a name without a place in the table.
    """
    return {names[prefix] + key.removeprefix(prefix): state[key] for key, prefix in _prefixes(state, names)}


def _prefixes(keys: Iterable[str], names: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    for key in keys:
        ends = [i + 1 for i, letter in enumerate(key) if letter == "."]
        found = next((key[:end] for end in [*ends, len(key)] if key[:end] in names), None)
        if found is None:
            raise ValueError(f"the key `{key}` has no place in this model")
        yield key, found


def _nested(ours: str, theirs: str, inner: Names) -> Names:
    return {ours + left: theirs + right for left, right in inner.items()}
