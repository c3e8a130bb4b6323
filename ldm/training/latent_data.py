"""Stage two's data: the training set encoded once by all processes, and a few validation pictures encoded in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from autoencoder import Autoencoder
from ldm.config import DataConfig, LdmTraining
from ldm.data.batches import SkipCounter, Transform
from ldm.data.fingerprint import weights_hash
from ldm.data.latent_batches import batches_with_prior, latent_batches
from ldm.data.latents import CacheSettings, LatentBatch, LatentCache
from ldm.data.order import BatchPlan
from ldm.data.sources import Source, Stream, every_sample
from ldm.data.transforms import BadImage
from ldm.training.encoding import encode_source, encoder

TRIAL_SAMPLES = 64


def trial_data(data: DataConfig) -> DataConfig:
    """Few enough samples for a dry run."""
    count = min(data.max_train_samples or TRIAL_SAMPLES, TRIAL_SAMPLES)
    return dataclasses.replace(data, max_train_samples=count, streaming=False)


def encoded_data(
    source: Source | Stream,
    config: LdmTraining,
    vae: Autoencoder,
    folder: Path,
    accelerator: Accelerator,
    skips: SkipCounter,
) -> LatentCache:
    """The latent cache of the training data; encoded by all processes together unless a valid one exists."""
    data = config.data
    settings = CacheSettings(
        source.name,
        source.fingerprint(),
        data.resolution,
        data.center_crop,
        data.random_flip,
        weights_hash(vae),
        config.latents.dtype,
        data.buckets.step,
        data.buckets.max_aspect_ratio,
    )
    sizes = config.latents.batch_size, config.latents.shard_size
    return encode_source(source, folder, settings, vae, accelerator, *sizes, skips)


def training_batches(
    cache: LatentCache, prior: LatentCache | None, config: LdmTraining, plan: BatchPlan, first: int, last: int
) -> Iterator[LatentBatch]:
    """The micro-batches of this process, with the class pictures among them where there are any."""
    if prior is None:
        return latent_batches(cache, plan, config.seed, first, last)
    weight = config.prior_preservation.prior_loss_weight
    return batches_with_prior(cache, prior, weight, plan, config.seed, first, last)


def validation_latents(source: Source | Stream, config: LdmTraining, vae: Autoencoder) -> LatentBatch | None:
    """The first readable pictures of a source and the first caption of each; None where the config wants none.

    Raises:
        ValueError: none of the pictures can be read.
    """
    count = config.validation.num_loss_samples
    if count == 0:
        return None
    transform = Transform(config.data.resolution, seed=config.seed)
    images: list[Tensor] = []
    captions: list[str] = []
    for index, item in enumerate(every_sample(source)):
        if len(images) == count:
            break
        if isinstance(item, BadImage):
            continue
        images.append(transform(item, 0, index))
        captions.append(item.captions[0])
    if not images:
        raise ValueError(
            f"{source.name} has no readable picture to validate on; validation.num_loss_samples 0 needs none"
        )
    moments = encoder(vae, config.latents.batch_size)(torch.stack(images))
    return LatentBatch(moments, tuple(captions), tuple(range(len(images))))
