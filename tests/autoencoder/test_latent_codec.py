"""LatentCodec: scale, shift, statistics of latents and the roundtrip of images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from autoencoder import (
    AutoencoderConfig,
    AutoencoderKL,
    DiagonalGaussian,
    LatentCodec,
    LatentStatistics,
    fold_into_convolutions,
)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_autoencoder(**values: float) -> AutoencoderKL:
    torch.manual_seed(0)
    config = AutoencoderConfig(block_out_channels=(16, 32), norm_num_groups=8, **values)  # type: ignore[arg-type]
    return AutoencoderKL(config).eval()


def stored_moments(seed: int, batch: int) -> Tensor:
    offset = torch.tensor([3.0, -1.0, 0.5, 2.0, -1.0, 0.0, 0.5, -6.0]).view(1, 8, 1, 1)
    return torch.randn(batch, 8, 6, 5, generator=rng(seed)) + offset


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 8, 8, generator=rng(1)) * 2 - 1


@torch.no_grad()
def test_encode_is_diffusers_formula(images: Tensor) -> None:
    vae = small_autoencoder(scaling_factor=0.3611, shift_factor=0.1159)
    codec = LatentCodec.from_config(vae)
    posterior = vae.encode(images)
    noise = torch.randn(posterior.mean.shape, generator=rng(2))
    assert_close(codec.encode(images), (vae.encode(images).mean - 0.1159) * 0.3611)
    assert_close(codec.encode(images, noise), (posterior.mean + posterior.std * noise - 0.1159) * 0.3611)
    z = torch.randn(2, 4, 4, 4, generator=rng(3))
    assert_close(codec.decode(z), vae.decode(z / 0.3611 + 0.1159).clamp(-1, 1))


@torch.no_grad()
def test_null_shift_is_zero(images: Tensor) -> None:
    vae = small_autoencoder()
    assert_close(LatentCodec.from_config(vae).encode(images), vae.encode(images).mean * 0.18215)


@torch.no_grad()
def test_stored_moments_give_the_latents_of_the_images(images: Tensor) -> None:
    vae = small_autoencoder()
    codec = LatentCodec.from_config(vae)
    moments = vae.moments(images)
    assert_close(codec.from_moments(moments), codec.encode(images))
    noise = torch.randn(moments.chunk(2, 1)[0].shape, generator=rng(4))
    assert_close(codec.from_moments(moments, noise), codec.encode(images, noise))


@torch.no_grad()
def test_scale_and_shift_do_not_touch_the_decoded_image(images: Tensor) -> None:
    vae = small_autoencoder()
    plain = LatentCodec(vae, 1.0)
    channels = LatentCodec(vae, torch.tensor([0.5, 2.0, 1.0, 0.1]), torch.tensor([1.0, -2.0, 0.0, 3.0]))
    assert_close(channels.decode(channels.encode(images)), plain.decode(plain.encode(images)), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_decoded_images_are_clamped() -> None:
    codec = LatentCodec(small_autoencoder(), 1e-4)
    image = codec.decode(torch.randn(1, 4, 4, 4, generator=rng(5)))
    assert image.min() >= -1.0
    assert image.max() <= 1.0


def test_roundtrip_psnr_grows_as_the_autoencoder_learns(images: Tensor) -> None:
    vae = small_autoencoder().train()
    codec = LatentCodec.from_config(vae)

    @torch.no_grad()
    def psnr() -> float:
        error = (codec.decode(codec.encode(images)) - images).square().mean()
        return float(10 * torch.log10(4.0 / error))

    before = psnr()
    optimiser = torch.optim.Adam(vae.parameters(), lr=2e-3)
    for _ in range(30):
        optimiser.zero_grad()
        (vae(images).image - images).square().mean().backward()
        optimiser.step()
    assert psnr() > before + 2.0


def test_measured_scale_makes_samples_unit_variance() -> None:
    batches = [stored_moments(6, 300), stored_moments(7, 100), stored_moments(8, 33)]
    scale, shift = LatentCodec.measure(iter(batches))
    codec = LatentCodec(small_autoencoder(), scale, shift)
    moments = torch.cat(batches)
    z = codec.from_moments(moments, torch.randn(moments.chunk(2, 1)[0].shape, generator=rng(9)))
    assert_close(z.mean(), torch.tensor(0.0), atol=0.01, rtol=0.0)
    assert_close(z.std(), torch.tensor(1.0), atol=0.01, rtol=0.0)


def test_measure_equals_the_law_of_total_variance_whatever_the_batches() -> None:
    moments = stored_moments(10, 20)
    posterior = DiagonalGaussian(moments.double())
    variance = posterior.mean.var(unbiased=False) + posterior.var.mean()
    whole, parts = LatentCodec.measure([moments]), LatentCodec.measure(moments.split([1, 12, 7]))
    assert whole == pytest.approx((float(variance) ** -0.5, float(posterior.mean.mean())), rel=1e-12)
    assert parts == pytest.approx(whole, rel=1e-12)


def test_statistics_per_channel() -> None:
    moments = stored_moments(11, 20)
    posterior = DiagonalGaussian(moments.double())
    statistics = LatentStatistics.of(moments[:5]) + LatentStatistics.of(moments[5:])
    variance = posterior.mean.var((0, 2, 3), unbiased=False) + posterior.var.mean((0, 2, 3))
    assert_close(statistics.channel_mean, posterior.mean.mean((0, 2, 3)))
    assert_close(statistics.channel_std, variance.sqrt())


def test_measuring_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        LatentCodec.measure([])


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), torch.tensor([1.0, 0.0, 1.0, 1.0])])
def test_impossible_scales_are_refused(scale: float | Tensor) -> None:
    with pytest.raises(ValueError, match="scale must be positive"):
        LatentCodec(small_autoencoder(), scale)


def test_wrong_number_of_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="shift needs 1 or 4 values, got 3"):
        LatentCodec(small_autoencoder(), 1.0, torch.zeros(3))


@torch.no_grad()
@pytest.mark.parametrize("spread", [None, torch.tensor([0.5, 2.0, 1.0, 3.0])])
def test_folding_moves_the_latents_and_not_the_image(images: Tensor, spread: Tensor | None) -> None:
    vae = small_autoencoder()
    mean = torch.tensor([3.0, -1.0, 0.5, 0.0])
    before = vae.encode(images)
    image = vae.decode(before.mean)
    fold_into_convolutions(vae, mean, spread)
    after = vae.encode(images)
    scale = torch.ones(4) if spread is None else spread
    assert_close(after.mean, (before.mean - mean.view(1, 4, 1, 1)) / scale.view(1, 4, 1, 1))
    assert_close(after.std, before.std / scale.view(1, 4, 1, 1))
    assert_close(vae.decode(after.mean), image, atol=1e-5, rtol=1e-5)


def test_folding_needs_the_one_by_one_convolutions() -> None:
    with pytest.raises(ValueError, match="use_quant_conv"):
        fold_into_convolutions(small_autoencoder(use_quant_conv=False), torch.zeros(4))
