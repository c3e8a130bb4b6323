"""The U-Net of latent diffusion (Rombach et al. 2022) with diffusers' parameter names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .attention import JointAttention, Transformer2DModel
from .blocks import DownBlock2D, MidBlock2D, ResnetBlock2D, Stage, UpBlock2D
from .config import UNetConfig
from .embeddings import (
    ACTIVATIONS,
    AttentionPooling,
    TextEmbedding,
    TextTimeEmbedding,
    TimestepEmbedding,
    sinusoidal_embedding,
)

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


class UNet(nn.Module):
    """Predicts from a noisy latent, a timestep and a condition; what it predicts is the objective's choice.

    Parameter names are those of diffusers' UNet2DConditionModel, so state dicts load strictly both ways.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.activation = ACTIVATIONS[config.act_fn]
        self.waves = _waves(config, config.block_out_channels[0])
        first = config.block_out_channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.time_embedding = TimestepEmbedding(
            first, config.time_embed_dim, self.activation, config.time_cond_proj_dim
        )
        self.class_embedding = _class_embedding(config)
        self.add_embedding = _add_embedding(config)
        self.down_blocks = _down_blocks(config)
        self.mid_block = None if config.mid_block_type is None else MidBlock2D(config, config.mid_level())
        self.up_blocks = _up_blocks(config)
        self.attends = any(level.depth > 0 for level in config.levels())
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, first, config.norm_eps)
        self.conv_out = nn.Conv2d(first, config.out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        context: Tensor | None = None,
        *,
        context_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        size_ids: Tensor | None = None,
        class_labels: Tensor | None = None,
        time_cond: Tensor | None = None,
        residuals: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Runs the network.

        Args:
            x: noisy latents [B, in_channels, H, W].
            t: timesteps [B], or one number for all rows.
            context: text features [B, L, cross_attention_dim]; required where any level attends or it is pooled.
            context_mask: [B, L] bool, True for the tokens to attend to, at least one a row.
            pooled: [B, P] text vector of `addition_embed_type` "text_time" (SDXL); others do not read it.
            size_ids: [B, 6] original size, crop and target size of "text_time".
            class_labels: [B] int labels, or the features [B, ...] that `class_embed_type` asks for.
            time_cond: [B, time_cond_proj_dim] features that join the timestep's, such as a guidance scale's.
            residuals: one tensor to add to every skip connection, finest first, then one for the middle
                block's output (Zhang et al. 2023, ControlNet).

        Returns:
            [B, out_channels, H, W].

        Raises:
            ValueError: when a condition is missing, the network has no place for it or the mask is not bool.
        """
        self._check_conditions(context, pooled, size_ids, class_labels, time_cond)
        mask = _attention_mask(context_mask)
        emb = self._embed(x, t, context, mask, pooled, size_ids, class_labels, time_cond)
        x = self.conv_in(2 * x - 1 if self.config.center_input_sample else x)
        skips = [x]
        for down in self.down_blocks:
            x, new = down(x, emb, context, mask)
            skips += new
        if self.mid_block is not None:
            x = self.mid_block(x, emb, context, mask)
        if residuals is not None:
            x, skips = _add_residuals(x, skips, residuals)
        for up in self.up_blocks:
            x = up(x, skips, emb, context, mask)
        x = self.conv_out(self.activation(self.conv_norm_out(x)))
        return x

    @classmethod
    def from_scratch(cls, config: UNetConfig, generator: torch.Generator) -> UNet:
        """A network to train, on the generator's device, a function of the generator alone.

        Weights and biases are uniform in ±1/sqrt(fan_in), class embeddings standard normal. The last layer of
        every resnet, of all attention and of the network is zero (Dhariwal & Nichol 2021), so that blocks
        start as the identity and the first prediction is zero.
        """
        with torch.device("meta"):
            unet = cls(config)
        unet.to_empty(device=generator.device)
        with torch.no_grad():
            for module in unet.modules():
                initialise(module, generator)
            for module in unet.modules():
                _zero_last_layer(module)
        return unet

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> UNet:
        """Reads a diffusers `unet/` folder strictly: config.json and diffusion_pytorch_model.safetensors.

        Raises:
            FileNotFoundError: when one of the files is missing.
            ValueError: one sentence naming the file and the key that is unknown, missing or of another shape.
        """
        config = _read_config(Path(folder) / CONFIG_NAME)
        weights = Path(folder) / WEIGHTS_NAME
        state = _read_weights(weights)
        with torch.device("meta"):
            unet = cls(config)
        _check_state(weights, state, unet.state_dict())
        unet.load_state_dict(state, strict=True, assign=True)
        return unet.to(dtype)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes a `unet/` folder that diffusers reads; each file is complete or absent."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        state = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        partial = path / f"{WEIGHTS_NAME}.partial"
        safetensors.torch.save_file(state, partial, metadata={"format": "pt"})
        _publish(partial, path / WEIGHTS_NAME)
        partial = path / f"{CONFIG_NAME}.partial"
        partial.write_text(json.dumps(self.config.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _publish(partial, path / CONFIG_NAME)

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Trades a second forward pass for the memory of the activations inside each layer."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.gradient_checkpointing = enabled

    def _embed(
        self,
        x: Tensor,
        t: Tensor | float,
        context: Tensor | None,
        mask: Tensor | None,
        pooled: Tensor | None,
        size_ids: Tensor | None,
        class_labels: Tensor | None,
        time_cond: Tensor | None,
    ) -> Tensor:
        times = torch.as_tensor(t, device=x.device).expand(len(x))
        emb: Tensor = self.time_embedding(self.waves(times).to(x.dtype), time_cond)
        if self.class_embedding is not None and class_labels is not None:
            by_time = self.config.class_embed_type == "timestep"
            emb = emb + self.class_embedding(self.waves(class_labels).to(x.dtype) if by_time else class_labels)
        match self.add_embedding:
            case TextEmbedding() as pool if context is not None:
                emb = emb + pool(context, mask)
            case TextTimeEmbedding() as project if pooled is not None and size_ids is not None:
                emb = emb + project(pooled.to(x.dtype), size_ids)
        return self.activation(emb)

    def _check_conditions(
        self,
        context: Tensor | None,
        pooled: Tensor | None,
        size_ids: Tensor | None,
        class_labels: Tensor | None,
        time_cond: Tensor | None,
    ) -> None:
        text_time = isinstance(self.add_embedding, TextTimeEmbedding)
        _require_given("context", context, self.attends or isinstance(self.add_embedding, TextEmbedding))
        _require_given("pooled", pooled, text_time)
        _require_given("size_ids", size_ids, text_time)
        _require_given("class_labels", class_labels, self.class_embedding is not None)
        _refuse_given("size_ids", size_ids, text_time)
        _refuse_given("class_labels", class_labels, self.class_embedding is not None)
        _refuse_given("time_cond", time_cond, self.time_embedding.cond_proj is not None)


def _require_given(name: str, value: Tensor | None, needed: bool) -> None:
    if needed and value is None:
        raise ValueError(f"`{name}` is None; this U-Net's config needs a tensor")


def _refuse_given(name: str, value: Tensor | None, accepted: bool) -> None:
    if value is not None and not accepted:
        raise ValueError(f"`{name}` is a tensor of shape {list(value.shape)}; this U-Net's config accepts None only")


def _attention_mask(context_mask: Tensor | None) -> Tensor | None:
    if context_mask is None:
        return None
    if context_mask.dtype != torch.bool:
        raise ValueError(f"`context_mask` has dtype {context_mask.dtype}; it must be torch.bool, True to attend")
    return context_mask[:, None, None, :]


def _class_embedding(config: UNetConfig) -> nn.Module | None:
    first, width, features = config.block_out_channels[0], config.time_embed_dim, _projected(config)
    match config.class_embed_type:
        case None:
            return nn.Embedding(config.num_class_embeds, width) if config.num_class_embeds else None
        case "timestep":
            return TimestepEmbedding(first, width, ACTIVATIONS[config.act_fn])
        case "identity":
            return nn.Identity()
        case "projection":
            return TimestepEmbedding(features, width)
        case "simple_projection":
            return nn.Linear(features, width)


def _add_embedding(config: UNetConfig) -> TextEmbedding | TextTimeEmbedding | None:
    match config.addition_embed_type:
        case None:
            return None
        case "text":
            width, heads = config.down_levels()[0].context_dim, config.addition_embed_type_num_heads
            return TextEmbedding(width, config.time_embed_dim, heads)
        case "text_time":
            waves = _waves(config, config.addition_time_embed_dim or 0)
            return TextTimeEmbedding(_projected(config), config.time_embed_dim, waves)


def _projected(config: UNetConfig) -> int:
    return config.projection_class_embeddings_input_dim or 0


def _waves(config: UNetConfig, dim: int) -> Callable[[Tensor], Tensor]:
    return partial(sinusoidal_embedding, dim=dim, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift)


def _down_blocks(config: UNetConfig) -> nn.ModuleList:
    levels = config.down_levels()
    inputs = [config.block_out_channels[0], *config.block_out_channels]
    last = len(levels) - 1
    return nn.ModuleList(DownBlock2D(config, level, inputs[i], downsample=i < last) for i, level in enumerate(levels))


def _up_blocks(config: UNetConfig) -> nn.ModuleList:
    levels = config.up_levels()
    widths = [level.channels for level in levels]
    below, finer = [widths[0], *widths], [*widths[1:], widths[-1]]
    last = len(levels) - 1
    return nn.ModuleList(
        UpBlock2D(config, level, below[i], finer[i], upsample=i < last) for i, level in enumerate(levels)
    )


def _add_residuals(x: Tensor, skips: list[Tensor], residuals: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    if len(residuals) != len(skips) + 1:
        raise ValueError(
            f"`residuals` has {len(residuals)} tensors; this U-Net takes {len(skips) + 1}, "
            f"one for each of {len(skips)} skip connections and one for the middle block"
        )
    *on_skips, on_mid = residuals
    return x + on_mid, [skip + extra for skip, extra in zip(skips, on_skips, strict=True)]


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draws the parameters of one layer: uniform in ±1/sqrt(fan_in), embeddings standard normal, norms the identity."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        bound = module.weight[0].numel() ** -0.5
        for parameter in module.parameters(recurse=False):
            parameter.uniform_(-bound, bound, generator=generator)
    elif isinstance(module, nn.Embedding):
        module.weight.normal_(generator=generator)
    elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
        module.reset_parameters()
    elif isinstance(module, AttentionPooling):
        offset = module.positional_embedding
        offset.normal_(0, offset.shape[-1] ** -0.5, generator=generator)


_LAST_LAYERS = {UNet: "conv_out", ResnetBlock2D: "conv2", Transformer2DModel: "proj_out", JointAttention: "to_out"}


def _zero_last_layer(module: nn.Module) -> None:
    last = _LAST_LAYERS.get(type(module))
    if last is not None:
        for parameter in module.get_submodule(last).parameters():
            parameter.zero_()


def _read_config(path: Path) -> UNetConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a JSON {type(values).__name__}; a U-Net config is an object")
    try:
        return UNetConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no weights file {path}")
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _check_state(path: Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    if missing := sorted(expected.keys() - state.keys()):
        raise ValueError(f"{path} lacks the key `{missing[0]}` of its config ({len(missing)} missing)")
    if unknown := sorted(state.keys() - expected.keys()):
        raise ValueError(f"{path} has the key `{unknown[0]}`, unknown to its config ({len(unknown)} unknown)")
    for key, value in expected.items():
        if state[key].shape != value.shape:
            raise ValueError(
                f"{path}: `{key}` has shape {list(state[key].shape)}; the config asks for {list(value.shape)}"
            )


def _publish(partial: Path, final: Path) -> None:
    """Makes a written file durable, then visible under its name."""
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, final)
