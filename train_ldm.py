"""Stage two: train a text-conditioned U-Net on the latents of a trained autoencoder, or fine-tune a whole model.

accelerate launch train_ldm.py --config train_configs/shapes/ldm.yaml
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from functools import partial
from pathlib import Path

import torch

from autoencoder import LatentCodec
from ldm.build import (
    build_data,
    build_objective,
    build_source,
    build_text_encoder,
    build_timesteps,
    build_training_noise,
    build_unet,
    check_resolution,
    vlb_weight,
)
from ldm.config import LdmTraining
from ldm.config.file import dump_config, parse_command_line
from ldm.data.batches import SkipCounter
from ldm.pretrained import read_vae, resolve
from ldm.tasks.text_to_image import ConditionedUNet, TextToImageTask
from ldm.training.captions import caption_source
from ldm.training.checkpoint import Checkpoint, Stateful
from ldm.training.ema import Ema
from ldm.training.export import export, trained_model
from ldm.training.fine_tuning import build_trained, class_images, prior_teacher, starting_model
from ldm.training.guards import SKIPS_IN_A_ROW, UpdateGuard
from ldm.training.latent_data import encoded_data, training_batches, trial_data, validation_latents
from ldm.training.launch import (
    batch_plan,
    due,
    mean_over_processes,
    open_run,
    parameter_count,
    place,
    run_command,
)
from ldm.training.log import TimestepLosses, TrainingLog
from ldm.training.optim import learning_rate, optimizer_of, set_learning_rate
from ldm.training.precision import LossScaling
from ldm.training.processes import last_state_named
from ldm.training.sharding import whole_network
from ldm.training.stop import StopSignal
from ldm.training.trial import Trial, trial_steps
from ldm.training.validation import validate_ldm

CAPTIONS_FOR_VOCABULARY = 100_000


def main() -> None:
    # 1. Config
    given, launch = parse_command_line(LdmTraining, sys.argv[1:])
    config, base = starting_model(given)
    training, total = config.training, config.training.max_train_steps
    accelerator, stop, trial = place(config), StopSignal(), Trial()
    run = open_run(accelerator, config, launch)

    # 2. Parts
    vae = (read_vae(resolve(str(config.autoencoder))) if base is None else base.vae).to(accelerator.device)
    check_resolution(config, vae.downsample_factor)
    data, latents = (trial_data(config.data), None) if launch.dry_run else (config.data, config.latents.folder)
    source = build_data(data, data.split, config.seed)
    skips = SkipCounter(data.max_bad_fraction)
    folder = Path(latents or run.folder / "latents")
    cache = encoded_data(source, config, vae, folder, accelerator, skips)
    if launch.dry_run:
        pictures = len(build_source(config.data, data.split, config.seed))
        trial.mark(f"{cache.read} encoded pictures", pictures / cache.read)
    prior = None
    if base is not None and config.prior_preservation.wanted:
        drawn = class_images(config, base, run.folder / "class_images", accelerator, launch.dry_run)
        if launch.dry_run:
            trial.mark(f"{len(drawn)} class pictures", config.prior_preservation.num_class_images / len(drawn))
        prior = encoded_data(drawn, config, vae, run.folder / "class_latents", accelerator, skips)
    held_out = validation_latents(build_data(data, data.validation_split, config.seed), config, vae)
    vocabulary = itertools.islice(itertools.chain.from_iterable(cache.captions), CAPTIONS_FOR_VOCABULARY)
    if base is not None:
        text_encoder, unet = base.text_encoder.to(accelerator.device), base.unet.to(accelerator.device)
    else:
        with accelerator.main_process_first():
            text_encoder = build_text_encoder(config.text_encoder, vocabulary, config.seed, run.folder / "tokenizer")
        unet = build_unet(config, vae.latent_channels, text_encoder)
    if training.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    network = ConditionedUNet(unet, text_encoder, vae.downsample_factor)
    teacher = prior_teacher(config, network)
    trained = build_trained(config, network)
    sizes = f"U-Net {parameter_count(unet)}, text encoder {parameter_count(text_encoder)} parameters"
    accelerator.print(sizes if trained is network else f"{sizes}, adapter {parameter_count(trained)}")

    # 3. Placement
    if training.torch_compile:
        unet.compile()
    model, scaling = accelerator.prepare(network), LossScaling(accelerator)
    optimizer, ema = optimizer_of(network, config.optimizer), Ema(trained, training.ema_decay)
    guard = UpdateGuard(training.skip_loss_spikes, limit=SKIPS_IN_A_ROW + scaling.halvings)
    objective = build_objective(config)
    timesteps = build_timesteps(config, objective, accelerator.gather)
    task = TextToImageTask(
        model,
        caption_source(config.latents, cache, held_out, text_encoder, folder / "text", accelerator),
        LatentCodec.from_config(vae),
        objective,
        build_training_noise(config),
        timesteps,
        vlb_weight(config),
        config.objective.proportion_empty_prompts,
        config.latents.sample_posterior,
        config.seed,
        teacher,
    )
    parameters = [p for p in network.parameters() if p.requires_grad]
    parts: dict[str, Stateful] = {"network": trained, "optimizer": optimizer, **scaling.parts(), **timesteps.parts()}
    limit, snapshots = training.checkpoints_total_limit, training.ema_snapshots
    checkpoint = Checkpoint(run, accelerator, limit, ema, guard, parts, snapshots)
    first = checkpoint.resume()

    # 4. Loop
    plan = batch_plan(training, accelerator)
    steps = trial_steps(total, 0) if launch.dry_run else range(first, total)
    batches = training_batches(cache, prior, config, plan, first, first + len(steps))
    log = TrainingLog(accelerator, run.folder, first, total, plan.global_size, quiet=launch.dry_run)
    mean = mean_over_processes(accelerator)
    by_timestep = TimestepLosses(config.diffusion.num_train_timesteps, mean)
    bare, model_now = dataclasses.replace(task, model=network), trained_model(config, vae, network)
    validate = partial(validate_ldm, bare, model_now, ema, held_out, config, run, log, stop)
    if run.lacks_sample(first, config.validation.steps, total):
        validate(first)
    with stop.deferred(), last_state_named(run):
        for step in steps:
            rate = learning_rate(step, total, config.optimizer)
            set_learning_rate(optimizer, rate)
            losses: list[torch.Tensor] = []
            for _ in range(training.gradient_accumulation_steps):
                with log.waiting():
                    batch = next(batches).to(accelerator.device)
                with accelerator.accumulate(model):
                    loss = task.loss(batch, step, plan.global_size)
                    accelerator.backward(loss.loss)
                losses.append(loss.loss.detach())
                by_timestep.add(loss.rows, loss.t)
            terms = {"loss": mean(torch.stack(losses).mean())}
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
                facts = {"learning_rate": rate, "skipped_updates": guard.total}
                log.report(done, {**facts, **by_timestep.means()})
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
    with ema.applied():
        finished = whole_network(accelerator, network)
        if accelerator.is_main_process:
            export(config, vae, finished, trained, run)
    if accelerator.is_main_process:
        log.say(f"wrote {run.export}; {guard.total} updates skipped; {skips.summary()}")
    accelerator.wait_for_everyone()
    log.close()


if __name__ == "__main__":
    run_command(main)
