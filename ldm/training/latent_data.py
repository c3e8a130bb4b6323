"""Stage two's data: the training set encoded once by all processes, and a few validation pictures encoded in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from autoencoder import Autoencoder
from ldm.config import DataConfig, LdmTraining
from ldm.data.batches import SkipCounter, Transform
from ldm.data.latents import (
    CacheSettings,
    LatentBatch,
    LatentCache,
    build_cache,
    check_settings,
    finish_cache,
    is_complete,
    shard_count,
)
from ldm.data.sources import Source
from ldm.data.transforms import BadImage
from ldm.training.run_dir import weights_hash

TRIAL_SAMPLES = 64


def trial_data(data: DataConfig) -> DataConfig:
    """Few enough samples for a dry run."""
    return dataclasses.replace(data, max_train_samples=min(data.max_train_samples or TRIAL_SAMPLES, TRIAL_SAMPLES))


def encoded_data(
    source: Source, config: LdmTraining, vae: Autoencoder, folder: Path, accelerator: Accelerator, skips: SkipCounter
) -> LatentCache:
    """The latent cache of the training data; encoded by all processes together unless a valid one exists."""
    settings = CacheSettings(
        source=source.name,
        num_samples=len(source),
        resolution=config.data.resolution,
        center_crop=config.data.center_crop,
        random_flip=config.data.random_flip,
        autoencoder=weights_hash(vae),
        dtype=config.latents.dtype,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with accelerator.main_process_first():
        check_settings(folder, settings)
    if not is_complete(folder):
        batch_size, size = config.latents.batch_size, config.latents.shard_size
        rank, world = accelerator.process_index, accelerator.num_processes
        with tqdm(total=len(source), desc="encoding", disable=not accelerator.is_main_process) as bar:
            encode = _encoder(vae, batch_size)
            build_cache(folder, source, settings, encode, batch_size, size, skips, rank, world, bar.update)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            finish_cache(folder, shard_count(len(source), size))
        accelerator.wait_for_everyone()
    return LatentCache(folder, settings)


def _encoder(vae: Autoencoder, batch_size: int) -> Callable[[Tensor], Tensor]:
    """Pixels [N, 3, H, W] -> moments [N, 2C, h, w] on the CPU, `batch_size` at a time."""
    device = next(vae.parameters()).device

    def encode(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([vae.moments(chunk.to(device)).cpu() for chunk in torch.split(x, batch_size)])

    return encode


def validation_latents(source: Source, config: LdmTraining, vae: Autoencoder) -> LatentBatch | None:
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
    for index in range(len(source)):
        if len(images) == count:
            break
        try:
            example = source[index]
            images.append(transform(example, 0, index))
        except BadImage:
            continue
        captions.append(example.captions[0])
    if not images:
        raise ValueError(
            f"{source.name} has no readable picture to validate on; validation.num_loss_samples 0 needs none"
        )
    moments = _encoder(vae, config.latents.batch_size)(torch.stack(images))
    return LatentBatch(moments, tuple(captions), tuple(range(len(images))))
