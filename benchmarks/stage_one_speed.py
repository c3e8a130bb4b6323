"""A training step of stage one with all losses on: ours beside the straightforward implementation of the same losses.

    python benchmarks/stage_one_speed.py [--rounds 12] [--resolution 64] [--batch 8] [--widths 32,64,128]

Straightforward means: the adaptive weight from two `autograd.grad` calls at the decoder's last layer and a third pass
for the sum of all losses, PyTorch's AdamW as it comes, an average of the weights updated
parameter by parameter, and the allocator as glibc sets it up. Both sides do the same mathematics on the same network,
pictures and noise, in float32 on one thread; the gradients of one step are compared first, in float64. Each side is a
process of its own; the two take turns step by step, and the medians of the processor time of their steps are compared.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from autoencoder import (
    AutoencoderConfig,
    AutoencoderKL,
    EfficientNetFeatureDistance,
    LossState,
    LossWeights,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    nll,
)
from autoencoder.losses import DiscriminatorPenalties
from ldm.config import OptimizerConfig
from ldm.data.batches import PixelBatch
from ldm.sampling import randn_rows
from ldm.seeds import generator
from ldm.tasks.autoencoder import AutoencoderTask
from ldm.tasks.bottleneck import GaussianBottleneck
from ldm.training.ema import Ema
from ldm.training.launch import keep_heap
from ldm.training.optim import adamw

SIDES = ("ours", "straightforward")
WEIGHTS = LossWeights(perceptual=0.05, kl=1e-3, discriminator=0.2, discriminator_start=0)
RATE, DECAY, WARM_UP = 1e-4, 0.999, 2


class Parts:
    """Network, discriminator and perceptual distance, equal for both sides."""

    def __init__(self, args: argparse.Namespace, dtype: torch.dtype = torch.float32) -> None:
        widths = tuple(int(width) for width in args.widths.split(","))
        config = AutoencoderConfig(block_out_channels=widths, norm_num_groups=8, latent_channels=8)
        torch.manual_seed(0)
        self.vae = AutoencoderKL(config).to(dtype)
        self.critic = PatchDiscriminator(base_channels=32, norm="group", generator=generator(0, "critic")).to(dtype)
        self.perceptual = EfficientNetFeatureDistance().to(dtype)
        side = args.resolution // self.vae.downsample_factor
        self.latent_shape = (config.latent_channels, side, side)
        shape = (args.batch, 3, args.resolution, args.resolution)
        self.images = (torch.rand(shape, generator=generator(0, "images")) * 2 - 1).to(dtype)

    def noise(self, step: int) -> Tensor:
        """The noise that our task draws at this step."""
        rows = [generator(0, "latent", step, row) for row in range(len(self.images))]
        return randn_rows((len(rows), *self.latent_shape), rows).to(self.images)


def our_gradients(parts: Parts) -> Callable[[int], None]:
    """The gradients of both networks as the task computes them."""
    task = AutoencoderTask(
        parts.vae,
        parts.critic,
        parts.critic,
        parts.perceptual,
        WEIGHTS,
        DiscriminatorPenalties(),
        LossState(),
        GaussianBottleneck(WEIGHTS.kl, parts.latent_shape[0], parts.vae.downsample_factor),
        0,
        lambda value: value,
    )
    batch = PixelBatch(parts.images, ("",) * len(parts.images), tuple(range(len(parts.images))))

    def backward(step: int) -> None:
        loss = task.generator_loss(batch, step)
        loss.surrogate.backward()
        task.discriminator_loss(batch, loss.image, step)[0].backward()

    return backward


def straightforward_gradients(parts: Parts) -> Callable[[int], None]:
    """The same gradients as the formulas are written down: three passes through the decoder."""

    def backward(step: int) -> None:
        x = parts.images
        posterior = parts.vae.encode(x)
        image = parts.vae.decode(posterior.sample(parts.noise(step)))
        image_loss = nll(image, x, parts.perceptual(image, x), WEIGHTS)
        g_loss, last = generator_loss(parts.critic(image)), parts.vae.last_layer
        nll_grad = torch.autograd.grad(image_loss, last, retain_graph=True)[0]
        g_grad = torch.autograd.grad(g_loss, last, retain_graph=True)[0]
        weight = WEIGHTS.discriminator * adaptive_weight(nll_grad, g_grad)
        (image_loss + WEIGHTS.kl * posterior.kl().mean() + weight * g_loss).backward()
        parts.critic.zero_grad()
        discriminator_loss(parts.critic(x), parts.critic(image.detach())).backward()

    return backward


def our_step(parts: Parts) -> Callable[[int], None]:
    keep_heap()
    config = OptimizerConfig(learning_rate=RATE)
    optimizers = [adamw(part.parameters(), config, RATE) for part in (parts.vae, parts.critic)]
    backward, ema = our_gradients(parts), Ema(parts.vae, DECAY)
    return lambda step: update(backward, optimizers, ema.update, step)


def straightforward_step(parts: Parts) -> Callable[[int], None]:
    optimizers = [torch.optim.AdamW(part.parameters(), RATE, weight_decay=0.0) for part in (parts.vae, parts.critic)]
    backward, average = straightforward_gradients(parts), [p.detach().clone() for p in parts.vae.parameters()]

    def follow() -> None:
        with torch.no_grad():
            for mean, parameter in zip(average, parts.vae.parameters(), strict=True):
                mean.mul_(DECAY).add_(parameter, alpha=1 - DECAY)

    return lambda step: update(backward, optimizers, follow, step)


def update(backward: Callable[[int], None], optimizers: list[Any], follow: Callable[[], None], step: int) -> None:
    """One training step: gradients, optimisers, average of the weights."""
    backward(step)
    for optimizer in optimizers:
        optimizer.step()
    follow()
    for optimizer in optimizers:
        optimizer.zero_grad()


def gradient_difference(args: argparse.Namespace) -> float:
    """Largest difference of any parameter's gradient relative to that gradient's norm, both sides in float64.

    A gradient that is zero but for rounding (a key's bias, which softmax ignores) is measured by a millionth of all.
    """
    found: list[list[Tensor]] = []
    for make in (our_gradients, straightforward_gradients):
        parts = Parts(args, torch.float64)
        make(parts)(0)
        found.append([p.grad for net in (parts.vae, parts.critic) for p in net.parameters() if p.grad is not None])
    least = 1e-6 * float(torch.stack([gradient.norm() for gradient in found[1]]).norm())
    pairs = zip(*found, strict=True)
    return max(float((ours - theirs).norm()) / max(float(theirs.norm()), least) for ours, theirs in pairs)


def worker(side: str, args: argparse.Namespace, pipe: Connection) -> None:
    """Makes one step for every number that the pipe gives, until None; answers with its processor time."""
    torch.set_num_threads(1)
    parts = Parts(args)
    step = {"ours": our_step, "straightforward": straightforward_step}[side](parts)
    while (number := pipe.recv()) is not None:
        started = time.process_time()
        step(number)
        pipe.send(time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="measured steps of each side")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--widths", default="32,64,128", help="block_out_channels of the autoencoder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"gradients differ by {gradient_difference(args):.1e} of their norm at most (float64)", flush=True)
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for side in SIDES:
        pipes[side], theirs = context.Pipe()
        context.Process(target=worker, args=(side, args, theirs), daemon=True).start()
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for step in range(args.rounds + WARM_UP):
        for side in SIDES:
            pipes[side].send(step)
            seconds[side].append(pipes[side].recv())
    for pipe in pipes.values():
        pipe.send(None)
    medians = {side: statistics.median(seconds[side][WARM_UP:]) for side in SIDES}
    for side, value in medians.items():
        print(f"{side:16s} {value:.3f} s a step, median of {args.rounds}")
    print(f"ratio {medians['straightforward'] / medians['ours']:.2f}")


if __name__ == "__main__":
    main()
