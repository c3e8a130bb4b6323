from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.batches import Transform
from ldm.data.sources import Example
from ldm.data.transforms import MAX_PIXELS, BadImage, open_image, resize_and_crop, to_images, to_tensor
from ldm.seeds import seed_of


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (24, 16), seed: int = 0) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.frombytes(mode, size, values.tobytes())


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int64)


def png_header(width: int, height: int) -> bytes:
    """A PNG that ends where its picture data would begin: there is nothing to decode."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 1000) + b"IDAT"


def test_alpha_is_composited_on_white() -> None:
    image = noise("RGBA")
    rgba = pixels(image).astype(float)
    expected = rgba[..., :3] * rgba[..., 3:] / 255 + 255 - rgba[..., 3:]
    assert np.abs(pixels(open_image(encoded(image), "k")) - expected).max() <= 1
    assert np.abs(pixels(open_image(encoded(image, "WEBP", lossless=True, exact=True), "k")) - expected).max() <= 1


def test_grey_with_alpha_and_transparent_palette_entries_are_composited() -> None:
    grey = Image.merge("LA", (Image.new("L", (2, 1), 100), Image.frombytes("L", (2, 1), b"\x00\xff")))
    assert pixels(open_image(encoded(grey), "k")).tolist() == [[[255] * 3, [100] * 3]]
    palette = Image.frombytes("P", (2, 1), b"\x00\x01")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    opened = open_image(encoded(palette, transparency=0), "k")
    assert pixels(opened).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    assert pixels(open_image(encoded(palette), "k")).tolist() == [[[10, 20, 30], [40, 50, 60]]]


TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}
"""How the stored array becomes the upright one for every EXIF orientation (TIFF 6.0, tag 274)."""


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation_is_applied(orientation: int) -> None:
    image = noise(size=(5, 3))
    exif = Image.Exif()
    exif[274] = orientation
    assert np.array_equal(pixels(open_image(encoded(image, exif=exif), "k")), TURNS[orientation](pixels(image)))


def test_sixteen_bit_grey_keeps_its_range() -> None:
    values = np.array([[0, 128, 257, 257 * 100, 65535]], dtype=np.uint16)
    opened = open_image(encoded(Image.fromarray(values)), "k")
    assert opened.mode == "RGB" and pixels(opened)[0, :, 0].tolist() == [0, 0, 1, 100, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = noise().convert(mode)
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    opened = open_image(encoded(image, kind, **({"quality": 100, "subsampling": 0} if kind == "JPEG" else {})), "k")
    assert opened.mode == "RGB" and opened.size == image.size
    assert np.abs(pixels(opened) - pixels(image.convert("RGB"))).mean() < (3 if kind == "JPEG" else 0.01)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_file_is_bad(kind: str) -> None:
    data = encoded(noise(size=(64, 64)), kind)
    for length in (10, len(data) // 3, len(data) - 40):
        with pytest.raises(BadImage, match="photo"):
            open_image(data[:length], "photo")


@pytest.mark.parametrize(
    "data", [b"", b"junk", encoded(noise(), "GIF"), encoded(noise(), "EPS"), encoded(noise(), "BMP")]
)
def test_what_is_not_jpeg_png_or_webp_is_bad_and_has_one_name(data: bytes) -> None:
    messages = set()
    for _ in range(2):
        with pytest.raises(BadImage) as error:
            open_image(data, "photo")
        messages.add(str(error.value))
    assert messages == {"photo: not a JPEG, PNG, WEBP picture"}


@pytest.mark.parametrize("data", [None, {"bytes": None, "path": None}, {}, 7])
def test_a_missing_picture_is_bad(data: object) -> None:
    with pytest.raises(BadImage, match="photo"):
        open_image(data, "photo")


def test_a_missing_file_is_bad(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match=r"photo.*none\.png"):
        open_image({"bytes": None, "path": str(tmp_path / "none.png")}, "photo")


def test_a_picture_comes_from_path_bytes_dict_or_pil(tmp_path: Path) -> None:
    image, path = noise(), tmp_path / "a.png"
    image.save(path)
    for data in (image, path, str(path), encoded(image), {"bytes": encoded(image), "path": None}, {"path": str(path)}):
        assert np.array_equal(pixels(open_image(data, "k")), pixels(image))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(10_001, 10_000), (60_000, 60_000)])
def test_too_many_pixels_are_refused_from_the_header(width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert width * height > MAX_PIXELS
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadImage, match=r"bomb.*pixels"):
        open_image(png_header(width, height), "bomb")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_files_raise_nothing_else() -> None:
    draw, exif = random.Random(0), Image.Exif()
    exif[274] = 6
    whole = [encoded(noise(mode), kind, **more) for mode, kind, more in (
        ("RGB", "JPEG", {"exif": exif}), ("CMYK", "JPEG", {}), ("RGBA", "PNG", {"exif": exif}), ("RGBA", "WEBP", {"exif": exif}),
    )]  # fmt: skip
    opened = 0
    for _ in range(1500):
        data = bytearray(draw.choice(whole))
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            opened += open_image(bytes(data), "k").mode == "RGB"
        except BadImage as error:
            assert str(error).startswith("k: ") and "\n" not in str(error)
    assert 0 < opened < 1500


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (33, 17), (8, 8), (3, 5), (16, 16)])
def test_the_middle_square_at_the_shorter_side(size: tuple[int, int]) -> None:
    """A linear ramp stays one under resizing: the middle of the result is the middle of the picture."""
    ramp = np.stack(np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1])), -1)
    image = Image.fromarray(np.dstack([ramp, np.zeros(size[::-1])]).round().astype(np.uint8))
    result = resize_and_crop(image, 16)
    assert result.size == (16, 16)
    middle = pixels(result)[..., :2].mean((0, 1))
    assert np.abs(middle - 127.5).max() < 255 / min(size) / 2 + 1
    spread = pixels(result)[..., :2].max((0, 1)) - pixels(result)[..., :2].min((0, 1))
    expected = 255 * min(size) / np.array(size)
    assert np.abs(spread - expected).max() < 3 * 255 / 16


def test_a_picture_of_the_right_height_is_only_cut() -> None:
    image = noise(size=(26, 16))
    assert np.array_equal(pixels(resize_and_crop(image, 16)), pixels(image)[:, 5:21])
    exact = noise(size=(16, 16))
    assert np.array_equal(pixels(resize_and_crop(exact, 16)), pixels(exact))


def test_flip_mirrors_left_and_right() -> None:
    image = noise(size=(20, 16))
    plain, flipped = resize_and_crop(image, 16), resize_and_crop(image, 16, flip=True)
    assert np.array_equal(pixels(flipped), pixels(plain)[:, ::-1])


def test_random_crops_reach_both_ends_and_repeat() -> None:
    image = noise(size=(20, 16))
    whole = pixels(image)
    found = set()
    for seed in range(60):
        cut = pixels(resize_and_crop(image, 16, center_crop=False, rng=random.Random(seed)))
        found |= {x for x in range(5) if np.array_equal(cut, whole[:, x : x + 16])}
        again = pixels(resize_and_crop(image, 16, center_crop=False, rng=random.Random(seed)))
        assert np.array_equal(cut, again)
    assert found == {0, 1, 2, 3, 4}


def test_tensors_span_minus_one_to_one_and_come_back() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.dstack([values, values.T, 255 - values]))
    x = to_tensor(image)
    assert x.shape == (3, 16, 16) and x.dtype == torch.float32
    assert torch.equal(x[0], torch.from_numpy(values.astype(np.float32) * 2 / 255 - 1).float()) or torch.allclose(
        x[0].double(), torch.from_numpy(values.astype(np.float64) * 2 / 255 - 1), atol=1e-6
    )
    assert float(x.min()) == -1.0 and float(x.max()) == 1.0
    assert np.array_equal(pixels(to_images(x[None])[0]), pixels(image))


def test_images_are_clamped_and_rounded_to_the_nearest_level() -> None:
    row = torch.tensor([-7.0, 7.0, (2 * 100.4) / 255 - 1, (2 * 100.6) / 255 - 1])
    image = to_images(row.expand(1, 3, 1, 4))[0]
    assert pixels(image)[0, :, 0].tolist() == [0, 255, 100, 101]


@pytest.mark.parametrize(
    ("size", "crop", "seen"),
    [((96, 64), 1.0, 64), ((96, 64), 0.5, 32), ((64, 200), 0.75, 48), ((96, 64), 0.1, 16), ((10, 12), 0.5, 10)],
)
def test_a_crop_shows_its_fraction_of_the_shorter_side_and_is_not_enlarged(
    size: tuple[int, int], crop: float, seen: int
) -> None:
    """A ramp of one level a pixel: the first and last level of the square tell how much of the picture it shows."""
    columns = np.broadcast_to(np.arange(size[0], dtype=np.uint8), size[::-1])
    ramp = Image.fromarray(np.stack([columns] * 3, axis=-1))
    row = pixels(resize_and_crop(ramp, 16, crop=crop))[8, :, 0]
    middle = (size[0] - 1) / 2
    assert row[-1] - row[0] == pytest.approx(seen * 15 / 16, abs=2)
    assert (row[0] + row[-1]) / 2 == pytest.approx(middle, abs=2)


def test_crops_of_many_sizes_are_drawn_anew_in_every_epoch_and_repeat() -> None:
    example = Example(noise(size=(96, 64)), ("",), "k")
    transform = Transform(16, center_crop=False, random_flip=True, seed=1, min_crop=0.3)
    first = [transform(example, epoch, 5) for epoch in range(4)]
    assert all(torch.equal(x, transform(example, epoch, 5)) for epoch, x in enumerate(first))
    assert not any(torch.equal(first[0], x) for x in first[1:])
    whole = Transform(16, center_crop=False, random_flip=True, seed=1)
    plain = random.Random(seed_of(1, "augment", 0, 5))
    flip = plain.random() < 0.5
    assert torch.equal(whole(example, 0, 5), to_tensor(resize_and_crop(example.image, 16, False, flip, plain)))
