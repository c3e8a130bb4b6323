"""Decoding in strips against the same network on the whole input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from autoencoder import AutoencoderConfig, AutoencoderKL, VQConfig, VQModel, strip_decode

SHAPES: dict[str, dict[str, Any]] = {
    "f1": {"block_out_channels": (8,)},
    "f4": {"block_out_channels": (8, 16, 16), "layers_per_block": 2},
    "no attention, no convolution after the latents": {
        "block_out_channels": (8, 16),
        "mid_block_add_attention": False,
        "use_post_quant_conv": False,
    },
    "gelu, attention in the levels": {
        "block_out_channels": (8, 16),
        "act_fn": "gelu",
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    },
}


def latents(height: int, width: int) -> Tensor:
    return torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(1))


def random_weights(model: AutoencoderKL | VQModel) -> None:
    """Norm scales and biases too, so that a wrong statistic shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("height", "width", "rows"), [(5, 7, 1), (6, 4, 4), (9, 3, 5), (4, 4, 1000)])
@torch.no_grad()
def test_the_picture_is_that_of_a_whole_decode(name: str, height: int, width: int, rows: int) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(AutoencoderConfig(norm_num_groups=4, **SHAPES[name])).eval()
    random_weights(vae)
    z = latents(height, width)
    assert_close(strip_decode(vae, z, rows), vae.decode(z), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_codes_are_decoded_too() -> None:
    torch.manual_seed(0)
    model = VQModel(VQConfig(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4)).eval()
    random_weights(model)
    assert_close(strip_decode(model, latents(6, 5), 3), model.decode(latents(6, 5)), atol=2e-5, rtol=1e-5)


def test_no_gradient_is_kept() -> None:
    vae = AutoencoderKL(AutoencoderConfig(block_out_channels=(8,), norm_num_groups=4))
    assert not strip_decode(vae, latents(3, 3), 2).requires_grad


def test_impossible_input_is_refused() -> None:
    vae = AutoencoderKL(AutoencoderConfig(block_out_channels=(8,), norm_num_groups=4))
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        strip_decode(vae, latents(3, 3), 0)
    with pytest.raises(ValueError, match=r"\[B, C, h, w\], got shape \(4, 3, 3\)"):
        strip_decode(vae, latents(3, 3)[0])
