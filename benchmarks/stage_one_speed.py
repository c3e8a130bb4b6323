"""A training step of stage one with all losses on: ours beside the straightforward implementation of the same losses.

    python benchmarks/stage_one_speed.py [--config train_configs/emoji/autoencoder-f4.yaml] [--rounds 20]
        [--section.field VALUE ...]

Straightforward means: the adaptive weight from two `autograd.grad` calls at the decoder's last layer and a third pass
for the sum of all losses, a forward pass of the discriminator for each use, PyTorch's AdamW as it comes, an average of
the weights updated parameter by parameter, and the process as the operating system starts it. It runs twice: on what
one takes first, diffusers' `AutoencoderKL` and the EfficientNet of its package, and on our networks, which shows how
much of the difference is theirs. Where the published loop computes the reconstructions a second time for the
discriminator's step, these do not.

All sides do the same mathematics on the same weights, pictures and noise, in float32 on one thread; the gradients of
one step are compared first, in float64. Each side is a process of its own, and they take turns step by step. What is
compared is the processor time of a step, because it does not count the time in which another program has the core.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from autoencoder import (
    AutoencoderKL,
    EfficientNetFeatureDistance,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    nll,
)
from autoencoder.perceptual import EFFICIENTNETS, FeatureDistance, load_efficientnet
from ldm.build import (
    build_autoencoder,
    build_bottleneck,
    build_discriminator,
    build_loss_state,
    build_loss_weights,
    build_penalties,
)
from ldm.config import AutoencoderTraining
from ldm.config.file import load_config
from ldm.data.batches import PixelBatch
from ldm.sampling import randn_rows
from ldm.seeds import generator
from ldm.tasks.autoencoder import AutoencoderTask
from ldm.training.ema import Ema
from ldm.training.launch import keep_heap
from ldm.training.optim import adamw

OURS, OUR_NETWORKS, PACKAGES = "ours", "straightforward, our networks", "straightforward, the packages' networks"
SIDES = (OURS, OUR_NETWORKS, PACKAGES)
WARM_UP = 2

Losses = tuple[Tensor, Tensor]
"""Two scalars: what the autoencoder's gradients come from, and the discriminator's."""


class Parts:
    """Network, discriminator, perceptual distance and pictures, equal for all sides."""

    def __init__(self, config: AutoencoderTraining, dtype: torch.dtype = torch.float32) -> None:
        self.config, self.weights = config, build_loss_weights(config.loss)
        vae = build_autoencoder(config)
        assert isinstance(vae, AutoencoderKL)
        torch.manual_seed(1)
        for parameter in vae.parameters():
            if not parameter.any():  # the residual branches' last layers, which hide the gradients behind them
                nn.init.normal_(parameter, std=0.05)
        self.vae = vae.to(dtype)
        self.critic = build_discriminator(config.discriminator, config.seed).to(dtype)
        assert config.perceptual.type == "efficientnet_lite0", "the comparison is made with `efficientnet_lite0`"
        self.perceptual: FeatureDistance = EfficientNetFeatureDistance().to(dtype)
        side, batch = config.data.resolution, config.training.train_batch_size
        self.latent_shape = (vae.latent_channels, *(side // vae.downsample_factor,) * 2)
        self.images = (torch.rand(batch, 3, side, side, generator=generator(0, "images")) * 2 - 1).to(dtype)
        self.step = config.loss.discriminator_start + config.loss.discriminator_warmup

    def noise(self) -> Tensor:
        """The noise that our task draws at this step."""
        rows = [generator(self.config.seed, "latent", self.step, row) for row in range(len(self.images))]
        return randn_rows((len(rows), *self.latent_shape), rows).to(self.images)


def our_gradients(parts: Parts) -> Callable[[], None]:
    """The gradients of both networks as the task computes them."""
    config = parts.config
    task = AutoencoderTask(
        parts.vae,
        parts.critic,
        parts.perceptual,
        parts.weights,
        build_penalties(config.discriminator),
        build_loss_state(config.loss),
        build_bottleneck(config, parts.vae, lambda value: value),
        config.seed,
        lambda value: value,
    )
    batch = PixelBatch(parts.images, ("",) * len(parts.images), tuple(range(len(parts.images))))

    def backward() -> None:
        loss = task.generator_loss(batch, parts.step)
        loss.surrogate.backward()
        assert loss.fake_logits is not None
        task.discriminator_loss(batch, loss.fake_logits, parts.step)[0].backward()

    return backward


def straightforward_gradients(parts: Parts) -> Callable[[], None]:
    """The same gradients as the formulas are written down."""
    weights, perceptual = parts.weights, parts.perceptual

    def backward() -> None:
        x = parts.images
        posterior = parts.vae.encode(x)
        posterior = getattr(posterior, "latent_dist", posterior)
        image = parts.vae.decode(posterior.mean + posterior.std * parts.noise())
        image = getattr(image, "sample", image)
        image_loss = nll(image, x, perceptual(image, x), weights)
        g_loss, last = generator_loss(parts.critic(image)), parts.vae.decoder.conv_out.weight
        nll_grad = torch.autograd.grad(image_loss, last, retain_graph=True)[0]
        g_grad = torch.autograd.grad(g_loss, last, retain_graph=True)[0]
        adversarial = weights.discriminator * adaptive_weight(nll_grad, g_grad) * g_loss
        (image_loss + weights.kl * posterior.kl().mean() + adversarial).backward()
        parts.critic.zero_grad()
        fake = image.detach()
        discriminator_loss(parts.critic(x), parts.critic(fake), weights.discriminator_loss).backward()

    return backward


def from_packages(parts: Parts) -> Parts:
    """The same parts with diffusers' autoencoder and the package's EfficientNet in place of ours, same weights."""
    from diffusers import AutoencoderKL as DiffusersAutoencoder

    network = DiffusersAutoencoder.from_config(parts.config.autoencoder.to_dict()).to(parts.vae.dtype).train()
    network.load_state_dict(parts.vae.state_dict(), strict=True)
    parts.vae, parts.perceptual = network, PackagedDistance().to(parts.vae.dtype)
    return parts


class PackagedDistance(FeatureDistance):
    """The distance of `EfficientNetFeatureDistance` on the network as its package builds it."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.taps = load_efficientnet("efficientnet-lite0"), EFFICIENTNETS["efficientnet-lite0"].taps
        self.freeze()

    def stages(self, x: Tensor) -> list[Tensor]:
        h = self.net._swish(self.net._bn0(self.net._conv_stem((127.5 * x + 0.5) / 128.0)))
        found: list[Tensor] = []
        for index, block in enumerate(self.net._blocks[: self.taps[-1] + 1]):
            h = block(h)
            if index in self.taps:
                found.append(h)
        return found


def our_step(parts: Parts) -> Callable[[], None]:
    config = parts.config.optimizer
    optimizers = [adamw(part.parameters(), config, config.learning_rate) for part in (parts.vae, parts.critic)]
    ema = Ema(parts.vae, parts.config.training.ema_decay)
    return update(our_gradients(parts), optimizers, ema.update)


def straightforward_step(parts: Parts) -> Callable[[], None]:
    config, decay = parts.config.optimizer, parts.config.training.ema_decay
    settings: dict[str, Any] = {
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    optimizers = [
        torch.optim.AdamW(part.parameters(), config.learning_rate, **settings) for part in (parts.vae, parts.critic)
    ]
    average = [p.detach().clone() for p in parts.vae.parameters()]

    def follow() -> None:
        with torch.no_grad():
            for mean, parameter in zip(average, parts.vae.parameters(), strict=True):
                mean.mul_(decay).add_(parameter, alpha=1 - decay)

    return update(straightforward_gradients(parts), optimizers, follow)


def update(
    backward: Callable[[], None], optimizers: list[torch.optim.AdamW], follow: Callable[[], None]
) -> Callable[[], None]:
    """One training step: gradients, optimisers, average of the weights."""

    def step() -> None:
        backward()
        for optimizer in optimizers:
            optimizer.step()
        follow()
        for optimizer in optimizers:
            optimizer.zero_grad()

    return step


def gradients(side: str, config: AutoencoderTraining) -> dict[str, Tensor]:
    """Every parameter's gradient of one step on two pictures in float64, by name."""
    two = dataclasses.replace(config, training=dataclasses.replace(config.training, train_batch_size=2))
    parts = Parts(two, torch.float64)
    if side == OURS:
        our_gradients(parts)()
    else:
        straightforward_gradients(from_packages(parts) if side == PACKAGES else parts)()
    return {
        f"{part}.{name}": p.grad
        for part, network in (("autoencoder", parts.vae), ("discriminator", parts.critic))
        for name, p in network.named_parameters()
        if p.grad is not None
    }


def gradient_difference(config: AutoencoderTraining, side: str) -> float:
    """Largest difference of any parameter's gradient between ours and that side, relative to that gradient's norm.

    A gradient that is zero but for rounding (a key's bias, which softmax ignores) is measured by a millionth of all.
    """
    ours, theirs = gradients(OURS, config), gradients(side, config)
    assert ours.keys() == theirs.keys(), "the sides have gradients for different parameters"
    least = 1e-6 * float(torch.stack([gradient.norm() for gradient in theirs.values()]).norm())
    return max(float((ours[name] - value).norm()) / max(float(value.norm()), least) for name, value in theirs.items())


def worker(side: str, config: AutoencoderTraining, pipe: Connection) -> None:
    """Makes one step whenever the pipe says True; answers with its seconds of processor time and of the clock."""
    torch.set_num_threads(1)
    if side == OURS:
        keep_heap()
        step = our_step(Parts(config))
    else:
        parts = Parts(config)
        step = straightforward_step(from_packages(parts) if side == PACKAGES else parts)
    while pipe.recv():
        clock, processor = time.perf_counter(), time.process_time()
        step()
        pipe.send((time.process_time() - processor, time.perf_counter() - clock))


def measure(config: AutoencoderTraining, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds (processor, clock) of every measured step of each side; the sides take turns, another one first."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for side in SIDES:
        pipes[side], theirs = context.Pipe()
        context.Process(target=worker, args=(side, config, theirs), daemon=True).start()
    seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    for turn in range(WARM_UP + rounds):
        for side in (*SIDES[turn % len(SIDES) :], *SIDES[: turn % len(SIDES)]):
            pipes[side].send(True)
            seconds[side].append(pipes[side].recv())
    for pipe in pipes.values():
        pipe.send(False)
    return {side: values[WARM_UP:] for side, values in seconds.items()}


def report(seconds: dict[str, list[tuple[float, float]]]) -> None:
    """Medians of each side, and the ratio to ours round by round: median, quartiles."""
    ours = [processor for processor, _ in seconds[OURS]]
    for side, values in seconds.items():
        processor, clock = (statistics.median(column) for column in zip(*values, strict=True))
        ratios = [value / mine for (value, _), mine in zip(values, ours, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        ratio = "" if side == OURS else f"  {middle:.2f} of ours (quartiles {low:.2f} to {high:.2f})"
        print(f"{side:40s} {processor:.3f} s of processor time, {clock:.3f} s by the clock{ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="train_configs/emoji/autoencoder-f4.yaml")
    parser.add_argument("--rounds", type=int, default=20, help="measured steps of each side")
    args, overrides = parser.parse_known_args()
    config = load_config(AutoencoderTraining, args.config, overrides)
    torch.set_num_threads(1)
    for side in (OUR_NETWORKS, PACKAGES):
        difference = gradient_difference(config, side)
        print(f"gradients of {side!r} differ from ours by {difference:.1e} of their norm at most (float64)", flush=True)
        assert difference < 1e-6, "the sides do not compute the same gradients"
    report(measure(config, args.rounds))


if __name__ == "__main__":
    main()
