"""What a latent cache costs: memory while it is written, opening time, memory and time while it is read.

    python benchmarks/latent_cache.py write [--pictures 20000]
    python benchmarks/latent_cache.py read [--entries 1000000]

`write` encodes built-in shapes at 64 px with the shapes model. `read` makes a cache of random latents, 8 x 8 x 8
and so one kilobyte each, opens it cold, draws a first batch, then every entry once in training batches of 32, and sets
the time of a batch beside that of a training step of a small U-Net. Memory is Linux's; what is written goes to a
temporary folder and is deleted. Ends with 1 if memory or opening time is over its limit, or reading over its share.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ldm.data.batches import SkipCounter
from ldm.data.cache_files import write_tensors, write_text
from ldm.data.latent_batches import latent_batches
from ldm.data.latent_shards import ShardBuffer
from ldm.data.latent_writing import build_cache, finish_cache
from ldm.data.latents import CacheSettings, LatentCache
from ldm.data.order import BatchPlan
from ldm.data.sources import open_source
from ldm.networks import UNet, UNetConfig
from ldm.pretrained import BUNDLED, read_vae
from ldm.training.encoding import encoder

MIB = 2**20
WRITE_MIB, READ_MIB, OPEN_SECONDS, READ_SHARE = 1536, 500, 2.0, 0.03
"""Limits of `write` above the model's memory, and of `read`: memory, opening, and its part of a training step."""
SHARD = 8192
SETTINGS = CacheSettings("synthetic", "synthetic", 32, True, False, "none", "float16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("write", "read"))
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--entries", type=int, default=1_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        good = written(Path(folder), args.pictures) if args.part == "write" else read(Path(folder), args.entries)
    sys.exit(0 if good else 1)


def written(folder: Path, count: int) -> bool:
    """Prints the peak memory above what the model needs for one batch; whether it is within its limit."""
    encode, source = encoder(read_vae(BUNDLED["shapes"]), 16), open_source("shapes", "train", 64, max_samples=count)
    encode(torch.zeros(16, 3, 64, 64))
    before = reset_peak()
    settings = CacheSettings(source.name, source.fingerprint(), 64, True, False, "bundled", "float16")
    started = time.process_time()
    finish_cache(folder, build_cache(folder, source, settings, encode, 16, SHARD, SkipCounter(0.0)))
    seconds = time.process_time() - started
    size = sum(path.stat().st_size for path in folder.iterdir()) / MIB
    print(f"{count} pictures: {seconds:.0f} s of processor time, {size:.0f} MiB on disk")
    peak = (memory("VmHWM") - before) / MIB
    print(f"peak memory {peak:.0f} MiB above the model's")
    return peak < WRITE_MIB


def read(folder: Path, entries: int) -> bool:
    """Prints opening time, and memory and time of drawing every entry once; whether all are within their limits."""
    synthetic(folder, entries)
    for path in folder.glob("*.safetensors"):
        evict(path)
    before, started = memory("VmRSS"), time.perf_counter()
    cache = LatentCache(folder, SETTINGS)
    batches = len(cache) // 32
    drawn = latent_batches(cache, BatchPlan(32), 0, 0, batches)
    next(drawn)
    opened = time.perf_counter() - started
    reset_peak()
    started = time.process_time()
    for _ in drawn:
        pass
    reading = (time.process_time() - started) / (batches - 1)
    peak = (memory("VmHWM") - before) / MIB
    step = step_seconds()
    print(f"{len(cache)} entries of {entries_bytes(folder) / MIB:.0f} MiB: opened in {opened:.3f} s")
    print(
        f"{32 * batches} entries read: peak memory {peak:.0f} MiB above the start, {1e3 * reading:.2f} ms a batch of 32"
    )
    print(f"a step of a {parameters() / 1e6:.1f} M U-Net takes {1e3 * step:.0f} ms: reading adds {reading / step:.2%}")
    return opened < OPEN_SECONDS and peak < READ_MIB and reading < READ_SHARE * step


def synthetic(folder: Path, entries: int) -> None:
    """A cache of random latents with a caption each; its shards are copies of one another."""
    write_text(folder / "settings.json", json.dumps(asdict(SETTINGS)))
    block = torch.randn(SHARD, 8, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    buffer = ShardBuffer(torch.float16)
    for row, moments in enumerate(block):
        buffer.add([moments], f"{row:09d}", [f"a picture of number {row}"])
    shapes, first = buffer.shapes, folder / "shard_00000.safetensors"
    digest = write_tensors(first, buffer.tensors())
    record = {"read": SHARD, "count": SHARD, "shapes": shapes, "sha256": digest, "bytes": first.stat().st_size}
    shards = -(-entries // SHARD)
    for number in range(shards):
        path = folder / f"shard_{number:05d}.safetensors"
        if path != first:
            shutil.copyfile(first, path)
        write_text(path.with_suffix(".json"), json.dumps({**record, "shard_size": SHARD, "skipped": []}))
    finish_cache(folder, shards)


def evict(path: Path) -> None:
    """Drops a file from the system's cache, so that reading it starts cold."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def entries_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def small_unet() -> UNet:
    config = UNetConfig(
        sample_size=8,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
    )
    return UNet.from_scratch(config, torch.Generator().manual_seed(0))


def parameters() -> int:
    return sum(p.numel() for p in small_unet().parameters())


def step_seconds(rounds: int = 5) -> float:
    """Processor time of one training step of 32 latents, the fastest of some."""
    unet = small_unet()
    x, context = torch.randn(32, 4, 8, 8), torch.randn(32, 32, 64)

    def step() -> Tensor:
        loss = unet(x, torch.full((32,), 500.0), context).square().mean()
        loss.backward()
        return loss

    step()
    return min(timed(step) for _ in range(rounds))


def timed(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def memory(name: str) -> int:
    """A figure of /proc/self/status in bytes: `VmRSS` now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def reset_peak() -> int:
    """Lets the peak start anew; the memory now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


if __name__ == "__main__":
    main()
