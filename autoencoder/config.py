"""The autoencoders' configurations; their fields are the keys of diffusers' ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Self

ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")
DOWN_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")


@dataclass(frozen=True)
class BlocksConfig:
    """Shape of an encoder and its decoder: the keys that all of diffusers' autoencoders share.

    The image is halved ``len(block_out_channels) - 1`` times: two entries give f2, four give f8, five f16.
    Empty block types mean plain residual blocks at every level.

    Raises:
        ValueError: a value is impossible or two of them disagree; the sentence names the field and the value.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ()
    up_block_types: tuple[str, ...] = ()
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        if not self.down_block_types:
            object.__setattr__(self, "down_block_types", DOWN_BLOCKS[:1] * levels)
        if not self.up_block_types:
            object.__setattr__(self, "up_block_types", UP_BLOCKS[:1] * levels)
        self._check_counts()
        self._check_blocks()

    def _check_counts(self) -> None:
        for name in (
            "in_channels",
            "out_channels",
            "layers_per_block",
            "latent_channels",
            "norm_num_groups",
            "sample_size",
        ):
            value = getattr(self, name)
            if not _is_count(value):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not self.block_out_channels:
            raise ValueError("block_out_channels must name at least one level, got ()")
        for channels in self.block_out_channels:
            if not _is_count(channels) or channels % self.norm_num_groups:
                raise ValueError(
                    "block_out_channels must be positive multiples of "
                    f"norm_num_groups={self.norm_num_groups}, got {channels!r}"
                )

    def _check_blocks(self) -> None:
        if self.act_fn not in ACTIVATIONS:
            raise ValueError(f"act_fn must be one of {', '.join(ACTIVATIONS)}, got {self.act_fn!r}")
        for name, accepted in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            types = getattr(self, name)
            if len(types) != len(self.block_out_channels):
                raise ValueError(
                    f"{name} must be as long as block_out_channels, "
                    f"got {len(types)} and {len(self.block_out_channels)} entries"
                )
            for block in types:
                if block not in accepted:
                    raise ValueError(f"{name} may hold {' and '.join(accepted)}, got {block!r}")

    @property
    def downsample_factor(self) -> int:
        """Image pixels along one side of a latent position."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read diffusers' JSON object; keys that start with an underscore are ignored.

        Raises:
            ValueError: an unknown key (named, with the nearest known one) or an impossible value.
        """
        return cls(**_from_json(values, [field.name for field in fields(cls)]))


@dataclass(frozen=True)
class AutoencoderConfig(BlocksConfig):
    """Shape of an `AutoencoderKL`; field names and defaults are those of diffusers' ``AutoencoderKL``.

    ``scaling_factor`` and ``shift_factor`` map raw latents to the denoiser's, z = (raw - shift) * scale;
    ``latents_mean`` and ``latents_std`` are statistics per channel.

    Raises:
        ValueError: a value is impossible or two of them disagree; the sentence names the field and the value.
    """

    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_latents()

    def _check_latents(self) -> None:
        if not self.scaling_factor > 0:
            raise ValueError(f"scaling_factor must be positive, got {self.scaling_factor!r}")
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.latent_channels:
                raise ValueError(f"{name} has {len(values)} entries, latent_channels is {self.latent_channels}")

    def to_dict(self) -> dict[str, Any]:
        """Diffusers' JSON object: every field plus ``_class_name``."""
        return {"_class_name": "AutoencoderKL", **_to_json(vars(self))}


@dataclass(frozen=True)
class VQConfig(BlocksConfig):
    """Shape of a `VQModel`; field names and defaults are those of diffusers' ``VQModel``.

    The codebook holds `num_vq_embeddings` vectors of
    `vq_embed_dim` entries (None: `latent_channels`). ``norm_type`` and ``lookup_from_codebook`` are read so that
    diffusers' files are, and accept diffusers' defaults only.

    Raises:
        ValueError: a value is impossible or two of them disagree; the sentence names the field and the value.
    """

    latent_channels: int = 3
    num_vq_embeddings: int = 256
    vq_embed_dim: int | None = None
    norm_type: str = "group"
    lookup_from_codebook: bool = False
    force_upcast: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _is_count(self.num_vq_embeddings):
            raise ValueError(f"num_vq_embeddings must be a positive integer, got {self.num_vq_embeddings!r}")
        if self.vq_embed_dim is not None and not _is_count(self.vq_embed_dim):
            raise ValueError(f"vq_embed_dim must be a positive integer or null, got {self.vq_embed_dim!r}")
        if self.norm_type != "group":
            raise ValueError(f"norm_type must be 'group', got {self.norm_type!r}")
        if self.lookup_from_codebook is not False:
            raise ValueError(f"lookup_from_codebook must be false, got {self.lookup_from_codebook!r}")

    @property
    def embed_dim(self) -> int:
        """Entries of one codebook vector."""
        return self.latent_channels if self.vq_embed_dim is None else self.vq_embed_dim

    def to_dict(self) -> dict[str, Any]:
        """Diffusers' JSON object: every field plus ``_class_name``."""
        return {"_class_name": "VQModel", **_to_json(vars(self))}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value > 0


def _from_json(values: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """The keys without a leading underscore, lists as tuples; a key outside `known` is refused."""
    chosen: dict[str, Any] = {}
    for key, value in values.items():
        if key.startswith("_"):
            continue
        if key not in known:
            nearest = get_close_matches(key, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known keys are {', '.join(known)}"
            raise ValueError(f"unknown autoencoder config key {key!r}{hint}")
        chosen[key] = tuple(value) if isinstance(value, list) else value
    return chosen


def _to_json(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
