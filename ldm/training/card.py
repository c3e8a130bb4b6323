"""Model cards: the README.md that is written into every model folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoencoder import Autoencoder, VQModel
from ldm.config import (
    AutoencoderTraining,
    DataConfig,
    DualClip,
    LdmTraining,
    PretrainedT5,
    PretrainedText,
    PretrainedTransformer,
)
from ldm.config.file import dump_config

LICENCES = {
    "shapes": "Procedurally generated, no rights reserved.",
    "emoji": (
        "Noto Emoji, Google (Apache-2.0); Twemoji, Copyright Twitter, Inc and other contributors (CC-BY-4.0, resized); "
        "Fluent Emoji, Microsoft (MIT)."
    ),
}
"""Built-in source -> its licence, in words."""


def autoencoder_card(config: AutoencoderTraining, vae: Autoencoder, psnr: float) -> str:
    """The card of a stage-one model."""
    factor, channels = vae.downsample_factor, vae.latent_channels
    kind = f"{vae.config.num_vq_embeddings} codes" if isinstance(vae, VQModel) else "KL-regularised"
    origin = "measured on the training data" if config.scaling_factor is None else "given by the config"
    if config.freeze_encoder:
        origin = "kept from the pretrained model"
    start = f"Fine-tuned from `{config.pretrained}`. " if config.pretrained else ""
    return f"""# Autoencoder trained with ldm

Autoencoder, {kind}, f{factor}, {channels} latent channels, for {config.data.resolution} px images.
{start}Validation PSNR {psnr:.2f} dB. Latent scale {vae.config.scaling_factor:.5f}, {origin}.

{_data(config.data)}

## Training

{config.training.max_train_steps} steps of {config.training.train_batch_size} images per process with this config:

```yaml
{dump_config(config)}```
"""


def model_card(config: LdmTraining, settings: Mapping[str, Any]) -> str:
    """The card of a text-to-image model."""
    measured = "\n".join(f"- {name}: {value}" for name, value in settings.items() if not isinstance(value, (dict, str)))
    return f"""# Text-to-image model trained with ldm

Latent diffusion, {config.data.resolution} px. Use it with `ldm-generate --model FOLDER --prompt "..."`
{_diffusers(config)}

{measured}

{_data(config.data)}

## Training

{config.training.max_train_steps} steps of {config.training.train_batch_size} images per process with this config:

```yaml
{dump_config(config)}```
"""


def _diffusers(config: LdmTraining) -> str:
    """The pipeline of diffusers that draws the same pictures; for encoders unlike CLIP there is none."""
    if isinstance(config.text_encoder, (PretrainedT5, PretrainedTransformer)):
        return "(diffusers has no pipeline for its text encoder)."
    if isinstance(config.text_encoder, PretrainedText):
        return f"or with `diffusers.DiffusionPipeline.from_pretrained(FOLDER)`. Fine-tuned from `{config.pretrained}`."
    name = "StableDiffusionXLPipeline" if isinstance(config.text_encoder, DualClip) else "StableDiffusionPipeline"
    return f"or with `diffusers.{name}.from_pretrained(FOLDER)`."


def _data(data: DataConfig) -> str:
    licence = LICENCES.get(data.source, "State its licence here.")
    return f"## Data\n\n`{data.source}`, split `{data.split}`. {licence}"
