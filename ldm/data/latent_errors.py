"""How far the latents that a model draws are from those of the pictures it draws: a file, a row for each picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.data.cache_files import write_tensors

FORMAT = "1"


class LatentErrors:
    """Errors of latents, drawn less encoded, by the names of the pictures; read from the file as they are asked for.

    Attributes:
        encoder: the hash of the weights that encoded, see `encoder_hash`.
        data: the name of the source that was drawn, and its fingerprint.
        shape: [C, h, w] of a row.

    Raises:
        ValueError: the file is missing or is none that `write_latent_errors` wrote; the sentence names it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            file = safe_open(self.path, framework="pt")
            told = file.metadata()  # type: ignore[no-untyped-call]
            if told["format"] != FORMAT:
                raise ValueError(f"its format is {told['format']}, this version reads {FORMAT}")
            self._rows = {key: row for row, key in enumerate(json.loads(told["keys"]))}
            self._errors = file.get_slice("errors")  # type: ignore[no-untyped-call]
            if self._errors.get_shape()[0] != len(self._rows):
                raise ValueError(f"it has {self._errors.get_shape()[0]} rows for {len(self._rows)} names")
            self.encoder: str = told["encoder"]
            self.data: tuple[str, str] = (told["source"], told["fingerprint"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no file of `ldm-data errors`: {error}") from error
        self.shape: tuple[int, ...] = tuple(self._errors.get_shape()[1:])

    def __len__(self) -> int:
        return len(self._rows)

    def of(self, keys: Sequence[str]) -> Tensor:
        """The errors of the pictures of those names, float32 [N, C, h, w], in units of the raw latents.

        Raises:
            ValueError: naming the file and the picture that it has not.
        """
        missing = [key for key in keys if key not in self._rows]
        if missing:
            raise ValueError(f"{self.path} has no row for {missing[0]}; make it anew from the data of this training")
        rows = [self._errors[self._rows[key] : self._rows[key] + 1] for key in keys]
        return torch.cat(rows).float()


def write_latent_errors(
    path: str | Path, keys: Sequence[str], errors: Tensor, encoder: str, data: tuple[str, str]
) -> None:
    """Writes the errors [N, C, h, w] of the pictures of those names, in half precision; the file appears whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"format": FORMAT, "keys": json.dumps(list(keys)), "encoder": encoder}
    told |= dict(zip(("source", "fingerprint"), data, strict=True))
    write_tensors(path, {"errors": errors.half().cpu().contiguous()}, told)
