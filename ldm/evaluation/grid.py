"""Contact sheets: pictures side by side, with a label under each where there is one."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN = 8
LINE_HEIGHT = 13
GLYPH_WIDTH = 6.2


def image_grid(
    images: Sequence[Image.Image], columns: int | None = None, labels: Sequence[str] | None = None, min_side: int = 0
) -> Image.Image:
    """Pastes equally large pictures on white, row by row.

    Args:
        columns: pictures a row; by default about as many as rows.
        labels: one text a picture, wrapped to its width; None: no labels.
        min_side: pictures smaller than this are enlarged by a whole factor, so that single pixels stay visible.

    Raises:
        ValueError: when there is no picture, or another number of labels than of pictures.
    """
    if not images:
        raise ValueError("a grid needs at least one picture, got none")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"labels has {len(labels)} entries; there are {len(images)} pictures")
    columns = columns or math.ceil(math.sqrt(len(images)))
    factor = max(1, math.ceil(min_side / images[0].width))
    images = [i.resize((i.width * factor, i.height * factor), Image.Resampling.NEAREST) for i in images]
    width, height = images[0].size
    wrapped = [textwrap.wrap(label, max(1, int(width / GLYPH_WIDTH))) for label in labels or []]
    caption = LINE_HEIGHT * max((len(lines) for lines in wrapped), default=0)
    rows = math.ceil(len(images) / columns)
    cell = (width + MARGIN, height + caption + MARGIN)
    sheet = Image.new("RGB", (columns * cell[0] + MARGIN, rows * cell[1] + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for index, image in enumerate(images):
        x, y = MARGIN + index % columns * cell[0], MARGIN + index // columns * cell[1]
        sheet.paste(image, (x, y))
        for number, line in enumerate(wrapped[index] if wrapped else []):
            draw.text((x, y + height + number * LINE_HEIGHT), line, fill="black", font=font)
    return sheet
