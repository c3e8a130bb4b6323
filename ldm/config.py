"""Training configuration: the frozen dataclasses, and what each refuses.

Field names follow diffusers' text-to-image script where that script has the setting. `ldm.config_file` fills them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

import draccus

from autoencoder import AutoencoderConfig
from ldm.networks.classifier import ClassifierConfig
from ldm.networks.config import UNetConfig
from ldm.process.flow import FlowConfig
from ldm.process.schedule import DiffusionConfig
from ldm.process.weighting import Weighting
from ldm.sampling import named_sampler

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is the sentence shown to the user."""


@dataclass(frozen=True)
class BucketConfig:
    """Aspect-ratio buckets: sizes in multiples of `step` of about `resolution`^2 pixels. A ratio of 1 is the square."""

    step: int = 64
    max_aspect_ratio: float = 1.0

    def __post_init__(self) -> None:
        _require_at_least(self, "data.buckets", 1, "step", "max_aspect_ratio")


@dataclass(frozen=True)
class DataConfig:
    """Where the captioned images come from and how they become tensors.

    `source` is `shapes`, `emoji`, a folder, a `.parquet` file or glob, a `.tar` file or glob (WebDataset) or a hub id.
    `min_crop` is the least side of a training crop as a fraction of the picture's shorter side; see `Transform`.
    """

    source: str = "shapes"
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
        _require_at_least(self, "data", 1, *counts)
        _require_at_least(self, "data", 0, "dataloader_num_workers")
        _require(len(self.caption_columns) > 0, "`data.caption_columns` is empty; it must name at least one column")
        _require(
            0 <= self.max_bad_fraction <= 1,
            f"`data.max_bad_fraction` is {self.max_bad_fraction}; it must lie in [0, 1]",
        )
        _require(0 < self.min_crop <= 1, f"`data.min_crop` is {self.min_crop}; it must lie in (0, 1]")
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
        _require_positive(self, "optimizer", "learning_rate", "adam_epsilon", "max_grad_norm")
        _require_at_least(self, "optimizer", 0, "lr_warmup_steps", "adam_weight_decay")
        for name in ("adam_beta1", "adam_beta2", "muon_momentum"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"`optimizer.{name}` is {value}; it must lie in [0, 1)")


@dataclass(frozen=True)
class TrainingConfig:
    """The loop: how long, how much at once, how often to save. Steps are optimiser steps.

    `skip_loss_spikes` skips an update whose loss lies more than that many standard deviations above the last 200.
    `report_to` is `none` or names of trackers with commas between them.
    """

    max_train_steps: int = 1000
    train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    ema_decay: float = 0.999
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    logging_steps: int = 20
    skip_loss_spikes: float | None = None
    report_to: str = "tensorboard"
    tracker_project_name: str = "ldm"

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
        _require_positive(self, "training", "skip_loss_spikes")
        for name in self.report_to.split(","):
            accepted = name in TRACKERS or self.report_to == "none"
            _require(accepted, f"`training.report_to` has {name!r}; accepted: none, {', '.join(TRACKERS)}")
        _require(0 <= self.ema_decay < 1, f"`training.ema_decay` is {self.ema_decay}; it must lie in [0, 1)")


@dataclass(frozen=True)
class PerceptualConfig:
    """Which frozen network measures perceptual distance; `weights` is a local file for LPIPS backbones."""

    type: Literal["efficientnet_lite0", "lpips_vgg", "lpips_alex", "lpips_squeeze", "none"] = "lpips_vgg"
    weights: str | None = None


@dataclass(frozen=True)
class AutoencoderLossConfig:
    """Weights of the stage-one loss; defaults are latent-diffusion's (Rombach et al. 2022, appendix G).

    `logvar_init` is the log-variance of the output, which stays as it is unless `learn_logvar`.
    """

    reconstruction: Literal["l1", "l2", "charbonnier"] = "l1"
    perceptual: float = 1.0
    kl: float = 1e-6
    discriminator: float = 0.5
    discriminator_start: int = 50_001
    discriminator_loss: Literal["hinge", "vanilla"] = "hinge"
    learn_logvar: bool = False
    logvar_init: float = 0.0

    def __post_init__(self) -> None:
        _require_at_least(self, "loss", 0, "perceptual", "kl", "discriminator", "discriminator_start")
        _require(isfinite(self.logvar_init), f"`loss.logvar_init` is {self.logvar_init}; it must be a finite number")


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The patch discriminator, its own learning rate as a multiple of the autoencoder's, and its regularisers.

    `r1` and `lecam` are weights, 0 switches one off; R1 is computed at every `r1_every`-th step.
    """

    num_layers: int = 3
    base_channels: int = 64
    norm: Literal["batch", "group", "act", "none"] = "batch"
    spectral_norm: bool = False
    learning_rate_ratio: float = 1.0
    r1: float = 0.0
    r1_every: int = 16
    lecam: float = 0.0

    def __post_init__(self) -> None:
        _require_at_least(self, "discriminator", 1, "num_layers", "base_channels", "r1_every")
        _require_at_least(self, "discriminator", 0, "r1", "lecam")
        _require_positive(self, "discriminator", "learning_rate_ratio")


@dataclass(frozen=True)
class CodebookConfig:
    """The codebook of a vector-quantised autoencoder; `num_vq_embeddings` null trains a KL-regularised one instead.

    `vq_embed_dim` null: as many entries a code as `autoencoder.latent_channels`. `update` is how the codebook learns,
    by the gradient of its loss or as moving averages with `decay`. `weight` is that of codebook and commitment loss
    together, `commitment` the factor of the second; the defaults are latent-diffusion's.
    """

    num_vq_embeddings: int | None = None
    vq_embed_dim: int | None = None
    weight: float = 1.0
    commitment: float = 0.25
    update: Literal["loss", "ema"] = "loss"
    decay: float = 0.99

    def __post_init__(self) -> None:
        _require_at_least(self, "codebook", 1, "num_vq_embeddings", "vq_embed_dim")
        _require_at_least(self, "codebook", 0, "weight", "commitment")
        _require(0 <= self.decay < 1, f"`codebook.decay` is {self.decay}; it must lie in [0, 1)")


@dataclass(frozen=True)
class ReconstructionValidation:
    """A grid of originals above reconstructions, and PSNR, every `steps`."""

    steps: int = 500
    num_images: int = 16

    def __post_init__(self) -> None:
        _require_at_least(self, "validation", 1, "steps", "num_images")


@dataclass(frozen=True)
class SampleValidation:
    """Every `steps`: a grid of images for fixed prompts and seeds, and the loss of the averaged weights.

    The loss is that of `num_loss_samples` validation pictures under fixed noise at evenly spaced noise levels.
    """

    steps: int = 1000
    num_loss_samples: int = 64
    validation_prompts: tuple[str, ...] = ()
    sampler: str = "ddim"
    num_inference_steps: int = 25
    guidance_scale: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require_at_least(self, "validation", 1, "steps", "num_inference_steps")
        _require_at_least(self, "validation", 0, "num_loss_samples")
        try:
            named_sampler(self.sampler)
        except ValueError as error:
            raise ConfigError(f"`validation.{str(error).replace(' is ', '` is ', 1)}") from error


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


@TextEncoderConfig.register_subclass("open_clip")
@dataclass(frozen=True)
class OpenClip(TextEncoderConfig):
    """A text tower of open_clip, exported as a plain CLIP; `clip_skip` 1 takes the penultimate states, as SD 2.

    `name` is an architecture with `pretrained`, a tag or a checkpoint file, or `local-dir:FOLDER`, `hf-hub:OWNER/NAME`.
    """

    name: str = "ViT-H-14"
    pretrained: str | None = None
    clip_skip: int = 1
    trainable: bool = False


@TextEncoderConfig.register_subclass("clip_dual")
@dataclass(frozen=True)
class DualClip(TextEncoderConfig):
    """Two CLIP text towers side by side, as in SDXL; `path` is a model folder or hub id in SDXL's layout.

    `second_path` takes the second one from elsewhere: a folder or hub id as for `clip`.
    """

    path: str = "stabilityai/stable-diffusion-xl-base-1.0"
    second_path: str | None = None
    trainable: bool = False


@TextEncoderConfig.register_subclass("t5")
@dataclass(frozen=True)
class PretrainedT5(TextEncoderConfig):
    """The encoder of a T5, mT5 or UMT5 from a folder or hub id; captions are cut at `max_length` tokens."""

    path: str = "google-t5/t5-base"
    max_length: int = 128
    trainable: bool = False

    def __post_init__(self) -> None:
        _require_at_least(self, "text_encoder", 1, "max_length")


@TextEncoderConfig.register_subclass("transformers")
@dataclass(frozen=True)
class PretrainedTransformer(TextEncoderConfig):
    """Any text encoder that transformers' AutoModel reads; `max_length` null takes the model's own."""

    path: str = "sentence-transformers/all-MiniLM-L6-v2"
    max_length: int | None = None
    trainable: bool = False

    def __post_init__(self) -> None:
        _require_at_least(self, "text_encoder", 1, "max_length")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Which noise levels are trained and how their errors are weighted.

    `snr_gamma` is Min-SNR's and excludes another `weighting`; `p2_gamma` and `p2_k` belong to `p2`. `time_shift` above
    1 trains the noisy timesteps more, `noise_offset` and `input_perturbation` are strengths of `ldm.process.noise`, and
    `vlb_weight` belongs to `diffusion.variance_type` learned_range.
    """

    snr_gamma: float | None = None
    weighting: Weighting = "none"
    p2_gamma: float = 1.0
    p2_k: float = 1.0
    timestep_sampling: Literal["uniform", "logit_normal", "importance"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    time_shift: float = 1.0
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    vlb_weight: float = 0.001
    proportion_empty_prompts: float = 0.1

    def __post_init__(self) -> None:
        _require_positive(self, "objective", "snr_gamma", "logit_std", "p2_gamma", "p2_k", "time_shift")
        _require_at_least(self, "objective", 0, "noise_offset", "input_perturbation", "vlb_weight")
        _require(
            self.snr_gamma is None or self.weighting == "none",
            f"`objective.weighting` is {self.weighting} with `objective.snr_gamma` {self.snr_gamma}; it must be none, "
            "`snr_gamma` is a weighting of its own",
        )
        _require(
            self.timestep_sampling != "importance" or self.time_shift == 1,
            f"`objective.time_shift` is {self.time_shift} with `objective.timestep_sampling` importance; it must be 1, "
            "importance sampling finds its own timesteps",
        )
        _require(
            0 <= self.proportion_empty_prompts <= 1,
            f"`objective.proportion_empty_prompts` is {self.proportion_empty_prompts}; it must lie in [0, 1]",
        )


@dataclass(frozen=True)
class LatentCacheConfig:
    """The encoded data set on disk; `folder` null means `latents/` in the run folder.

    `sample_posterior` false trains on the mean of each picture's posterior instead of a new sample in every epoch.
    `cache_text` keeps the encodings of all captions beside the latents; for text encoders that are not trained.
    """

    folder: str | None = None
    sample_posterior: bool = True
    cache_text: bool = False
    dtype: Literal["float32", "float16"] = "float16"
    batch_size: int = 16
    shard_size: int = 8192

    def __post_init__(self) -> None:
        _require_at_least(self, "latents", 1, "batch_size", "shard_size")


@dataclass(frozen=True)
class AutoencoderTraining:
    """Everything `train_autoencoder.py` needs. `scaling_factor` null: measured on the data at the end.

    `pretrained`, a `vae/` folder, a model's folder or single file, or a hub id, is trained further in place of a new
    `autoencoder`; `freeze_encoder` then leaves its latents, their scale and shift as they are and trains the decoder
    alone. With `codebook.num_vq_embeddings` the autoencoder is a `VQModel`, whose shape `autoencoder` gives.
    """

    output_dir: str
    seed: int = 0
    pretrained: str | None = None
    freeze_encoder: bool = False
    scaling_factor: float | None = None
    statistics_samples: int = 2048
    data: DataConfig = field(default_factory=DataConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    validation: ReconstructionValidation = field(default_factory=ReconstructionValidation)

    def __post_init__(self) -> None:
        _require_at_least(self, "", 1, "statistics_samples")
        _require_positive(self, "", "scaling_factor")
        _require(self.optimizer.type == "adamw", "`optimizer.type` is muon; stage one is trained by adamw")
        self._check_pretrained()
        self._check_codebook()
        factor = 2 ** (len(self.autoencoder.block_out_channels) - 1)
        check_buckets(self.data, factor)
        _require(
            not self.data.streaming or self.data.buckets.max_aspect_ratio == 1,
            f"`data.buckets.max_aspect_ratio` is {self.data.buckets.max_aspect_ratio} with `data.streaming` true; it "
            "must be 1, buckets need the sizes of all pictures beforehand",
        )
        _require(
            self.data.resolution % factor == 0,
            f"`data.resolution` is {self.data.resolution}; with {len(self.autoencoder.block_out_channels)} "
            f"`autoencoder.block_out_channels` it must be a multiple of {factor}",
        )

    def _check_codebook(self) -> None:
        codes, shape, plain = self.codebook.num_vq_embeddings, self.autoencoder, AutoencoderConfig()
        _require(
            self.pretrained is None or codes is None,
            f"`codebook.num_vq_embeddings` is {codes} and `pretrained` {self.pretrained!r}; it must be null, a "
            "pretrained model brings its own codebook or has none",
        )
        for name in ("shift_factor", "latents_mean", "latents_std", "use_quant_conv", "use_post_quant_conv"):
            _require(
                codes is None or getattr(shape, name) == getattr(plain, name),
                f"`autoencoder.{name}` is {getattr(shape, name)} with `codebook.num_vq_embeddings` {codes}; it must be "
                f"{getattr(plain, name)}, a VQModel has no such choice",
            )

    def _check_pretrained(self) -> None:
        _require(
            self.pretrained is None or self.autoencoder == AutoencoderConfig(),
            f"`pretrained` is {self.pretrained!r} and there is an `autoencoder` section; give one of the two, a "
            "pretrained model brings its own config",
        )
        _require(
            self.pretrained is not None or not self.freeze_encoder,
            "`freeze_encoder` is true and `pretrained` null; a new encoder must be trained, so it must be false",
        )
        _require(
            self.scaling_factor is None or not self.freeze_encoder,
            f"`scaling_factor` is {self.scaling_factor} and `freeze_encoder` true; it must be null, the pretrained "
            "model's scale is kept",
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
    diffusion: DiffusionConfig | FlowConfig = field(default_factory=DiffusionConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    validation: SampleValidation = field(default_factory=SampleValidation)

    def __post_init__(self) -> None:
        _require(
            self.data.center_crop,
            f"`data.center_crop` is {self.data.center_crop}; stage two encodes every picture once, so it must be true",
        )
        _require(
            self.data.min_crop == 1,
            f"`data.min_crop` is {self.data.min_crop}; stage two encodes every picture once, so it must be 1",
        )
        _require(
            not self.latents.cache_text or not getattr(self.text_encoder, "trainable", True),
            "`latents.cache_text` is true, but the text encoder is trained; it must be false, or "
            "`text_encoder.trainable` false where the type has it",
        )
        steps, trained = self.validation.num_inference_steps, self.diffusion.num_train_timesteps
        _require(
            steps <= trained,
            f"`validation.num_inference_steps` is {steps}; `diffusion.num_train_timesteps` allows at most {trained}",
        )
        self._check_timesteps()

    def _check_timesteps(self) -> None:
        sampling, shift = self.objective.timestep_sampling, self.objective.time_shift
        _require(
            sampling != "importance" or isinstance(self.diffusion, DiffusionConfig),
            "`objective.timestep_sampling` is importance with `diffusion.type` flow, whose times are continuous; it "
            "must be uniform or logit_normal",
        )
        _require(
            self.diffusion.variance_type != "learned_range" or (sampling != "logit_normal" and shift == 1),
            f"`objective.timestep_sampling` is {sampling} and `objective.time_shift` {shift} with "
            "`diffusion.variance_type` learned_range, whose bound is a sum over all timesteps; they must be uniform or "
            "importance, and 1",
        )


@dataclass(frozen=True)
class ClassifierTraining:
    """Everything `train_classifier.py` needs.

    `model` is the model folder or hub id to be guided, which gives scale and noise of the latents; `latents` the cache
    that its training left, `latents/` in its run folder. A caption that names exactly one of `classifier.labels` is of
    that class, others do not count.
    """

    output_dir: str
    model: str
    latents: str
    classifier: ClassifierConfig
    seed: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


def check_buckets(data: DataConfig, multiple: int) -> None:
    """Refuses bucket sizes that a network cannot halve often enough.

    Raises:
        ConfigError: when there are several buckets whose step is no multiple of `multiple`, or larger than the square.
    """
    step, ratio = data.buckets.step, data.buckets.max_aspect_ratio
    _require(
        ratio == 1 or (step % multiple == 0 and step <= data.resolution),
        f"`data.buckets.step` is {step} with `data.buckets.max_aspect_ratio` {ratio}; it must be a multiple of "
        f"{multiple} and at most `data.resolution` {data.resolution}",
    )


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
