"""Config dataclasses -> objects: the only place that chooses a class by a config's kind."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from autoencoder import (
    LPIPS,
    Autoencoder,
    AutoencoderKL,
    CodebookUpdate,
    DiscriminatorPenalties,
    EfficientNetFeatureDistance,
    LossState,
    LossWeights,
    PatchDiscriminator,
    ProjectedDiscriminator,
    VQConfig,
    VQModel,
)
from autoencoder.config import BlocksConfig
from autoencoder.perceptual import FeatureDistance
from conditioning import (
    ClipTextConfig,
    ClipTextEncoder,
    ClipTextModel,
    ClipTokenizer,
    DualTextEncoder,
    T5TextEncoder,
    TextEncoder,
    TransformersTextEncoder,
    read_open_clip,
    text_folders,
)
from ldm.config import (
    AutoencoderLossConfig,
    AutoencoderTraining,
    ClassifierTraining,
    ConfigError,
    DataConfig,
    DiscriminatorConfig,
    DualClip,
    LdmTraining,
    OpenClip,
    PerceptualConfig,
    PretrainedClip,
    PretrainedT5,
    PretrainedText,
    PretrainedTransformer,
    ScratchClip,
    TextEncoderConfig,
    check_buckets,
)
from ldm.data.batches import PixelBatch, Transform, pixel_batches, stream_batches
from ldm.data.buckets import Buckets
from ldm.data.fingerprint import encoder_hash
from ldm.data.instances import InstanceSource
from ldm.data.latent_errors import LatentErrors
from ldm.data.order import BatchPlan
from ldm.data.pixels import stacked
from ldm.data.sources import Columns, Source, Stream, open_source, open_stream
from ldm.data.transforms import BadImage
from ldm.networks import LatentClassifier, UNet
from ldm.pretrained import POOLED, POOLED_KEY, READ_ERRORS, pooled_inputs, read_vae, resolve
from ldm.process import Objective, TrainingNoise
from ldm.seeds import generator, seed_of
from ldm.tasks.bottleneck import Bottleneck, CodebookBottleneck, GaussianBottleneck
from ldm.tasks.labels import LatentLabels
from ldm.tasks.timesteps import FixedTimesteps, ImportanceTimesteps, TimestepDraw


def build_source(config: DataConfig, split: str, seed: int) -> Source:
    """The training or validation data of a config, with random access."""
    validation = split == config.validation_split
    limit = config.max_validation_samples if validation else config.max_train_samples
    if config.instance_prompt is not None:
        return InstanceSource(config.source, config.instance_prompt, limit)
    return open_source(
        (config.validation_source or config.source) if validation else config.source,
        split,
        config.resolution,
        Columns(config.image_column, config.caption_columns),
        limit,
        config.shapes_per_image,
        seed,
    )


def build_stream(config: DataConfig, split: str, seed: int) -> Stream:
    """The training or validation data of a config, to be read in order."""
    source = (config.validation_source or config.source) if split == config.validation_split else config.source
    columns = Columns(config.image_column, config.caption_columns)
    return open_stream(source, split, columns, seed, config.shuffle_buffer)


def build_data(config: DataConfig, split: str, seed: int) -> Source | Stream:
    """The same with random access, or as a stream where the config says so."""
    return build_stream(config, split, seed) if config.streaming else build_source(config, split, seed)


def build_transform(config: DataConfig, seed: int) -> Transform:
    """Resize, crop and flip as the config says."""
    buckets = build_buckets(config) if config.buckets.max_aspect_ratio > 1 else None
    return Transform(config.resolution, config.center_crop, config.random_flip, seed, config.min_crop, buckets)


def build_buckets(config: DataConfig) -> Buckets:
    """The picture sizes of a config; the square alone where its largest aspect ratio is 1."""
    return Buckets(config.resolution, config.buckets.step, config.buckets.max_aspect_ratio)


def build_validation(config: DataConfig, seed: int) -> Tensor:
    """The validation pictures [N, 3, R, R] in [-1, 1], cut from the middle, at most `max_validation_samples`."""
    transform = Transform(config.resolution, seed=seed)
    if not config.streaming:
        return stacked(build_source(config, config.validation_split, seed), transform)
    stream = build_stream(config, config.validation_split, seed)
    examples = (item for _, item in stream.examples(shuffle=False) if not isinstance(item, BadImage))
    limit = config.max_validation_samples
    return torch.stack([transform(item, 0, i) for i, item in enumerate(itertools.islice(examples, limit))])


def build_batches(
    config: DataConfig, plan: BatchPlan, seed: int, first_step: int, last_step: int
) -> Iterator[PixelBatch]:
    """Stage one's training batches for the given optimiser steps of this process."""
    transform = build_transform(config, seed)
    if config.streaming:
        return stream_batches(build_stream(config, config.split, seed), transform, plan, first_step, last_step)
    source = build_source(config, config.split, seed)
    return pixel_batches(source, transform, plan, seed, first_step, last_step, config.dataloader_num_workers)


def build_autoencoder(config: AutoencoderTraining) -> Autoencoder:
    """A new autoencoder, its weights a function of the seed, or the pretrained one, its encoder frozen where asked.

    Raises:
        ConfigError: the pretrained one cannot be read or had, or does not fit `data.resolution`.
    """
    seed, codes = seed_of(config.seed, "autoencoder"), config.codebook
    update = CodebookUpdate("loss" if config.freeze_encoder else codes.update, codes.decay)
    if config.pretrained is None:
        if codes.num_vq_embeddings is None:
            return AutoencoderKL.from_scratch(config.autoencoder, seed)
        return VQModel.from_scratch(vq_config(config), seed, update)
    try:
        vae = read_vae(resolve(config.pretrained), update=update).train()
    except ValueError as error:
        raise ConfigError(f"`pretrained`: {error}") from error
    if config.data.resolution % vae.downsample_factor:
        raise ConfigError(
            f"`data.resolution` is {config.data.resolution}; the autoencoder of `pretrained` needs a multiple of "
            f"{vae.downsample_factor}"
        )
    codebook = vae.quantize if isinstance(vae, VQModel) else None
    for frozen in (vae.encoder, vae.quant_conv, codebook) if config.freeze_encoder else ():
        if frozen is not None:
            frozen.requires_grad_(False)
    return vae


def vq_config(config: AutoencoderTraining) -> VQConfig:
    """The shape in `autoencoder` with the codebook in `codebook`.

    Raises:
        ConfigError: there is no codebook.
    """
    codes = config.codebook.num_vq_embeddings
    if codes is None:
        raise ConfigError("`codebook.num_vq_embeddings` is null; a VQModel needs a number")
    shape = {entry.name: getattr(config.autoencoder, entry.name) for entry in fields(BlocksConfig)}
    return VQConfig(**shape, num_vq_embeddings=codes, vq_embed_dim=config.codebook.vq_embed_dim)


def build_bottleneck(
    config: AutoencoderTraining, vae: Autoencoder, reduce_mean: Callable[[Tensor], Tensor]
) -> Bottleneck:
    """How the latents are regularised while the autoencoder trains.

    Raises:
        ConfigError: `latent_noise`, `latent_errors` or `latent_labels` for the latents of a codebook, a file that does
            not fit, or more labels than the latent channels can tell apart.
    """
    if isinstance(vae, VQModel):
        for name, value in (
            ("latent_noise", config.latent_noise),
            ("latent_errors", config.latent_errors),
            ("latent_labels.names", list(config.latent_labels.names)),
        ):
            if value:
                raise ConfigError(
                    f"`{name}` is {value}, but `pretrained` has a codebook, and it is for latents without; leave it out"
                )
        return CodebookBottleneck(vae, config.codebook.weight, config.codebook.commitment, reduce_mean)
    return GaussianBottleneck(
        config.loss.kl,
        vae.latent_channels,
        vae.downsample_factor,
        config.latent_noise / vae.config.scaling_factor,
        None if config.latent_errors is None else _latent_errors(config, vae, config.latent_errors).of,
        config.latent_errors_share,
        _latent_labels(config, vae) if config.latent_labels.names else None,
    )


def _latent_labels(config: AutoencoderTraining, vae: AutoencoderKL) -> LatentLabels:
    labels, channels = config.latent_labels, vae.latent_channels
    if len(labels.names) >= channels:
        raise ConfigError(
            f"`latent_labels.names` holds {len(labels.names)} labels; the {channels} latent channels of `pretrained` "
            f"tell at most {channels - 1} apart"
        )
    return LatentLabels(labels.names, labels.weight, labels.temperature / vae.config.scaling_factor)


def _latent_errors(config: AutoencoderTraining, vae: AutoencoderKL, path: str) -> LatentErrors:
    try:
        errors = LatentErrors(path)
    except ValueError as error:
        raise ConfigError(f"`latent_errors`: {error}") from error
    side = config.data.resolution // vae.downsample_factor
    shape = (vae.latent_channels, side, side)
    if errors.shape != shape:
        raise ConfigError(
            f"`latent_errors` is {path}, whose rows are {list(errors.shape)}; those of `pretrained` at "
            f"`data.resolution` {config.data.resolution} would be {list(shape)}"
        )
    if errors.encoder != encoder_hash(vae):
        raise ConfigError(
            f"`latent_errors` is {path}, made with another encoder than that of `pretrained` "
            f"{config.pretrained!r}; make it anew"
        )
    source = build_source(config.data, config.data.split, config.seed)
    if errors.data[1] != source.fingerprint():
        raise ConfigError(
            f"`latent_errors` is {path}, made of {errors.data[0]!r}, which is not what `data` has now, "
            f"{source.name!r} with {len(source)} pictures; its columns, its seed or its pictures differ: make it anew"
        )
    return errors


def build_discriminator(config: DiscriminatorConfig, seed: int) -> PatchDiscriminator | ProjectedDiscriminator:
    """The discriminator, its weights a function of the seed.

    Raises:
        ConfigError: the features of a projected one cannot be had, saying what to do.
    """
    draws = generator(seed, "discriminator")
    if config.type == "patch":
        shape = config.base_channels, config.num_layers, config.norm, config.spectral_norm
        return PatchDiscriminator(3, *shape, draws, len(config.labels))
    try:
        return ProjectedDiscriminator(EfficientNetFeatureDistance(), config.base_channels, draws, len(config.labels))
    except ValueError as error:
        raise ConfigError(f"`discriminator.type` is projected: {error}") from error


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
        discriminator_warmup=config.discriminator_warmup,
    )


def build_penalties(config: DiscriminatorConfig) -> DiscriminatorPenalties:
    """The weights of the discriminator's regularisers."""
    return DiscriminatorPenalties(config.r1, config.r1_every, config.lecam)


def build_loss_state(config: AutoencoderLossConfig) -> LossState:
    """What the stage-one losses learn and remember, at its start."""
    return LossState(config.logvar_init, config.learn_logvar)


def build_text_encoder(
    config: TextEncoderConfig, captions: Iterable[str], seed: int, saved_tokenizer: Path
) -> TextEncoder:
    """A pretrained text encoder, or a new one whose vocabulary is learnt from the captions.

    The learnt vocabulary is kept in `saved_tokenizer`, so that a resumed run reads the same one.

    Raises:
        ConfigError: the pretrained one cannot be read or had.
    """
    try:
        match config:
            case ScratchClip():
                return _new_clip(config, captions, seed, saved_tokenizer)
            case PretrainedClip():
                tower, tokenizer = _clip_parts(config.path)
                return ClipTextEncoder(tokenizer, tower.without_last(config.clip_skip), trainable=config.trainable)
            case OpenClip():
                encoder = read_open_clip(config.name, config.pretrained)
                tower = encoder.model.without_last(config.clip_skip)
                encoder = ClipTextEncoder(encoder.tokenizer, tower, trainable=config.trainable)
                return encoder.restricted(captions) if config.vocabulary == "captions" else encoder
            case DualClip():
                return _dual_clip(config)
            case PretrainedT5():
                parts = text_folders(resolve(config.path))
                return T5TextEncoder.from_pretrained(*parts, config.max_length, config.trainable)
            case PretrainedText():
                raise ConfigError("`text_encoder.type` is pretrained, but there is no `pretrained`, whose it would be")
            case PretrainedTransformer():
                parts = text_folders(resolve(config.path))
                return TransformersTextEncoder.from_pretrained(*parts, config.max_length, config.trainable)
    except READ_ERRORS as error:
        raise ConfigError(f"`text_encoder`: {error}") from error
    raise ConfigError(f"`text_encoder.type` {type(config).__name__} is not known")


def _clip_parts(path: str, suffix: str = "") -> tuple[ClipTextModel, ClipTokenizer]:
    model, tokenizer = text_folders(resolve(path), suffix)
    return ClipTextModel.from_pretrained(model), ClipTokenizer.from_pretrained(tokenizer)


def _dual_clip(config: DualClip) -> DualTextEncoder:
    """The penultimate states of both towers without the final norm, and the second one's projection, as in SDXL."""
    second = _clip_parts(config.path, "_2") if config.second_path is None else _clip_parts(config.second_path)
    first, last = (
        ClipTextEncoder(tokenizer, tower, 1, config.trainable, final_norm=False)
        for tower, tokenizer in (_clip_parts(config.path), second)
    )
    return DualTextEncoder(first, last)


def _new_clip(config: ScratchClip, captions: Iterable[str], seed: int, saved_tokenizer: Path) -> ClipTextEncoder:
    if not (saved_tokenizer / "tokenizer_config.json").exists():
        ClipTokenizer.train(captions, config.vocab_size, config.max_length).save_pretrained(saved_tokenizer)
    tokenizer = ClipTokenizer.from_pretrained(saved_tokenizer)
    text = ClipTextConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=4 * config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return ClipTextEncoder(tokenizer, ClipTextModel.from_scratch(text, generator(seed, "text_encoder")), trainable=True)


def build_unet(config: LdmTraining, latent_channels: int, text_encoder: TextEncoder) -> UNet:
    """A new U-Net, its weights a function of the seed.

    Raises:
        ConfigError: when its channels do not fit the autoencoder or its context does not fit the text encoder.
    """
    unet, latents = config.unet, "autoencoder's latent channels"
    learned = config.diffusion.variance_type == "learned_range"
    doubled = f"double of the {latents} under `diffusion.variance_type` learned_range"
    fitting = {
        "in_channels": (latents, latent_channels),
        "out_channels": (doubled if learned else latents, latent_channels * (1 + learned)),
        "cross_attention_dim": ("text encoder's width", text_encoder.context_dim),
        POOLED_KEY: (POOLED, pooled_inputs(unet, text_encoder)),
    }
    for key in ("class_embed_type", "num_class_embeds"):
        if getattr(unet, key) is not None:
            raise ConfigError(f"`unet.{key}` is {getattr(unet, key)}; it must be null, stage two has no classes")
    for key, (source, wanted) in fitting.items():
        if getattr(unet, key) != wanted:
            raise ConfigError(f"`unet.{key}` is {getattr(unet, key)}, but the {source} is {wanted}")
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
    check_buckets(config.data, multiple)
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
            return FixedTimesteps(objective, config.objective.curriculum_steps, config.objective.curriculum_start)
        case "importance":
            return ImportanceTimesteps(config.diffusion.num_train_timesteps, gather)


def vlb_weight(config: LdmTraining) -> float | None:
    """The bound's part in the loss, None where the variance is fixed."""
    return config.objective.vlb_weight if config.diffusion.variance_type == "learned_range" else None
