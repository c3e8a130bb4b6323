"""More than 300 malformed pictures: each is refused by name or decoded, without a crash, a hang or much memory."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.batches import SkipCounter, Transform, pixel_batches
from ldm.data.order import BatchPlan
from ldm.data.sources import open_source
from ldm.data.transforms import MAX_PIXELS, BadImage, image_size, open_image

Limits = Callable[..., AbstractContextManager[None]]
FORMATS = ("PNG", "JPEG", "WEBP")


def noise(width: int = 24, height: int = 16) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image or noise()).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, data: bytes, *extra: bytes, depth: int = 8, color: int = 0) -> bytes:
    """A PNG put together by hand; grey unless `color` says otherwise."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def truncated() -> Iterator[tuple[str, bytes]]:
    for kind in FORMATS:
        whole = encoded(kind)
        for part in range(1, 40):
            yield f"{kind} cut at {part}/50", whole[: len(whole) * part // 50]


def scrambled() -> Iterator[tuple[str, bytes]]:
    """Ten bytes changed: some of these decode to another picture, which is no harm."""
    rng = random.Random(1)
    for kind in FORMATS:
        for n in range(40):
            data = bytearray(encoded(kind))
            for _ in range(10):
                data[rng.randrange(len(data))] = rng.randrange(256)
            yield f"{kind} scrambled {n}", bytes(data)


def other_formats() -> Iterator[tuple[str, bytes]]:
    for kind in ("GIF", "BMP", "TIFF", "ICO", "PPM", "TGA", "PCX", "EPS", "PDF", "DDS", "SGI", "JPEG2000"):
        yield kind, encoded(kind)
    yield "SVG", b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'
    yield "FITS", b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800)
    yield "HTML", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    yield "text", b"a caption, not a picture\n"
    yield "zip", b"PK\x03\x04" + bytes(60)
    yield "pickle", b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07picture\x94."


def empty_and_random() -> Iterator[tuple[str, bytes]]:
    yield "zero bytes", b""
    for n in range(30):
        yield f"random {n}", random.Random(n).randbytes(1 + 37 * n)
    for kind in FORMATS:
        yield f"{kind} all zero", bytes(len(encoded(kind)))
        for n in range(8, 16):
            yield f"{kind} first {n} bytes", encoded(kind)[:n]


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that would be large pictures, by their data or by their header alone."""
    for side in (9_000, 12_000, 20_000):
        for color, samples in ((0, 1), (2, 3), (6, 4)):
            row = zlib.compress(bytes(1 + samples * side) * 64, 9)
            yield f"{side} px of kind {color}", png(side, side, row, color=color)
    for width, height in ((65_535, 65_535), (2**31 - 1, 1), (1, 2**31 - 1), (100_000, 100_000), (2**31 - 1, 2**31 - 1)):
        yield f"header of {width} x {height}", png(width, height, zlib.compress(bytes(100)))
    jpeg = bytearray(encoded("JPEG"))
    start = jpeg.index(b"\xff\xc0") + 5
    jpeg[start : start + 4] = b"\xff\xff\xff\xff"
    yield "JPEG header of 65535 x 65535", bytes(jpeg)
    for name in (b"zTXt", b"iCCP"):
        text = b"x\0\0" + zlib.compress(bytes(200_000_000), 9)
        yield f"PNG with a {name.decode()} of 200 MB", png(8, 8, zlib.compress(bytes(72)), chunk(name, text))
    for width, height in ((1, 4_000), (5_000, 2), (3, 200)):
        yield f"strip of {width} x {height}", encoded("PNG", noise(width, height))


def lying() -> Iterator[tuple[str, bytes]]:
    """Headers that do not fit what follows."""
    pixels = zlib.compress(bytes(72))
    for depth in (3, 5, 7, 9, 32):
        yield f"PNG depth {depth}", png(8, 8, pixels, depth=depth)
    for color in (1, 5, 7, 9):
        yield f"PNG colour type {color}", png(8, 8, pixels, color=color)
    for width, height in ((0, 8), (8, 0), (8, 4_000), (4_000, 8)):
        yield f"PNG {width} x {height} with 64 pixels", png(width, height, pixels)
    yield "PNG with damaged data", png(8, 8, b"not zlib")
    yield "PNG without data", png(8, 8, b"")
    yield "PNG with a palette picture and no palette", png(8, 8, pixels, color=3)
    whole = encoded("PNG")
    for n in range(8, 60, 4):
        yield f"PNG with a piece missing at {n}", whole[:n] + whole[n + 5 :]


MALFORMED = [
    case for family in (truncated, scrambled, other_formats, empty_and_random, bombs, lying) for case in family()
]
MAY_DECODE = ("scrambled", "zTXt", "iCCP", "4000 x 8", "8 x 4000", "no palette", "piece missing", "cut at")
"""Cases in which the decoder may find a usable picture all the same."""


def test_there_are_300_of_them() -> None:
    assert len(MALFORMED) >= 300


@pytest.mark.usefixtures("lean")
def test_malformed_pictures_are_refused_by_name_in_bounded_time_and_memory(limit_time: Limits) -> None:
    good, refused = encoded("PNG"), 0
    for name, data in MALFORMED:
        key = f"folder/{name}.png"
        with limit_time():
            try:
                image = open_image(data, key)
            except BadImage as error:
                assert str(error).startswith(f"{key}: ") and "\n" not in str(error)
                refused += 1
            else:
                assert any(word in name for word in MAY_DECODE), f"{name} was taken for a picture"
                assert image.mode == "RGB" and image.width * image.height <= MAX_PIXELS
        assert open_image(good, "good").size == (24, 16)
    assert refused >= 200


@pytest.mark.usefixtures("lean")
def test_training_on_a_folder_of_them_counts_and_names_each(tmp_path: Path) -> None:
    """An epoch of the pictures, with good ones among them: what is skipped is what cannot be opened, each once."""
    folder = tmp_path / "train"
    folder.mkdir()
    paths = [folder / f"{number:03d}.png" for number in range(len(MALFORMED))]
    good = {str(path.with_suffix(".good.png")) for path in paths[::2]}
    for path, (_, data) in zip(paths, MALFORMED, strict=True):
        path.write_bytes(data)
    for name in good:
        Path(name).write_bytes(encoded("PNG"))
    for picture in folder.glob("*.png"):
        picture.with_suffix(".txt").write_text("a caption")
    refused = {str(path) for path in paths if not opens(path)}
    source, skips, used = open_source(str(tmp_path), "train", 8), SkipCounter(1.0), set()
    assert len(source) == len(paths) + len(good)
    for batch in pixel_batches(source, Transform(8), BatchPlan(1), 0, 0, len(source)):
        skips.add(1, batch.skipped)
        used.update(batch.keys)
    assert len(refused) >= 200 and {reason.split(": ")[0] for reason in skips.names} == refused
    assert len(skips.names) == len(refused) and f"{len(refused)} samples could not be used" in skips.summary()
    assert used == (good | set(map(str, paths))) - refused


def opens(path: Path) -> bool:
    try:
        open_image(path, str(path))
    except BadImage:
        return False
    return True


def test_the_limits_end_what_waits_and_what_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit_time: Limits
) -> None:
    """Also within the reader, which turns every Exception into a bad picture."""
    os.mkfifo(tmp_path / "pipe")

    def wait() -> None:
        (tmp_path / "pipe").read_bytes()

    def compute() -> None:
        while True:
            pass

    for hanging, reason, limits in ((wait, "lasted 1 s", (60, 1)), (compute, "computed for 1 s", (1, 60))):
        monkeypatch.setattr(Image, "open", lambda *_, hanging=hanging, **__: hanging())
        with pytest.raises(BaseException, match=reason), limit_time(*limits):
            open_image(encoded("PNG"), "x")


@pytest.mark.parametrize("kind", FORMATS)
def test_the_contents_decide_and_not_the_extension(tmp_path: Path, kind: str) -> None:
    for suffix in (".png", ".jpg", ".webp", ".gif", ".txt"):
        path = tmp_path / f"picture{suffix}"
        path.write_bytes(encoded(kind))
        assert open_image(path, str(path)).size == image_size(path, "x") == (24, 16)


def test_what_is_no_file_is_refused(tmp_path: Path, limit_time: Limits) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    for path in (*tmp_path.iterdir(), tmp_path / "never.png", Path("/dev/zero")):
        with limit_time(), pytest.raises(BadImage, match=str(path)):
            open_image(path, str(path))


def test_the_size_of_a_turned_picture_is_known_from_its_header() -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded("JPEG", exif=exif)
        assert image_size(data, "x") == open_image(data, "x").size == ((16, 24) if orientation > 4 else (24, 16))


@pytest.mark.parametrize("mode", ["CMYK", "L", "1", "YCbCr"])
def test_colour_spaces_become_rgb(mode: str) -> None:
    kind = "PNG" if mode in ("L", "1") else "JPEG"
    flat = Image.new("RGB", (16, 16), (200, 200, 200)).convert(mode)
    image = open_image(encoded(kind, flat), "x")
    expected = 255 if mode == "1" else 200
    assert image.mode == "RGB" and abs(image.resize((1, 1)).getpixel((0, 0))[0] - expected) <= (
        60 if mode == "1" else 3
    )


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
    for kind in ("PNG", "WEBP"):
        data = encoded(kind, frames[0], save_all=True, append_images=frames[1:], lossless=True, duration=40)
        assert open_image(data, "x").getpixel((4, 4)) == (255, 0, 0)
