"""One reader for captioned images: built-in shapes, folders, parquet, WebDataset tars and hub data sets.

Reading is done by the Hugging Face `datasets` library; this file only decides which of its readers fits and gives
every one of them the same face: `len(source)` and `source[i] -> Example`, or iteration for a stream.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ldm.data.shapes import ShapesDataset
from ldm.data.transforms import BadImage, open_image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
HOLDOUT = 50


@dataclass(frozen=True)
class Example:
    """A decoded RGB picture, its captions (one is drawn each time it is used) and its name."""

    image: Image.Image
    captions: tuple[str, ...]
    key: str


class Source(Protocol):
    """A data set with random access; `source[i]` raises BadImage for a picture that cannot be used."""

    name: str

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True)
class Columns:
    """Which columns hold the picture and the captions."""

    image: str = "image"
    captions: tuple[str, ...] = ("text",)


def open_source(
    source: str,
    split: str,
    resolution: int,
    columns: Columns = Columns(),
    max_samples: int | None = None,
    shapes_per_image: int | None = None,
    seed: int = 0,
) -> Source:
    """Opens a map-style source.

    A folder or file without splits of its own gives every 50th example to `validation` and the others to `train`.

    Raises:
        ValueError: naming the source when it does not exist, has no such split or column, or is empty.
    """
    if source == "shapes":
        return ShapesSource(split, max_samples or 100_000, resolution, seed, shapes_per_image)
    rows = _limit(_load(source, split, columns), max_samples)
    if len(rows) == 0:
        raise ValueError(f"{source} has no examples in its split {split!r}")
    return RowSource(rows, f"{source}:{split}", _present(rows.column_names, columns, source))


def open_stream(source: str, split: str, columns: Columns, seed: int, shuffle_buffer: int) -> Stream:
    """Opens a source for reading in order, without random access (`data.streaming`)."""
    return Stream(source, split, columns, seed, shuffle_buffer)


class ShapesSource:
    """The built-in procedural data set behind the same face as every other source."""

    def __init__(self, split: str, size: int, resolution: int, seed: int, num_shapes: int | None) -> None:
        self.data = ShapesDataset(split, size, resolution, seed=seed, num_shapes=num_shapes)
        self.name = f"shapes:{split}:{seed}:{num_shapes}:{resolution}"

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Example:
        row = self.data[index]
        return Example(row["image"], tuple(row["captions"]), row["key"])


class RowSource:
    """A `datasets.Dataset` whose picture column is left encoded until it is asked for."""

    def __init__(self, rows: Any, name: str, columns: Columns) -> None:
        self.rows, self.name, self.columns = rows, name, columns

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return to_example(self.rows[index], self.columns, f"{self.name}[{index}]")


class Stream:
    """A `datasets.IterableDataset`, shuffled within a buffer by (seed, epoch), that can start at any position."""

    def __init__(self, source: str, split: str, columns: Columns, seed: int, shuffle_buffer: int) -> None:
        self.name, self.columns, self.seed, self.buffer = f"{source}:{split}", columns, seed, shuffle_buffer
        self.rows = _load(source, split, columns, streaming=True)
        self.columns = _present(self.rows.column_names or list(next(iter(self.rows))), columns, source)

    def examples(self, epoch: int = 0, shuffle: bool = True) -> Iterator[tuple[int, Example | BadImage]]:
        """Position and example (or the reason why it cannot be used) of every row of one epoch."""
        rows = self.rows.shuffle(seed=self.seed + epoch, buffer_size=self.buffer) if shuffle else self.rows
        for position, row in enumerate(rows):
            try:
                yield position, to_example(row, self.columns, f"{self.name}[{position}]")
            except BadImage as error:
                yield position, error


def to_example(row: dict[str, Any], columns: Columns, fallback_key: str) -> Example:
    """One row of a data set -> Example.

    Raises:
        BadImage: when the picture cannot be decoded or there is no caption.
    """
    data = row.get(columns.image)
    path = data.get("path") if isinstance(data, dict) else None
    key = str(row.get("__key__") or path or fallback_key)
    captions = tuple(text for column in columns.captions for text in _texts(row.get(column)))
    if not captions:
        raise BadImage(f"{key}: no caption in {', '.join(columns.captions)}")
    return Example(open_image(data, key), captions, key)


def _texts(value: Any) -> list[str]:
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if isinstance(value, dict):
        value = value.get("text") or value.get("caption")
    values = value if isinstance(value, list) else [value]
    return [text.strip() for text in values if isinstance(text, str) and text.strip()]


def _load(source: str, split: str, columns: Columns, streaming: bool = False) -> Any:
    path = Path(source).expanduser()
    files = sorted(glob.glob(str(path)))
    if path.is_dir():
        rows = _load_folder(path, split, columns, streaming)
    elif files and all(f.endswith(".parquet") for f in files):
        rows = _held_out(_read("parquet", files, streaming), split, streaming)
    elif files and all(f.endswith(".tar") for f in files):
        rows = _held_out(_read("webdataset", files, streaming), split, streaming)
    elif files or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"data.source {source!r} is neither a folder nor .parquet or .tar files")
    else:
        rows = _load_hub(source, split, streaming)
    return _undecoded(rows, columns)


def _load_folder(folder: Path, split: str, columns: Columns, streaming: bool) -> Any:
    if (folder / split).is_dir():
        return _load_folder_rows(folder / split, columns, streaming)
    for suffix, reader in ((".parquet", "parquet"), (".tar", "webdataset")):
        named = sorted(str(f) for f in folder.glob(f"{split}*{suffix}"))
        if named:
            return _read(reader, named, streaming)
        files = sorted(str(f) for f in folder.glob(f"*{suffix}"))
        if files:
            return _held_out(_read(reader, files, streaming), split, streaming)
    return _held_out(_load_folder_rows(folder, columns, streaming), split, streaming)


def _load_folder_rows(folder: Path, columns: Columns, streaming: bool) -> Any:
    from datasets import Dataset

    rows = _metadata_rows(folder, columns) or _sidecar_rows(folder, columns)
    if not rows:
        raise ValueError(f"{folder} has no metadata.jsonl, no metadata.csv and no picture with a .txt file beside it")
    names = sorted({name for row in rows for name in row})
    data = Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    return data.to_iterable_dataset() if streaming else data


def _metadata_rows(folder: Path, columns: Columns) -> list[dict[str, Any]]:
    jsonl, csv = folder / "metadata.jsonl", folder / "metadata.csv"
    if jsonl.is_file():
        rows = [json.loads(line) for line in jsonl.read_text(encoding="utf-8").splitlines() if line.strip()]
    elif csv.is_file():
        rows = list(_read("csv", [str(csv)], streaming=False))
    else:
        return []
    if any("file_name" not in row for row in rows):
        raise ValueError(f"{jsonl if jsonl.is_file() else csv} has a row without file_name")
    return [{**row, columns.image: str(folder / row["file_name"])} for row in rows]


def _sidecar_rows(folder: Path, columns: Columns) -> list[dict[str, Any]]:
    pictures = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    pairs = [(picture, picture.with_suffix(".txt")) for picture in pictures]
    return [
        {columns.image: str(picture), columns.captions[0]: text.read_text(encoding="utf-8", errors="replace").splitlines()}
        for picture, text in pairs
        if text.is_file()
    ]


def _read(reader: str, files: Sequence[str], streaming: bool) -> Any:
    from datasets import load_dataset

    return load_dataset(reader, data_files=list(files), split="train", streaming=streaming)


def _load_hub(source: str, split: str, streaming: bool) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(source, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise ValueError(f"data.source {source!r} cannot be opened: {str(error).splitlines()[0]}") from error


def _held_out(rows: Any, split: str, streaming: bool) -> Any:
    validation = split != "train"
    if streaming:
        return rows.filter(lambda _, i: (i % HOLDOUT == HOLDOUT - 1) == validation, with_indices=True)
    return rows.select([i for i in range(len(rows)) if (i % HOLDOUT == HOLDOUT - 1) == validation])


def _undecoded(rows: Any, columns: Columns) -> Any:
    from datasets import Image as ImageFeature

    names = rows.column_names or []
    for name in [columns.image, *(s[1:] for s in IMAGE_SUFFIXES)]:
        if name in names:
            rows = rows.cast_column(name, ImageFeature(decode=False))
    return rows


def _present(names: Sequence[str], columns: Columns, source: str) -> Columns:
    images = [n for n in (columns.image, *(s[1:] for s in IMAGE_SUFFIXES)) if n in names]
    captions = tuple(n for n in columns.captions if n in names) or tuple(n for n in ("txt", "json") if n in names)
    if not images:
        raise ValueError(f"{source} has no column {columns.image!r}; it has {', '.join(names)}: set data.image_column")
    if not captions:
        wanted = ", ".join(columns.captions)
        raise ValueError(f"{source} has no column {wanted!r}; it has {', '.join(names)}: set data.caption_columns")
    return Columns(images[0], captions)


def _limit(rows: Any, max_samples: int | None) -> Any:
    return rows if max_samples is None else rows.select(range(min(max_samples, len(rows))))
