"""What the judges of the generation suite see in data sets, and readers of labels, kept on disk between its runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.data.fingerprint import of_files, of_values
from ldm.evaluation.generation import JudgedSet, Vectors
from ldm.evaluation.label_reader import RECIPE, LabelReader
from ldm.evaluation.reconstruction import Pictures

FORMAT = "2"


@dataclass(frozen=True)
class JudgedCache:
    """A folder with one file for every combination of data, number of pictures, resolution and judges.

    Args:
        folder: None keeps nothing.
        judges: what tells these judges from others, see `judges_key`.
    """

    folder: Path | None
    judges: str

    def get(self, pictures: Pictures, resolution: int, labelled: bool, judge: Callable[[], JudgedSet]) -> JudgedSet:
        """What `judge` makes of the pictures, from the file where there is one; `pictures` is as if it had been read.

        A file that cannot be read is made anew.

        Raises:
            OSError: the file cannot be written.
        """
        if self.folder is None:
            return judge()
        key = of_values([FORMAT, pictures.source.fingerprint(), pictures.count, resolution, labelled, self.judges])
        path = _file(self.folder, key)
        found = _read(path, pictures)
        if found is None:
            found = judge()
            _write(path, pictures, found)
        return found


def cached_reader(
    folder: Path | None, pictures: Pictures, told: Sequence[object], make: Callable[[], LabelReader]
) -> LabelReader:
    """The reader of labels that `make` trains, from the file where there is one; without a folder nothing is kept.

    Args:
        pictures: those that it is trained on.
        told: what else tells this reader from others.

    Raises:
        OSError: the file cannot be written.
    """
    if folder is None:
        return make()
    key = of_values(["labels", RECIPE, pictures.source.fingerprint(), pictures.count, *told])
    path = _file(folder, key)
    try:
        with safe_open(path, framework="pt") as file:
            reader = LabelReader(json.loads(file.metadata()["labels"]))
            reader.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            return reader
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError, ValueError):
        reader = make()
    _replace(path, reader.state_dict(), {"labels": json.dumps(reader.names)})
    return reader


def judges_key(names: Sequence[object], weights: Sequence[str | Path | None]) -> str:
    """A hash of the judges' names and of their local files; a folder counts with all of its files."""
    files: list[str] = []
    for path in (Path(name) for name in weights if name is not None):
        files += sorted(map(str, path.rglob("*"))) if path.is_dir() else [str(path)]
    return of_values([*names, of_files([file for file in files if Path(file).is_file()])])


def _file(folder: Path, key: str) -> Path:
    return folder / f"{key[:32]}.safetensors"


def _read(path: Path, pictures: Pictures) -> JudgedSet | None:
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads(file.metadata()["pictures"])
            vectors = Vectors(*(file.get_tensor(name) for name in Vectors._fields))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    pictures.indices[:], pictures.skipped[:] = told["indices"], told["skipped"]
    pictures.captions[:] = [tuple(row) for row in told["columns"]]
    return JudgedSet(vectors, told["captions"], told["labels"])


def _write(path: Path, pictures: Pictures, judged: JudgedSet) -> None:
    told = {
        "indices": pictures.indices,
        "skipped": pictures.skipped,
        "columns": pictures.captions,
        "captions": judged.captions,
        "labels": judged.labels,
    }
    _replace(path, judged.vectors._asdict(), {"pictures": json.dumps(told)})


def _replace(path: Path, tensors: Mapping[str, Tensor], told: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, partial, metadata=told)
    os.replace(partial, path)
