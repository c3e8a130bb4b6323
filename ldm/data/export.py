"""A data set as a folder of PNG pictures with `metadata.jsonl`, which every tool reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from ldm.data.sources import Example
from ldm.data.transforms import BadImage

PER_FOLDER = 10_000


def export_folder(items: Iterable[Example | BadImage], folder: Path) -> tuple[int, list[str]]:
    """Writes every usable sample; returns their number and the reasons of the others.

    Every row has `file_name`, `text`, a list of the captions, and `key`, the sample's name in the source. The metadata
    get their name last, so a folder that has them is whole.

    Raises:
        ValueError: when the folder is not empty.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    count, skipped, partial = 0, list[str](), folder / "metadata.jsonl.tmp"
    with open(partial, "w", encoding="utf-8") as metadata:
        for item in items:
            if isinstance(item, BadImage):
                skipped.append(str(item))
                continue
            metadata.write(json.dumps(_row(item, count, folder), ensure_ascii=False) + "\n")
            count += 1
        metadata.flush()
        os.fsync(metadata.fileno())
    os.replace(partial, folder / "metadata.jsonl")
    return count, skipped


def _row(example: Example, number: int, folder: Path) -> dict[str, object]:
    """Writes the picture and gives its row."""
    name = f"{number // PER_FOLDER:04d}/{number:08d}.png"
    (folder / name).parent.mkdir(exist_ok=True)
    example.image.save(folder / name)
    return {"file_name": name, "text": list(example.captions), "key": example.key}
