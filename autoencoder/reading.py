"""The two kinds of autoencoder behind one name, and how a folder says which kind it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autoencoder.model import CONFIG_NAME, AutoencoderKL, read_config
from autoencoder.vq import CodebookUpdate, VQModel

Autoencoder = AutoencoderKL | VQModel


def read_autoencoder(folder: str | Path, update: CodebookUpdate = CodebookUpdate()) -> Autoencoder:
    """Reads diffusers' folder as the class that its config.json names, `AutoencoderKL` where it names none.

    Args:
        update: how the codebook learns, where there is one.

    Raises:
        ValueError: a file is missing or unreadable, or its keys or shapes are not this class's and config's; the
            sentence names the file and the key.
    """
    kind: Any = read_config(Path(folder) / CONFIG_NAME, lambda values: values.get("_class_name"))
    if kind == "VQModel":
        return VQModel.from_pretrained(folder, update=update)
    return AutoencoderKL.from_pretrained(folder)
