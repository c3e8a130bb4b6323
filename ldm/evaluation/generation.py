"""The `generation` suite: pictures drawn from the captions of a data set, compared with its pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.data.transforms import to_tensor
from ldm.evaluation.distribution import (
    Figure,
    frechet_figure,
    kernel_figure,
    mean_figure,
    precision_recall,
    resamplings,
)
from ldm.evaluation.features import FeatureNet
from ldm.evaluation.label_reader import LabelReader
from ldm.evaluation.memorisation import Neighbours, near_duplicates, nearest_pairs, threshold
from ldm.evaluation.ranking import Ranking
from ldm.evaluation.reconstruction import Pictures
from ldm.evaluation.sharing import Share
from ldm.evaluation.text_image import CANDIDATES, TextImageModel, candidate_rows, clip_scores, r_precision
from ldm.pipeline import TextToImage

SHOWN = 32
"""How many pictures of a setting are kept to be looked at."""
PAIRS = 8


class Vectors(NamedTuple):
    """What the judges make of pictures; 0 wide without a judge.

    `features` [N, D] for distances, unit vectors `joint` [N, E] beside captions, `logits` [N, L] of labels.
    """

    features: Tensor
    joint: Tensor
    logits: Tensor

    @classmethod
    def cat(cls, parts: Sequence[Vectors]) -> Vectors:
        return cls(*(torch.cat(rows) for rows in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Judges:
    """The frozen networks that look at pictures; None where there is none. `name` is that of the feature net."""

    name: str
    features: FeatureNet | None
    text_image: TextImageModel | None
    reader: LabelReader | None = None

    def to(self, device: torch.device) -> Judges:
        """The same networks on a device."""
        for net in (self.features, self.text_image, self.reader):
            if isinstance(net, nn.Module):
                net.to(device)
        return self

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Vectors:
        """Of images [B, 3, H, W] in [-1, 1], on the CPU."""
        empty = torch.zeros(len(x), 0)
        features = empty if self.features is None else self.features(x).float().cpu()
        joint = empty if self.text_image is None else self.text_image.images(x).float().cpu()
        return Vectors(features, joint, empty if self.reader is None else self.reader(x).float().cpu())


@dataclass(frozen=True)
class JudgedSet:
    """Pictures as the judges see them, with the first caption of each and, where there is a label column, its label."""

    vectors: Vectors
    captions: list[str]
    labels: list[str]

    def __len__(self) -> int:
        return len(self.captions)


@dataclass(frozen=True)
class Drawn:
    """Generated pictures: as the judges see them, the first `SHOWN` themselves, and the seed that draws each again."""

    judged: JudgedSet
    shown: list[Image.Image]
    seeds: list[int]


def judge_pictures(
    pictures: Pictures, judges: Judges, share: Share, labelled: bool, progress: Callable[[Iterable[Tensor]], Any] = iter
) -> JudgedSet:
    """The pictures of a source, judged batch by batch; where `labelled`, the last caption of each is its label."""
    vectors = Vectors.cat(share.map(progress(pictures.batches()), judges))
    captions = [row[0] for row in pictures.captions]
    return JudgedSet(vectors, captions, [row[-1] for row in pictures.captions] if labelled else [])


def draw(
    pipe: TextToImage,
    prompts: JudgedSet,
    count: int,
    batch_size: int,
    judges: Judges,
    share: Share,
    seed: int,
    progress: Callable[[Sequence[int]], Any] = iter,
    ranking: Ranking = Ranking(),
    **settings: Any,
) -> Drawn:
    """Draws picture i with seed + i from caption i of a set; the captions start again at their end.

    With several candidates a picture the seeds are those of `Ranking.seeds`.
    """
    rows = [i % len(prompts.captions) for i in range(count)]
    captions = [prompts.captions[row] for row in rows]

    def batch(first: int) -> tuple[Vectors, list[Image.Image], list[int]]:
        part, start = captions[first : first + batch_size], ranking.seeds(seed, first).start
        images, seeds = zip(*ranking.draw(pipe, part, start, batch_size=batch_size, **settings), strict=True)
        pixels = torch.stack([to_tensor(image) for image in images]).to(pipe.device)
        return judges(pixels), list(images[: max(0, SHOWN - first)]), list(seeds)

    parts = share.map(progress(range(0, count, batch_size)), batch)
    labels = [prompts.labels[row] for row in rows] if prompts.labels else []
    vectors, shown, seeds = zip(*parts, strict=True)
    judged = JudgedSet(Vectors.cat(vectors), captions, labels)
    return Drawn(judged, list(chain.from_iterable(shown)), list(chain.from_iterable(seeds)))


@dataclass(frozen=True)
class Comparison:
    """What generated pictures are measured against; its own figures are computed once for all settings.

    Args:
        training: pictures that may have been memorised; None: these are not looked for.
        label: what the labels are called that the judges' reader reads, None without one.
        candidates: captions that R-precision chooses among.
        captions: those that pictures are drawn from, where they are not the reference's; candidates too.
        bootstrap: bootstrap samples behind every interval; 0 gives intervals without width.

    Raises:
        ValueError: from its methods, when a set is too small for what is measured.
    """

    judges: Judges
    reference: JudgedSet
    training: JudgedSet | None = None
    label: str | None = None
    candidates: int = CANDIDATES
    captions: Sequence[str] = ()
    bootstrap: int = 200
    seed: int = 0

    def figures(self, drawn: JudgedSet) -> dict[str, Figure]:
        """Every metric of a set of generated pictures."""
        found: dict[str, Figure] = {}
        if self.judges.features is not None:
            found |= self._distances(drawn) | self._copies(drawn)
        return found | self._fit(drawn)

    def of_reference(self) -> dict[str, Figure]:
        """What the reference's own pictures reach where each is judged by itself: captions and labels."""
        return self._fit(self.reference)

    @cached_property
    def held_out(self) -> Neighbours | None:
        """The reference's nearest neighbours among the training pictures."""
        if self.training is None or self.judges.features is None:
            return None
        return Neighbours.of(self.reference.vectors.features, self.training.vectors.features)

    def neighbours(self, drawn: JudgedSet) -> Neighbours | None:
        """The generated pictures' nearest neighbours among the training pictures."""
        if self.training is None or self.judges.features is None:
            return None
        return Neighbours.of(drawn.vectors.features, self.training.vectors.features)

    def _distances(self, drawn: JudgedSet) -> dict[str, Figure]:
        x, y, name = drawn.vectors.features, self.reference.vectors.features, self.judges.name
        weights = self._weights(len(x))
        precise, recalled = precision_recall(x, y)
        return {
            f"frechet_{name}": frechet_figure(x, y, weights),
            f"kid_{name}": kernel_figure(x, y, weights),
            f"precision_{name}": mean_figure(precise, weights, 0.0, 1.0),
            f"recall_{name}": mean_figure(recalled, self._weights(len(y)), 0.0, 1.0),
        }

    def _copies(self, drawn: JudgedSet) -> dict[str, Figure]:
        found, held_out = self.neighbours(drawn), self.held_out
        if found is None or held_out is None:
            return {}
        weights = self._weights(len(drawn))
        return {"near_duplicates": mean_figure(near_duplicates(found, held_out), weights, 0.0, 1.0)}

    def _fit(self, judged: JudgedSet) -> dict[str, Figure]:
        """How well pictures fit their captions and labels."""
        found, weights = dict[str, Figure](), self._weights(len(judged))
        if self._texts is not None:
            own, joint = torch.tensor([self._pool[caption] for caption in judged.captions]), judged.vectors.joint
            rows = candidate_rows(own.tolist(), len(self._pool), self.candidates, self.seed)
            found["clip_score"] = mean_figure(clip_scores(joint, self._texts[own]), weights, 0.0, 100.0)
            found["r_precision"] = mean_figure(r_precision(joint, self._texts, rows), weights, 0.0, 1.0)
        if self.judges.reader is not None:
            right = self.judges.reader.correct(judged.vectors.logits, judged.labels)
            found[f"{self.label}_accuracy"] = mean_figure(right, weights, 0.0, 1.0)
        return found

    @cached_property
    def _pool(self) -> Mapping[str, int]:
        """The different captions that may be asked for, numbered."""
        return {caption: row for row, caption in enumerate(dict.fromkeys([*self.reference.captions, *self.captions]))}

    @cached_property
    @torch.no_grad()
    def _texts(self) -> Tensor | None:
        """Unit vectors of the pool [M, E]."""
        model = self.judges.text_image
        return None if model is None else model.texts(list(self._pool)).float().cpu()

    def _weights(self, count: int) -> Tensor:
        return resamplings(count, self.bootstrap, self.seed)


def copies_grid(
    pipe: TextToImage, comparison: Comparison, drawn: Drawn, training: Pictures, **settings: Any
) -> Image.Image:
    """The generated pictures nearest to training pictures, drawn again, above those.

    Raises:
        ValueError: the comparison has no training pictures or no features.
    """
    found, held_out = comparison.neighbours(drawn.judged), comparison.held_out
    if found is None or held_out is None:
        raise ValueError("copies are looked for among training pictures in a feature space; one of both is missing")
    chosen = found.distances.argsort(stable=True)[:PAIRS].tolist()
    again = [pipe(drawn.judged.captions[i], seed=drawn.seeds[i], **settings)[0] for i in chosen]
    originals = training.again(found.indices[chosen].tolist()).cpu()
    images = torch.stack([to_tensor(image) for image in again])
    return nearest_pairs(images, originals, found.distances[chosen], threshold(held_out))
