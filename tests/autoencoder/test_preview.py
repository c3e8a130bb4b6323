from __future__ import annotations

import torch

from autoencoder import AutoencoderConfig, AutoencoderKL, LatentCodec
from autoencoder.preview import LinearPreview, smooth_latents


def test_a_linear_decoder_is_found_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = 0.1 * torch.randn(3, 5, generator=generator), torch.tensor([0.1, -0.2, 0.0])
    z = torch.randn(4, 5, 6, 6, generator=generator)
    pictures = torch.einsum("kc,bchw->bkhw", weight, z) + bias[:, None, None]
    preview = LinearPreview.fit(z, pictures.repeat_interleave(4, 2).repeat_interleave(4, 3))
    torch.testing.assert_close(preview.weight, weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(preview(z), pictures.clamp(-1, 1), atol=1e-5, rtol=0)


def test_the_map_of_a_decoder_beats_a_constant_picture() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(AutoencoderConfig(block_out_channels=(16, 16), norm_num_groups=8, latent_channels=4)).eval()
    codec = LatentCodec.from_config(vae)
    preview = LinearPreview.of_decoder(codec, torch.Generator().manual_seed(0))
    z = smooth_latents(16, 4, 8, torch.Generator().manual_seed(1))
    with torch.no_grad():
        pictures = torch.nn.functional.avg_pool2d(codec.decode(z), vae.downsample_factor)
    left, best = ((p(z) - pictures).square().mean() for p in (preview, LinearPreview.fit(z, pictures)))
    constant = (pictures - pictures.mean((0, 2, 3), keepdim=True)).square().mean()
    assert best <= left < 1.1 * best and left < 0.9 * constant
