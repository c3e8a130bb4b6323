"""The configuration of `train_ldm.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ldm.config.adapters import (
    AdapterConfig,
    LoraConfig,
    NoAdapter,
    PriorPreservationConfig,
    TextualInversionConfig,
)
from ldm.config.common import (
    ConfigError,
    DataConfig,
    OptimizerConfig,
    TrainingConfig,
    require,
    require_at_least,
    require_positive,
)
from ldm.config.text_encoders import ScratchClip, TextEncoderConfig
from ldm.networks.config import UNetConfig
from ldm.process.diffusion_config import DiffusionConfig
from ldm.process.flow import FlowConfig
from ldm.process.ve import VeConfig
from ldm.process.weighting import Weighting
from ldm.sampling import named_sampler


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
        require_at_least(self, "validation", 1, "steps", "num_inference_steps")
        require_at_least(self, "validation", 0, "num_loss_samples")
        try:
            named_sampler(self.sampler)
        except ValueError as error:
            raise ConfigError(f"`validation.{str(error).replace(' is ', '` is ', 1)}") from error


@dataclass(frozen=True)
class ObjectiveConfig:
    """Which noise levels are trained and how their errors are weighted.

    `snr_gamma` is Min-SNR's and excludes another `weighting`; `p2_gamma` and `p2_k` belong to `p2`. `time_shift` above
    1 trains the noisy timesteps more, `noise_offset` and `input_perturbation` are strengths of `ldm.process.noise`, and
    `vlb_weight` belongs to `diffusion.variance_type` learned_range. In the first `curriculum_steps` only the noisiest
    part of the timesteps is drawn, growing from `curriculum_start` to all of them; see `ldm.tasks.timesteps`.
    """

    snr_gamma: float | None = None
    weighting: Weighting = "none"
    p2_gamma: float = 1.0
    p2_k: float = 1.0
    timestep_sampling: Literal["uniform", "logit_normal", "importance"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    time_shift: float = 1.0
    curriculum_steps: int = 0
    curriculum_start: float = 0.02
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    vlb_weight: float = 0.001
    proportion_empty_prompts: float = 0.1

    def __post_init__(self) -> None:
        require_positive(
            self, "objective", "snr_gamma", "logit_std", "p2_gamma", "p2_k", "time_shift", "curriculum_start"
        )
        require_at_least(self, "objective", 0, "noise_offset", "input_perturbation", "vlb_weight", "curriculum_steps")
        require(
            self.curriculum_start <= 1,
            f"`objective.curriculum_start` is {self.curriculum_start}; it must lie in (0, 1], a part of the timesteps",
        )
        require(
            self.snr_gamma is None or self.weighting == "none",
            f"`objective.weighting` is {self.weighting} with `objective.snr_gamma` {self.snr_gamma}; it must be none, "
            "`snr_gamma` is a weighting of its own",
        )
        require(
            self.timestep_sampling != "importance" or self.time_shift == 1,
            f"`objective.time_shift` is {self.time_shift} with `objective.timestep_sampling` importance; it must be 1, "
            "importance sampling finds its own timesteps",
        )
        require(
            self.timestep_sampling != "importance" or self.curriculum_steps == 0,
            f"`objective.curriculum_steps` is {self.curriculum_steps} with `objective.timestep_sampling` importance; "
            "it must be 0, importance sampling finds its own timesteps",
        )
        require(
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
        require_at_least(self, "latents", 1, "batch_size", "shard_size")


@dataclass(frozen=True)
class LdmTraining:
    """Everything `train_ldm.py` needs. `autoencoder` is a model folder, a `vae/` folder or a hub id.

    `pretrained`, a model folder, single file or hub id, brings autoencoder, text encoder, U-Net and process with it;
    `revision` is a branch, tag or commit of that hub id, `variant` which of its weight files are read, such as fp16.
    """

    output_dir: str
    autoencoder: str | None = None
    pretrained: str | None = None
    revision: str | None = None
    variant: str | None = None
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    latents: LatentCacheConfig = field(default_factory=LatentCacheConfig)
    text_encoder: TextEncoderConfig = field(default_factory=ScratchClip)
    unet: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig | FlowConfig | VeConfig = field(default_factory=DiffusionConfig)
    adapter: AdapterConfig = field(default_factory=NoAdapter)
    prior_preservation: PriorPreservationConfig = field(default_factory=PriorPreservationConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    validation: SampleValidation = field(default_factory=SampleValidation)

    def __post_init__(self) -> None:
        require(
            self.data.center_crop,
            f"`data.center_crop` is {self.data.center_crop}; stage two encodes every picture once, so it must be true",
        )
        require(
            self.data.min_crop == 1,
            f"`data.min_crop` is {self.data.min_crop}; stage two encodes every picture once, so it must be 1",
        )
        require(
            not self.latents.cache_text or not getattr(self.text_encoder, "trainable", self.pretrained is None),
            "`latents.cache_text` is true, but the text encoder is trained; it must be false, or "
            "`text_encoder.trainable` false where the type has it",
        )
        steps, trained = self.validation.num_inference_steps, self.diffusion.num_train_timesteps
        require(
            steps <= trained,
            f"`validation.num_inference_steps` is {steps}; `diffusion.num_train_timesteps` allows at most {trained}",
        )
        self._check_timesteps()
        self._check_pretrained()

    def _check_pretrained(self) -> None:
        require(
            (self.autoencoder is None) != (self.pretrained is None),
            f"`autoencoder` is {self.autoencoder!r} and `pretrained` {self.pretrained!r}; one of the two must name a "
            "model, for a training from scratch or from that model",
        )
        for name in ("revision", "variant"):
            require(
                self.pretrained is not None or getattr(self, name) is None,
                f"`{name}` is {getattr(self, name)!r} without `pretrained`, whose it would be",
            )
        require(
            self.pretrained is not None or isinstance(self.adapter, NoAdapter),
            "`adapter` is given without `pretrained`; it needs a model to adapt",
        )
        require(
            isinstance(self.adapter, NoAdapter) or self.optimizer.type == "adamw",
            f"`optimizer.type` is {self.optimizer.type} with an `adapter`; it must be adamw",
        )
        require(
            isinstance(self.adapter, LoraConfig | NoAdapter) or not self.latents.cache_text,
            "`latents.cache_text` is true, but `adapter` learns a token of the text encoder; it must be false",
        )
        require(
            isinstance(self.adapter, NoAdapter) or not self.training.ema_snapshots,
            "`training.ema_snapshots` is true with an `adapter`; another average is made of whole networks only",
        )
        if self.prior_preservation.wanted:
            self._check_prior()

    def _check_prior(self) -> None:
        batch, ratio = self.training.train_batch_size, self.data.buckets.max_aspect_ratio
        require(
            self.pretrained is not None,
            "`prior_preservation` names class pictures without `pretrained`, the model that they keep as it is",
        )
        require(
            batch % 2 == 0,
            f"`training.train_batch_size` is {batch} with `prior_preservation`, whose pictures are half "
            "of it; it must be even",
        )
        require(
            ratio == 1,
            f"`data.buckets.max_aspect_ratio` is {ratio} with `prior_preservation`; it must be 1",
        )
        require(
            not self.latents.cache_text,
            "`latents.cache_text` is true with `prior_preservation`; it must be false",
        )
        taught = self.prior_preservation.target == "model"
        require(
            not taught or not isinstance(self.adapter, TextualInversionConfig),
            "`prior_preservation.target` is model with `adapter.type` textual_inversion, which changes no caption but "
            "its token's; it must be picture",
        )

    def _check_timesteps(self) -> None:
        sampling, shift = self.objective.timestep_sampling, self.objective.time_shift
        require(
            sampling != "importance" or not isinstance(self.diffusion, FlowConfig),
            "`objective.timestep_sampling` is importance with `diffusion.type` flow, whose times are continuous; it "
            "must be uniform or logit_normal",
        )
        require(
            self.diffusion.variance_type != "learned_range" or self.objective.curriculum_steps == 0,
            f"`objective.curriculum_steps` is {self.objective.curriculum_steps} with `diffusion.variance_type` "
            "learned_range, whose bound is a sum over all timesteps; it must be 0",
        )
        require(
            self.diffusion.variance_type != "learned_range" or (sampling != "logit_normal" and shift == 1),
            f"`objective.timestep_sampling` is {sampling} and `objective.time_shift` {shift} with "
            "`diffusion.variance_type` learned_range, whose bound is a sum over all timesteps; they must be uniform or "
            "importance, and 1",
        )
