"""Stage two: train a text-conditioned U-Net on the latents of a trained autoencoder.

accelerate launch train_ldm.py --config train_configs/shapes/ldm.yaml
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from autoencoder import Autoencoder, LatentCodec
from ldm.build import build_objective, build_source, build_text_encoder, build_unet, check_resolution
from ldm.config import DataConfig, LdmTraining
from ldm.config_file import dump_config, parse_command_line
from ldm.data.batches import SkipCounter
from ldm.data.latent_batches import latent_batches
from ldm.data.latents import (
    CacheSettings,
    LatentCache,
    build_cache,
    check_settings,
    finish_cache,
    is_complete,
    shard_count,
)
from ldm.evaluation.grid import image_grid
from ldm.pipeline import TextToImage
from ldm.pretrained import Model, read_vae, resolve, write_model
from ldm.tasks.text_to_image import ConditionedUNet, TextToImageTask
from ldm.training.card import model_card
from ldm.training.ema import Ema
from ldm.training.guards import NonFiniteGuard
from ldm.training.launch import (
    StopSignal,
    batch_plan,
    dry_run_report,
    parameter_count,
    place,
    run_command,
    tracker_image,
    trial_run,
)
from ldm.training.log import TrainingLog, averaged
from ldm.training.optim import learning_rate, optimizer_of, set_learning_rate
from ldm.training.precision import LossScaling
from ldm.training.run_dir import RunDir, weights_hash

CAPTIONS_FOR_VOCABULARY = 100_000
TRIAL_SAMPLES = 64


def main() -> None:
    # 1. Config
    config, launch = parse_command_line(LdmTraining, sys.argv[1:])
    training, total = config.training, config.training.max_train_steps
    run = RunDir(config.output_dir)
    accelerator = place(training, run, config.seed)
    if accelerator.is_main_process and not launch.dry_run:
        run.prepare(dump_config(config), launch)
    accelerator.wait_for_everyone()
    stop = StopSignal()

    # 2. Parts
    data, latents = config.data, Path(config.latents.folder or run.folder / "latents")
    if launch.dry_run:
        run = trial_run(accelerator)
        data, latents = trial_data(config.data), run.folder / "latents"
    vae = read_vae(resolve(config.autoencoder)).to(accelerator.device)
    check_resolution(config, vae.downsample_factor)
    skips = SkipCounter(config.data.max_bad_fraction)
    cache = encoded_data(dataclasses.replace(config, data=data), vae, latents, accelerator, skips, stop)
    captions = (cache.captions[i][j] for i in range(len(cache)) for j in range(len(cache.captions[i])))
    with accelerator.main_process_first():
        text_encoder = build_text_encoder(
            config.text_encoder,
            itertools.islice(captions, CAPTIONS_FOR_VOCABULARY),
            config.seed,
            run.folder / "tokenizer",
        )
    unet = build_unet(config, vae.latent_channels, text_encoder.model.config.hidden_size)
    if training.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    network = ConditionedUNet(unet, text_encoder)
    optimizer = optimizer_of(network, config.optimizer)
    if accelerator.is_main_process:
        print(f"U-Net {parameter_count(unet)}, text encoder {parameter_count(text_encoder)} parameters")

    # 3. Placement
    if training.torch_compile:
        unet.compile()
    model = accelerator.prepare(network)
    ema, scaling = Ema(network, training.ema_decay), LossScaling(accelerator)
    guard = NonFiniteGuard(10 + scaling.halvings)
    task = TextToImageTask(
        model,
        text_encoder,
        LatentCodec.from_config(vae),
        build_objective(config),
        text_encoder.tokenize([""])[0],
        config.objective.proportion_empty_prompts,
        config.latents.sample_posterior,
        config.seed,
    )
    parameters = [p for p in network.parameters() if p.requires_grad]
    first = 0
    newest = None if launch.dry_run else run.load_newest(accelerator.print)
    if newest is not None:
        first, state = newest
        network.load_state_dict(state["network"])
        ema.load_state_dict(state["ema"], state["progress"]["ema_updates"])
        optimizer.load_state_dict(state["optimizer"])
        scaling.load_state_dict(state["progress"].get("loss_scale", {}))
        accelerator.print(f"resuming {run.folder} at step {first}")

    def save(step: int) -> None:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            state = {
                "network": network.state_dict(),
                "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(),
                "progress": {"step": step, "ema_updates": ema.updates, "loss_scale": scaling.state_dict()},
            }
            run.save(step, state, training.checkpoints_total_limit)
        accelerator.wait_for_everyone()

    # 4. Loop
    plan = batch_plan(training, accelerator)
    last = min(total, first + 3) if launch.dry_run else total
    batches = latent_batches(cache, plan, config.seed, first, last)
    if not launch.dry_run:
        accelerator.init_trackers("logs")
    log = TrainingLog(accelerator, run.folder, first, total, plan.global_size, quiet=launch.dry_run)
    started = time.perf_counter()
    for step in range(first, last):
        set_learning_rate(optimizer, learning_rate(step, total, config.optimizer))
        parts: list[dict[str, torch.Tensor]] = []
        for _ in range(training.gradient_accumulation_steps):
            batch = next(batches)
            with accelerator.accumulate(model):
                parts.append(task.loss(batch.to(accelerator.device), step, plan.global_size))
                accelerator.backward(parts[-1]["loss"])
        terms = averaged(parts)
        terms["gradient_norm"] = scaling.clip(optimizer, parameters, config.optimizer.max_grad_norm)
        if guard.allows(terms["gradient_norm"], f"step {step}"):
            scaling.step(optimizer)
            ema.update()
        else:
            scaling.skip()
        optimizer.zero_grad()
        log.add(terms)

        done = step + 1
        if launch.dry_run:
            continue
        if done % training.logging_steps == 0 or done == total:
            log.report(done)
        if done % config.validation.steps == 0 or done == total:
            if accelerator.is_main_process:
                with ema.applied():
                    sample_grid(trained_model(config, vae, network), config, run, log, done)
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
        with ema.applied():
            finished = trained_model(config, vae, network)
            write_model(dataclasses.replace(finished, card=model_card(config, finished.settings)), run.export)
        log.say(f"wrote {run.export}; {guard.total} updates skipped; {skips.summary()}")
    accelerator.wait_for_everyone()
    log.close()


def trial_data(data: DataConfig) -> DataConfig:
    """Few enough samples for a dry run."""
    return dataclasses.replace(data, max_train_samples=min(data.max_train_samples or TRIAL_SAMPLES, TRIAL_SAMPLES))


def encoded_data(
    config: LdmTraining,
    vae: Autoencoder,
    folder: Path,
    accelerator: Accelerator,
    skips: SkipCounter,
    stop: StopSignal,
) -> LatentCache:
    """The latent cache of the training data; encoded by all processes together unless a valid one exists."""
    source = build_source(config.data, config.data.split, config.seed)
    settings = CacheSettings(
        source=source.name,
        num_samples=len(source),
        resolution=config.data.resolution,
        center_crop=config.data.center_crop,
        random_flip=config.data.random_flip,
        autoencoder=weights_hash(vae),
        dtype=config.latents.dtype,
    )

    def encode(x: torch.Tensor) -> torch.Tensor:
        chunks = torch.split(x, config.latents.batch_size)
        with torch.no_grad():
            return torch.cat([vae.moments(chunk.to(accelerator.device)).cpu() for chunk in chunks])

    folder.mkdir(parents=True, exist_ok=True)
    with accelerator.main_process_first():
        check_settings(folder, settings)
    if not is_complete(folder):
        size, shards = config.latents.shard_size, shard_count(len(source), config.latents.shard_size)
        with tqdm(total=len(source), desc="encoding", disable=not accelerator.is_main_process) as bar:

            def progress(count: int) -> None:
                bar.update(count)
                if stop.number:
                    stop.leave()

            build_cache(
                folder,
                source,
                settings,
                encode,
                config.latents.batch_size,
                size,
                skips,
                accelerator.process_index,
                accelerator.num_processes,
                progress,
            )
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            finish_cache(folder, shards)
        accelerator.wait_for_everyone()
    return LatentCache(folder, settings)


def trained_model(config: LdmTraining, vae: Autoencoder, network: ConditionedUNet) -> Model:
    """The parts as they stand now, with the sampling defaults of the config."""
    side = config.data.resolution // vae.downsample_factor
    network.unet.config = dataclasses.replace(network.unet.config, sample_size=side)
    chosen = config.validation
    settings = {
        "sampler": chosen.sampler,
        "num_inference_steps": chosen.num_inference_steps,
        "guidance_scale": chosen.guidance_scale,
        "training": dump_config(config),
    }
    return Model(vae, network.unet, network.text_encoder, config.diffusion, settings)


def sample_grid(model: Model, config: LdmTraining, run: RunDir, log: TrainingLog, step: int) -> None:
    """Pictures of the fixed prompts and seeds, labelled; training is left exactly as it was."""
    prompts = list(config.validation.validation_prompts) or [""]
    device = log.accelerator.device
    training = [part.training for part in (model.unet, model.text_encoder)]
    images = TextToImage(model, device, torch.float32)(prompts, seed=config.validation.seed)
    for part, mode in zip((model.unet, model.text_encoder), training, strict=True):
        part.train(mode)
    grid = image_grid(images, labels=prompts, min_side=128)
    grid.save(run.samples / f"step_{step:06d}.png")
    tracker_image(log.accelerator, "samples", grid, step)


if __name__ == "__main__":
    run_command(main)
