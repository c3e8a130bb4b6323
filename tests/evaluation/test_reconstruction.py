"""The reconstruction suite on pictures and models whose figures are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.data.batches import Transform
from ldm.data.sources import Example
from ldm.data.transforms import BadImage
from ldm.evaluation.grid import LINE_HEIGHT, MARGIN
from ldm.evaluation.metrics import ssim
from ldm.evaluation.reconstruction import MAX_PSNR, Pictures, comparison_grid, evaluate_reconstruction

SIDE = 64


@dataclass
class GreySource:
    """Picture i is flat, of the i-th level; a level of None cannot be read."""

    levels: list[int | None]
    name: str = "greys"

    def __len__(self) -> int:
        return len(self.levels)

    def __getitem__(self, index: int) -> Example:
        level = self.levels[index]
        if level is None:
            raise BadImage(f"greys[{index}]: damaged")
        return Example(Image.new("RGB", (SIDE, SIDE), (level,) * 3), ("grey",), str(index))


def pictures(levels: list[int | None], count: int = 1000, batch_size: int = 4) -> Pictures:
    return Pictures(GreySource(levels), Transform(SIDE), count, batch_size)


def model(change: Callable[[Tensor], Tensor]) -> Any:
    """An autoencoder that gives `change(x)` back."""
    return SimpleNamespace(reconstruct=change)


class Means:
    """Features: the mean of each channel."""

    dim = 3

    def __call__(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def largest(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).flatten(1).amax(1)


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_figures_are_those_of_all_pictures_at_once(batch_size: int) -> None:
    config = AutoencoderConfig(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2)
    x = torch.rand(9, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = AutoencoderKL.from_scratch(config, 0).eval()
    with torch.no_grad():
        y = vae.decode(vae.encode(x).mean).clamp(-1, 1).double().numpy()
    figures = evaluate_reconstruction(vae, x.split(batch_size), {"largest": largest}, {"means": Means()})
    original = x.double().numpy()
    levels = 10 * np.log10(1 / np.square((original - y) / 2).mean((1, 2, 3)))
    a, b = original.mean((2, 3)), y.mean((2, 3))
    expected = {
        "psnr": levels.mean(),
        "psnr_median": np.median(levels),
        "psnr_worst": levels.min(),
        "ssim": float(ssim(torch.from_numpy(y), x).mean()),
        "l1": np.abs(original - y).mean(),
        "perceptual_largest": (y - original).max((1, 2, 3)).mean(),
    }
    assert {name: figures.metrics[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert figures.psnr.numpy() == pytest.approx(levels, abs=1e-4)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(first @ second).real.clip(0)).sum()
    distance = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(first + second) - 2 * roots
    assert figures.metrics["frechet_means"] == pytest.approx(distance, rel=1e-4)
    assert set(figures.metrics) == {*expected, "frechet_means"}


def test_a_perfect_model_has_the_best_figures() -> None:
    perfect = model(lambda x: x.clone())
    x = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    figures = evaluate_reconstruction(perfect, [x], {"largest": largest}, {"means": Means()})
    best = {"psnr": MAX_PSNR, "psnr_median": MAX_PSNR, "psnr_worst": MAX_PSNR, "ssim": 1.0}
    zero = {"l1": 0.0, "perceptual_largest": 0.0, "frechet_means": 0.0}
    assert figures.metrics == pytest.approx(best | zero, abs=1e-6)


def test_a_brightened_set_is_as_far_as_its_mean_moved() -> None:
    """0.1 brighter in three channels: the covariances are equal, so the squared distance is 3 * 0.01."""
    x = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(2)) - 0.5
    figures = evaluate_reconstruction(model(lambda z: z + 0.1), [x[:4], x[4:]], {}, {"means": Means()})
    assert figures.metrics["frechet_means"] == pytest.approx(0.03, rel=1e-4)
    assert figures.metrics["psnr_worst"] == pytest.approx(10 * np.log10(4 / 0.01), abs=1e-3)
    assert figures.metrics["l1"] == pytest.approx(0.1, rel=1e-4)


def test_what_cannot_be_measured_is_refused() -> None:
    x = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match="reconstructions are not finite"):
        evaluate_reconstruction(model(lambda z: z / 0), [x], {}, {})
    with pytest.raises(ValueError, match="no picture"):
        evaluate_reconstruction(model(lambda z: z), [], {}, {})
    with pytest.raises(ValueError, match="at least 2 examples, got 1"):
        evaluate_reconstruction(model(lambda z: z), [x], {}, {"means": Means()})


@pytest.mark.parametrize(
    ("count", "indices", "skipped"), [(2, [0, 2], 1), (4, [0, 2, 3, 5], 2), (100, [0, 2, 3, 5, 6], 2)]
)
def test_the_first_readable_pictures_are_read_in_order(count: int, indices: list[int], skipped: int) -> None:
    levels: list[int | None] = [0, None, 51, 102, None, 204, 255]
    reader = pictures(levels, count, batch_size=2)
    batches = list(reader.batches())
    assert [len(batch) for batch in batches] == [2] * (len(indices) // 2) + [1] * (len(indices) % 2)
    expected = [levels[i] / 127.5 - 1 for i in indices]
    assert torch.cat(batches).mean((1, 2, 3)).tolist() == pytest.approx(expected, abs=1e-5)
    assert reader.indices == indices and reader.skipped == ["greys[1]: damaged", "greys[4]: damaged"][:skipped]
    assert torch.equal(reader.again([1, 0]), torch.cat(batches)[[1, 0]])


def test_a_source_without_readable_pictures_is_refused() -> None:
    with pytest.raises(ValueError, match="greys has no readable picture"):
        list(pictures([None, None]).batches())


def tile(sheet: np.ndarray[Any, Any], row: int, column: int) -> int:
    """The level of a flat picture of the sheet; labels take one line of text."""
    y = MARGIN + row * (SIDE + LINE_HEIGHT + MARGIN) + SIDE // 2
    return int(sheet[y, MARGIN + column * (SIDE + MARGIN) + SIDE // 2, 0])


def test_the_grid_shows_the_worst_and_the_median_above_what_came_back() -> None:
    """Halving the brightness harms bright pictures most, so the order of harm is the order of brightness."""
    levels = [10 * i for i in (3, 9, 1, 7, 5, 2, 8, 4, 6)]
    halved = model(lambda x: (x + 1) / 2 - 1)
    reader = pictures(list(levels))
    figures = evaluate_reconstruction(halved, reader.batches(), {}, {})
    sheet = np.asarray(comparison_grid(halved, reader, figures.psnr, count=3))
    worst, median = [90, 80, 70], [60, 50, 40]
    shown = [[tile(sheet, row, column) for column in range(3)] for row in range(4)]
    assert shown == [worst, [level // 2 for level in worst], median, [level // 2 for level in median]]
    assert sheet.shape[1] == 3 * (SIDE + MARGIN) + MARGIN


def test_a_grid_of_few_pictures_shows_them_all() -> None:
    halved = model(lambda x: (x + 1) / 2 - 1)
    reader = pictures([200, 100])
    figures = evaluate_reconstruction(halved, reader.batches(), {}, {})
    sheet = np.asarray(comparison_grid(halved, reader, figures.psnr))
    assert [tile(sheet, row, 0) for row in range(4)] == [200, 100, 200, 100]
    assert [tile(sheet, row, 1) for row in range(4)] == [100, 50, 100, 50]
