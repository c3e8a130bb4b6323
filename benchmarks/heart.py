"""A subject that no model here knows, a red heart, on the five backgrounds of the shapes.

    python -m benchmarks.heart data/heart

writes the five pictures, with captions, on which train_configs/shapes/dreambooth.yaml trains. `is_heart` says whether a
picture shows that subject, by its outline and its colour.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from ldm.data.shapes import BACKGROUNDS, COLORS

PROMPT = "a large sks heart on a {} background"
COLOR = "red"
PLACES = ((0.5, 0.5), (0.44, 0.55), (0.56, 0.47), (0.47, 0.44), (0.55, 0.56))
"""Middles of the five hearts, in parts of the side."""
RADIUS, SUPERSAMPLING, TEMPLATE_SIDE = 0.2, 8, 32
OUTLINE_IOU = 0.8
"""What the outlines have in common, in parts of their union, once their bounding boxes are laid upon each other."""
BACKGROUND_DISTANCE = 90
"""Pixels whose channels differ by more than this from the corners, taken together, belong to the subject."""

Mask = npt.NDArray[np.bool_]


def heart(background: str, place: tuple[float, float] = (0.5, 0.5), side: int = 64) -> Image.Image:
    """The subject, whose outline is x = 16 sin³ t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t."""
    large = side * SUPERSAMPLING
    t = np.linspace(0, 2 * np.pi, 200)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t) + 2.5
    outline = np.stack([place[0] + RADIUS * x / 16, place[1] - RADIUS * y / 16], axis=1) * large
    image = Image.new("RGB", (large, large), BACKGROUNDS[background])
    ImageDraw.Draw(image).polygon([tuple(point) for point in outline.tolist()], fill=COLORS[COLOR])
    return image.resize((side, side), Image.Resampling.BOX)


def is_heart(image: Image.Image) -> bool:
    """Whether what stands before the background has the heart's outline and its colour."""
    mask = _subject(image)
    if mask.sum() < 0.02 * mask.size:
        return False
    found, template = _outline(mask), _outline(_subject(heart("white")))
    alike = (found & template).sum() >= OUTLINE_IOU * (found | template).sum()
    mean = np.asarray(image)[mask].mean(0)
    nearest = min(COLORS, key=lambda name: float(np.square(mean - COLORS[name]).sum()))
    return bool(alike) and nearest == COLOR


def _subject(image: Image.Image) -> Mask:
    pixels = np.asarray(image).astype(int)
    corners = np.stack([pixels[0, 0], pixels[0, -1], pixels[-1, 0], pixels[-1, -1]])
    far: Mask = np.abs(pixels - np.median(corners, axis=0)).sum(-1) > BACKGROUND_DISTANCE
    return far


def _outline(mask: Mask) -> Mask:
    """The mask within its bounding box, scaled to a fixed square."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    shape = Image.fromarray((255 * mask).astype(np.uint8)).crop(box)
    return np.asarray(shape.resize((TEMPLATE_SIDE, TEMPLATE_SIDE), Image.Resampling.BOX)) > 127


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (background, place) in enumerate(zip(BACKGROUNDS, PLACES, strict=True)):
        heart(background, place).save(folder / f"{number}.png", optimize=True)
        rows.append({"file_name": f"{number}.png", "text": PROMPT.format(background)})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
