"""Tiled and sliced decoding against the same network on the whole input, and against networks that tiles cannot change."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from autoencoder import AutoencoderConfig, AutoencoderKL, sliced_decode, tiled_decode, tiled_encode
from autoencoder.tiling import tile_starts, tile_weights


class Blocks:
    """Pixels are f x f blocks of their latent, moments the means of such blocks: no position knows its neighbours."""

    downsample_factor = 4

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def decode(self, z: Tensor) -> Tensor:
        self.seen.append(tuple(z.shape))
        return F.interpolate(z[:, :3], scale_factor=4.0, mode="nearest")

    def moments(self, x: Tensor) -> Tensor:
        self.seen.append(tuple(x.shape))
        return torch.cat([F.avg_pool2d(x, 4), -F.avg_pool2d(x, 4)], dim=1)


class Marks:
    """Every decoded tile is filled with its own number."""

    downsample_factor = 2

    def __init__(self) -> None:
        self.count = 0

    def decode(self, z: Tensor) -> Tensor:
        self.count += 1
        return torch.full((1, 1, 2 * z.shape[2], 2 * z.shape[3]), float(self.count))


def small_vae(attention: bool) -> AutoencoderKL:
    torch.manual_seed(0)
    config = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, mid_block_add_attention=attention)
    return AutoencoderKL(config).eval()


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("length", "tile", "overlap"),
    [(1, 8, 2), (8, 8, 7), (9, 8, 1), (9, 8, 7), (14, 8, 2), (15, 8, 2), (37, 8, 5), (128, 64, 16), (100, 3, 2)],
)
def test_tiles_cover_everything_and_share_at_least_the_overlap(length: int, tile: int, overlap: int) -> None:
    starts = tile_starts(length, tile, overlap)
    assert starts[0] == 0 and starts[-1] + min(tile, length) == length
    steps = [b - a for a, b in itertools.pairwise(starts)]
    assert all(0 < step <= tile - overlap for step in steps)
    assert not steps or (len(starts) - 2) * (tile - overlap) + tile < length, "a tile too many"
    weights = tile_weights(length, tile, overlap, 4)
    assert weights.shape == (len(starts), 4 * length)
    assert_close(weights.sum(0), torch.ones(4 * length))
    for start, row in zip(starts, weights, strict=True):
        inside = torch.zeros(4 * length, dtype=torch.bool)
        inside[4 * start : 4 * (start + tile)] = True
        assert bool((row[inside] > 0).all()) and not row[~inside].any()


def test_two_tiles_fade_linearly() -> None:
    weights = tile_weights(12, 8, 4)
    ramp = (torch.arange(4) + 0.5) / 4
    assert_close(weights[1], torch.cat([torch.zeros(4), ramp, torch.ones(4)]))
    assert_close(weights[0], 1 - weights[1])


@pytest.mark.parametrize(("height", "width"), [(5, 5), (8, 8), (9, 3), (8, 20), (23, 17), (31, 32)])
@pytest.mark.parametrize(("tile", "overlap"), [(8, 2), (8, 7), (5, 1)])
def test_a_network_without_neighbours_is_unchanged(height: int, width: int, tile: int, overlap: int) -> None:
    blocks = Blocks()
    z = random(2, 4, height, width)
    assert_close(tiled_decode(blocks, z, tile, overlap), blocks.decode(z), atol=1e-6, rtol=1e-6)
    x = random(2, 3, 4 * height, 4 * width)
    posterior = tiled_encode(blocks, x, 4 * tile, 4 * overlap)
    assert_close(torch.cat([posterior.mean, posterior.logvar], 1), blocks.moments(x), atol=1e-6, rtol=1e-6)


def test_no_piece_is_larger_than_a_tile() -> None:
    blocks = Blocks()
    tiled_decode(blocks, random(1, 4, 30, 7), 8, 2)
    assert len(blocks.seen) == 5 and all(shape == (1, 4, 8, 7) for shape in blocks.seen)


@torch.no_grad()
def test_what_fits_in_one_tile_is_bit_equal() -> None:
    vae = small_vae(attention=True)
    z, x = random(2, 4, 6, 8), random(2, 3, 12, 16)
    assert torch.equal(tiled_decode(vae, z, 8, 2), vae.decode(z))
    assert torch.equal(tiled_encode(vae, x, 16, 4).mean, vae.encode(x).mean)
    assert torch.equal(tiled_encode(vae, x, 16, 4).logvar, vae.encode(x).logvar)


@torch.no_grad()
def test_constant_latents_show_no_seam() -> None:
    """Group norm of a picture that is constant in each channel is the same for every size; edges are continued."""
    vae = small_vae(attention=False)
    for layer in vae.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            layer.padding_mode = "replicate"
    z = random(1, 4, 1, 1).expand(1, 4, 21, 18).contiguous()
    image = tiled_decode(vae, z, 8, 3)
    assert_close(image, image[:, :, :1, :1].expand(1, 3, 42, 36), atol=1e-5, rtol=0.0)
    assert_close(image, vae.decode(z), atol=1e-5, rtol=0.0)


@torch.no_grad()
def test_a_random_decoder_changes_little() -> None:
    vae = small_vae(attention=True)
    z = random(1, 4, 32, 32)
    whole, tiled = vae.decode(z), tiled_decode(vae, z, 16, 4)
    assert (tiled - whole).square().mean().sqrt() < 0.25 * whole.std()
    corner = vae.decode(z[:, :, :16, :16])[:, :, :8, :8]
    assert_close(tiled[:, :, :8, :8], corner, atol=1e-5, rtol=1e-5)


def test_pixels_between_tiles_lie_between_their_values() -> None:
    marks = Marks()
    image = tiled_decode(marks, random(1, 4, 8, 14), 8, 2)[0, 0]
    assert marks.count == 2
    expected = 1 + torch.cat([torch.zeros(12), torch.tensor([0.125, 0.375, 0.625, 0.875]), torch.ones(12)])
    assert_close(image, expected.expand(16, 28))


@torch.no_grad()
def test_rows_one_at_a_time_equal_the_batch() -> None:
    vae = small_vae(attention=True)
    z = random(3, 4, 5, 6)
    assert_close(sliced_decode(vae, z), vae.decode(z), atol=1e-5, rtol=0.0)
    blocks = Blocks()
    sliced_decode(blocks, z)
    assert blocks.seen == [(1, 4, 5, 6)] * 3


def test_the_type_is_the_networks_and_sums_run_in_float32() -> None:
    z = torch.full((1, 4, 30, 30), 1.7).bfloat16()
    image = tiled_decode(Blocks(), z, 8, 3)
    assert torch.equal(image, torch.full((1, 3, 120, 120), 1.7).bfloat16())


def test_no_gradient_is_kept() -> None:
    vae = small_vae(attention=False)
    assert not tiled_decode(vae, random(1, 4, 9, 4), 8, 2).requires_grad
    assert not sliced_decode(vae, random(2, 4, 4, 4)).requires_grad
    assert not tiled_encode(vae, random(1, 3, 20, 8), 16, 4).mean.requires_grad


@pytest.mark.parametrize(("tile", "overlap"), [(8, 8), (8, 9), (8, 0), (8, -1), (0, 0), (-4, -8)])
def test_impossible_tiles_are_refused(tile: int, overlap: int) -> None:
    with pytest.raises(ValueError, match=rf"0 < overlap < tile, got tile={tile} and overlap={overlap}"):
        tiled_decode(Blocks(), random(1, 4, 9, 9), tile, overlap)
    with pytest.raises(ValueError, match="0 < overlap < tile"):
        tiled_encode(Blocks(), random(1, 3, 36, 36), tile, overlap)


@pytest.mark.parametrize(
    ("shape", "tile", "overlap", "words"),
    [
        ((1, 3, 36, 36), 10, 4, "tile must be a multiple of the autoencoder's factor 4, got 10"),
        ((1, 3, 36, 36), 16, 5, "overlap must be .* 4, got 5"),
        ((1, 3, 35, 36), 16, 4, "height must be .* 4, got 35"),
        ((1, 3, 36, 34), 16, 4, "width must be .* 4, got 34"),
        ((3, 36, 36), 16, 4, r"\[B, C, H, W\], got shape \(3, 36, 36\)"),
    ],
)
def test_impossible_images_are_refused(shape: tuple[int, ...], tile: int, overlap: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiled_encode(Blocks(), random(*shape), tile, overlap)


def test_impossible_latents_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[B, C, H, W\], got shape \(4, 9, 9\)"):
        tiled_decode(Blocks(), random(4, 9, 9), 8, 2)
