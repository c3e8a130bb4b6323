"""A few pictures of one subject under one prompt, as DreamBooth trains on (Ruiz et al. 2023)."""

from __future__ import annotations

from pathlib import Path

from ldm.data.fingerprint import of_files, of_values
from ldm.data.folders import SUFFIXES, printable
from ldm.data.sources import Example
from ldm.data.transforms import image_size, open_image


class InstanceSource:
    """The first `max_samples` pictures of a folder, all for None, each with the same caption; none is held out.

    Raises:
        ValueError: there is no such folder, or no picture in it.
    """

    def __init__(self, folder: str, prompt: str, max_samples: int | None = None) -> None:
        found = sorted(str(p) for p in Path(folder).expanduser().rglob("*") if p.suffix.lower() in SUFFIXES)
        self.files = found[:max_samples]
        self.name, self.prompt = f"{folder}:{prompt}", prompt
        if not self.files:
            raise ValueError(f"data.source {folder!r} holds no pictures; with data.instance_prompt it must be a folder")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        path = self.files[index]
        return Example(open_image(path, printable(path)), (self.prompt,), path)

    def size(self, index: int) -> tuple[int, int]:
        return image_size(self.files[index], printable(self.files[index]))

    def fingerprint(self) -> str:
        return of_values([of_files(self.files), self.prompt])
