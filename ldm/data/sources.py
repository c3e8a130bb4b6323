"""One reader for captioned images: built-in shapes and emoji, folders, parquet, WebDataset tars and hub data sets.

Parquet and hub data sets are read by the Hugging Face `datasets` library, folders and tars by `ldm.data.folders` and
`ldm.data.tars`; this file decides which fits and gives every one of them the same face: `len(source)` and
`source[i] -> Example`, or iteration for a stream.
"""

from __future__ import annotations

import glob
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ldm.data.emoji import FORMS, caption_forms, emoji_folder, with_forms
from ldm.data.fingerprint import of_files, of_values
from ldm.data.folders import FolderRows, folder_rows
from ldm.data.shapes import ShapesDataset
from ldm.data.tars import BAD, TarRows, stream_rows
from ldm.data.text import BadText, captions_of, first_line
from ldm.data.transforms import BadImage, image_size, open_image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
HOLDOUT = 50
FIRST_ROWS = 64


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
    def size(self, index: int) -> tuple[int, int]:
        """Width and height of a picture from its header."""
        ...

    def fingerprint(self) -> str:
        """A hash of what the source holds, whatever its name."""
        ...


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
    others to `train`; `all` is both together.

    Raises:
        ValueError: naming the source when it does not exist, has no such split or column, or is empty.
    """
    if source == "shapes":
        return ShapesSource(split, max_samples or 100_000, resolution, seed, shapes_per_image)
    loaded = _load(source, split, columns)
    rows = _limit(loaded.rows, max_samples)
    if len(rows) == 0:
        raise ValueError(f"{source} has no examples in its split {split!r}")
    found = _present(rows.column_names, columns, source)
    loaded.report()
    return RowSource(replace(loaded, rows=rows), f"{source}:{split}:{','.join([found.image, *found.captions])}", found)


def open_stream(source: str, split: str, columns: Columns, seed: int, shuffle_buffer: int) -> Stream:
    """Opens a source for reading in order, without random access (`data.streaming`)."""
    return Stream(source, split, columns, seed, shuffle_buffer)


@dataclass(frozen=True)
class Loaded:
    """The rows of a split, a hash of what they were read from, and pictures that no row names."""

    rows: Any
    content: Callable[[], str]
    left_out: tuple[str, ...] = ()

    def report(self) -> None:
        """Says on stderr how many pictures are left out."""
        if self.left_out:
            print(
                f"warning: {len(self.left_out)} pictures have no row in the metadata and are left out, such as "
                f"{self.left_out[0]}",
                file=sys.stderr,
            )


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

    def size(self, index: int) -> tuple[int, int]:
        return self.data.resolution, self.data.resolution

    def fingerprint(self) -> str:
        return of_values([self.name, len(self)])


class RowSource:
    """Rows with random access whose picture is left encoded until it is asked for."""

    def __init__(self, loaded: Loaded, name: str, columns: Columns) -> None:
        self.rows, self.left_out, self.content = loaded.rows, loaded.left_out, loaded.content
        self.name, self.columns = name, columns

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return to_example(self._row(index), self.columns, f"{self.name}[{index}]")

    def size(self, index: int) -> tuple[int, int]:
        row, key = self._row(index), f"{self.name}[{index}]"
        return image_size(row.get(self.columns.image), _key(row, self.columns, key))

    def fingerprint(self) -> str:
        return of_values([self.content(), self.columns, len(self)])

    def _row(self, index: int) -> dict[str, Any]:
        try:
            row: dict[str, Any] = self.rows[index]
        except (OSError, ValueError) as error:
            raise BadImage(f"{self.name}[{index}]: {first_line(error)}") from error
        return row


class Stream:
    """A `datasets.IterableDataset`, shuffled within a buffer by (seed, epoch), that can start at any position."""

    def __init__(self, source: str, split: str, columns: Columns, seed: int, shuffle_buffer: int) -> None:
        self.name, self.seed, self.buffer = f"{source}:{split}", seed, shuffle_buffer
        loaded = _load(source, split, columns, streaming=True)
        self.rows, self.content, self.left_out = loaded.rows, loaded.content, loaded.left_out
        self.columns = _present(self.rows.column_names or _first_names(self.rows, source), columns, source)
        loaded.report()

    def examples(self, epoch: int = 0, shuffle: bool = True) -> Iterator[tuple[int, Example | BadImage]]:
        """Position and example (or the reason why it cannot be used) of every row of one epoch."""
        rows = self.rows.shuffle(seed=self.seed + epoch, buffer_size=self.buffer) if shuffle else self.rows
        for position, row in enumerate(rows):
            yield position, self.decoded(position, row)

    def decoded(self, position: int, row: dict[str, Any]) -> Example | BadImage:
        """The example of a row, or the reason why it cannot be used."""
        try:
            return to_example(row, self.columns, f"{self.name}[{position}]")
        except BadImage as error:
            return error

    def fingerprint(self) -> str:
        """A hash of what the stream reads, whatever its name."""
        return of_values([self.content(), self.columns, "stream"])


def every_sample(source: Source | Stream) -> Iterator[Example | BadImage]:
    """All samples in their order, or the reasons why they cannot be used."""
    if isinstance(source, Stream):
        yield from (item for _, item in source.examples(shuffle=False))
        return
    for index in range(len(source)):
        try:
            yield source[index]
        except BadImage as error:
            yield error


def to_example(row: dict[str, Any], columns: Columns, fallback_key: str) -> Example:
    """One row of a data set -> Example.

    Raises:
        BadImage: when the picture cannot be decoded or there is no caption.
    """
    key = _key(row, columns, fallback_key)
    where = f"{row['__url__']}: {key}" if row.get("__url__") else key
    try:
        captions = tuple(text for column in columns.captions for text in captions_of(row.get(column)))
    except BadText as error:
        raise BadImage(f"{where}: a caption with {error}") from error
    if not captions:
        raise BadImage(f"{where}: no caption in {', '.join(columns.captions)}")
    return Example(open_image(row.get(columns.image), where), captions, key)


def _key(row: dict[str, Any], columns: Columns, fallback: str) -> str:
    """The name of a row.

    Raises:
        BadImage: when the row holds nothing but the reason why it cannot be used.
    """
    if row.get(BAD):
        raise BadImage(row[BAD])
    data = row.get(columns.image)
    return str(row.get("__key__") or (data.get("path") if isinstance(data, dict) else None) or fallback)


def _load(source: str, split: str, columns: Columns, streaming: bool = False) -> Loaded:
    if source == "emoji":
        return _load_emoji(split, columns, streaming)
    path = Path(source).expanduser()
    files = sorted(glob.glob(str(path)))
    if path.is_dir():
        return _load_folder(path, split, columns, streaming)
    for suffix in ARCHIVES:
        if files and all(f.endswith(suffix) for f in files):
            return _load_files(suffix, files, source, split, columns, streaming, held_out=True)
    if files or source.startswith((".", "/", "~")) or source.count("/") > 1 or path.suffix in ARCHIVES:
        raise ValueError(f"data.source {source!r} is neither a folder nor .parquet or .tar files")
    return _load_hub(source, split, columns, streaming)


def _load_emoji(split: str, columns: Columns, streaming: bool) -> Loaded:
    """The built-in emoji, with the column of all caption forms where it is asked for."""
    loaded = _load_folder(emoji_folder(), split, columns, streaming)
    if FORMS not in columns.captions:
        return loaded
    first = caption_forms(next(iter(loaded.rows)))  # another way of forming captions is another data set
    return Loaded(with_forms(loaded.rows), lambda: of_values([loaded.content(), first]), loaded.left_out)


def _load_folder(folder: Path, split: str, columns: Columns, streaming: bool) -> Loaded:
    if (folder / split).is_dir():
        return _load_pictures(folder / split, split, columns, streaming, held_out=False)
    if (folder / "train").is_dir():
        raise ValueError(_no_split(folder, split, folder / "train"))
    for suffix in ARCHIVES:
        named = sorted(str(f) for f in folder.glob(f"{split}*{suffix}"))
        if named:
            return _load_files(suffix, named, str(folder), split, columns, streaming, held_out=False)
        if any(folder.glob(f"train*{suffix}")):
            raise ValueError(_no_split(folder, split, folder / f"train*{suffix}"))
        files = sorted(str(f) for f in folder.glob(f"*{suffix}"))
        if files:
            return _load_files(suffix, files, str(folder), split, columns, streaming, held_out=True)
    return _load_pictures(folder, split, columns, streaming, held_out=True)


def _load_files(
    suffix: str, files: list[str], source: str, split: str, columns: Columns, streaming: bool, held_out: bool
) -> Loaded:
    rows = ARCHIVES[suffix](files, columns, streaming)
    if held_out:
        rows = _held_out(rows, source, split, streaming)
    return Loaded(rows, lambda: of_values([of_files(files), split, held_out]))


def _load_pictures(folder: Path, split: str, columns: Columns, streaming: bool, held_out: bool) -> Loaded:
    found = folder_rows(folder, columns.image, columns.captions)
    rows = _arrow(found, columns)
    rows = rows.to_iterable_dataset() if streaming else rows
    if held_out:
        rows = _held_out(rows, str(folder), split, streaming)
    return Loaded(rows, lambda: of_values([found.fingerprint(), split, held_out]), found.left_out)


def _no_split(folder: Path, split: str, train: Path) -> str:
    return (
        f"{folder} has its split 'train' but no {split!r}; add it, or set data.source to {str(train)!r} to hold out "
        f"every {HOLDOUT}th example for validation"
    )


def _arrow(folder: FolderRows, columns: Columns) -> Any:
    """Rows of a folder as a `datasets.Dataset`, where they take less memory; a bad one holds its reason alone."""
    from datasets import Dataset

    found = _present(folder.names, columns, str(folder.folder))
    cells = {name: [row.get(name) for row in folder.rows] for name in (found.image, *found.captions, BAD)}
    return _undecoded(Dataset.from_dict({n: c for n, c in cells.items() if any(v is not None for v in c)}), columns)


def _read_tars(files: list[str], columns: Columns, streaming: bool) -> Any:
    from datasets import IterableDataset

    if streaming:
        return IterableDataset.from_generator(stream_rows, gen_kwargs={"archives": files})
    return _refuse_all_bad(TarRows.of(files), files)


def _refuse_all_bad(rows: TarRows, files: list[str]) -> TarRows:
    if rows.samples and all(sample.bad for sample in rows.samples):
        raise ValueError(f"{_names(files)} cannot be read as webdataset: {rows.samples[0].bad}")
    return rows


def _read_parquet(files: list[str], columns: Columns, streaming: bool) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset("parquet", data_files=list(files), split="train", streaming=streaming)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(f"{_names(files)} cannot be read as parquet: {first_line(error)}") from error
    return _undecoded(rows, columns)


ARCHIVES: dict[str, Callable[[list[str], Columns, bool], Any]] = {".parquet": _read_parquet, ".tar": _read_tars}
"""File suffix -> its reader."""


def _names(files: Sequence[str]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]} to {files[-1]}"


def _load_hub(source: str, split: str, columns: Columns, streaming: bool) -> Loaded:
    """A hub data set; one that has nothing but `train` is cut like a folder without splits."""
    from datasets import get_dataset_split_names, load_dataset

    try:
        whole = get_dataset_split_names(source) == ["train"]
        rows = load_dataset(source, split="train" if whole else split, streaming=streaming)
    except (OSError, ValueError) as error:
        raise ValueError(f"data.source {source!r} cannot be opened: {first_line(error)}") from error
    described = [source, split, str(rows.info.version), rows.info.dataset_size, str(rows.features)]
    rows = _undecoded(rows, columns)
    return Loaded(_held_out(rows, source, split, streaming) if whole else rows, lambda: of_values(described))


def _held_out(rows: Any, source: str, split: str, streaming: bool) -> Any:
    """The rows of `split` by their place in the unshuffled order, the same ones with and without streaming."""
    if split == "all":
        return rows
    if split not in ("train", "validation"):
        raise ValueError(
            f"{source} has no splits of its own, so data.split is 'train', 'validation' or 'all', not {split!r}"
        )

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


def _first_names(rows: Iterable[dict[str, Any]], source: str) -> list[str]:
    """The columns of a stream that does not know them, from its first rows."""
    first = list(itertools.islice(rows, FIRST_ROWS))
    if first and all(BAD in row for row in first):
        raise ValueError(f"{source} has no usable sample among its first {len(first)}: {first[0][BAD]}")
    return list(dict.fromkeys(name for row in first for name in row if not name.startswith("__")))


def _present(names: Sequence[str], columns: Columns, source: str) -> Columns:
    names = [name for name in names if name != BAD]
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
