"""Train a classifier of noisy latents for classifier guidance, on the cached latents of a stage-two run.

accelerate launch train_classifier.py --config train_configs/shapes/classifier.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from autoencoder import LatentCodec
from ldm.build import build_classifier
from ldm.config import ClassifierTraining, ConfigError
from ldm.config.file import dump_config, parse_command_line
from ldm.data.fingerprint import weights_hash
from ldm.data.latent_batches import latent_batches
from ldm.data.latents import LatentCache
from ldm.pretrained import read_diffusion, read_vae, resolve
from ldm.process import Objective
from ldm.tasks.classifier import ClassifierTask
from ldm.tasks.labels import UNLABELLED, class_indices
from ldm.training.checkpoint import Checkpoint, Stateful
from ldm.training.ema import Ema
from ldm.training.guards import SKIPS_IN_A_ROW, UpdateGuard
from ldm.training.launch import (
    batch_plan,
    due,
    mean_over_processes,
    open_run,
    parameter_count,
    place,
    run_command,
)
from ldm.training.log import TrainingLog, averaged
from ldm.training.optim import learning_rate, optimizer_of, set_learning_rate
from ldm.training.precision import LossScaling
from ldm.training.processes import last_state_named
from ldm.training.stop import StopSignal
from ldm.training.trial import Trial, trial_steps


def main() -> None:
    # 1. Config
    config, launch = parse_command_line(ClassifierTraining, sys.argv[1:])
    training, total = config.training, config.training.max_train_steps
    accelerator = place(config)
    stop, trial = StopSignal(), Trial()
    run = open_run(accelerator, config, launch)

    # 2. Parts
    folder = resolve(config.model)
    vae, diffusion = read_vae(folder).to(accelerator.device), read_diffusion(folder)
    cache = LatentCache.open(Path(config.latents), weights_hash(vae))
    check_labels(cache, config.classifier.labels)
    classifier = build_classifier(config, vae.latent_channels)
    optimizer = optimizer_of(classifier, config.optimizer)
    accelerator.print(f"classifier {parameter_count(classifier)} parameters, {len(cache)} latents")

    # 3. Placement
    if training.torch_compile:
        classifier.compile()
    model, scaling = accelerator.prepare(classifier), LossScaling(accelerator)
    ema = Ema(classifier, training.ema_decay)
    guard = UpdateGuard(training.skip_loss_spikes, limit=SKIPS_IN_A_ROW + scaling.halvings)
    objective = Objective(diffusion.schedule(), diffusion.prediction_type)
    task = ClassifierTask(model, LatentCodec.from_config(vae), objective, config.classifier.labels, config.seed)
    parameters = list(classifier.parameters())
    parts: dict[str, Stateful] = {"network": classifier, "optimizer": optimizer, **scaling.parts()}
    checkpoint = Checkpoint(run, accelerator, training.checkpoints_total_limit, ema, guard, parts)
    first = checkpoint.resume()

    # 4. Loop
    plan = batch_plan(training, accelerator)
    steps = trial_steps(total, 0) if launch.dry_run else range(first, total)
    batches = latent_batches(cache, plan, config.seed, first, first + len(steps))
    log = TrainingLog(accelerator, run.folder, first, total, plan.global_size, quiet=launch.dry_run)
    mean = mean_over_processes(accelerator)
    trial.mark("start", 1)
    with stop.deferred(), last_state_named(run):
        for step in steps:
            set_learning_rate(optimizer, learning_rate(step, total, config.optimizer))
            losses: list[dict[str, torch.Tensor]] = []
            for _ in range(training.gradient_accumulation_steps):
                with log.waiting():
                    batch = next(batches).to(accelerator.device)
                with accelerator.accumulate(model):
                    losses.append(task.loss(batch, step, plan.global_size))
                    accelerator.backward(losses[-1]["loss"])
            terms = {name: mean(value) for name, value in averaged(losses).items()}
            terms["gradient_norm"] = scaling.clip(optimizer, parameters, config.optimizer.max_grad_norm)
            refusal = guard.refusal(terms["loss"], terms["gradient_norm"], step)
            if refusal is None:
                scaling.step(optimizer)
                ema.update()
            else:
                scaling.skip()
            optimizer.zero_grad()
            log.say(refusal)
            log.add(terms)

            done = step + 1
            if launch.dry_run:
                trial.mark("step", total)
                continue
            if due(done, training.logging_steps, total):
                log.report(done, {"skipped_updates": guard.total})
            stopping = stop.requested(accelerator)
            if due(done, training.checkpointing_steps, total) or stopping:
                checkpoint.save(done, log.say)
            if stopping:
                stop.leave()
    if launch.dry_run:
        checkpoint.save(total, log.say)
        trial.mark("save", total / training.checkpointing_steps)
        accelerator.print(dump_config(config) + trial.report(run.state(total)))
        return

    # 5. Export
    if accelerator.is_main_process:
        with ema.applied():
            classifier.save_pretrained(run.export)
        log.say(f"wrote {run.export}; {guard.total} updates skipped")
    accelerator.wait_for_everyone()
    log.close()


def check_labels(cache: LatentCache, labels: tuple[str, ...]) -> None:
    """Refuses labels of which one stands in no caption alone."""
    captions = [caption for entry in cache.captions for caption in entry]
    found = class_indices(captions, labels)
    missing = [label for index, label in enumerate(labels) if not (found == index).any()]
    if missing:
        raise ConfigError(
            f"`classifier.labels` has {missing[0]!r}, but no caption names it and no other label; "
            f"{(found != UNLABELLED).sum()} of {len(captions)} captions name exactly one"
        )


if __name__ == "__main__":
    run_command(main)
