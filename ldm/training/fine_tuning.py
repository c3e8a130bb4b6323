"""Training from a model that is there already: what it brings, what of it is trained, and its own class pictures."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from conditioning import ClipTextEncoder
from ldm.adapters import Adapter, LoraBranches, TextualInversion, adapted_parts
from ldm.config import (
    ConfigError,
    LdmTraining,
    LoraConfig,
    NoAdapter,
    PretrainedText,
    ScratchClip,
    TextualInversionConfig,
)
from ldm.data.sources import Columns, Source, open_source
from ldm.networks import UNetConfig
from ldm.pipeline import TextToImage
from ldm.pretrained import Model, read_model
from ldm.process import DiffusionConfig
from ldm.seeds import generator
from ldm.tasks.text_to_image import ConditionedUNet
from ldm.training.run_dir import write_text

ORIGIN = "origin.json"


def starting_model(config: LdmTraining) -> tuple[LdmTraining, Model | None]:
    """The model of `pretrained`, and the config with the sections that it brings; None without `pretrained`.

    Raises:
        ConfigError: the model cannot be read or had, is an inpainting model, or the config has such a section of its
            own that says otherwise; only `diffusion` may, where all weights are trained.
    """
    if config.pretrained is None:
        return config, None
    try:
        model = read_model(config.pretrained, config.revision, config.variant)
    except ValueError as error:
        raise ConfigError(f"`pretrained`: {error}") from error
    if model.unet.config.in_channels != model.vae.latent_channels:
        raise ConfigError(f"`pretrained` is {config.pretrained!r}, an inpainting model, which is not trained here")
    if config.unet not in (UNetConfig(), model.unet.config):
        raise ConfigError("`unet` is given with `pretrained`, whose model brings its own; leave it out")
    diffusion = model.diffusion if config.diffusion == DiffusionConfig() else config.diffusion
    if diffusion != model.diffusion and not isinstance(config.adapter, NoAdapter):
        raise ConfigError(
            "`diffusion` is not that of the `pretrained` model, and a file that holds an adapter alone cannot say so; "
            "leave it out, or train without `adapter`"
        )
    if diffusion != model.diffusion and config.prior_preservation.target == "model":
        raise ConfigError(
            "`diffusion` is not that of the `pretrained` model, whose predictions `prior_preservation.target` model "
            "asks for; leave it out, or set `prior_preservation.target` to picture"
        )
    text = config.text_encoder
    if text == ScratchClip():
        text = PretrainedText()
    if not isinstance(text, PretrainedText):
        raise ConfigError("`text_encoder.type` must be pretrained with `pretrained`, whose model brings its own")
    model.text_encoder.set_trainable(text.trainable)
    return dataclasses.replace(config, unet=model.unet.config, diffusion=diffusion, text_encoder=text), model


def build_trained(config: LdmTraining, network: ConditionedUNet) -> nn.Module:
    """What is trained, averaged and saved: the network itself, or the adapter that is added to it.

    Raises:
        ConfigError: the adapter does not fit the model.
    """
    try:
        match config.adapter:
            case NoAdapter():
                return network
            case LoraConfig():
                adapter: Adapter = _lora(config.adapter, config.seed, network)
            case TextualInversionConfig():
                adapter = _textual_inversion(config.adapter, network)
    except ValueError as error:
        raise ConfigError(f"`adapter`: {error}") from error
    network.adapter = adapter
    return adapter


def prior_teacher(config: LdmTraining, network: ConditionedUNet) -> ConditionedUNet | None:
    """A frozen copy of the network, made before any adapter is; None where class pictures are their own target."""
    if config.prior_preservation.target == "picture":
        return None
    return copy.deepcopy(network).requires_grad_(False).eval()


def _lora(config: LoraConfig, seed: int, network: ConditionedUNet) -> LoraBranches:
    encoder = network.text_encoder
    parts = adapted_parts(network.unet, encoder)
    targets = {name: config.targets if name == "unet" else config.text_encoder_targets for name in parts}
    chosen = targets if encoder.trainable else {"unet": config.targets}
    alpha = config.rank if config.alpha is None else config.alpha
    return LoraBranches(parts, chosen, config.rank, alpha, generator(seed, "adapter"))


def _textual_inversion(config: TextualInversionConfig, network: ConditionedUNet) -> TextualInversion:
    encoder = network.text_encoder
    if not isinstance(encoder, ClipTextEncoder):
        raise ValueError(f"textual_inversion needs a model with one CLIP text encoder, not a {type(encoder).__name__}")
    network.requires_grad_(False)
    encoder.trainable = True  # gradients pass through it, to the token alone
    return TextualInversion(encoder, config.token, config.initializer)


def merged(trained: nn.Module) -> AbstractContextManager[None]:
    """Within the block the model's weights hold what the adapter has learnt; nothing to do where there is none."""
    return trained.merged() if isinstance(trained, Adapter) else nullcontext()


def class_images(config: LdmTraining, model: Model, folder: Path, accelerator: Accelerator, few: bool) -> Source:
    """The pictures of `class_source`, or those that the model draws of the class prompts into `folder`.

    `few` takes one batch, for a dry run.

    Raises:
        ValueError: the source cannot be read, the folder holds pictures of another model, seed or prompts, or the file
            of prompts holds none.
    """
    prior, data = config.prior_preservation, config.data
    count = min(prior.num_class_images, prior.batch_size) if few else prior.num_class_images
    if prior.class_source is not None:
        columns = Columns(data.image_column, data.caption_columns)
        return open_source(prior.class_source, "train", data.resolution, columns, count)
    given = prior.class_prompts if prior.class_prompts_file is None else _lines(Path(prior.class_prompts_file))
    prompts = [given[i % len(given)] for i in range(count)]
    origin = {"model": config.pretrained, "revision": config.revision, "seed": config.seed, "prompts": prompts}
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            _draw_class_images(TextToImage(model, accelerator.device, torch.float32), origin, folder, prior.batch_size)
    if differing := _differing(origin, folder):
        raise ValueError(
            f"{folder} holds class pictures whose {' and '.join(differing)} differ; delete it to draw this config's"
        )
    return open_source(str(folder), "train", data.resolution)


def _draw_class_images(pipe: TextToImage, origin: dict[str, Any], folder: Path, batch_size: int) -> None:
    """Draws what is missing: picture i from prompt i with seed + i and the model's own settings.

    The folder first notes what its pictures are drawn from; one that notes something else is left as it is.
    """
    noted, pictures = folder / ORIGIN, folder / "train"
    if not noted.exists():
        pictures.mkdir(parents=True, exist_ok=True)
        write_text(noted, json.dumps(origin))
    table, prompts = pictures / "metadata.jsonl", origin["prompts"]
    if table.exists() or _differing(origin, folder):
        return
    with tqdm(total=len(prompts), desc="class images", unit="picture") as bar:
        for first in range(0, len(prompts), batch_size):
            numbers = range(first, min(first + batch_size, len(prompts)))
            files = [pictures / f"{number:05d}.png" for number in numbers]
            if not all(file.exists() for file in files):
                images = pipe(prompts[first : numbers.stop], seed=origin["seed"] + first, batch_size=batch_size)
                for file, image in zip(files, images, strict=True):
                    image.save(temporary := file.with_suffix(".tmp"), format="PNG")
                    os.replace(temporary, file)
            bar.update(len(numbers))
    rows = [{"file_name": f"{i:05d}.png", "text": text} for i, text in enumerate(prompts)]
    write_text(table, "".join(json.dumps(row) + "\n" for row in rows))


def _differing(origin: dict[str, Any], folder: Path) -> list[str]:
    """What the folder's pictures were drawn from that is another thing in `origin`."""
    found = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    return [name for name, value in origin.items() if found[name] != value]


def _lines(file: Path) -> list[str]:
    try:
        found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"`prior_preservation.class_prompts_file`: {file} cannot be read: {error}") from error
    if not found:
        raise ConfigError(f"`prior_preservation.class_prompts_file`: {file} holds no prompts")
    return found
