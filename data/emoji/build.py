"""Draws the emoji pictures again from the public packages that they come from.

    pip install resvg-py
    python data/emoji/build.py --size 64 --output /some/folder

The rows (names, captions, licences, split) are those of `train.parquet` and `validation.parquet` beside this file; the
pictures are taken from the npm packages below, which `npm pack` downloads. Where the size is 64, every picture is
compared with the hash of the committed one. The column `captions`, which the source `emoji` makes when it is read, is
written besides, so that the folder serves as a `data.source` with the same `data.caption_columns`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ldm.data.emoji import FORMS, caption_forms

HERE = Path(__file__).parent
VARIATION = "-fe0f"
"""The variation selector, which the packages' file names have and the rows' code points do not."""
RASTER = {
    "noto": ("emoji-datasource-google@16.0.0", "img/google/64/"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "img/twitter/64/"),
    "fluent-3d": ("@lobehub/fluent-emoji-3d@1.1.0", "assets/"),
}
"""Style -> npm package with PNG or WebP pictures, and the folder that they lie in."""
VECTOR = {"fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6"}
VECTOR_AT_128 = {"noto": "@iconify-json/noto@1.2.9", **VECTOR}
SVG_FILES_AT_128 = {"twemoji": ("@twemoji/svg@15.0.0", "")}

Draw = Callable[[str], Image.Image | None]
"""Code points -> picture, RGB over white; None where the package has none."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, choices=(64, 128), default=64)
    parser.add_argument("--styles", nargs="+", choices=("noto", "twemoji", "fluent-3d", "fluent-flat"), default=None)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        styles = args.styles or ("noto", "twemoji", "fluent-3d", "fluent-flat")
        draw = {style: drawer(style, args.size, Path(scratch)) for style in styles}
        for split in ("train", "validation"):
            rebuild(split, draw, args.size, args.output)


def rebuild(split: str, draw: dict[str, Draw], size: int, output: Path) -> None:
    """Writes one split with new pictures, and says how many equal the committed ones or are missing."""
    table = pq.read_table(HERE / f"{split}.parquet")
    rows, counts = [], Counter[str]()
    for row in table.to_pylist():
        image = draw[row["style"]](row["codepoints"]) if row["style"] in draw else None
        if image is None:
            counts["missing" if row["style"] in draw else "of other styles"] += 1
            continue
        known = row["pixel_hash"]
        row["pixel_hash"] = hashlib.sha1(image.tobytes()).hexdigest()
        if size == 64:
            counts["equal" if row["pixel_hash"] == known else "different"] += 1
        row["image"] = {"bytes": lossless(image), "path": row["image"]["path"]}
        rows.append(row | {FORMS: caption_forms(row)})
    schema = table.schema.append(pa.field(FORMS, pa.list_(pa.string())))
    pq.write_table(pa.Table.from_pylist(rows, schema), output / f"{split}.parquet", compression="zstd")
    print(f"{split}: {len(rows)} pictures;", ", ".join(f"{count} {name}" for name, count in counts.items()))


def lossless(image: Image.Image) -> bytes:
    """The picture as lossless WebP."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, quality=60, method=4, exact=True)
    return buffer.getvalue()


def drawer(style: str, size: int, scratch: Path) -> Draw:
    """What draws the pictures of one style."""
    if size == 128 and style in SVG_FILES_AT_128:
        files = members(*SVG_FILES_AT_128[style], scratch)
        return lambda points: svg_picture(files[points].decode(), size) if points in files else None
    vectors = VECTOR_AT_128 if size == 128 else VECTOR
    if style in vectors:
        return icon_drawer(vectors[style], size, scratch)
    pictures = members(*RASTER[style], scratch)
    return lambda points: raster_picture(pictures[points], size) if points in pictures else None


def icon_drawer(package: str, size: int, scratch: Path) -> Draw:
    """Draws from an Iconify set: `icons.json` holds the bodies, `chars.json` the name of each code point."""
    files = archive(package, scratch)
    icons: dict[str, Any] = json.loads(files["icons.json"])
    names = {points.replace(VARIATION, ""): name for points, name in json.loads(files["chars.json"]).items()}

    def draw(points: str) -> Image.Image | None:
        if points not in names:
            return None
        name = names[points]
        icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
        side = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        head = f'<svg {spaces} viewBox="0 0 {side[0]} {side[1]}">'
        return svg_picture(f"{head}{icon['body']}</svg>", size)

    return draw


def svg_picture(svg: str, size: int) -> Image.Image:
    """An SVG at a size."""
    import resvg_py

    return over_white(Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)))))


def raster_picture(data: bytes, size: int) -> Image.Image:
    """A PNG or WebP at a size."""
    image = squared(Image.open(io.BytesIO(data)).convert("RGBA"))
    return over_white(image if image.size == (size, size) else image.resize((size, size), Image.Resampling.LANCZOS))


def squared(image: Image.Image) -> Image.Image:
    """A picture in the middle of a transparent square."""
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def over_white(image: Image.Image) -> Image.Image:
    """An RGBA picture in the middle of a white square."""
    image = squared(image.convert("RGBA"))
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def members(package: str, folder: str, scratch: Path) -> dict[str, bytes]:
    """The files of a package's folder by code points; of two for the same ones, the first by name."""
    found = sorted(archive(package, scratch).items(), reverse=True)
    files = ((Path(name), data) for name, data in found if name.startswith(folder))
    return {path.stem.lower().replace(VARIATION, ""): data for path, data in files}


def archive(package: str, scratch: Path) -> dict[str, bytes]:
    """The files of an npm package by their path, downloaded by npm."""
    command = ["npm", "pack", "--silent", package, "--pack-destination", str(scratch)]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    return dict(files_of(scratch / name))


def files_of(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        for info in tar:
            file = tar.extractfile(info)
            if file is not None:
                yield info.name.partition("/")[2], file.read()


if __name__ == "__main__":
    main()
