"""Pictures to tensors: decoding with care, compositing on white, resize and crop, scaling to [-1, 1]."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 100_000_000


class BadImage(ValueError):  # noqa: N818
    """A picture that cannot be used; the message says which and why."""


def open_image(data: Any, key: str) -> Image.Image:
    """Decodes one picture to RGB over white.

    Args:
        data: a PIL image, a path, encoded bytes, or the `{"bytes", "path"}` of the `datasets` library.
        key: the name used in messages.

    Raises:
        BadImage: when it is missing, not JPEG, PNG or WebP, larger than 100 megapixels, or damaged.
    """
    try:
        image = data if isinstance(data, Image.Image) else Image.open(_stream(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(f"{key}: {image.width} x {image.height} pixels is more than {MAX_PIXELS:,}")
        return to_rgb(image)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"{key}: not a {', '.join(FORMATS)} picture") from error
    except Exception as error:  # what Pillow raises for a damaged file depends on where the damage is
        raise BadImage(f"{key}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation and composites any transparency on white; 16-bit grey is scaled to 8 bits."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((values / 257.0).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def resize_and_crop(
    image: Image.Image,
    resolution: int,
    center_crop: bool = True,
    flip: bool = False,
    rng: random.Random | None = None,
    crop: float = 1.0,
) -> Image.Image:
    """A square of `resolution` pixels: the middle, or one drawn from `rng`.

    Its side is the fraction `crop` of the picture's shorter side, or as much more as it takes not to enlarge it. The
    picture is resized (Lanczos) before it is cut.
    """
    scale = max(resolution, min(resolution / crop, min(image.size))) / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    x, y = (width - resolution) // 2, (height - resolution) // 2
    if not center_crop and rng is not None:
        x, y = rng.randint(0, width - resolution), rng.randint(0, height - resolution)
    image = image.crop((x, y, x + resolution, y + resolution))
    return ImageOps.mirror(image) if flip else image


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> float32 [3, H, W] in [-1, 1]."""
    array = torch.from_numpy(np.array(image, dtype=np.uint8))
    return array.permute(2, 0, 1).float().div_(127.5).sub_(1.0).contiguous()


def to_images(x: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] in [-1, 1] -> RGB pictures, rounded to the nearest of 256 levels."""
    levels = x.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return [Image.fromarray(row) for row in levels.permute(0, 2, 3, 1).cpu().numpy()]


def _stream(data: Any) -> Any:
    if isinstance(data, dict):
        data = data.get("bytes") or data.get("path")
    if data is None:
        raise ValueError("no image data")
    return io.BytesIO(data) if isinstance(data, bytes) else Path(data)
