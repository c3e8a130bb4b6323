"""What the configurations of all trainings share, and how a value is refused.

Field names follow diffusers' text-to-image script where that script has the setting.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is the sentence shown to the user."""


@dataclass(frozen=True)
class BucketConfig:
    """Aspect-ratio buckets: sizes in multiples of `step` of about `resolution`^2 pixels. A ratio of 1 is the square."""

    step: int = 64
    max_aspect_ratio: float = 1.0

    def __post_init__(self) -> None:
        require_at_least(self, "data.buckets", 1, "step", "max_aspect_ratio")


UNREAD_WITH_INSTANCES = (
    "validation_source",
    "image_column",
    "caption_columns",
    "shapes_per_image",
)


@dataclass(frozen=True)
class DataConfig:
    """Where the captioned images come from and how they become tensors.

    `source` is `shapes`, `emoji`, a folder, a `.parquet` file or glob, a `.tar` file or glob (WebDataset) or a hub id.
    With `instance_prompt` it is a folder of pictures that all have this caption, and all are trained on. `split` all
    holds nothing out of a source that has no splits.
    `min_crop` is the least side of a training crop as a fraction of the picture's shorter side; see `Transform`.
    """

    source: str = "shapes"
    instance_prompt: str | None = None
    validation_source: str | None = None
    split: str = "train"
    validation_split: str = "validation"
    resolution: int = 64
    image_column: str = "image"
    caption_columns: tuple[str, ...] = ("text",)
    center_crop: bool = True
    min_crop: float = 1.0
    random_flip: bool = False
    max_train_samples: int | None = None
    max_validation_samples: int | None = 256
    shapes_per_image: int | None = None
    streaming: bool = False
    shuffle_buffer: int = 1000
    dataloader_num_workers: int = 0
    max_bad_fraction: float = 0.01
    buckets: BucketConfig = field(default_factory=BucketConfig)

    def __post_init__(self) -> None:
        counts = ("resolution", "max_train_samples", "max_validation_samples", "shuffle_buffer")
        require_at_least(self, "data", 1, *counts)
        require_at_least(self, "data", 0, "dataloader_num_workers")
        require(len(self.caption_columns) > 0, "`data.caption_columns` is empty; it must name at least one column")
        require(
            0 <= self.max_bad_fraction <= 1,
            f"`data.max_bad_fraction` is {self.max_bad_fraction}; it must lie in [0, 1]",
        )
        require(0 < self.min_crop <= 1, f"`data.min_crop` is {self.min_crop}; it must lie in (0, 1]")
        require(
            self.shapes_per_image in (None, 1, 2),
            f"`data.shapes_per_image` is {self.shapes_per_image}; it must be 1, 2 or null (both)",
        )
        require(
            self.split != self.validation_split,
            f"`data.validation_split` is {self.validation_split!r}, the same as `data.split`; they must differ",
        )
        require(
            not (self.streaming and self.source == "shapes"),
            "`data.streaming` is true with `data.source` shapes, which are drawn when needed; it must be false",
        )
        require(
            not self.streaming or self.max_train_samples is None,
            f"`data.max_train_samples` is {self.max_train_samples} with `data.streaming` true; it must be null, a "
            "stream is read to its end",
        )
        require(
            self.instance_prompt is None or not self.streaming,
            "`data.streaming` is true with `data.instance_prompt`, which is for a few pictures; it must be false",
        )
        for name in () if self.instance_prompt is None else UNREAD_WITH_INSTANCES:
            require(
                getattr(self, name) == getattr(DataConfig, name),
                f"`data.{name}` is given with `data.instance_prompt`, which reads every picture of a folder and no "
                "captions; leave it out",
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser and a learning rate that is a function of the step alone.

    `muon`, for stage two, trains the hidden matrices of U-Net and text encoder by Muon and the rest by AdamW.
    """

    type: Literal["adamw", "muon"] = "adamw"
    muon_momentum: float = 0.95
    learning_rate: float = 1e-4
    lr_scheduler: Literal["constant", "cosine", "linear"] = "constant"
    lr_warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "optimizer", "learning_rate", "adam_epsilon", "max_grad_norm")
        require_at_least(self, "optimizer", 0, "lr_warmup_steps", "adam_weight_decay")
        for name in ("adam_beta1", "adam_beta2", "muon_momentum"):
            value = getattr(self, name)
            require(0 <= value < 1, f"`optimizer.{name}` is {value}; it must lie in [0, 1)")


@dataclass(frozen=True)
class TrainingConfig:
    """The loop: how long, how much at once, how often to save. Steps are optimiser steps.

    `skip_loss_spikes` skips an update whose loss lies more than that many standard deviations above the last 200.
    With `ema_snapshots` every state leaves its averaged weights in `ema/`, from which `ldm-convert --ema-sigma-rel`
    makes another average afterwards; for stage two.
    `report_to` is `none` or names of trackers with commas between them.
    """

    max_train_steps: int = 1000
    train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    ema_decay: float = 0.999
    ema_snapshots: bool = False
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    logging_steps: int = 20
    skip_loss_spikes: float | None = None
    report_to: str = "tensorboard"
    tracker_project_name: str = "ldm"

    def __post_init__(self) -> None:
        require_at_least(
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
        require_positive(self, "training", "skip_loss_spikes")
        for name in self.report_to.split(","):
            accepted = name in TRACKERS or self.report_to == "none"
            require(accepted, f"`training.report_to` has {name!r}; accepted: none, {', '.join(TRACKERS)}")
        require(0 <= self.ema_decay < 1, f"`training.ema_decay` is {self.ema_decay}; it must lie in [0, 1)")


def check_buckets(data: DataConfig, multiple: int) -> None:
    """Refuses bucket sizes that a network cannot halve often enough.

    Raises:
        ConfigError: when there are several buckets whose step is no multiple of `multiple`, or larger than the square.
    """
    step, ratio = data.buckets.step, data.buckets.max_aspect_ratio
    require(
        ratio == 1 or (step % multiple == 0 and step <= data.resolution),
        f"`data.buckets.step` is {step} with `data.buckets.max_aspect_ratio` {ratio}; it must be a multiple of "
        f"{multiple} and at most `data.resolution` {data.resolution}",
    )


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def require_at_least(config: object, section: str, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        key = f"{section}.{name}".lstrip(".")
        require(value is None or value >= least, f"`{key}` is {value}; it must be at least {least}")


def require_positive(config: object, section: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        key = f"{section}.{name}".lstrip(".")
        require(value is None or value > 0, f"`{key}` is {value}; it must be positive")
