"""Folders of pictures: `metadata.jsonl`, `metadata.csv`, or a `.txt` file beside each picture, as rows.

What is wrong with one row spoils that row alone: it becomes `{BAD: reason}`, to be skipped, counted and named when its
turn comes. Pictures that no row of the metadata names are listed beside the rows.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.data.fingerprint import of_values
from ldm.data.tars import BAD
from ldm.data.text import MARKS, MAX_TEXT_BYTES, BadText, captions_of, decode

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".svg")
"""What a picture may be called; whether it can be read is told by its contents."""
FILE_NAME = "file_name"


@dataclass(frozen=True)
class FolderRows:
    """The rows of a folder.

    Attributes:
        rows: `{image column: path, caption column: [captions]}`, or `{BAD: reason}`.
        names: all columns that the folder has.
        left_out: pictures that no row names.
    """

    folder: Path
    rows: list[dict[str, Any]]
    names: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """A hash of names, sizes and captions."""
        return of_values(sorted(repr(self._described(row)) for row in self.rows))

    def _described(self, row: dict[str, Any]) -> list[Any]:
        cells: list[Any] = []
        for name, value in sorted(row.items()):
            if name != BAD and isinstance(value, str):
                size = os.path.getsize(value) if os.path.isfile(value) else None
                cells += [os.path.relpath(value, self.folder), size]
            elif name != BAD:
                cells += [name, value]
        return cells


def folder_rows(folder: Path, image: str, captions: Sequence[str]) -> FolderRows:
    """The rows of a folder.

    Args:
        image: the column that the paths of the pictures go to.
        captions: the caption columns; what lies in a `.txt` file goes to the first.

    Raises:
        ValueError: naming the folder or file in which there is no usable row.
    """
    table = next((folder / n for n in ("metadata.jsonl", "metadata.csv") if (folder / n).is_file()), None)
    names = {image: None}
    if table is None:
        rows, names[captions[0]] = _sidecar_rows(folder, image, captions), None
    else:
        rows = _metadata_rows(folder, table, image, captions, names)
    if not rows:
        raise ValueError(f"{folder} has no metadata.jsonl, no metadata.csv and no picture with a .txt file beside it")
    if all(BAD in row for row in rows):
        raise ValueError(f"{table or folder} has no usable row: {rows[0][BAD]}")
    return FolderRows(folder, rows, tuple(names), _unnamed(folder, rows, image) if table else ())


def printable(path: str | os.PathLike[str]) -> str:
    """A path as text that can be printed, whatever bytes its name has."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode()


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)


def _unnamed(folder: Path, rows: list[dict[str, Any]], image: str) -> tuple[str, ...]:
    named = {os.path.normpath(row[image]) for row in rows if image in row}
    return tuple(printable(p) for p in _pictures(folder) if os.path.normpath(p) not in named)


def _metadata_rows(
    folder: Path, table: Path, image: str, captions: Sequence[str], names: dict[str, None]
) -> list[dict[str, Any]]:
    """One row a picture, in the order of first mention; what several rows say of the same picture is put together.

    The names of all columns go to `names`.
    """
    read = _json_rows if table.suffix == ".jsonl" else _csv_rows
    found: dict[str, dict[str, Any]] = {}
    for number, (where, row) in enumerate(read(table)):
        if isinstance(row, str) or not isinstance(row.get(FILE_NAME), str) or not row[FILE_NAME]:
            found[f"\0{number}"] = {BAD: f"{where} {row if isinstance(row, str) else 'has no file_name'}"}
            continue
        names.update(dict.fromkeys(name for name in row if name and name != FILE_NAME))
        path = str(folder / row[FILE_NAME])
        checked = _checked(path, {image: path}, {name: row[name] for name in captions if name in row})
        known = found.setdefault(path, checked)
        if known is not checked and not {BAD} & (known.keys() | checked.keys()):
            for name in checked.keys() - {image}:
                known[name] = list(dict.fromkeys([*known.get(name, []), *checked[name]]))
    return list(found.values())


def _checked(path: str, row: dict[str, Any], captions: dict[str, Any]) -> dict[str, Any]:
    """The row with its captions as lists, or the reason why it cannot be used."""
    try:
        path.encode()
        return row | {name: captions_of(value) for name, value in captions.items()}
    except UnicodeEncodeError:
        return {BAD: f"{printable(path)}: a file name that is not UTF-8"}
    except BadText as error:
        return {BAD: f"{path}: a caption with {error}"}


def _text(file: Path) -> str:
    """A whole table: what its byte-order mark says, else UTF-8; other bytes as surrogates, so they spoil one row."""
    data = file.read_bytes()
    if any(data.startswith(mark) for mark, _ in MARKS):
        try:
            return decode(data)
        except BadText as error:
            raise ValueError(f"{file} holds {error}") from error
    return data.decode("utf-8", "surrogateescape")


def _json_rows(table: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    for number, line in enumerate(_text(table).split("\n"), 1):
        if line.strip():
            yield f"{table}, line {number}", _json_row(line)


def _json_row(line: str) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {error}"
    return row if isinstance(row, dict) else 'is not an object such as {"file_name": ..., "text": ...}'


def _csv_rows(table: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    reader = csv.DictReader(io.StringIO(_text(table), newline=""))
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"{table}, line {reader.line_num}", f"is not CSV: {error}"
        else:
            yield f"{table}, line {reader.line_num}", row


def _sidecar_rows(folder: Path, image: str, captions: Sequence[str]) -> list[dict[str, Any]]:
    pairs = [(picture, picture.with_suffix(".txt")) for picture in _pictures(folder)]
    if not any(text.is_file() for _, text in pairs):
        return []
    return [_sidecar_row(picture, text, image, captions[0]) for picture, text in pairs]


def _sidecar_row(picture: Path, text: Path, image: str, column: str) -> dict[str, Any]:
    if not text.is_file():
        return {BAD: f"{printable(picture)}: no caption, there is no {printable(text.name)} beside it"}
    with open(text, "rb") as file:
        data = file.read(MAX_TEXT_BYTES)
    try:
        lines = decode(data).splitlines()
    except BadText as error:
        return {BAD: f"{printable(picture)}: a caption with {error}"}
    return _checked(str(picture), {image: str(picture)}, {column: lines})
