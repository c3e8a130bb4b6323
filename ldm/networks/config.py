"""`UNetConfig`: the keys of diffusers' `unet/config.json`, typed and checked."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any, Literal

DownBlockType = Literal["CrossAttnDownBlock2D", "DownBlock2D", "SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"]
MidBlockType = Literal["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn"]
UpBlockType = Literal["CrossAttnUpBlock2D", "UpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"]

FIXED_KEYS: Mapping[str, object] = types.MappingProxyType(
    {
        "attention_type": "default",
        "class_embeddings_concat": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_norm": None,
        "dropout": 0.0,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "mid_block_only_cross_attention": None,
        "num_attention_heads": None,
        "only_cross_attention": False,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "reverse_transformer_layers_per_block": None,
        "time_embedding_act_fn": None,
        "time_embedding_dim": None,
        "time_embedding_type": "positional",
        "timestep_post_act": None,
    }
)
"""Keys of diffusers' UNet2DConditionModel that are read at this value only."""


@dataclass(frozen=True)
class Level:
    """One resolution of the U-Net; `depth` 0 means that it has no attention.

    With `biggan` its residual blocks resample (Brock et al. 2019) and its attention is the joint one of GLIDE (Nichol
    et al. 2022), `depth` 1; otherwise convolutions resample and its attention is that of `depth` transformer blocks.
    """

    channels: int
    layers: int
    depth: int
    heads: int
    context_dim: int
    biggan: bool = False


@dataclass(frozen=True)
class UNetConfig:
    """Architecture of the U-Net; field names, meanings and defaults are diffusers' UNet2DConditionModel's.

    A field that takes an int or a tuple gives one value for all levels or one a level, finest level first.
    `attention_head_dim` is, as in diffusers, the number of heads, and the width of one in the blocks of names with
    "Simple". `upcast_attention` is kept for exchange: `scaled_dot_product_attention` accumulates in fp32 whatever the
    dtype of its inputs. `addition_embed_type` text adds the pooled context to the timestep's embedding, text_time a
    pooled vector given beside it and sizes.

    Raises:
        ValueError: one sentence naming the key, its value and what is accepted.
    """

    sample_size: int | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[DownBlockType, ...] = (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    )
    mid_block_type: MidBlockType | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[UpBlockType, ...] = (
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    )
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: Literal[0, 1] = 1
    mid_block_scale_factor: float = 1.0
    act_fn: Literal["silu", "swish", "gelu", "relu", "mish"] = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    class_embed_type: Literal["timestep", "identity", "projection", "simple_projection"] | None = None
    num_class_embeds: int | None = None
    addition_embed_type: Literal["text", "text_time"] | None = None
    addition_embed_type_num_heads: int = 64
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    upcast_attention: bool | None = False
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    time_cond_proj_dim: int | None = None

    def __post_init__(self) -> None:
        for key, hint in _hints().items():
            _check_value(key, getattr(self, key), hint)
        self._check_lengths()
        self._check_groups()
        self.levels()
        self._check_embeddings()

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Reads the mapping of a `unet/config.json`; keys that start with "_" are ignored.

        Raises:
            ValueError: for a key unknown to diffusers, a key that is read at its default only and has another
                value, and a value that is not accepted.
        """
        known = {field.name for field in fields(cls)}
        chosen = {key: value for key, value in config.items() if not key.startswith("_")}
        for key in chosen.keys() - known:
            _check_fixed(key, chosen[key])
        return cls(**{key: _tuples(value) for key, value in chosen.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """The mapping for `unet/config.json`, which diffusers' `UNet2DConditionModel.from_config` reads."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {"_class_name": "UNet2DConditionModel", **values}

    @property
    def time_embed_dim(self) -> int:
        """Width of the embedding that every residual block receives."""
        return 4 * self.block_out_channels[0]

    def down_levels(self) -> list[Level]:
        """The levels of the contracting path, finest first."""
        return [self._level(i, name, i) for i, name in enumerate(self.down_block_types)]

    def up_levels(self) -> list[Level]:
        """The levels of the expanding path, coarsest first: the order in which they run."""
        last = len(self.up_block_types) - 1
        # diffusers reads the widths of heads from the start here, although the levels run from the end
        return [
            self._level(last - i, name, i if "Simple" in name else last - i)
            for i, name in enumerate(self.up_block_types)
        ]

    def mid_level(self) -> Level:
        """The bottleneck: the coarsest level's widths."""
        last = len(self.block_out_channels) - 1
        return self._level(last, self.mid_block_type or "", last)

    def levels(self) -> list[Level]:
        """All of them, in the order in which they run."""
        return [*self.down_levels(), self.mid_level(), *self.up_levels()]

    def _level(self, index: int, block_type: str, head_index: int) -> Level:
        def pick(value: int | tuple[int, ...], index: int = index) -> int:
            return value if isinstance(value, int) else value[index]

        channels, head_dim = self.block_out_channels[index], pick(self.attention_head_dim, head_index)
        simple, attends = "Simple" in block_type, "CrossAttn" in block_type
        _require(
            not attends or channels % head_dim == 0,
            f"`attention_head_dim`, the {'width of a head' if simple else 'number of heads'}, is {head_dim} on a level "
            f"of {channels} channels; it must divide them",
        )
        return Level(
            channels=channels,
            layers=pick(self.layers_per_block),
            depth=(1 if simple else pick(self.transformer_layers_per_block)) if attends else 0,
            heads=channels // head_dim if simple else head_dim,
            context_dim=pick(self.cross_attention_dim),
            biggan=simple or block_type.startswith("Resnet"),
        )

    def _check_lengths(self) -> None:
        levels = len(self.block_out_channels)
        _require(levels > 0, "`block_out_channels` is (); it must have at least 1 entry")
        for key in _hints():
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(f"`{key}` is {value!r}; `block_out_channels` asks for {levels} entries")

    def _check_groups(self) -> None:
        for channels in self.block_out_channels:
            _require(
                channels % self.norm_num_groups == 0,
                f"`block_out_channels` has {channels}; it must be a multiple of `norm_num_groups`, "
                f"which is {self.norm_num_groups}",
            )

    def _check_embeddings(self) -> None:
        needs = {
            "addition_time_embed_dim": self.addition_embed_type == "text_time",
            "projection_class_embeddings_input_dim": self.addition_embed_type == "text_time"
            or self.class_embed_type in ("projection", "simple_projection"),
        }
        if self.addition_embed_type == "text":
            width, heads = self.cross_attention_dim, self.addition_embed_type_num_heads
            _require(
                isinstance(width, int) and width % heads == 0,
                f"`addition_embed_type_num_heads` is {heads}; with `addition_embed_type` 'text' it must divide "
                f"`cross_attention_dim`, one width for all levels, which is {width}",
            )
        for key, needed in needs.items():
            _require(
                not needed or getattr(self, key) is not None,
                f"`{key}` is None; `addition_embed_type` {self.addition_embed_type!r} and "
                f"`class_embed_type` {self.class_embed_type!r} need an int of at least 1",
            )


@cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(UNetConfig)


def _keys() -> str:
    return ", ".join(_hints())


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_fixed(key: str, value: object) -> None:
    if key not in FIXED_KEYS:
        raise ValueError(f"`{key}` is not a key of a U-Net config (its value: {value!r}); accepted: {_keys()}")
    accepted = FIXED_KEYS[key]
    if value != accepted or isinstance(value, bool) != isinstance(accepted, bool):
        raise ValueError(f"`{key}` is {value!r}; this U-Net implements {accepted!r} only")


def _check_value(key: str, value: object, hint: Any) -> None:
    smallest = 0 if key in ("freq_shift", "downsample_padding") else 1
    _require(_matches(value, hint), f"`{key}` is {value!r}; accepted: {_describe(hint)}")
    for number in value if isinstance(value, tuple) else (value,):
        if type(number) is int:
            _require(number >= smallest, f"`{key}` is {value!r}; it must be at least {smallest}")
        if type(number) is float:
            _require(number > 0, f"`{key}` is {value!r}; it must be positive")


def _matches(value: object, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in arguments)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_matches(item, arguments[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in arguments)
    if origin is Literal:
        return ", ".join(repr(option) for option in arguments)
    if origin is tuple:
        return f"a list of {_describe(arguments[0])}"
    return "None" if hint is type(None) else str(hint.__name__)
