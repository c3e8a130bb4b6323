"""What stage two leaves: the model with the sampling defaults of the config, and an adapter's file beside it."""

from __future__ import annotations

import dataclasses

from torch import nn

from autoencoder import Autoencoder
from ldm.adapters import Adapter
from ldm.config import LdmTraining
from ldm.config.file import dump_config
from ldm.pretrained import Model, write_model
from ldm.tasks.text_to_image import ConditionedUNet
from ldm.training.card import model_card
from ldm.training.fine_tuning import merged
from ldm.training.run_dir import RunDir


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


def export(config: LdmTraining, vae: Autoencoder, network: ConditionedUNet, trained: nn.Module, run: RunDir) -> None:
    """Writes the complete model to `export/`, and what an adapter learnt to `adapter/`."""
    with merged(trained):
        finished = trained_model(config, vae, network)
        write_model(dataclasses.replace(finished, card=model_card(config, finished.settings)), run.export)
    if isinstance(trained, Adapter):
        trained.save(run.folder / "adapter")
