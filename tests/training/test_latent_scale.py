"""Which scale and shift a stage-one model leaves with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.config import AutoencoderTraining
from ldm.training.latent_scale import latent_scale

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def model(**changes: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(AutoencoderConfig(block_out_channels=(8, 8), norm_num_groups=4, shift_factor=0.3, **changes))


def nothing() -> Iterator[Tensor]:
    raise AssertionError("no latents are needed")
    yield


def test_a_frozen_encoder_keeps_its_own_scale() -> None:
    vae = model()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    assert latent_scale(vae, nothing(), AutoencoderTraining("out", pretrained="vae", freeze_encoder=True)) == {}
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


def test_a_given_scale_is_taken() -> None:
    config = AutoencoderTraining("out", scaling_factor=0.25)
    assert latent_scale(model(), nothing(), config) == {"scaling_factor": 0.25}


@pytest.mark.parametrize("convolutions", [True, False])
def test_a_measured_scale_leaves_unit_variance_and_no_trace_of_an_older_shift(convolutions: bool) -> None:
    vae = model(use_quant_conv=convolutions, use_post_quant_conv=convolutions, latents_mean=(9.0,) * 4)
    with torch.no_grad():
        picture = vae.decode(vae.encode(IMAGES).mode())
        found = latent_scale(vae, (vae.moments(part) for part in IMAGES.split(2)), AutoencoderTraining("out"))
        config = dataclasses.replace(vae.config, **found)
        posterior = vae.encode(IMAGES)
        z = (posterior.mean - (config.shift_factor or 0.0)) * config.scaling_factor
        spread = (posterior.var * config.scaling_factor**2).mean() + z.var((0, 2, 3), correction=0).mean()
        assert_close(vae.decode(posterior.mode()), picture, atol=1e-5, rtol=1e-5)
    assert z.mean().item() == pytest.approx(0.0, abs=1e-5)
    if convolutions:
        assert spread.item() == pytest.approx(1.0, abs=1e-4)
        assert config.shift_factor is None and config.latents_mean == (0.0,) * 4
    else:
        assert (z.square() + posterior.var * config.scaling_factor**2).mean().item() == pytest.approx(1.0, abs=1e-4)
        assert config.latents_mean is None
