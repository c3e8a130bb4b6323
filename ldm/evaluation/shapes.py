"""The `shapes` suite: draw scenes from captions and read them back with the exact scorer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image

from ldm.data.shapes import captions, scene
from ldm.evaluation.shapes_scorer import Score, aggregate, score
from ldm.pipeline import TextToImage

SPLITS = {"train": "validation", "heldout": "heldout"}
"""What a split is called in the report -> its scenes: new ones of the training distribution, and unseen ones."""


def evaluate_shapes(
    pipe: TextToImage,
    num_samples: int,
    seed: int = 0,
    num_shapes: int | None = None,
    batch_size: int = 50,
    progress: Callable[[int], object] | None = None,
    **settings: Any,
) -> tuple[dict[str, dict[str, float | None]], dict[str, list[tuple[str, Image.Image, Score]]]]:
    """Accuracies of `num_samples` pictures a split, and the pictures with caption and score.

    The captions are the full ones of scenes 0, 1, 2, ... of each split; picture i uses seed + i.
    """
    report: dict[str, dict[str, float | None]] = {}
    drawn: dict[str, list[tuple[str, Image.Image, Score]]] = {}
    for name, split in SPLITS.items():
        prompts = [captions(scene(i, split, num_shapes=num_shapes))[0] for i in range(num_samples)]
        images = pipe(prompts, seed=seed, batch_size=batch_size, progress=progress, **settings)
        drawn[name] = [(p, image, score(image, p)) for p, image in zip(prompts, images, strict=True)]
        report[name] = aggregate([s for _, _, s in drawn[name]])
    return report, drawn
