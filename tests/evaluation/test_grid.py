from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.evaluation.grid import MARGIN, image_grid
from ldm.evaluation.reconstruction import mean_psnr, psnr, reconstruct

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9), (200, 100, 50)]


def squares(count: int, side: int = 10) -> list[Image.Image]:
    return [Image.new("RGB", (side, side), COLOURS[i]) for i in range(count)]


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, None, 1), (4, None, 2), (5, None, 2), (5, 5, 1), (5, 2, 3)])
def test_pictures_stand_row_by_row_on_white(count: int, columns: int | None, rows: int) -> None:
    sheet = np.asarray(image_grid(squares(count), columns))
    across = columns or math.ceil(math.sqrt(count))
    assert sheet.shape == (rows * (10 + MARGIN) + MARGIN, across * (10 + MARGIN) + MARGIN, 3)
    expected = np.full(sheet.shape, 255, dtype=np.uint8)
    for index in range(count):
        y, x = (MARGIN + place * (10 + MARGIN) for place in divmod(index, across))
        expected[y : y + 10, x : x + 10] = COLOURS[index]
    assert np.array_equal(sheet, expected)


def test_small_pictures_are_enlarged_by_a_whole_factor() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8))
    sheet = np.asarray(image_grid([image], min_side=12))[MARGIN : MARGIN + 15, MARGIN : MARGIN + 15]
    assert np.array_equal(sheet, np.asarray(image).repeat(3, 0).repeat(3, 1))


def test_labels_stand_under_their_pictures() -> None:
    images = squares(2, 100)
    sheet = image_grid(images, 2, ["short", "a longer label that takes more than one line of its picture's width"])
    plain = image_grid(images, 2)
    assert sheet.width == plain.width and sheet.height > plain.height
    pixels = np.asarray(sheet.convert("L"))
    below = pixels[MARGIN + 100 :]
    dark = [(below[:, x : x + 100] < 128).sum() for x in (MARGIN, 2 * MARGIN + 100)]
    assert dark[1] > dark[0] > 0
    assert (below[:, 2 * MARGIN + 200 :] == 255).all()
    assert np.array_equal(np.asarray(sheet)[: MARGIN + 100], np.asarray(plain)[: MARGIN + 100])


def test_a_label_fits_any_width() -> None:
    assert image_grid(squares(1, 3), labels=["wide"]).height > 3 + 2 * MARGIN


def test_no_pictures_and_missing_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one picture"):
        image_grid([])
    with pytest.raises(ValueError, match="labels has 1 entries; there are 2 pictures"):
        image_grid(squares(2), labels=["one"])


def test_psnr_by_hand() -> None:
    """Peak 2: an error of 0.2 everywhere is 10 log10(4 / 0.04) = 20 dB; on a quarter of the values, 6.02 dB more."""
    x = torch.zeros(3, 3, 4, 4)
    y = torch.stack([torch.full((3, 4, 4), 0.2), torch.zeros(3, 4, 4), torch.full((3, 4, 4), 2.0)])
    y[1, :, 0] = 0.2
    assert psnr(x, y).tolist() == pytest.approx([20.0, 20 + 10 * math.log10(4), 0.0], abs=1e-4)
    assert psnr(x[:1], x[:1]).isinf().all()


def test_reconstructions_are_the_decoded_modes() -> None:
    config = AutoencoderConfig(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(config).eval()
        x = torch.rand(5, 3, 8, 8) * 2 - 1
    pairs = list(reconstruct(vae, torch.split(x, 2)))
    with torch.no_grad():
        expected = [vae.decode(vae.encode(row[None]).mean).clamp(-1, 1) for row in x]
    assert torch.equal(torch.cat([a for a, _ in pairs]), x)
    torch.testing.assert_close(torch.cat([b for _, b in pairs]), torch.cat(expected), atol=1e-5, rtol=1e-5)
    by_hand = [10 * math.log10(4 / float((row - y[0]).square().mean())) for row, y in zip(x, expected, strict=True)]
    assert mean_psnr(vae, torch.split(x, 2)) == pytest.approx(sum(by_hand) / 5, abs=1e-3)
