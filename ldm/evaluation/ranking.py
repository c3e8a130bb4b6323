"""The best of several pictures of a caption, by a model that puts pictures and captions into one space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from conditioning.weighting import parse_weights
from ldm.data.transforms import to_tensor
from ldm.evaluation.text_image import TextImageModel
from ldm.pipeline import TextToImage


class Chosen(NamedTuple):
    """A picture and the seed that draws it again, alone."""

    image: Image.Image
    seed: int


@dataclass(frozen=True)
class Ranking:
    """Draws `count` candidates of every picture and keeps the one that fits its caption best (Ramesh et al. 2021,
    section 2.6); 1 keeps what is drawn, and needs no model.

    Raises:
        ValueError: `count` is below 1, or above 1 without a model.
    """

    count: int = 1
    model: TextImageModel | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"the number of candidates is {self.count}; it must be at least 1")
        if self.count > 1 and self.model is None:
            raise ValueError(f"{self.count} candidates a picture need a model that tells which is best")

    def seeds(self, seed: int, picture: int) -> range:
        """The seeds of the candidates of one picture of a run."""
        return range(seed + picture * self.count, seed + (picture + 1) * self.count)

    def draw(
        self, pipe: TextToImage, captions: Sequence[str], seed: int, *, batch_size: int = 8, **settings: Any
    ) -> list[Chosen]:
        """One picture of every caption; `settings` are those of the pipeline's call."""
        chosen: list[Chosen] = []
        together = max(1, batch_size // self.count)
        for first in range(0, len(captions), together):
            part = captions[first : first + together]
            seeds = range(self.seeds(seed, first).start, self.seeds(seed, first + len(part)).start)
            images = pipe(part, num_images=self.count, seed=seeds.start, batch_size=batch_size, **settings)
            texts = [plain(text) for text in part] if settings.get("prompt_syntax") == "a1111" else part
            chosen += [Chosen(images[row], seeds[row]) for row in self._best(images, texts, batch_size)]
        return chosen

    @torch.no_grad()
    def _best(self, images: Sequence[Image.Image], captions: Sequence[str], batch_size: int) -> list[int]:
        if self.model is None or self.count == 1:
            return list(range(len(images)))
        parts = [images[first : first + batch_size] for first in range(0, len(images), batch_size)]
        seen = [self.model.images(torch.stack([to_tensor(image) for image in part])) for part in parts]
        return best_rows(torch.cat(seen), self.model.texts(captions)).tolist()


def plain(prompt: str) -> str:
    """A prompt of AUTOMATIC1111's syntax without its weights; its pieces, read apart, stay apart."""
    return " ".join(" ".join(text for text, _ in parse_weights(prompt)).split())


def best_rows(images: Tensor, captions: Tensor) -> Tensor:
    """The row of the picture that is most similar to each caption, the first of equals: int64 [N].

    Args:
        images: unit vectors [N * K, D], those of caption n in the rows from n * K on.
        captions: unit vectors [N, D].
    """
    similarity = torch.einsum("nkd,nd->nk", images.view(len(captions), -1, images.shape[1]), captions)
    return similarity.argmax(1) + torch.arange(len(captions), device=images.device) * similarity.shape[1]
