"""Encoding a data set into a latent cache, by all processes together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from autoencoder import Autoencoder
from ldm.data.batches import SkipCounter
from ldm.data.cache_files import check_settings
from ldm.data.latent_writing import build_cache, finish_cache
from ldm.data.latents import CacheSettings, LatentCache, is_complete
from ldm.data.sources import Source, Stream


def encode_source(
    source: Source | Stream,
    folder: Path,
    settings: CacheSettings,
    vae: Autoencoder,
    accelerator: Accelerator,
    batch_size: int,
    shard_size: int,
    skips: SkipCounter,
) -> LatentCache:
    """The cache of a source in `folder`; what is missing of it is encoded, a shard by one process.

    Raises:
        StaleCache: when the folder holds entries of other settings.
        TooManyBadSamples: when more pictures than allowed cannot be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with accelerator.main_process_first():
        check_settings(folder, settings)
    if is_complete(folder):
        cache = LatentCache(folder, settings)
        skips.add(cache.read, cache.skipped)
        return cache
    total = None if isinstance(source, Stream) else len(source) // accelerator.num_processes
    with tqdm(total=total, desc="encoding", unit="picture", disable=not accelerator.is_main_process) as bar:
        encode, place = encoder(vae, batch_size), (accelerator.process_index, accelerator.num_processes)
        shards = build_cache(folder, source, settings, encode, batch_size, shard_size, skips, *place, bar.update)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish_cache(folder, shards)
    accelerator.wait_for_everyone()
    return LatentCache(folder, settings)


def encoding_processes(device: str | None) -> Accelerator:
    """The processes of this launch, for encoding alone.

    Raises:
        ValueError: for a device other than `cpu`; where there are GPUs accelerate gives one to each process.
    """
    if device not in (None, "cpu"):
        raise ValueError(f"--device is {device!r}; it must be cpu, or be left out for what accelerate chooses")
    return Accelerator(cpu=device == "cpu")


def encoder(vae: Autoencoder, batch_size: int) -> Callable[[Tensor], Tensor]:
    """Pixels [N, 3, H, W] -> moments [N, 2C, h, w] on the CPU, `batch_size` at a time."""
    device = next(vae.parameters()).device

    def encode(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([vae.moments(chunk.to(device)).cpu() for chunk in torch.split(x, batch_size)])

    return encode
