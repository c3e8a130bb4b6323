"""The presets are what they say: one for every tool, one for diffusers and this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ldm.config import AutoencoderTraining, LdmTraining, ScratchClip
from ldm.config.file import load_config
from ldm.interop.compatibility import Description, verdicts
from ldm.interop.families import VIT_L
from ldm.networks import UNet

PRESETS = Path(__file__).parents[2] / "train_configs" / "presets"


def described(name: str) -> Description:
    stage_one = load_config(AutoencoderTraining, PRESETS / f"{name}-autoencoder.yaml")
    stage_two = load_config(LdmTraining, PRESETS / f"{name}.yaml")
    text: dict[str, Any] = VIT_L.to_dict()
    if isinstance(stage_two.text_encoder, ScratchClip):
        text |= {"hidden_size": stage_two.text_encoder.hidden_size}
    return Description(
        "folder",
        "StableDiffusionPipeline",
        stage_two.unet,
        stage_one.autoencoder,
        {"text_encoder": text},
        stage_two.diffusion,
        clip_vocabulary=not isinstance(stage_two.text_encoder, ScratchClip),
    )


def test_sd1_compat_opens_everywhere_and_has_44_million_parameters() -> None:
    found = verdicts(described("sd1-compat"))
    assert all(verdict.opens for verdict in found), found
    with torch.device("meta"):
        unet = UNet(described("sd1-compat").unet)
    assert 43e6 < sum(p.numel() for p in unet.parameters()) < 45e6


def test_free_opens_in_diffusers_alone() -> None:
    assert [verdict.opens for verdict in verdicts(described("free"))] == [True, False, False, False]
