"""The configuration of `train_autoencoder.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

from autoencoder import AutoencoderConfig
from ldm.config.common import (
    DataConfig,
    OptimizerConfig,
    TrainingConfig,
    check_buckets,
    require,
    require_at_least,
    require_positive,
)
from ldm.tasks.labels import UNLABELLED, named_classes


@dataclass(frozen=True)
class PerceptualConfig:
    """Which frozen network measures perceptual distance; `weights` is a local file for LPIPS backbones."""

    type: Literal["efficientnet_lite0", "lpips_vgg", "lpips_alex", "lpips_squeeze", "none"] = "lpips_vgg"
    weights: str | None = None


@dataclass(frozen=True)
class AutoencoderLossConfig:
    """Weights of the stage-one loss; defaults are latent-diffusion's (Rombach et al. 2022, appendix G).

    The discriminator learns from step `discriminator_start` on, and the autoencoder from it `discriminator_warmup`
    steps later. `logvar_init` is the log-variance of the output, which stays as it is unless `learn_logvar`.
    """

    reconstruction: Literal["l1", "l2", "charbonnier"] = "l1"
    perceptual: float = 1.0
    kl: float = 1e-6
    discriminator: float = 0.5
    discriminator_start: int = 50_001
    discriminator_warmup: int = 0
    discriminator_loss: Literal["hinge", "vanilla"] = "hinge"
    learn_logvar: bool = False
    logvar_init: float = 0.0

    def __post_init__(self) -> None:
        require_at_least(self, "loss", 0, "perceptual", "kl", "discriminator")
        require_at_least(self, "loss", 0, "discriminator_start", "discriminator_warmup")
        require(isfinite(self.logvar_init), f"`loss.logvar_init` is {self.logvar_init}; it must be a finite number")


def _require_labels(name: str, labels: Sequence[str]) -> None:
    """Refuses labels of which a caption cannot name one alone; `name` is the setting that holds them."""
    require(
        len(labels) != 1 and len(set(labels)) == len(labels) and all(map(str.strip, labels)),
        f"`{name}` is {list(labels)}; it must hold two or more different words, or none",
    )
    for label, named in zip(labels, named_classes(labels, labels), strict=True):
        require(
            named != UNLABELLED,
            f"`{name}` has {label!r}, which names another of them too or no word at all; a caption must be able to "
            "name one of them alone",
        )


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminator, its own learning rate as a multiple of the autoencoder's, and its regularisers.

    "patch" sees pixels; "projected" sees the features of EfficientNet-Lite0, has heads of `base_channels` and brings
    its own number of layers and norm. `labels` are words, such as styles; it is told which of them a picture's first
    caption names in whole words, where that is exactly one. `r1` and `lecam` are weights, 0 switches one off; R1 is
    computed at every `r1_every`-th step.
    """

    type: Literal["patch", "projected"] = "patch"
    num_layers: int = 3
    base_channels: int = 64
    norm: Literal["batch", "group", "act", "none"] = "batch"
    spectral_norm: bool = False
    learning_rate_ratio: float = 1.0
    r1: float = 0.0
    r1_every: int = 16
    lecam: float = 0.0
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_at_least(self, "discriminator", 1, "num_layers", "base_channels", "r1_every")
        require_at_least(self, "discriminator", 0, "r1", "lecam")
        require_positive(self, "discriminator", "learning_rate_ratio")
        _require_labels("discriminator.labels", self.labels)
        own = (self.num_layers, self.norm, self.spectral_norm) == (3, "batch", False)
        require(
            self.type == "patch" or own,
            "`discriminator.type` is projected, which brings its own layers and norm; `num_layers`, `norm` and "
            "`spectral_norm` must be left out",
        )


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
        require_at_least(self, "codebook", 1, "num_vq_embeddings", "vq_embed_dim")
        require_at_least(self, "codebook", 0, "weight", "commitment")
        require(0 <= self.decay < 1, f"`codebook.decay` is {self.decay}; it must lie in [0, 1)")


@dataclass(frozen=True)
class LatentLabelsConfig:
    """Labels that each picture's latents themselves are to tell, by their mean over space; none without `names`.

    A picture whose first caption names exactly one of `names` in whole words has that label, others have none. `weight`
    is that of the cross-entropy of a picture; `temperature` is in units of the pretrained model's latents times its
    `scaling_factor`.
    """

    names: tuple[str, ...] = ()
    weight: float = 100.0
    temperature: float = 0.2

    def __post_init__(self) -> None:
        require_positive(self, "latent_labels", "weight", "temperature")
        _require_labels("latent_labels.names", self.names)


@dataclass(frozen=True)
class ReconstructionValidation:
    """A grid of originals above reconstructions, and PSNR, every `steps`."""

    steps: int = 500
    num_images: int = 16

    def __post_init__(self) -> None:
        require_at_least(self, "validation", 1, "steps", "num_images")


@dataclass(frozen=True)
class AutoencoderTraining:
    """Everything `train_autoencoder.py` needs. `scaling_factor` null: measured on the data at the end.

    `pretrained`, a `vae/` folder, a model's folder or single file, or a hub id, is trained further in place of a new
    `autoencoder`; `freeze_encoder` then leaves its latents, their scale and shift as they are and trains the decoder
    alone. `latent_noise` makes the decoder bear stage two's errors: it is the tau of the noise levels |N(0, tau^2)|,
    one for each picture, in units of the pretrained model's latents times its `scaling_factor`, as stage two has them.
    An encoder that is trained with it learns latents that bear noise, as far as `loss.kl` keeps them from growing
    beyond it: levels as in the sigma-VAE (Sun et al. 2024, Multimodal Latent Language Modeling, section 2.3), beside a
    variance that is learnt. `latent_errors`, a file of `ldm-data errors`, holds the errors that stage two does make of
    these pictures; a decoder trained with a frozen encoder is given them in place of noise for a share
    `latent_errors_share` of the pictures. `latent_labels` give what decides a picture's look, such as its style, a part
    of a pretrained model's latents. With `codebook.num_vq_embeddings` the autoencoder is a `VQModel`, whose shape
    `autoencoder` gives.
    """

    output_dir: str
    seed: int = 0
    pretrained: str | None = None
    freeze_encoder: bool = False
    latent_noise: float = 0.0
    latent_errors: str | None = None
    latent_errors_share: float = 0.75
    latent_labels: LatentLabelsConfig = field(default_factory=LatentLabelsConfig)
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
        require_at_least(self, "", 1, "statistics_samples")
        require_at_least(self, "", 0, "latent_noise")
        require_positive(self, "", "scaling_factor")
        require(self.optimizer.type == "adamw", "`optimizer.type` is muon; stage one is trained by adamw")
        require(not self.training.ema_snapshots, "`training.ema_snapshots` is true; it is for train_ldm.py")
        self._check_pretrained()
        self._check_errors()
        self._check_labels()
        self._check_codebook()
        factor = 2 ** (len(self.autoencoder.block_out_channels) - 1)
        check_buckets(self.data, factor)
        require(
            not self.data.streaming or self.data.buckets.max_aspect_ratio == 1,
            f"`data.buckets.max_aspect_ratio` is {self.data.buckets.max_aspect_ratio} with `data.streaming` true; it "
            "must be 1, buckets need the sizes of all pictures beforehand",
        )
        require(
            self.data.resolution % factor == 0,
            f"`data.resolution` is {self.data.resolution}; with {len(self.autoencoder.block_out_channels)} "
            f"`autoencoder.block_out_channels` it must be a multiple of {factor}",
        )

    def _check_errors(self) -> None:
        share, data, plain = self.latent_errors_share, self.data, DataConfig()
        require(0 < share <= 1, f"`latent_errors_share` is {share}; it must lie in (0, 1]")
        require(
            self.latent_errors is None or self.freeze_encoder,
            f"`latent_errors` is {self.latent_errors!r} and `freeze_encoder` false; it must be true, the errors are "
            "those of the pretrained encoder's latents",
        )
        for name in ("random_flip", "center_crop", "min_crop", "streaming", "buckets"):
            require(
                self.latent_errors is None or getattr(data, name) == getattr(plain, name),
                f"`data.{name}` is {getattr(data, name)} with `latent_errors`; it must be {getattr(plain, name)}, the "
                "errors are those of every picture's middle square",
            )

    def _check_labels(self) -> None:
        labels, told = list(self.latent_labels.names), list(self.discriminator.labels)
        require(
            not labels or self.pretrained is not None,
            f"`latent_labels.names` is {labels} and `pretrained` null; it must be empty, the latents of a new "
            "autoencoder have no scale yet",
        )
        require(
            not labels or not self.freeze_encoder,
            f"`latent_labels.names` is {labels} and `freeze_encoder` true; it must be false, labels move the latents",
        )
        for name, words in (("latent_labels.names", labels), ("discriminator.labels", told)):
            require(
                not words or self.data.instance_prompt is None,
                f"`{name}` is {words} and `data.instance_prompt` {self.data.instance_prompt!r}; it must be null, or "
                "all pictures have the same label",
            )

    def _check_codebook(self) -> None:
        codes, shape, plain = self.codebook.num_vq_embeddings, self.autoencoder, AutoencoderConfig()
        require(
            self.pretrained is None or codes is None,
            f"`codebook.num_vq_embeddings` is {codes} and `pretrained` {self.pretrained!r}; it must be null, a "
            "pretrained model brings its own codebook or has none",
        )
        for name in ("shift_factor", "latents_mean", "latents_std", "use_quant_conv", "use_post_quant_conv"):
            require(
                codes is None or getattr(shape, name) == getattr(plain, name),
                f"`autoencoder.{name}` is {getattr(shape, name)} with `codebook.num_vq_embeddings` {codes}; it must be "
                f"{getattr(plain, name)}, a VQModel has no such choice",
            )

    def _check_pretrained(self) -> None:
        require(
            self.pretrained is None or self.autoencoder == AutoencoderConfig(),
            f"`pretrained` is {self.pretrained!r} and there is an `autoencoder` section; give one of the two, a "
            "pretrained model brings its own config",
        )
        require(
            self.pretrained is not None or not self.freeze_encoder,
            "`freeze_encoder` is true and `pretrained` null; a new encoder must be trained, so it must be false",
        )
        require(
            self.latent_noise == 0 or self.pretrained is not None,
            f"`latent_noise` is {self.latent_noise} and `pretrained` null; it must be 0, the latents of a new "
            "autoencoder have no scale yet",
        )
        require(
            self.latent_noise == 0 or self.freeze_encoder or self.loss.kl > 0,
            f"`latent_noise` is {self.latent_noise}, `freeze_encoder` false and `loss.kl` 0; it must be above 0, or "
            "the latents outgrow the noise",
        )
        require(
            self.scaling_factor is None or not self.freeze_encoder,
            f"`scaling_factor` is {self.scaling_factor} and `freeze_encoder` true; it must be null, the pretrained "
            "model's scale is kept",
        )
