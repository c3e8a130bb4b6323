"""One reader for captioned images: built-in shapes, folders, parquet, WebDataset tars and hub data sets.

Reading is done by the Hugging Face `datasets` library; this file only decides which of its readers fits and gives
every one of them the same face: `len(source)` and `source[i] -> Example`, or iteration for a stream.
"""

from __future__ import annotations

import csv
import glob
import json
import tarfile
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

    Data without splits of their own give every 50th example to `validation` (of fewer than 50, the last one) and the
    others to `train`.

    Raises:
        ValueError: naming the source when it does not exist, has no such split or column, or is empty.
    """
    if source == "shapes":
        return ShapesSource(split, max_samples or 100_000, resolution, seed, shapes_per_image)
    rows = _limit(_load(source, split, columns), max_samples)
    if len(rows) == 0:
        raise ValueError(f"{source} has no examples in its split {split!r}")
    found = _present(rows.column_names, columns, source)
    return RowSource(rows, f"{source}:{split}:{','.join([found.image, *found.captions])}", found)


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
        self.columns = _present(self.rows.column_names or list(next(iter(self.rows), {})), columns, source)

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
        rows = _held_out(_read("parquet", files, columns, streaming), source, split, streaming)
    elif files and all(f.endswith(".tar") for f in files):
        rows = _held_out(_read("webdataset", files, columns, streaming), source, split, streaming)
    elif files or source.startswith((".", "/", "~")) or source.count("/") > 1 or path.suffix in (".parquet", ".tar"):
        raise ValueError(f"data.source {source!r} is neither a folder nor .parquet or .tar files")
    else:
        rows = _load_hub(source, split, columns, streaming)
    return rows


def _load_folder(folder: Path, split: str, columns: Columns, streaming: bool) -> Any:
    if (folder / split).is_dir():
        return _load_folder_rows(folder / split, columns, streaming)
    if (folder / "train").is_dir():
        raise ValueError(_no_split(folder, split, folder / "train"))
    for suffix, reader in ((".parquet", "parquet"), (".tar", "webdataset")):
        named = sorted(str(f) for f in folder.glob(f"{split}*{suffix}"))
        if named:
            return _read(reader, named, columns, streaming)
        if any(folder.glob(f"train*{suffix}")):
            raise ValueError(_no_split(folder, split, folder / f"train*{suffix}"))
        files = sorted(str(f) for f in folder.glob(f"*{suffix}"))
        if files:
            return _held_out(_read(reader, files, columns, streaming), str(folder), split, streaming)
    return _held_out(_load_folder_rows(folder, columns, streaming), str(folder), split, streaming)


def _no_split(folder: Path, split: str, train: Path) -> str:
    return (
        f"{folder} has its split 'train' but no {split!r}; add it, or set data.source to {str(train)!r} to hold out "
        f"every {HOLDOUT}th example for validation"
    )


def _load_folder_rows(folder: Path, columns: Columns, streaming: bool) -> Any:
    from datasets import Dataset

    rows = _metadata_rows(folder, columns) or _sidecar_rows(folder, columns)
    if not rows:
        raise ValueError(f"{folder} has no metadata.jsonl, no metadata.csv and no picture with a .txt file beside it")
    found = _present(sorted({name for row in rows for name in row if name}), columns, str(folder))
    captions = {name: [_texts(row.get(name)) for row in rows] for name in found.captions}
    data = Dataset.from_dict({found.image: [row[found.image] for row in rows], **captions})
    return _undecoded(data.to_iterable_dataset() if streaming else data, columns)


def _metadata_rows(folder: Path, columns: Columns) -> list[dict[str, Any]]:
    jsonl, table = folder / "metadata.jsonl", folder / "metadata.csv"
    if jsonl.is_file():
        lines = jsonl.read_text(encoding="utf-8-sig").split("\n")
        rows = [_json_row(line, f"{jsonl}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    elif table.is_file():
        with open(table, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    else:
        return []
    if any(not isinstance(row.get("file_name"), str) for row in rows):
        raise ValueError(f"{jsonl if jsonl.is_file() else table} has a row without file_name")
    return [{**row, columns.image: str(folder / row["file_name"])} for row in rows]


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f'{where} is {row!r}; it must be an object such as {{"file_name": ..., "text": ...}}')
    return row


def _sidecar_rows(folder: Path, columns: Columns) -> list[dict[str, Any]]:
    pictures = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    pairs = [(picture, picture.with_suffix(".txt")) for picture in pictures]
    alone = [picture for picture, text in pairs if not text.is_file()]
    if alone and len(alone) < len(pairs):
        print(f"{folder}: {len(alone)} of {len(pairs)} pictures have no .txt file and are left out, such as {alone[0]}")
    return [
        {
            columns.image: str(picture),
            columns.captions[0]: text.read_text(encoding="utf-8-sig", errors="replace").splitlines(),
        }
        for picture, text in pairs
        if text.is_file()
    ]


def _read(reader: str, files: Sequence[str], columns: Columns, streaming: bool) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(reader, data_files=list(files), split="train", streaming=streaming)
    except (OSError, ValueError, DatasetsError, tarfile.TarError) as error:
        names = files[0] if len(files) == 1 else f"{files[0]} to {files[-1]}"
        raise ValueError(f"{names} cannot be read as {reader}: {_first_line(error)}") from error
    return _undecoded(rows, columns)


def _load_hub(source: str, split: str, columns: Columns, streaming: bool) -> Any:
    """A hub data set; one that has nothing but `train` is cut like a folder without splits."""
    from datasets import get_dataset_split_names, load_dataset

    try:
        whole = get_dataset_split_names(source) == ["train"]
        rows = load_dataset(source, split="train" if whole else split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise ValueError(f"data.source {source!r} cannot be opened: {_first_line(error)}") from error
    rows = _undecoded(rows, columns)
    return _held_out(rows, source, split, streaming) if whole else rows


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _held_out(rows: Any, source: str, split: str, streaming: bool) -> Any:
    """The rows of `split` by their place in the unshuffled order, the same ones with and without streaming."""
    if split not in ("train", "validation"):
        raise ValueError(f"{source} has no splits of its own, so data.split is 'train' or 'validation', not {split!r}")

    stride = HOLDOUT if streaming else max(2, min(HOLDOUT, len(rows)))

    def chosen(index: int) -> bool:
        return (index % stride == stride - 1) == (split == "validation")

    if not streaming:
        return rows.select([index for index in range(len(rows)) if chosen(index)])
    from datasets import IterableDataset

    # a generator is one shard: `shuffle` would reorder the files beneath a filter and so move the hold-out
    return IterableDataset.from_generator(
        lambda: (row for index, row in enumerate(rows) if chosen(index)), features=rows.features
    )


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
