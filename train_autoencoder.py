"""Stage one: train an autoencoder on images, KL-regularised or with a codebook.

accelerate launch train_autoencoder.py --config train_configs/shapes/autoencoder.yaml
"""

from __future__ import annotations

import dataclasses
import sys
import time

import torch
from accelerate.utils import gather_object

from autoencoder import Autoencoder
from ldm.build import (
    build_autoencoder,
    build_batches,
    build_bottleneck,
    build_discriminator,
    build_loss_state,
    build_loss_weights,
    build_penalties,
    build_perceptual,
    build_validation,
)
from ldm.config import AutoencoderTraining
from ldm.config_file import dump_config, parse_command_line
from ldm.data.batches import SkipCounter
from ldm.data.order import BatchPlan
from ldm.data.transforms import to_images
from ldm.evaluation.grid import image_grid
from ldm.evaluation.reconstruction import mean_psnr, reconstruct
from ldm.pretrained import write_vae
from ldm.tasks.autoencoder import AutoencoderTask
from ldm.training.card import autoencoder_card
from ldm.training.ema import Ema
from ldm.training.guards import DiscriminatorWatch, NonFiniteGuard, named_batch, watched_latents
from ldm.training.latent_scale import latent_scale
from ldm.training.launch import (
    StopSignal,
    batch_plan,
    dry_run_report,
    mean_over_processes,
    parameter_count,
    place,
    run_command,
    tracker_image,
)
from ldm.training.log import TrainingLog, averaged
from ldm.training.optim import adamw, learning_rate, set_learning_rate
from ldm.training.precision import LossScaling
from ldm.training.run_dir import RunDir

STATISTICS_BATCH = 32


def main() -> None:
    # 1. Config
    config, launch = parse_command_line(AutoencoderTraining, sys.argv[1:])
    training, total = config.training, config.training.max_train_steps
    run = RunDir(config.output_dir)
    accelerator = place(training, run, config.seed)
    if accelerator.is_main_process and not launch.dry_run:
        run.prepare(dump_config(config), launch)
    accelerator.wait_for_everyone()
    stop = StopSignal()

    # 2. Parts
    vae = build_autoencoder(config)
    vae.set_gradient_checkpointing(training.gradient_checkpointing)
    discriminator = build_discriminator(config.discriminator, config.seed)
    perceptual = build_perceptual(config.perceptual)
    weights, loss_state = build_loss_weights(config.loss), build_loss_state(config.loss)
    rate = config.optimizer.learning_rate
    optimizer = adamw(vae.parameters(), config.optimizer, rate, undecayed=loss_state.parameters())
    d_optimizer = adamw(discriminator.parameters(), config.optimizer, rate * config.discriminator.learning_rate_ratio)
    validation = build_validation(config.data, config.seed)
    if accelerator.is_main_process:
        print(f"autoencoder {parameter_count(vae)}, discriminator {parameter_count(discriminator)} parameters")

    # 3. Placement
    if training.torch_compile:
        vae.compile()
    if perceptual is not None:
        perceptual.to(accelerator.device)
    loss_state.to(accelerator.device)
    model, wrapped_d = accelerator.prepare(vae, discriminator)
    ema, scaling, watch = Ema(vae, training.ema_decay), LossScaling(accelerator), DiscriminatorWatch()
    guard, mean = NonFiniteGuard(10 + scaling.halvings), mean_over_processes(accelerator)
    task = AutoencoderTask(
        model,
        wrapped_d,
        discriminator,
        perceptual,
        weights,
        build_penalties(config.discriminator),
        loss_state,
        build_bottleneck(config, vae, mean),
        config.seed,
        mean,
    )
    parameters, d_parameters = list(vae.parameters()), list(discriminator.parameters())
    first = 0
    newest = None if launch.dry_run else run.load_newest(accelerator.print)
    if newest is not None:
        first, state = newest
        vae.load_state_dict(state["autoencoder"])
        vae.load_codebook_state(state.get("codebook", {}))
        discriminator.load_state_dict(state["discriminator"])
        loss_state.load_state_dict(state["loss"])
        ema.load_state_dict(state["ema"], state["progress"]["ema_updates"])
        optimizer.load_state_dict(state["optimizer"])
        d_optimizer.load_state_dict(state["discriminator_optimizer"])
        scaling.load_state_dict(state["progress"].get("loss_scale", {}))
        accelerator.print(f"resuming {run.folder} at step {first}")

    def save(step: int) -> None:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            state = {
                "autoencoder": vae.state_dict(),
                "codebook": vae.codebook_state(),
                "discriminator": discriminator.state_dict(),
                "loss": loss_state.state_dict(),
                "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(),
                "discriminator_optimizer": d_optimizer.state_dict(),
                "progress": {"step": step, "ema_updates": ema.updates, "loss_scale": scaling.state_dict()},
            }
            run.save(step, state, training.checkpoints_total_limit)
        accelerator.wait_for_everyone()

    # 4. Loop
    plan = batch_plan(training, accelerator)
    last = min(total, first + 3) if launch.dry_run else total
    batches = build_batches(config.data, plan, config.seed, first, last)
    skips = SkipCounter(config.data.max_bad_fraction)
    if not launch.dry_run:
        accelerator.init_trackers("logs")
    log = TrainingLog(accelerator, run.folder, first, total, plan.global_size, quiet=launch.dry_run)
    started = time.perf_counter()
    for step in range(first, last):
        factor = learning_rate(step, total, config.optimizer) / rate
        set_learning_rate(optimizer, rate * factor)
        set_learning_rate(d_optimizer, rate * factor * config.discriminator.learning_rate_ratio)
        adversarial = weights.discriminator_active(step)
        parts: list[dict[str, torch.Tensor]] = []
        keys: list[str] = []
        for _ in range(training.gradient_accumulation_steps):
            batch = next(batches).to(accelerator.device)
            skips.add(len(batch.rows), batch.skipped)
            keys.extend(batch.keys)
            with accelerator.accumulate(model, wrapped_d):
                loss = task.generator_loss(batch, step)
                accelerator.backward(loss.surrogate)
                parts.append(loss.terms)
                if adversarial:
                    d_loss, d_terms = task.discriminator_loss(batch, loss.image, step)
                    accelerator.backward(d_loss)
                    parts[-1] |= d_terms
        terms = averaged(parts)
        active = [(optimizer, parameters), (d_optimizer, d_parameters)][: 2 if adversarial else 1]
        norms = [scaling.clip(which, part, config.optimizer.max_grad_norm) for which, part in active]
        terms["gradient_norm"] = norms[0]
        losses = task.reduce_mean(torch.stack(list(terms.values())).sum())
        if guard.allows(losses + torch.stack(norms).sum(), named_batch(step, keys)):
            scaling.step(*(which for which, _ in active))
            task.remember(terms)
            if adversarial:
                watch.add(terms)
            ema.update()
        else:
            scaling.skip()
            log.say(f"{named_batch(step, gather_object(keys))}: a loss or gradient is not finite, no update")
        optimizer.zero_grad()
        d_optimizer.zero_grad()
        log.add(terms)

        done = step + 1
        if launch.dry_run:
            continue
        if done % training.logging_steps == 0 or done == total:
            log.report(done)
            if warning := watch.warning(done):
                log.say(warning)
        if done % config.validation.steps == 0 or done == total:
            if accelerator.is_main_process:
                validate(vae, ema, validation, config, run, log, done)
            accelerator.wait_for_everyone()
        stopping = stop.requested(accelerator)
        if done % training.checkpointing_steps == 0 or done == total or stopping:
            save(done)
        if stopping:
            stop.leave()
    if launch.dry_run:
        print(dump_config(config))
        print(dry_run_report((time.perf_counter() - started) / max(1, last - first), total))
        return

    # 5. Export
    if accelerator.is_main_process:
        export(vae, ema, validation, config, run)
        log.say(f"wrote {run.export}; {guard.total} updates skipped; {skips.summary()}")
    accelerator.wait_for_everyone()
    log.close()


def validate(
    vae: Autoencoder,
    ema: Ema,
    images: torch.Tensor,
    config: AutoencoderTraining,
    run: RunDir,
    log: TrainingLog,
    step: int,
) -> None:
    """PSNR of the averaged weights, what became of the latents, and a grid of originals above reconstructions."""
    with ema.applied(), torch.no_grad():
        batches = [chunk.to(next(vae.parameters()).device) for chunk in torch.split(images, 32)]
        value = mean_psnr(vae, batches)
        latents = watched_latents(vae, batches)
        x, y = next(reconstruct(vae, [batches[0][: config.validation.num_images]]))
    grid = image_grid(to_images(x) + to_images(y), columns=len(x), min_side=64)
    grid.save(run.samples / f"step_{step:06d}.png")
    tracker_image(log.accelerator, "reconstructions", grid, step)
    log.write(step, {"validation_psnr": value, **latents.figures()})
    log.say("\n".join(filter(None, [f"step {step}: validation PSNR {value:.2f} dB", latents.warning(step)])))


def export(vae: Autoencoder, ema: Ema, validation: torch.Tensor, config: AutoencoderTraining, run: RunDir) -> None:
    """Writes the averaged weights with the latent scale and shift: the pretrained, given or measured ones."""
    device = next(vae.parameters()).device
    plan = BatchPlan(STATISTICS_BATCH)
    steps = -(-config.statistics_samples // plan.size)
    batches = build_batches(config.data, plan, config.seed, 0, steps)
    with ema.applied(), torch.no_grad():
        value = mean_psnr(vae, [chunk.to(device) for chunk in torch.split(validation, 32)])
        scale = latent_scale(vae, (vae.moments(batch.image.to(device)) for batch in batches), config)
        vae.config = dataclasses.replace(vae.config, sample_size=config.data.resolution, **scale)
        measured = steps * plan.size if config.scaling_factor is None and not config.freeze_encoder else None
        settings = {"validation_psnr": value, "scale_measured_on": measured, "training": dump_config(config)}
        write_vae(vae, run.export, autoencoder_card(config, vae, value), settings)


if __name__ == "__main__":
    run_command(main)
