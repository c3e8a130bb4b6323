"""Config dataclasses -> objects: the only place that chooses a class by a config's kind."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from autoencoder import (
    LPIPS,
    AutoencoderKL,
    DiscriminatorPenalties,
    EfficientNetFeatureDistance,
    LossState,
    LossWeights,
    PatchDiscriminator,
)
from autoencoder.perceptual import FeatureDistance
from conditioning import ClipTextConfig, ClipTextEncoder, ClipTextModel, ClipTokenizer
from ldm.config import (
    AutoencoderLossConfig,
    AutoencoderTraining,
    ClassifierTraining,
    ConfigError,
    DataConfig,
    DiscriminatorConfig,
    LdmTraining,
    PerceptualConfig,
    PretrainedClip,
    ScratchClip,
    TextEncoderConfig,
)
from ldm.data.batches import PixelBatch, Transform, pixel_batches, stream_batches
from ldm.data.order import BatchPlan
from ldm.data.pixels import stacked
from ldm.data.sources import Columns, Source, open_source, open_stream
from ldm.data.transforms import BadImage
from ldm.networks import LatentClassifier, UNet
from ldm.pretrained import read_vae, resolve
from ldm.process import Objective, TrainingNoise
from ldm.seeds import generator, seed_of
from ldm.tasks.timesteps import FixedTimesteps, ImportanceTimesteps, TimestepDraw


def build_source(config: DataConfig, split: str, seed: int) -> Source:
    """The training or validation data of a config, with random access."""
    validation = split == config.validation_split
    return open_source(
        (config.validation_source or config.source) if validation else config.source,
        split,
        config.resolution,
        Columns(config.image_column, config.caption_columns),
        config.max_validation_samples if validation else config.max_train_samples,
        config.shapes_per_image,
        seed,
    )


def build_transform(config: DataConfig, seed: int) -> Transform:
    """Resize, crop and flip as the config says."""
    return Transform(config.resolution, config.center_crop, config.random_flip, seed)


def build_validation(config: DataConfig, seed: int) -> Tensor:
    """The validation pictures [N, 3, R, R] in [-1, 1], cut from the middle, at most `max_validation_samples`."""
    transform = Transform(config.resolution, seed=seed)
    if not config.streaming:
        return stacked(build_source(config, config.validation_split, seed), transform)
    columns = Columns(config.image_column, config.caption_columns)
    source = config.validation_source or config.source
    stream = open_stream(source, config.validation_split, columns, seed, config.shuffle_buffer)
    examples = (item for _, item in stream.examples(shuffle=False) if not isinstance(item, BadImage))
    limit = config.max_validation_samples
    return torch.stack([transform(item, 0, i) for i, item in enumerate(itertools.islice(examples, limit))])


def build_batches(
    config: DataConfig, plan: BatchPlan, seed: int, first_step: int, last_step: int
) -> Iterator[PixelBatch]:
    """Stage one's training batches for the given optimiser steps of this process."""
    transform = build_transform(config, seed)
    if config.streaming:
        columns = Columns(config.image_column, config.caption_columns)
        stream = open_stream(config.source, config.split, columns, seed, config.shuffle_buffer)
        return stream_batches(stream, transform, plan, first_step, last_step)
    source = build_source(config, config.split, seed)
    return pixel_batches(source, transform, plan, seed, first_step, last_step, config.dataloader_num_workers)


def build_autoencoder(config: AutoencoderTraining) -> AutoencoderKL:
    """A new autoencoder, its weights a function of the seed, or the pretrained one, its encoder frozen where asked.

    Raises:
        ConfigError: the pretrained one cannot be read or had, or does not fit `data.resolution`.
    """
    if config.pretrained is None:
        return AutoencoderKL.from_scratch(config.autoencoder, seed_of(config.seed, "autoencoder"))
    try:
        vae = read_vae(resolve(config.pretrained)).train()
    except ValueError as error:
        raise ConfigError(f"`pretrained`: {error}") from error
    if config.data.resolution % vae.downsample_factor:
        raise ConfigError(
            f"`data.resolution` is {config.data.resolution}; the autoencoder of `pretrained` needs a multiple of "
            f"{vae.downsample_factor}"
        )
    for frozen in (vae.encoder, vae.quant_conv) if config.freeze_encoder else ():
        if frozen is not None:
            frozen.requires_grad_(False)
    return vae


def build_discriminator(config: DiscriminatorConfig, seed: int) -> PatchDiscriminator:
    """A patch discriminator, its weights a function of the seed."""
    return PatchDiscriminator(
        3,
        config.base_channels,
        config.num_layers,
        config.norm,
        config.spectral_norm,
        generator(seed, "discriminator"),
    )


def build_perceptual(config: PerceptualConfig) -> FeatureDistance | None:
    """The frozen perceptual network.

    Raises:
        ConfigError: when its weights cannot be had, saying what to do.
    """
    try:
        match config.type:
            case "efficientnet_lite0":
                return EfficientNetFeatureDistance()
            case "lpips_vgg" | "lpips_alex" | "lpips_squeeze":
                return LPIPS(config.type.removeprefix("lpips_"), config.weights)
            case "none":
                return None
    except ValueError as error:
        raise ConfigError(f"`perceptual.type` {config.type}: {error}") from error


def build_loss_weights(config: AutoencoderLossConfig) -> LossWeights:
    """The stage-one loss weights."""
    return LossWeights(
        reconstruction=config.reconstruction,
        perceptual=config.perceptual,
        kl=config.kl,
        discriminator=config.discriminator,
        discriminator_loss=config.discriminator_loss,
        discriminator_start=config.discriminator_start,
    )


def build_penalties(config: DiscriminatorConfig) -> DiscriminatorPenalties:
    """The weights of the discriminator's regularisers."""
    return DiscriminatorPenalties(config.r1, config.r1_every, config.lecam)


def build_loss_state(config: AutoencoderLossConfig) -> LossState:
    """What the stage-one losses learn and remember, at its start."""
    return LossState(config.logvar_init, config.learn_logvar)


def build_text_encoder(
    config: TextEncoderConfig, captions: Iterable[str], seed: int, saved_tokenizer: Path
) -> ClipTextEncoder:
    """A pretrained text tower, or a new one whose vocabulary is learnt from the captions.

    The learnt vocabulary is kept in `saved_tokenizer`, so that a resumed run reads the same one.
    """
    match config:
        case PretrainedClip():
            folder = resolve(config.path)
            parts = [folder / "text_encoder", folder / "tokenizer"]
            model, tokenizer = parts if all(p.is_dir() for p in parts) else (folder, folder)
            tower = ClipTextModel.from_pretrained(model).without_last(config.clip_skip)
            return ClipTextEncoder(ClipTokenizer.from_pretrained(tokenizer), tower, trainable=config.trainable)
        case ScratchClip():
            if not (saved_tokenizer / "tokenizer_config.json").exists():
                ClipTokenizer.train(captions, config.vocab_size, config.max_length).save_pretrained(saved_tokenizer)
            tokenizer_ = ClipTokenizer.from_pretrained(saved_tokenizer)
            text = ClipTextConfig(
                vocab_size=tokenizer_.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=4 * config.hidden_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                max_position_embeddings=config.max_length,
                bos_token_id=tokenizer_.bos_token_id,
                eos_token_id=tokenizer_.eos_token_id,
                pad_token_id=tokenizer_.pad_token_id,
            )
            model_ = ClipTextModel.from_scratch(text, generator(seed, "text_encoder"))
            return ClipTextEncoder(tokenizer_, model_, trainable=True)
        case _:
            raise ConfigError(f"`text_encoder.type` {type(config).__name__} is not clip or clip_from_scratch")


def build_unet(config: LdmTraining, latent_channels: int, context_width: int) -> UNet:
    """A new U-Net, its weights a function of the seed.

    Raises:
        ConfigError: when its channels do not fit the autoencoder or its context does not fit the text encoder.
    """
    unet, latents = config.unet, "autoencoder's latent channels"
    learned = config.diffusion.variance_type == "learned_range"
    doubled = f"double of the {latents} under `diffusion.variance_type` learned_range"
    for name, value, other, source in (
        ("in_channels", unet.in_channels, latent_channels, latents),
        ("out_channels", unet.out_channels, latent_channels * (1 + learned), doubled if learned else latents),
        ("cross_attention_dim", unet.cross_attention_dim, context_width, "text encoder's width"),
    ):
        if value != other:
            raise ConfigError(f"`unet.{name}` is {value}, but the {source} is {other}")
    return UNet.from_scratch(unet, generator(config.seed, "unet"))


def build_classifier(config: ClassifierTraining, latent_channels: int) -> LatentClassifier:
    """A new classifier of noisy latents, its weights a function of the seed.

    Raises:
        ConfigError: when its channels do not fit the autoencoder.
    """
    channels = config.classifier.in_channels
    if channels != latent_channels:
        raise ConfigError(
            f"`classifier.in_channels` is {channels}, but the autoencoder's latent channels is {latent_channels}"
        )
    return LatentClassifier.from_scratch(config.classifier, generator(config.seed, "classifier"))


def check_resolution(config: LdmTraining, downsample_factor: int) -> None:
    """Refuses, before any training, a picture size at which the first validation would fail.

    Raises:
        ConfigError: when autoencoder and U-Net together cannot halve it often enough.
    """
    multiple = downsample_factor * 2 ** (len(config.unet.block_out_channels) - 1)
    if config.data.resolution % multiple:
        raise ConfigError(
            f"`data.resolution` is {config.data.resolution}; this autoencoder and U-Net need a multiple of {multiple}"
        )


def build_objective(config: LdmTraining) -> Objective:
    """The training objective over the config's diffusion process."""
    chosen = config.objective
    return Objective(
        config.diffusion.schedule(),
        config.diffusion.prediction_type,
        snr_gamma=chosen.snr_gamma,
        timestep_sampling="uniform" if chosen.timestep_sampling == "importance" else chosen.timestep_sampling,
        logit_mean=chosen.logit_mean,
        logit_std=chosen.logit_std,
        weighting=chosen.weighting,
        p2_gamma=chosen.p2_gamma,
        p2_k=chosen.p2_k,
        time_shift=chosen.time_shift,
    )


def build_training_noise(config: LdmTraining) -> TrainingNoise:
    """The noise of training, with what the config changes about it."""
    return TrainingNoise(config.objective.noise_offset, config.objective.input_perturbation)


def build_timesteps(config: LdmTraining, objective: Objective, gather: Callable[[Tensor], Tensor]) -> TimestepDraw:
    """How timesteps are drawn; `gather` concatenates over all processes."""
    match config.objective.timestep_sampling:
        case "uniform" | "logit_normal":
            return FixedTimesteps(objective)
        case "importance":
            return ImportanceTimesteps(config.diffusion.num_train_timesteps, gather)


def vlb_weight(config: LdmTraining) -> float | None:
    """The bound's part in the loss, None where the variance is fixed."""
    return config.objective.vlb_weight if config.diffusion.variance_type == "learned_range" else None
