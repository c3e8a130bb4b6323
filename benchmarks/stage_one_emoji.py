"""One autoencoder trained twice for the same time: by our stage one, and by a plain loop over diffusers' class.

    python benchmarks/stage_one_emoji.py --data FOLDER [--minutes 15] [--config train_configs/emoji/autoencoder-f4.yaml]
        [--slice 30] [--output outputs/stage_one_emoji] [--section.field VALUE ...]

Ours is the task of `train_autoencoder.py` with every loss of the config; the other side is diffusers' `AutoencoderKL`
of the same shape, squared error + KL, PyTorch's AdamW as it comes, no average of the weights. Both see the same
pictures in batches of the same size at the same learning rate, which follows the time used. Each side is a process
with one thread and works in slices, one side after the other, until it has used its minutes of processor time. The
judge is EfficientNet-Lite2, which neither side trained on. Writes both models, the figures as JSON and a picture:
originals, ours, the plain loop's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoencoder import AutoencoderKL, EfficientNetFeatureDistance
from ldm.build import (
    build_autoencoder,
    build_bottleneck,
    build_discriminator,
    build_loss_state,
    build_loss_weights,
    build_penalties,
    build_perceptual,
    build_source,
    build_transform,
    build_validation,
)
from ldm.config import AutoencoderTraining
from ldm.config.file import load_config
from ldm.data.batches import PixelBatch
from ldm.data.order import permutation
from ldm.data.pixels import stacked
from ldm.data.transforms import to_images
from ldm.evaluation.grid import image_grid
from ldm.evaluation.reconstruction import evaluate_reconstruction, reconstruct
from ldm.tasks.autoencoder import AutoencoderTask
from ldm.training.ema import Ema
from ldm.training.launch import keep_heap
from ldm.training.optim import adamw, learning_rate, set_learning_rate

SIDES = ("ours", "plain")
SHOWN = 10
JUDGES = ("efficientnet_lite2", "efficientnet_lite0")
"""Lite2 decides; the figure of Lite0, which ours trains on, stands beside it."""

Step = Callable[[Tensor, int, float], None]
"""(images [B, 3, H, W], number of the step, fraction of the time used) -> nothing: one update."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="any data source of training with a validation split")
    parser.add_argument("--config", default="train_configs/emoji/autoencoder-f4.yaml")
    parser.add_argument("--minutes", type=float, default=15.0, help="processor time of each side")
    parser.add_argument("--slice", type=float, default=30.0, help="seconds of processor time before the other's turn")
    parser.add_argument("--output", type=Path, default=Path("outputs/stage_one_emoji"))
    args, overrides = parser.parse_known_args()
    config = load_config(AutoencoderTraining, args.config, [*overrides, "--data.source", args.data])
    args.output.mkdir(parents=True, exist_ok=True)
    steps = train_in_turns(config, args.minutes * 60, args.slice, args.output)
    report = {"minutes": args.minutes, "steps": steps, **judge(config, args.output)}
    (args.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def train_in_turns(config: AutoencoderTraining, budget: float, slice_: float, folder: Path) -> dict[str, int]:
    """Lets both sides work slice by slice until each has used `budget` seconds; how many steps each made."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for side in SIDES:
        pipes[side], theirs = context.Pipe()
        context.Process(target=worker, args=(side, config, budget, folder, theirs), daemon=True).start()
    steps: dict[str, int] = {}
    while len(steps) < len(SIDES):
        for side in (s for s in SIDES if s not in steps):
            pipes[side].send(slice_)
            used, done = pipes[side].recv()
            print(f"{side:6s} {used:7.1f} s  {done} steps", flush=True)
            if used >= budget:
                steps[side] = done
    return steps


def worker(side: str, config: AutoencoderTraining, budget: float, folder: Path, pipe: Connection) -> None:
    """One side: trains for as many seconds as the pipe says, again and again, and writes its model at the end."""
    torch.set_num_threads(1)
    step, save = {"ours": ours, "plain": plain}[side](config)
    pictures = training_pictures(config)
    size = config.training.train_batch_size
    used, count = 0.0, 0
    while used < budget:
        end = min(budget, used + pipe.recv())
        started = time.process_time() - used
        while used < end:
            rows = torch.arange(count * size, (count + 1) * size)
            order = permutation(len(pictures), config.seed, int(rows[0]) // len(pictures))
            step(pictures[order[rows % len(pictures)]].float() / 127.5 - 1, count, used / budget)
            count += 1
            used = time.process_time() - started
        if used >= budget:
            save(folder / side)
        pipe.send((used, count))


def training_pictures(config: AutoencoderTraining) -> Tensor:
    """The training split, uint8 [N, 3, R, R]."""
    source = build_source(config.data, config.data.split, config.seed)
    return ((stacked(source, build_transform(config.data, config.seed)) + 1) * 127.5).round().to(torch.uint8)


def ours(config: AutoencoderTraining) -> tuple[Step, Callable[[Path], None]]:
    """What `train_autoencoder.py` does at a step, the config's schedule stretched over the time."""
    keep_heap()
    vae = build_autoencoder(config)
    critic = build_discriminator(config.discriminator, config.seed)
    weights, state = build_loss_weights(config.loss), build_loss_state(config.loss)
    task = AutoencoderTask(
        vae,
        critic,
        build_perceptual(config.perceptual),
        weights,
        build_penalties(config.discriminator),
        state,
        build_bottleneck(config, vae, lambda value: value),
        config.seed,
        lambda value: value,
    )
    rate, total = config.optimizer.learning_rate, config.training.max_train_steps
    optimizer = adamw(vae.parameters(), config.optimizer, rate, undecayed=state.parameters())
    d_optimizer = adamw(critic.parameters(), config.optimizer, rate)
    ema = Ema(vae, config.training.ema_decay)

    def step(images: Tensor, count: int, fraction: float) -> None:
        batch, now = PixelBatch(images, ("",) * len(images), tuple(range(len(images)))), int(fraction * total)
        factor = learning_rate(now, total, config.optimizer)
        set_learning_rate(optimizer, factor)
        set_learning_rate(d_optimizer, factor * config.discriminator.learning_rate_ratio)
        loss = task.generator_loss(batch, now)
        loss.surrogate.backward()
        if loss.fake_logits is not None:
            d_loss, terms = task.discriminator_loss(batch, loss.fake_logits, now)
            d_loss.backward()
            d_optimizer.step()
            loss.terms.update(terms)
        optimizer.step()
        task.remember(loss.terms)
        ema.update()
        optimizer.zero_grad()
        d_optimizer.zero_grad()

    def save(folder: Path) -> None:
        with ema.applied():
            vae.save_pretrained(folder)

    return step, save


def plain(config: AutoencoderTraining) -> tuple[Step, Callable[[Path], None]]:
    """diffusers' class and the loop that one writes around it first."""
    from diffusers import AutoencoderKL as DiffusersAutoencoder

    torch.manual_seed(config.seed)
    vae = DiffusersAutoencoder.from_config(config.autoencoder.to_dict()).train()
    optimizer = torch.optim.AdamW(
        vae.parameters(),
        config.optimizer.learning_rate,
        (config.optimizer.adam_beta1, config.optimizer.adam_beta2),
        weight_decay=config.optimizer.adam_weight_decay,
    )
    total = config.training.max_train_steps

    def step(images: Tensor, count: int, fraction: float) -> None:
        set_learning_rate(optimizer, learning_rate(int(fraction * total), total, config.optimizer))
        posterior = vae.encode(images).latent_dist
        output = vae.decode(posterior.sample()).sample
        loss = (output - images).square().sum() / len(images) + config.loss.kl * posterior.kl().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, vae.save_pretrained


def judge(config: AutoencoderTraining, folder: Path) -> dict[str, Any]:
    """Figures of both models on the validation split, and a picture of the first reconstructions."""
    everything = dataclasses.replace(config.data, max_validation_samples=None)
    batches = torch.split(build_validation(everything, config.seed), 32)
    models = {side: AutoencoderKL.from_pretrained(folder / side) for side in SIDES}
    nets = {name: EfficientNetFeatureDistance(name.replace("_", "-")) for name in JUDGES}
    figures = {side: evaluate_reconstruction(vae, batches, nets, {}).metrics for side, vae in models.items()}
    shown = [batches[0][:SHOWN], *(next(reconstruct(vae, [batches[0][:SHOWN]]))[1] for vae in models.values())]
    image_grid([picture for row in shown for picture in to_images(row)], columns=SHOWN).save(folder / "picture.png")
    distance = {side: figures[side]["perceptual_efficientnet_lite2"] for side in SIDES}
    return {
        "pictures": sum(map(len, batches)),
        "figures": figures,
        "perceptual_gain": 1 - distance["ours"] / distance["plain"],
        "psnr_gain": figures["ours"]["psnr"] - figures["plain"]["psnr"],
    }


if __name__ == "__main__":
    main()
