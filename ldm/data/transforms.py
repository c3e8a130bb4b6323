"""Pictures to tensors: decoding with care, compositing on white, resize and crop, scaling to [-1, 1]."""

from __future__ import annotations

import io
import random
import stat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 8192 * 8192
MAX_ASPECT_RATIO = 50
ORIENTATION = 0x0112


class BadImage(ValueError):  # noqa: N818
    """A picture that cannot be used; the message says which and why."""


def open_image(data: Any, key: str) -> Image.Image:
    """Decodes one picture, of an animation the first frame, to RGB over white.

    Args:
        data: a PIL image, a path, encoded bytes, or the `{"bytes", "path"}` of the `datasets` library.
        key: the name used in messages.

    Raises:
        BadImage: when it is missing, not JPEG, PNG or WebP, larger than 8192 x 8192 pixels or more than 50 times as
            long as wide by its header (nothing is decoded then), or damaged.
    """
    with _Explained(key):
        image = _opened(data, key)
        return to_rgb(image)


def image_size(data: Any, key: str) -> tuple[int, int]:
    """Width and height of the picture that `open_image` would give, read from its header.

    Raises:
        BadImage: as `open_image`, for what a header can tell.
    """
    with _Explained(key):
        image = _opened(data, key)
        turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else (image.width, image.height)


def to_rgb(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation and composites any transparency on white; 16-bit grey is scaled to 8 bits."""
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((values / 257.0).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


class _Explained:
    """Turns whatever Pillow raises within the block into BadImage: that depends on where the damage is."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, BadImage) or not isinstance(error, Exception):
            return
        if isinstance(error, UnidentifiedImageError):
            raise BadImage(f"{self.key}: not a {', '.join(FORMATS)} picture") from error
        raise BadImage(f"{self.key}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error


def _opened(data: Any, key: str) -> Image.Image:
    """The picture, its header read and its size checked."""
    image = data if isinstance(data, Image.Image) else Image.open(_stream(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{key}: {image.width} x {image.height} pixels is more than {MAX_PIXELS:,}")
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise BadImage(
            f"{key}: {image.width} x {image.height} pixels, one side over {MAX_ASPECT_RATIO} times the other"
        )
    return image


def resize_and_crop(
    image: Image.Image,
    resolution: int | tuple[int, int],
    center_crop: bool = True,
    flip: bool = False,
    rng: random.Random | None = None,
    crop: float = 1.0,
) -> Image.Image:
    """A picture of the given size: the middle, or one drawn from `rng`, of the resized one (Lanczos).

    The cut is the fraction `crop` of the largest that fits, or as much more as it takes not to enlarge it.

    Args:
        resolution: (width, height), or the side of a square.
    """
    size = (resolution, resolution) if isinstance(resolution, int) else resolution
    cover = max(wanted / side for wanted, side in zip(size, image.size, strict=True))
    scale = max(cover, min(cover / crop, 1.0))
    width, height = (max(wanted, round(side * scale)) for wanted, side in zip(size, image.size, strict=True))
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    x, y = (width - size[0]) // 2, (height - size[1]) // 2
    if not center_crop and rng is not None:
        x, y = rng.randint(0, width - size[0]), rng.randint(0, height - size[1])
    image = image.crop((x, y, x + size[0], y + size[1]))
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
    if isinstance(data, bytes):
        return io.BytesIO(data)
    path = Path(data)
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a regular file")
    return path
