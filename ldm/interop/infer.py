"""Configs from the shapes of an original-layout file, for the files of others, which carry none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoencoder import AutoencoderConfig
from ldm.networks.config import UNetConfig

Shapes = Mapping[str, tuple[int, ...]]

HEAD_SIZE = 64
"""Of every U-Net with linear projections and of every text tower; SD 1.x has eight heads whatever the width."""
SAMPLE_SIZES = {"sd1": 64, "sd2": 64, "sdxl": 128}
SCALING_FACTORS = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
TIME_IDS, SIZE_NUMBERS = 256, 6
"""SDXL is told six numbers of sizes; the published one embeds each in 256."""


def infer_unet_config(shapes: Shapes, layout: str) -> UNetConfig:
    """The U-Net of `input_blocks`, `middle_block`, `output_blocks`; what shapes do not tell is its family's.

    Raises:
        ValueError: the blocks are not a U-Net of the Stable Diffusion family.
    """
    levels = _unet_levels(shapes)
    widths = [level[0][0] for level in levels]
    depths = [max(depth for _, depth in level) for level in levels]
    context = _context(shapes)
    linear = len(shapes[f"{_first_transformer(shapes)}proj_in.weight"]) == 2
    extra: dict[str, Any] = {}
    if "label_emb.0.0.weight" in shapes:
        width = shapes["label_emb.0.0.weight"][1]
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": TIME_IDS,
            "projection_class_embeddings_input_dim": width,
        }
    return UNetConfig(
        sample_size=SAMPLE_SIZES[layout],
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        block_out_channels=tuple(widths),
        layers_per_block=_one_or_all([len(level) for level in levels]),
        down_block_types=tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths),
        up_block_types=tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)),
        transformer_layers_per_block=_one_or_all([depth or 1 for depth in depths]),
        cross_attention_dim=context,
        attention_head_dim=_one_or_all([width // HEAD_SIZE for width in widths]) if linear else 8,
        use_linear_projection=linear,
        **extra,
    )


def _unet_levels(shapes: Shapes) -> list[list[tuple[int, int]]]:
    """(channels, transformer depth) of every residual block of the contracting path, level by level."""
    levels: list[list[tuple[int, int]]] = [[]]
    block = 1
    while True:
        if f"input_blocks.{block}.0.op.weight" in shapes:
            levels.append([])
        elif f"input_blocks.{block}.0.in_layers.2.weight" in shapes:
            levels[-1].append(
                (shapes[f"input_blocks.{block}.0.in_layers.2.weight"][0], _depth(shapes, f"input_blocks.{block}.1."))
            )
        else:
            break
        block += 1
    if not all(levels):
        raise ValueError("its input_blocks are not those of a Stable Diffusion U-Net")
    return levels


def _depth(shapes: Shapes, prefix: str) -> int:
    depth = 0
    while f"{prefix}transformer_blocks.{depth}.attn1.to_q.weight" in shapes:
        depth += 1
    return depth


def _first_transformer(shapes: Shapes) -> str:
    found = min((key for key in shapes if key.endswith(".1.proj_in.weight")), default=None)
    if found is None:
        raise ValueError("its U-Net has no transformer, so no text could guide it")
    return found.removesuffix("proj_in.weight")


def _context(shapes: Shapes) -> int:
    return shapes[f"{_first_transformer(shapes)}transformer_blocks.0.attn2.to_k.weight"][1]


def _one_or_all(values: list[int]) -> int | tuple[int, ...]:
    return values[0] if len(set(values)) == 1 else tuple(values)


def infer_vae_config(shapes: Shapes, layout: str) -> AutoencoderConfig:
    """The autoencoder of `encoder.down` and `decoder.up`, with the scale that its family has."""
    widths: list[int] = []
    attends: list[bool] = []
    while (key := f"encoder.down.{len(widths)}.block.0.conv1.weight") in shapes:
        attends.append(f"encoder.down.{len(widths)}.attn.0.q.weight" in shapes)
        widths.append(shapes[key][0])
    if not widths:
        raise ValueError("its encoder has no levels")
    layers = 0
    while f"encoder.down.0.block.{layers}.conv1.weight" in shapes:
        layers += 1
    return AutoencoderConfig(
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        down_block_types=tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends),
        up_block_types=tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)),
        latent_channels=shapes["decoder.conv_in.weight"][1],
        mid_block_add_attention="encoder.mid.attn_1.q.weight" in shapes,
        use_quant_conv="quant_conv.weight" in shapes,
        use_post_quant_conv="post_quant_conv.weight" in shapes,
        sample_size=8 * SAMPLE_SIZES[layout],
        scaling_factor=SCALING_FACTORS[layout],
    )


def time_ids_width(unet: UNetConfig, pooled: int) -> int | None:
    """Width of the embedding of each of SDXL's six size numbers: what the pooled text leaves of the added input.

    None for a U-Net without that input.

    Raises:
        ValueError: the rest is not six equal parts.
    """
    width = unet.projection_class_embeddings_input_dim
    if width is None:
        return None
    each, over = divmod(width - pooled, SIZE_NUMBERS)
    if each < 1 or over:
        raise ValueError(
            f"`label_emb.0.0.weight` takes {width} numbers, which are not the {pooled} of the pooled text and "
            f"{SIZE_NUMBERS} equal parts"
        )
    return each


def infer_clip_config(shapes: Shapes) -> dict[str, Any]:
    """config.json of a CLIP text tower under its original names, which are transformers'."""
    stem = "" if "embeddings.token_embedding.weight" in shapes else "text_model."
    fc1 = f"{stem}encoder.layers.{{}}.mlp.fc1.weight"
    layers = 0
    while fc1.format(layers) in shapes:
        layers += 1
    words, positions = (shapes[f"{stem}embeddings.{name}_embedding.weight"] for name in ("token", "position"))
    projection = shapes.get("text_projection.weight")
    return _text_config(words, positions, layers, shapes[fc1.format(0)][0], "quick_gelu", projection)


def infer_open_clip_config(shapes: Shapes) -> dict[str, Any]:
    """config.json of an OpenCLIP tower as transformers' class; a whole tower of SD 2.x loses its last layer."""
    layers = 0
    while f"transformer.resblocks.{layers}.mlp.c_fc.weight" in shapes:
        layers += 1
    words, positions = shapes["token_embedding.weight"], shapes["positional_embedding"]
    hidden = shapes["transformer.resblocks.0.mlp.c_fc.weight"][0]
    return _text_config(words, positions, layers, hidden, "gelu", shapes.get("text_projection"))


def penultimate(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a tower that is read at its last layer but one: without that layer and without projection."""
    return {
        **config,
        "architectures": ["CLIPTextModel"],
        "num_hidden_layers": config["num_hidden_layers"] - 1,
        "projection_dim": config["hidden_size"] // 2,
    }


def _text_config(
    words: tuple[int, ...],
    positions: tuple[int, ...],
    layers: int,
    intermediate: int,
    act: str,
    projection: tuple[int, ...] | None,
) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel" if projection is None else "CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": words[0],
        "hidden_size": words[1],
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, words[1] // HEAD_SIZE),
        "max_position_embeddings": positions[0],
        "hidden_act": act,
        "layer_norm_eps": 1e-5,
        "projection_dim": words[1] if projection is None else projection[0 if act == "quick_gelu" else 1],
        "bos_token_id": words[0] - 2,
        "eos_token_id": words[0] - 1,
        "pad_token_id": 1,
    }
