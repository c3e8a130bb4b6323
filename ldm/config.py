"""Training configuration: YAML and `--section.field VALUE` overrides into frozen dataclasses.

Field names follow diffusers' text-to-image script where that script has the setting. Every mistake ends as a
`ConfigError`: one sentence that names the key and, for a misspelt one, the nearest valid key.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import draccus

from autoencoder import AutoencoderConfig
from ldm.networks.config import UNetConfig
from ldm.process.schedule import DiffusionConfig
from ldm.sampling import SAMPLERS

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
        counts = ("resolution", "max_train_samples", "max_validation_samples", "shuffle_buffer")
        _require_at_least(self, "data", 1, *counts)
        _require_at_least(self, "data", 0, "dataloader_num_workers")
        _require(len(self.caption_columns) > 0, "`data.caption_columns` is empty; it must name at least one column")
        _require(
            0 <= self.max_bad_fraction <= 1,
            f"`data.max_bad_fraction` is {self.max_bad_fraction}; it must lie in [0, 1]",
        )
        _require(
            self.shapes_per_image in (None, 1, 2),
            f"`data.shapes_per_image` is {self.shapes_per_image}; it must be 1, 2 or null (both)",
        )
        _require(
            self.split != self.validation_split,
            f"`data.validation_split` is {self.validation_split!r}, the same as `data.split`; they must differ",
        )
        _require(
            not (self.streaming and self.source == "shapes"),
            "`data.streaming` is true with `data.source` shapes, which are drawn when needed; it must be false",
        )
        _require(
            not self.streaming or self.max_train_samples is None,
            f"`data.max_train_samples` is {self.max_train_samples} with `data.streaming` true; it must be null, a "
            "stream is read to its end",
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
        _require_positive(self, "optimizer", "learning_rate", "adam_epsilon", "max_grad_norm")
        _require_at_least(self, "optimizer", 0, "lr_warmup_steps", "adam_weight_decay")
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"`optimizer.{name}` is {value}; it must lie in [0, 1)")


@dataclass(frozen=True)
class TrainingConfig:
    """The loop: how long, how much at once, how often to save. Steps are optimiser steps."""

    max_train_steps: int = 1000
    train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    mixed_precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    ema_decay: float = 0.999
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    logging_steps: int = 20
    report_to: str = "tensorboard"

    def __post_init__(self) -> None:
        _require_at_least(
            self,
            "training",
            1,
            "max_train_steps",
            "train_batch_size",
            "gradient_accumulation_steps",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "logging_steps",
        )
        _require(0 <= self.ema_decay < 1, f"`training.ema_decay` is {self.ema_decay}; it must lie in [0, 1)")


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

    def __post_init__(self) -> None:
        _require_at_least(self, "loss", 0, "perceptual", "kl", "discriminator", "discriminator_start")


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The patch discriminator and its own learning rate, as a multiple of the autoencoder's."""

    num_layers: int = 3
    base_channels: int = 64
    norm: Literal["batch", "group", "none"] = "batch"
    spectral_norm: bool = False
    learning_rate_ratio: float = 1.0

    def __post_init__(self) -> None:
        _require_at_least(self, "discriminator", 1, "num_layers", "base_channels")
        _require_positive(self, "discriminator", "learning_rate_ratio")


@dataclass(frozen=True)
class ReconstructionValidation:
    """A grid of originals above reconstructions, and PSNR, every `steps`."""

    steps: int = 500
    num_images: int = 16

    def __post_init__(self) -> None:
        _require_at_least(self, "validation", 1, "steps", "num_images")


@dataclass(frozen=True)
class SampleValidation:
    """A grid of images for fixed prompts and seeds, every `steps`."""

    steps: int = 1000
    validation_prompts: tuple[str, ...] = ()
    sampler: str = "ddim"
    num_inference_steps: int = 25
    guidance_scale: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require_at_least(self, "validation", 1, "steps", "num_inference_steps")
        _require(
            self.sampler in SAMPLERS,
            f"`validation.sampler` is {self.sampler!r}; it must be one of {', '.join(SAMPLERS)}",
        )


@dataclass(frozen=True)
class TextEncoderConfig(draccus.ChoiceRegistry):  # type: ignore[misc]
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
    logit_mean: float = 0.0
    logit_std: float = 1.0
    proportion_empty_prompts: float = 0.1

    def __post_init__(self) -> None:
        _require_positive(self, "objective", "snr_gamma", "logit_std")
        _require(
            0 <= self.proportion_empty_prompts <= 1,
            f"`objective.proportion_empty_prompts` is {self.proportion_empty_prompts}; it must lie in [0, 1]",
        )


@dataclass(frozen=True)
class LatentCacheConfig:
    """The encoded data set on disk; `folder` null means `latents/` in the run folder.

    `sample_posterior` false trains on the mean of each picture's posterior instead of a new sample in every epoch.
    """

    folder: str | None = None
    sample_posterior: bool = True
    dtype: Literal["float32", "float16"] = "float16"
    batch_size: int = 16
    shard_size: int = 8192

    def __post_init__(self) -> None:
        _require_at_least(self, "latents", 1, "batch_size", "shard_size")


@dataclass(frozen=True)
class AutoencoderTraining:
    """Everything `train_autoencoder.py` needs. `scaling_factor` null: measured on the data at the end."""

    output_dir: str
    seed: int = 0
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
        _require_at_least(self, "", 1, "statistics_samples")
        _require_positive(self, "", "scaling_factor")
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
    data: DataConfig = field(default_factory=DataConfig)
    latents: LatentCacheConfig = field(default_factory=LatentCacheConfig)
    text_encoder: TextEncoderConfig = field(default_factory=ScratchClip)
    unet: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    validation: SampleValidation = field(default_factory=SampleValidation)

    def __post_init__(self) -> None:
        _require(
            self.data.center_crop and not self.data.streaming,
            f"`data.center_crop` is {self.data.center_crop} and `data.streaming` {self.data.streaming}; stage two "
            "encodes every picture once, so they must be true and false",
        )
        steps, trained = self.validation.num_inference_steps, self.diffusion.num_train_timesteps
        _require(
            steps <= trained,
            f"`validation.num_inference_steps` is {steps}; `diffusion.num_train_timesteps` allows at most {trained}",
        )


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
        tree = _read_yaml(Path(path))
        for key, text in _pairs(overrides):
            _override(tree, key, text, kind)
        return _build(kind, tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def dump_config(config: object) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal object."""
    text: str = draccus.dump(config)
    return text


def differences(before: str, after: str) -> list[str]:
    """Dotted keys whose values differ between two YAML configs, as `key: old -> new`."""
    old, new = _flat(draccus.cfgparsing.parse_string(before)), _flat(draccus.cfgparsing.parse_string(after))
    keys = sorted(old.keys() | new.keys())
    return [f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in keys if old.get(k) != new.get(k)]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_at_least(config: object, section: str, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        key = f"{section}.{name}".lstrip(".")
        _require(value is None or value >= least, f"`{key}` is {value}; it must be at least {least}")


def _require_positive(config: object, section: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        key = f"{section}.{name}".lstrip(".")
        _require(value is None or value > 0, f"`{key}` is {value}; it must be positive")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, sub in tree.items() for k, v in _flat(sub, f"{prefix}.{key}" if prefix else key).items()}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            tree = draccus.cfgparsing.load_config(file, file=path)
    except (draccus.utils.DraccusException, ValueError) as error:
        raise ConfigError(f"not a YAML file: {' '.join(str(error.__cause__ or error).split())}") from error
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"the file holds {tree!r}; it must hold `key: value` lines")
    return tree or {}


def _pairs(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Keys and values of `--key value` and `--key=value`."""
    pairs: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not flag.startswith("--"):
            raise ConfigError(f"{flag!r} belongs to no flag; overrides have the form --section.field VALUE")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{flag} needs a value")
            value = rest.pop(0)
        pairs.append((flag[2:], value))
    return pairs


def _override(tree: dict[str, Any], key: str, text: str, kind: type) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"`{section}` is {tree!r}; it must be a section of keys and values")
    hint = _keys(kind).get(key)
    if _accepts(hint, text) and not (text == "null" and _accepts(hint, None)):
        tree[name] = text
        return
    try:
        tree[name] = draccus.cfgparsing.parse_string(text)
    except Exception as error:
        raise ConfigError(f"`{key}` is {text!r}; that is not YAML") from error


def _build(kind: type[T], tree: Any, prefix: str = "") -> T:
    """Checks every key and value of a section, then builds it."""
    if not isinstance(tree, dict):
        raise ConfigError(f"`{prefix[:-1]}` is {tree!r}; it must be a section of keys and values")
    hints = _hints(_chosen(kind, tree, prefix))
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise ConfigError(f"`{key}` is not a key of the config{_nearest(str(name), prefix, hints)}")
        if value is False and "no" in typing.get_args(hints[name]):
            tree[name] = value = "no"  # YAML 1.1 takes a bare no for false
        if dataclasses.is_dataclass(hints[name]):
            _build(hints[name], value, f"{key}.")
        elif not _accepts(hints[name], value):
            raise ConfigError(f"`{key}` is {value!r}; it must be {_described(hints[name])}")
    try:
        built: T = draccus.decode(kind, tree)
        return built
    except draccus.utils.DraccusException as error:
        cause = error.__cause__ or error
        section = f"`{prefix[:-1]}`: " if prefix and not isinstance(cause, ConfigError) else ""
        raise ConfigError(f"{section}{cause}") from error


def _chosen(kind: Any, tree: Mapping[str, Any], prefix: str) -> Any:
    """The dataclass that a section's `type` names, where it names one."""
    if kind is not TextEncoderConfig:
        return kind
    choices = kind.get_known_choices()
    if tree.get("type") not in choices:
        found = f"is {tree['type']!r}" if "type" in tree else "is missing"
        raise ConfigError(f"`{prefix}type` {found}; it must be one of {', '.join(choices)}")
    return choices[tree["type"]]


def _hints(kind: Any) -> dict[str, Any]:
    """Names and types of a section's keys."""
    hints = typing.get_type_hints(kind)
    kinds = {"type": str} if issubclass(kind, TextEncoderConfig) else {}
    return kinds | {entry.name: hints[entry.name] for entry in dataclasses.fields(kind)}


def _keys(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names and types of every key, those of all text encoders included."""
    keys: dict[str, Any] = {}
    for option in TextEncoderConfig.get_known_choices().values() if kind is TextEncoderConfig else [kind]:
        for name, hint in _hints(option).items():
            keys[f"{prefix}{name}"] = hint
            if dataclasses.is_dataclass(hint):
                keys |= _keys(hint, f"{prefix}{name}.")
    return keys


def _accepts(hint: Any, value: Any) -> bool:
    """Whether a value read from YAML is one of the type."""
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_accepts(argument, value) for argument in arguments)
    if typing.get_origin(hint) is Literal:
        return any(value == argument and type(value) is type(argument) for argument in arguments)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, (list, tuple)) and all(_accepts(arguments[0], entry) for entry in value)
    if hint is float:
        return isinstance(value, (int, float, str)) and not isinstance(value, bool) and _is_number(value)
    return type(value) is hint


def _is_number(value: int | float | str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _described(hint: Any) -> str:
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(_described(argument) for argument in arguments)
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if typing.get_origin(hint) is tuple:
        return f"a list, each entry of it {_described(arguments[0])}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
    return names.get(hint, str(hint))


def _nearest(name: str, prefix: str, hints: Mapping[str, Any]) -> str:
    """A hint at the key that was meant: in this section, or else in any section."""
    elsewhere = {key.rsplit(".", 1)[-1]: key for root in (LdmTraining, AutoencoderTraining) for key in _keys(root)}
    near, far = difflib.get_close_matches(name, hints, 1), difflib.get_close_matches(name, elsewhere, 1)
    if near:
        return f"; did you mean `{prefix}{near[0]}`?"
    if far and elsewhere[far[0]] != f"{prefix}{name}":
        return f"; did you mean `{elsewhere[far[0]]}`?"
    return f"; accepted here: {', '.join(hints)}"
