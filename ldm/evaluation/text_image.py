"""How well pictures fit their captions, by a model that puts both into one space: CLIP (Radford et al. 2021)."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.data.transforms import to_images
from ldm.seeds import generator

CANDIDATES = 32
"""Captions among which R-precision looks for a picture's own."""
TEXTS_AT_ONCE = 256


class TextImageModel(Protocol):
    """Pictures and captions as unit vectors of one space [N, dim]; images are [N, 3, H, W] in [-1, 1]."""

    dim: int

    def images(self, x: Tensor) -> Tensor: ...
    def texts(self, captions: Sequence[str]) -> Tensor: ...


class OpenClip(nn.Module):
    """A model of the library open_clip with its own preprocessing and tokenizer.

    Args:
        name: `local-dir:FOLDER` (a folder of open_clip's, which holds weights), or an architecture such as `ViT-B-32`.
        weights: the checkpoint of an architecture as a local file; nothing is downloaded.

    Raises:
        ValueError: open_clip is not installed, there is no such model, or these are not its weights.
    """

    def __init__(self, name: str, weights: str | Path | None = None) -> None:
        super().__init__()
        _check(name, weights)
        try:
            open_clip = importlib.import_module("open_clip")
            with _quiet():
                self.net, _, self.preprocess = open_clip.create_model_and_transforms(
                    name, None if weights is None else str(weights), require_pretrained=True
                )
                self.tokenizer: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(name)
        except ImportError as error:
            raise ValueError("open_clip is not installed: run `pip install 'ldm[eval]'`") from error
        except Exception as error:  # what open_clip and torch raise depends on what the files are
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"open_clip cannot load it from {weights or name}: {reason}") from error
        self.requires_grad_(False).eval()
        self.dim = len(self.texts([""])[0])

    def images(self, x: Tensor) -> Tensor:
        """Pictures are rounded to 8 bits, as a file of them would hold them, and resized by open_clip."""
        pixels = torch.stack([self.preprocess(image) for image in to_images(x)]).to(self._device)
        return F.normalize(self.net.encode_image(pixels).float(), dim=-1)

    def texts(self, captions: Sequence[str]) -> Tensor:
        parts = [list(captions[i : i + TEXTS_AT_ONCE]) for i in range(0, len(captions), TEXTS_AT_ONCE)]
        encoded = [self.net.encode_text(self.tokenizer(part).to(self._device)) for part in parts]
        return F.normalize(torch.cat(encoded).float(), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """The image side alone, as a feature net."""
        return self.images(x)

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self.net.parameters()).device
        return device


def clip_scores(images: Tensor, texts: Tensor) -> Tensor:
    """100 max(cos, 0) of each pair of unit vectors [N, D]: [N] (Hessel et al. 2021, equation 1, whose w is 2.5)."""
    return 100 * (images * texts).sum(-1).clamp(min=0)


def candidate_rows(own: Sequence[int], pool: int, count: int = CANDIDATES, seed: int = 0) -> Tensor:
    """For each picture the rows of `count` different captions of a pool, its own first: int64 [N, count].

    Args:
        own: the row of each picture's caption in the pool.
        pool: how many different captions there are.

    Raises:
        ValueError: the pool is smaller than `count`, or `count` smaller than 2.
    """
    if not 2 <= count <= pool:
        raise ValueError(f"R-precision among {count} captions needs so many different ones, and 2 at least; got {pool}")
    rows = []
    for index, row in enumerate(own):
        others = torch.randperm(pool - 1, generator=generator(seed, "candidates", index))[: count - 1]
        rows.append(torch.cat([torch.tensor([row]), others + (others >= row)]))
    return torch.stack(rows)


def r_precision(images: Tensor, texts: Tensor, candidates: Tensor) -> Tensor:
    """Whether each picture's own caption is the most similar of its candidates: float32 [N].

    R-precision with one relevant caption (Xu et al. 2018, section 4.1). Where k captions are equally similar and none
    more so, its own being among them, the picture counts 1/k: a model that tells nothing apart has 1 / candidates.

    Args:
        images: unit vectors [N, D].
        texts: unit vectors of the pool [M, D].
        candidates: rows of the pool, the picture's own first [N, K].
    """
    similarity = (texts[candidates] @ images.unsqueeze(-1)).squeeze(-1)
    best = similarity >= similarity.amax(1, keepdim=True)
    return best[:, 0].float() / best.sum(1)


def _check(name: str, weights: str | Path | None) -> None:
    folder = name.removeprefix("local-dir:") if name.startswith("local-dir:") else None
    if folder is not None and not Path(folder, "open_clip_config.json").is_file():
        raise ValueError(f"{folder} holds no open_clip_config.json, so it is no folder of an open_clip model")
    if folder is not None and weights is not None:
        raise ValueError(f"its weights are in its folder, so {weights} would not be read")
    if folder is None and (weights is None or not Path(weights).is_file()):
        given = "no file" if weights is None else f"{weights}, which is not there"
        raise ValueError(f"its `weights` must be a local checkpoint, got {given}; or give local-dir:FOLDER")


@contextmanager
def _quiet() -> Iterator[Any]:
    """Keeps open_clip from logging what it loads; the library configures the root logger's level."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
