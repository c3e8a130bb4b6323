"""The built-in emoji data set: 7,013 captioned pictures of 64 px under `data/emoji/` of the repository."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[2] / "data" / "emoji"
CAPTIONS = ("text", "text_keywords", "text_category", "text_short")
"""The caption columns: style and name, with keywords, category first and style last, the name alone."""


def emoji_folder(folder: Path = FOLDER) -> Path:
    """Where the data stand.

    Raises:
        ValueError: when they are not there, saying what to do: an installed wheel does not hold them.
    """
    if not (folder / "train.parquet").is_file():
        raise ValueError(
            f"data.source emoji: there is no {folder / 'train.parquet'}; the pictures come with a clone of the "
            "repository (data/emoji/): install from a clone with `pip install -e .`, or set data.source to that folder"
        )
    return folder
