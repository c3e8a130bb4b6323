"""Training configuration: YAML and `--section.field VALUE` overrides into frozen dataclasses.

Field names follow diffusers' text-to-image script where that script has the setting. Every mistake ends as a
`ConfigError`: one sentence that names the key and, for a misspelt one, the nearest valid key.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import draccus

from autoencoder import AutoencoderConfig
from ldm.networks.config import UNetConfig
from ldm.process.schedule import DiffusionConfig

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is the sentence shown to the user."""


@dataclass(frozen=True)
class DataConfig:
    """Where the captioned images come from and how they become tensors.

    `source` is `shapes`, a folder, a `.parquet` file or glob, a `.tar` file or glob (WebDataset) or a hub id.
    """

    source: str = "shapes"
    validation_source: str | None = None
    split: str = "train"
    validation_split: str = "validation"
    resolution: int = 64
    image_column: str = "image"
    caption_columns: tuple[str, ...] = ("text",)
    center_crop: bool = True
    random_flip: bool = False
    max_train_samples: int | None = None
    max_validation_samples: int | None = 256
    shapes_per_image: int | None = None
    streaming: bool = False
    shuffle_buffer: int = 1000
    dataloader_num_workers: int = 0
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        _require(self.resolution > 0, f"`data.resolution` is {self.resolution}; it must be at least 1")
        _require(
            0 <= self.max_bad_fraction <= 1,
            f"`data.max_bad_fraction` is {self.max_bad_fraction}; it must lie in [0, 1]",
        )
        _require(
            self.shapes_per_image in (None, 1, 2),
            f"`data.shapes_per_image` is {self.shapes_per_image}; it must be 1, 2 or null (both)",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and a learning rate that is a function of the step alone."""

    learning_rate: float = 1e-4
    lr_scheduler: Literal["constant", "cosine", "linear"] = "constant"
    lr_warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        _require(
            self.learning_rate > 0, f"`optimizer.learning_rate` is {self.learning_rate}; it must be positive"
        )


@dataclass(frozen=True)
class TrainingConfig:
    """The loop: how long, how much at once, how often to save. Steps are optimiser steps."""

    max_train_steps: int = 1000
    train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    ema_decay: float = 0.999
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    logging_steps: int = 20
    report_to: str = "tensorboard"

    def __post_init__(self) -> None:
        for name in (
            "max_train_steps",
            "train_batch_size",
            "gradient_accumulation_steps",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "logging_steps",
        ):
            value = getattr(self, name)
            _require(value >= 1, f"`training.{name}` is {value}; it must be at least 1")
        _require(
            0 <= self.ema_decay < 1, f"`training.ema_decay` is {self.ema_decay}; it must lie in [0, 1)"
        )


@dataclass(frozen=True)
class PerceptualConfig:
    """Which frozen network measures perceptual distance; `weights` is a local file for LPIPS backbones."""

    type: Literal["efficientnet_lite0", "lpips_vgg", "lpips_alex", "lpips_squeeze", "none"] = "lpips_vgg"
    weights: str | None = None


@dataclass(frozen=True)
class AutoencoderLossConfig:
    """Weights of the stage-one loss; defaults are latent-diffusion's (Rombach et al. 2022, appendix G)."""

    reconstruction: Literal["l1", "l2"] = "l1"
    perceptual: float = 1.0
    kl: float = 1e-6
    discriminator: float = 0.5
    discriminator_start: int = 50_001
    discriminator_loss: Literal["hinge", "vanilla"] = "hinge"


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The patch discriminator and its own learning rate, as a multiple of the autoencoder's."""

    num_layers: int = 3
    base_channels: int = 64
    norm: Literal["batch", "group", "none"] = "batch"
    spectral_norm: bool = False
    learning_rate_ratio: float = 1.0


@dataclass(frozen=True)
class ReconstructionValidation:
    """A grid of originals above reconstructions, and PSNR, every `steps`."""

    steps: int = 500
    num_images: int = 16


@dataclass(frozen=True)
class SampleValidation:
    """A grid of images for fixed prompts and seeds, every `steps`."""

    steps: int = 1000
    validation_prompts: tuple[str, ...] = ()
    sampler: str = "ddim"
    num_inference_steps: int = 25
    guidance_scale: float = 3.0
    seed: int = 0


@dataclass(frozen=True)
class TextEncoderConfig(draccus.ChoiceRegistry):
    """How a caption becomes the U-Net's context; `type` chooses the kind."""


@TextEncoderConfig.register_subclass("clip")
@dataclass(frozen=True)
class PretrainedClip(TextEncoderConfig):
    """A CLIP text tower from a model folder or hub id with `text_encoder/` and `tokenizer/`, or from one folder."""

    path: str = "openai/clip-vit-large-patch14"
    clip_skip: int = 0
    trainable: bool = False


@TextEncoderConfig.register_subclass("clip_from_scratch")
@dataclass(frozen=True)
class ScratchClip(TextEncoderConfig):
    """A CLIP-architecture text transformer trained jointly with the U-Net, its BPE learnt from the captions."""

    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    vocab_size: int = 4096
    max_length: int = 77


@dataclass(frozen=True)
class ObjectiveConfig:
    """Which noise levels are trained and how their errors are weighted; `snr_gamma` is Min-SNR's."""

    snr_gamma: float | None = None
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    proportion_empty_prompts: float = 0.1

    def __post_init__(self) -> None:
        _require(
            0 <= self.proportion_empty_prompts <= 1,
            f"`objective.proportion_empty_prompts` is {self.proportion_empty_prompts}; it must lie in [0, 1]",
        )


@dataclass(frozen=True)
class LatentCacheConfig:
    """The encoded data set on disk; `folder` null means `latents/` in the run folder."""

    folder: str | None = None
    dtype: Literal["float32", "float16"] = "float16"
    batch_size: int = 16
    shard_size: int = 8192


@dataclass(frozen=True)
class AutoencoderTraining:
    """Everything `train_autoencoder.py` needs. `scaling_factor` null: measured on the data at the end."""

    output_dir: str
    seed: int = 0
    pretrained_model: str | None = None
    scaling_factor: float | None = None
    statistics_samples: int = 2048
    data: DataConfig = field(default_factory=DataConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    validation: ReconstructionValidation = field(default_factory=ReconstructionValidation)

    def __post_init__(self) -> None:
        factor = 2 ** (len(self.autoencoder.block_out_channels) - 1)
        _require(
            self.data.resolution % factor == 0,
            f"`data.resolution` is {self.data.resolution}; with {len(self.autoencoder.block_out_channels)} "
            f"`autoencoder.block_out_channels` it must be a multiple of {factor}",
        )


@dataclass(frozen=True)
class LdmTraining:
    """Everything `train_ldm.py` needs. `autoencoder` is a model folder, a `vae/` folder or a hub id."""

    output_dir: str
    autoencoder: str
    seed: int = 0
    pretrained_model: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    latents: LatentCacheConfig = field(default_factory=LatentCacheConfig)
    text_encoder: TextEncoderConfig = field(default_factory=ScratchClip)
    unet: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    validation: SampleValidation = field(default_factory=SampleValidation)


@dataclass(frozen=True)
class Launch:
    """What the command line asked for besides the config itself."""

    resume: Literal["auto", "never"]
    allow_config_change: bool
    dry_run: bool


def parse_command_line(kind: type[T], argv: Sequence[str]) -> tuple[T, Launch]:
    """Reads `--config FILE [--section.field VALUE ...] [--dry-run] [--resume auto|never]`.

    Raises:
        ConfigError: naming the file, key or flag at fault and what is accepted.
    """
    parser = argparse.ArgumentParser(description=kind.__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, see train_configs/")
    parser.add_argument("--resume", choices=("auto", "never"), default="auto", help="never: refuse a used folder")
    parser.add_argument("--allow-config-change", action="store_true", help="resume although the config changed")
    parser.add_argument("--dry-run", action="store_true", help="print config, sizes and estimates, then stop")
    known, overrides = parser.parse_known_args(list(argv))
    launch = Launch(known.resume, known.allow_config_change, known.dry_run)
    return load_config(kind, known.config, overrides), launch


def load_config(kind: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Reads one YAML file and applies `--section.field VALUE` overrides.

    Raises:
        ConfigError: when the file is missing or not YAML, or a key or value is not accepted.
    """
    if not Path(path).is_file():
        raise ConfigError(f"There is no config file {path}")
    try:
        return draccus.parse(kind, config_path=path, args=list(overrides), exit_on_error=False)
    except (draccus.utils.DraccusException, ValueError, argparse.ArgumentError) as error:
        raise ConfigError(f"{path}: {_explain(kind, error)}") from error


def dump_config(config: object) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal object."""
    return draccus.dump(config)


def differences(before: str, after: str) -> list[str]:
    """Dotted keys whose values differ between two YAML configs, as `key: old -> new`."""
    old, new = _flat(draccus.cfgparsing.parse_string(before)), _flat(draccus.cfgparsing.parse_string(after))
    keys = sorted(old.keys() | new.keys())
    return [f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in keys if old.get(k) != new.get(k)]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, sub in tree.items() for k, v in _flat(sub, f"{prefix}.{key}" if prefix else key).items()}


def _explain(kind: type, error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ValueError) and not isinstance(cause, draccus.utils.DraccusException):
            return str(cause)
        cause = cause.__cause__
    message = str(error).split("\n")[0].rstrip(".")
    unknown = re.findall(r"(?:fields? |, )`([\w.]+)`|--([\w.]+)", message)
    hints = [_nearest(kind, left or right) for left, right in unknown]
    return message + "".join(hint for hint in hints if hint)


def _nearest(kind: type, key: str) -> str:
    paths = _key_paths(kind)
    by_last = {path.rsplit(".", 1)[-1]: path for path in paths}
    close = difflib.get_close_matches(key, paths, 1) or difflib.get_close_matches(
        key.rsplit(".", 1)[-1], list(by_last), 1
    )
    return f"; did you mean `{by_last.get(close[0], close[0])}`?" if close else ""


def _key_paths(kind: type, prefix: str = "") -> list[str]:
    paths: list[str] = []
    hints = typing.get_type_hints(kind)
    for entry in dataclasses.fields(kind):
        path = f"{prefix}{entry.name}"
        paths.append(path)
        for option in _dataclasses_in(hints[entry.name]):
            paths.extend(_key_paths(option, f"{path}."))
    return paths


def _dataclasses_in(hint: Any) -> list[type]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return [found for arg in typing.get_args(hint) for found in _dataclasses_in(arg)]
    if not dataclasses.is_dataclass(hint) or not isinstance(hint, type):
        return []
    if issubclass(hint, draccus.ChoiceRegistry):
        return list(hint.get_known_choices().values())
    return [hint]
