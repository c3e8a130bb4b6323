"""One optimiser step of stage one under accelerate, checked for gradients that stray; run by test_gradient_isolation.

Every process checks that the generator's pass leaves the discriminator's gradients as they were and the reverse, and that
the perceptual network gets none, in every micro-batch. Rank 0 writes the final gradients to the file that is named.
"""

from __future__ import annotations

import os
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from safetensors.torch import save_file
from torch import Tensor, nn

from autoencoder import (
    AutoencoderConfig,
    AutoencoderKL,
    DiscriminatorPenalties,
    LossState,
    LossWeights,
    PatchDiscriminator,
)
from autoencoder.perceptual import FeatureDistance
from ldm.data.batches import PixelBatch
from ldm.data.order import BatchPlan
from ldm.tasks.autoencoder import AutoencoderTask
from ldm.tasks.bottleneck import GaussianBottleneck
from ldm.training.launch import mean_over_processes

IMAGES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
WEIGHTS = LossWeights(perceptual=0.5, kl=1e-2, discriminator=0.5, discriminator_start=0)


class SmallDistance(FeatureDistance):
    """Features of one random convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.freeze()

    def stages(self, x: Tensor) -> list[Tensor]:
        return [self.conv(x).relu()]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def run(accumulation: int) -> dict[str, Tensor]:
    """Gradients of both networks after one step over all of IMAGES, in as many micro-batches a process."""
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=accumulation,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    torch.manual_seed(0)
    vae = AutoencoderKL(AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4))
    critic = PatchDiscriminator(base_channels=4, num_layers=1, norm="group", generator=torch.Generator().manual_seed(1))
    perceptual, reduce_mean = SmallDistance(), mean_over_processes(accelerator)
    model, wrapped = accelerator.prepare(vae, critic)
    bottleneck = GaussianBottleneck(WEIGHTS.kl, 4, 2)
    penalties, state = DiscriminatorPenalties(), LossState()
    task = AutoencoderTask(model, wrapped, perceptual, WEIGHTS, penalties, state, bottleneck, 0, reduce_mean)
    world = accelerator.num_processes
    plan = BatchPlan(len(IMAGES) // world // accumulation, accumulation, world, accelerator.process_index)
    for micro in range(accumulation):
        rows = plan.rows(micro)
        batch = PixelBatch(IMAGES[list(rows)], ("",) * len(rows), tuple(rows))
        with accelerator.accumulate(model, wrapped):
            of_critic, of_vae = gradients(critic), gradients(vae)
            loss = task.generator_loss(batch, 0)
            accelerator.backward(loss.surrogate)
            assert same(gradients(critic), of_critic), "the generator's pass reached the discriminator"
            assert not same(gradients(vae), of_vae), "the generator's pass did nothing"
            of_vae = gradients(vae)
            assert not loss.image.requires_grad and loss.fake_logits is not None
            accelerator.backward(task.discriminator_loss(batch, loss.fake_logits, 0)[0])
            assert same(gradients(vae), of_vae), "the discriminator's pass reached the autoencoder"
            assert not same(gradients(critic), of_critic), "the discriminator's pass did nothing"
            assert not gradients(perceptual), "the perceptual network was given a gradient"
    found = {f"vae.{name}": value for name, value in gradients(vae).items()}
    return found | {f"critic.{name}": value for name, value in gradients(critic).items()}


if __name__ == "__main__":
    final = run(int(sys.argv[2]))
    if os.environ.get("RANK", "0") == "0":
        save_file(final, sys.argv[1])
