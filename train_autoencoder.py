"""Stage one: train an autoencoder on images, KL-regularised or with a codebook.

accelerate launch train_autoencoder.py --config train_configs/shapes/autoencoder.yaml
"""

from __future__ import annotations

import dataclasses
import sys
from functools import partial

import torch

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
from ldm.config.file import dump_config, parse_command_line
from ldm.data.batches import SkipCounter
from ldm.data.order import BatchPlan
from ldm.evaluation.reconstruction import mean_psnr
from ldm.pretrained import write_vae
from ldm.tasks.autoencoder import AutoencoderTask
from ldm.training.card import autoencoder_card
from ldm.training.checkpoint import Checkpoint, Stateful
from ldm.training.ema import Ema
from ldm.training.guards import SKIPS_IN_A_ROW, DiscriminatorWatch, RunningStatistics, UpdateGuard, label_warning
from ldm.training.latent_scale import latent_scale
from ldm.training.launch import batch_plan, due, mean_over_processes, open_run, parameter_count, place, run_command
from ldm.training.log import TrainingLog, averaged
from ldm.training.optim import adamw, learning_rate, set_learning_rate
from ldm.training.precision import LossScaling
from ldm.training.processes import last_state_named
from ldm.training.run_dir import RunDir
from ldm.training.stop import StopSignal
from ldm.training.trial import Trial, trial_steps
from ldm.training.validation import validate_autoencoder

STATISTICS_BATCH = 32


def main() -> None:
    # 1. Config
    config, launch = parse_command_line(AutoencoderTraining, sys.argv[1:])
    training, total = config.training, config.training.max_train_steps
    accelerator, stop, trial = place(config), StopSignal(), Trial()
    run = open_run(accelerator, config, launch)

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
    accelerator.print(f"autoencoder {parameter_count(vae)}, discriminator {parameter_count(discriminator)} parameters")

    # 3. Placement
    if training.torch_compile:
        vae.compile()
    if perceptual is not None:
        perceptual.to(accelerator.device)
    loss_state.to(accelerator.device)
    model, wrapped_d = accelerator.prepare(vae, discriminator)
    ema, scaling, watch = Ema(vae, training.ema_decay), LossScaling(accelerator), DiscriminatorWatch()
    guard = UpdateGuard(training.skip_loss_spikes, limit=SKIPS_IN_A_ROW + scaling.halvings)
    mean = mean_over_processes(accelerator)
    bottleneck = build_bottleneck(config, vae, mean)
    task = AutoencoderTask(
        model,
        wrapped_d,
        perceptual,
        weights,
        build_penalties(config.discriminator),
        loss_state,
        bottleneck,
        config.seed,
        mean,
        config.discriminator.labels,
    )
    parameters, d_parameters = list(vae.parameters()), list(discriminator.parameters())
    parts: dict[str, Stateful] = {"autoencoder": vae, "discriminator": discriminator, "loss": loss_state}
    parts |= {"optimizer": optimizer, "discriminator_optimizer": d_optimizer, **bottleneck.parts(), **scaling.parts()}
    checkpoint = Checkpoint(run, accelerator, training.checkpoints_total_limit, ema, guard, parts)
    first, statistics = checkpoint.resume(), RunningStatistics(discriminator)

    # 4. Loop
    plan = batch_plan(training, accelerator)
    start = min(total, config.loss.discriminator_start) if weights.discriminator > 0 else total
    heard = min(total, start + config.loss.discriminator_warmup)
    steps = trial_steps(total, 0, start, heard) if launch.dry_run else range(first, total)
    batches = build_batches(config.data, plan, config.seed, first, first + len(steps))
    skips = SkipCounter(config.data.max_bad_fraction)
    log = TrainingLog(accelerator, run.folder, first, total, plan.global_size, quiet=launch.dry_run)
    validate = partial(validate_autoencoder, vae, ema, validation, config, run, log, stop)
    if run.lacks_sample(first, config.validation.steps, total):
        validate(first)
    with stop.deferred(), last_state_named(run):
        for step in steps:
            rate = learning_rate(step, total, config.optimizer)
            set_learning_rate(optimizer, rate)
            set_learning_rate(d_optimizer, rate * config.discriminator.learning_rate_ratio)
            adversarial = weights.discriminator_active(step)
            micro: list[dict[str, torch.Tensor]] = []
            keys: list[str] = []
            for _ in range(training.gradient_accumulation_steps):
                with log.waiting():
                    batch = next(batches).to(accelerator.device)
                skips.add(len(batch.rows), batch.skipped)
                keys.extend(batch.keys)
                with accelerator.accumulate(model, wrapped_d):
                    loss = task.generator_loss(batch, step)
                    accelerator.backward(loss.surrogate)
                    micro.append(loss.terms)
                    if loss.fake_logits is not None:
                        d_loss, d_terms = task.discriminator_loss(batch, loss.fake_logits, step)
                        accelerator.backward(d_loss)
                        micro[-1] |= d_terms
            terms = averaged(micro)
            active = [(optimizer, parameters), (d_optimizer, d_parameters)][: 2 if adversarial else 1]
            norms = [scaling.clip(which, part, config.optimizer.max_grad_norm) for which, part in active]
            terms["gradient_norm"] = norms[0]
            losses = task.reduce_mean(terms["nll"] + terms[bottleneck.term])
            refusal = guard.refusal(losses, torch.stack(norms).sum(), step, keys)
            if refusal is None:
                scaling.step(*(which for which, _ in active))
                task.remember(terms)
                if weights.adversary_active(step):
                    watch.add(terms)
                ema.update()
                statistics.keep()
            else:
                scaling.skip()
                statistics.restore()
            log.say(refusal)
            optimizer.zero_grad()
            d_optimizer.zero_grad()
            log.add(terms)

            done = step + 1
            if launch.dry_run:
                if weights.adversary_active(step):
                    trial.mark("step with the discriminator", total - heard)
                else:
                    trial.mark(*("step of its warm-up", heard - start) if adversarial else ("step", start))
                continue
            if due(done, training.logging_steps, total):
                row = log.report(done, {"learning_rate": rate, "skipped_updates": guard.total})
                log.say(watch.warning(done))
                log.say(label_warning(done, row))
            if due(done, config.validation.steps, total):
                validate(done)
            stopping = stop.requested(accelerator)
            if due(done, training.checkpointing_steps, total) or stopping:
                checkpoint.save(done, log.say)
            if stopping:
                stop.leave()
    if launch.dry_run:
        validate(total)
        trial.mark("validation", total / config.validation.steps)
        checkpoint.save(total, log.say)
        trial.mark("save", total / training.checkpointing_steps)
        accelerator.print(dump_config(config) + trial.report(run.state(total)))
        return

    # 5. Export
    if accelerator.is_main_process:
        export(vae, ema, validation, config, run)
        log.say(f"wrote {run.export}; {guard.total} updates skipped; {skips.summary()}")
    accelerator.wait_for_everyone()
    log.close()


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
