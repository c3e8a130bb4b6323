"""What both trainings look at every `validation.steps`: measures of the averaged weights, and a grid of pictures.

Only the main process looks; where weights are sharded all of them compute the same, and the main one writes. Nothing
here draws from a generator that training uses, and a signal ends it early; the next start then makes up for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from autoencoder import Autoencoder
from ldm.config import AutoencoderTraining, LdmTraining
from ldm.data.latents import LatentBatch
from ldm.data.transforms import to_images
from ldm.evaluation.grid import image_grid
from ldm.evaluation.reconstruction import mean_psnr, reconstruct
from ldm.pipeline import TextToImage
from ldm.pretrained import Model
from ldm.tasks.text_to_image import TextToImageTask
from ldm.training.ema import Ema
from ldm.training.guards import watched_latents
from ldm.training.log import TrainingLog
from ldm.training.run_dir import RunDir
from ldm.training.sharding import ShardingAccelerator
from ldm.training.stop import StopSignal

CHUNK = 32


def validate_autoencoder(
    vae: Autoencoder,
    ema: Ema,
    images: Tensor,
    config: AutoencoderTraining,
    run: RunDir,
    log: TrainingLog,
    stop: StopSignal,
    step: int,
) -> None:
    """PSNR of `images` [N, 3, R, R], what became of the latents, and a grid of originals above reconstructions."""
    if not log.accelerator.is_main_process:
        return
    with stop.interruptible(), ema.applied(), torch.no_grad():
        batches = [chunk.to(log.accelerator.device) for chunk in torch.split(images, CHUNK)]
        value = mean_psnr(vae, stop.checked(batches))
        latents = watched_latents(vae, stop.checked(batches))
        x, y = next(reconstruct(vae, [batches[0][: config.validation.num_images]]))
        grid = image_grid(to_images(x) + to_images(y), columns=len(x), min_side=64)
        log.write(step, {"validation_psnr": value, **latents.figures()})
        log.say(f"step {step}: validation PSNR {value:.2f} dB")
        log.say(latents.warning(step))
        log.show("reconstructions", grid, run.sample(step), step)


def validate_ldm(
    task: TextToImageTask,
    model: Model,
    ema: Ema,
    held_out: LatentBatch | None,
    config: LdmTraining,
    run: RunDir,
    log: TrainingLog,
    stop: StopSignal,
    step: int,
) -> None:
    """The loss on `held_out` under fixed noise, and pictures of the fixed prompts and seeds, labelled.

    `task` has the bare network in the place of the wrapped one; `model` shares its weights with it.
    """
    together = log.accelerator if isinstance(log.accelerator, ShardingAccelerator) else None
    if together is None and not log.accelerator.is_main_process:
        return
    prompts = list(config.validation.validation_prompts) or [""]
    with stop.interruptible(together), ema.applied(), evaluating(model.vae, task.model):
        if held_out is not None:
            loss = held_out_loss(task, held_out, log.accelerator.device, stop)
            log.write(step, {"validation_loss": loss})
            log.say(f"step {step}: validation loss {loss:.5f}")
        try:
            pipe = TextToImage(model, log.accelerator.device, torch.float32)
            images = pipe(prompts, seed=config.validation.seed, callback=stop.check)
        except FloatingPointError as error:
            log.say(f"step {step}: warning: no pictures were drawn: {error}")
            return
        if not log.accelerator.is_main_process:
            return
        grid = image_grid(images, labels=prompts, min_side=128)
        log.show("samples", grid, run.sample(step), step)


def held_out_loss(task: TextToImageTask, batch: LatentBatch, device: torch.device, stop: StopSignal) -> float:
    """Mean of `TextToImageTask.validation_loss` over a fixed batch, taken in chunks."""
    total, count = 0.0, len(batch.rows)
    for first in stop.checked(range(0, count, CHUNK)):
        part = slice(first, first + CHUNK)
        chunk = replace(batch, moments=batch.moments[part], captions=batch.captions[part], rows=batch.rows[part])
        total += float(task.validation_loss(chunk.to(device), count).rows.sum())
    return total / count


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Within the block the modules are in evaluation mode, afterwards each of their parts in its own again."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
