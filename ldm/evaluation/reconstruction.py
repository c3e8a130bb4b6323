"""How well an autoencoder gives pictures back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from autoencoder import Autoencoder, PerceptualLoss
from ldm.data.batches import Transform
from ldm.data.sources import Source
from ldm.data.transforms import BadImage, to_images
from ldm.evaluation.features import FeatureNet
from ldm.evaluation.grid import image_grid
from ldm.evaluation.metrics import FeatureStatistics, frechet_distance, psnr, ssim

MAX_PSNR = 100.0
"""What a picture that comes back exactly counts in a report, in dB."""


@torch.no_grad()
def reconstruct(vae: Autoencoder, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, reconstructions) of every batch: the posterior's mode or its codes, decoded and clamped to [-1, 1]."""
    for x in batches:
        yield x, vae.reconstruct(x).float().clamp(-1, 1)


def mean_psnr(vae: Autoencoder, batches: Iterable[Tensor]) -> float:
    """Mean over images of the PSNR in dB."""
    return float(torch.cat([psnr(x, y) for x, y in reconstruct(vae, batches)]).mean())


class Pictures:
    """The first `count` readable pictures of a source, read batch by batch onto a device; keeps none of them.

    `indices`, `captions` and `skipped` fill while `batches` is read: the place in the source and the captions of every
    picture given, and the reason for every one that could not be used.
    """

    def __init__(
        self, source: Source, transform: Transform, count: int, batch_size: int, device: torch.device | str = "cpu"
    ) -> None:
        self.source, self.transform, self.device = source, transform, device
        self.count, self.batch_size = count, batch_size
        self.indices: list[int] = []
        self.captions: list[tuple[str, ...]] = []
        self.skipped: list[str] = []

    def batches(self) -> Iterator[Tensor]:
        """float32 [B, 3, R, R] in [-1, 1], B at most `batch_size`.

        Raises:
            ValueError: the source has no readable picture.
        """
        waiting: list[Tensor] = []
        for index in range(len(self.source)):
            if len(self.indices) == self.count:
                break
            try:
                example = self.source[index]
            except BadImage as error:
                self.skipped.append(str(error))
                continue
            waiting.append(self.transform(example, 0, index))
            self.indices.append(index)
            self.captions.append(example.captions)
            if len(waiting) == self.batch_size:
                yield torch.stack(waiting).to(self.device)
                waiting = []
        if waiting:
            yield torch.stack(waiting).to(self.device)
        if not self.indices:
            raise ValueError(f"{self.source.name} has no readable picture")

    def again(self, positions: Sequence[int]) -> Tensor:
        """The pictures given at these positions, read a second time: [len(positions), 3, R, R]."""
        places = [self.indices[position] for position in positions]
        return torch.stack([self.transform(self.source[place], 0, place) for place in places]).to(self.device)


@dataclass(frozen=True)
class ReconstructionFigures:
    """`metrics` over all pictures by name, and the PSNR of each in dB, [N], in the order in which they were read."""

    metrics: dict[str, float]
    psnr: Tensor


@torch.no_grad()
def evaluate_reconstruction(
    vae: Autoencoder,
    batches: Iterable[Tensor],
    perceptual: Mapping[str, PerceptualLoss],
    features: Mapping[str, FeatureNet],
) -> ReconstructionFigures:
    """Figures of the reconstructions of images [B, 3, H, W] in [-1, 1] that come in batches, on the model's device.

    Means over pictures of PSNR (dB, at most MAX_PSNR for one picture), SSIM, L1 (in [0, 2]) and, under
    `perceptual_{name}`, each perceptual distance; under `frechet_{name}` the squared Fréchet distance between all
    originals and all reconstructions in each feature net. Only figures and sums are kept of a batch.

    Raises:
        ValueError: there is no picture, one is too small for SSIM, there is only one where a Fréchet distance is
            asked for, or a reconstruction is not finite.
    """
    measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "psnr": psnr,
        "ssim": ssim,
        "l1": lambda y, x: (x - y).abs().flatten(1).mean(1),
        **{f"perceptual_{name}": distance for name, distance in perceptual.items()},
    }
    values: dict[str, list[Tensor]] = {name: [] for name in measures}
    statistics = {name: (FeatureStatistics(), FeatureStatistics()) for name in features}
    for x, y in reconstruct(vae, batches):
        if not bool(y.isfinite().all()):
            raise ValueError("the model's reconstructions are not finite numbers")
        for name, measure in measures.items():
            values[name].append(measure(y, x).cpu())
        for name, net in features.items():
            for sums, images in zip(statistics[name], (x, y), strict=True):
                sums.add(net(images))
    if not values["psnr"]:
        raise ValueError("there is no picture to reconstruct")
    each = torch.cat(values.pop("psnr")).clamp(max=MAX_PSNR)
    metrics = {"psnr": float(each.mean()), "psnr_median": float(each.median()), "psnr_worst": float(each.min())}
    metrics |= {name: float(torch.cat(parts).mean()) for name, parts in values.items()}
    metrics |= {f"frechet_{name}": frechet_distance(*pair) for name, pair in statistics.items()}
    return ReconstructionFigures(metrics, each)


def comparison_grid(vae: Autoencoder, pictures: Pictures, values: Tensor, count: int = 8) -> Image.Image:
    """The `count` worst pictures by PSNR and the `count` around the median: originals above reconstructions.

    Args:
        pictures: read to their end.
        values: the PSNR of each in dB, [N].
    """
    order = values.argsort().tolist()
    count = min(count, len(order))
    middle = (len(order) - count) // 2
    rows: list[Image.Image] = []
    labels: list[str] = []
    for title, chosen in (("worst", order[:count]), ("median", order[middle : middle + count])):
        ((x, y),) = reconstruct(vae, [pictures.again(chosen)])
        rows += to_images(x) + to_images(y)
        labels += [title] * count + [f"{values[i]:.1f} dB" for i in chosen]
    return image_grid(rows, count, labels, min_side=64)
