"""The built-in emoji data set: 7,013 captioned pictures of 64 px under `data/emoji/` of the repository.

The rows hold four captions in columns of their own; `caption_forms` says a picture in more ways, so that a model
trained on them follows what people type: a bare name, a name with an adjective, a style before or after it, or none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "data" / "emoji"
CAPTIONS = ("text", "text_keywords", "text_category", "text_short")
"""The caption columns: style and name, with keywords, category first and style last, the name alone."""
FORMS = "captions"
"""The column that is made when the source is read: the list of `caption_forms`."""
STYLES = {"noto": "noto", "twemoji": "twemoji", "fluent-3d": "glossy 3d", "fluent-flat": "flat fluent"}
"""Style -> what captions call it."""
PARTS = ("name", "style", "keywords", *CAPTIONS)
"""The columns that `caption_forms` reads."""

WORD = re.compile(r"[a-z]{3,}(?:-[a-z]+)*")
VOWEL_SOUND = re.compile(r"(?!one\b|once|uni|use|euro)[aeiou]|hour")
PLURAL = re.compile(r"(?<![su])s$")


def emoji_folder(folder: Path = FOLDER) -> Path:
    """Where the data stand.

    Raises:
        ValueError: when they are not there, saying what to do: an installed wheel does not hold them.
    """
    if not (folder / "train.parquet").is_file():
        raise ValueError(
            f"data.source emoji: there is no {folder / 'train.parquet'}; the pictures come with a clone of the "
            "repository (data/emoji/): install from a clone with `pip install -e .`"
        )
    return folder


def caption_forms(row: Mapping[str, Any]) -> list[str]:
    """Up to twelve captions of a row, each once, about half of them without a style; the first is the column `text`.

    Of the keywords only single plain words that the name does not hold are taken, from another one on in each style, so
    that the styles of a name together use most of them: four beside the name, the same four alone, and two in front.
    """
    name, style = row["name"], STYLES[row["style"]]
    first = list(STYLES).index(row["style"])
    words = [word for word in row["keywords"] if WORD.fullmatch(word) and word not in name.split()]
    forms = [row["text"], row["text_keywords"], row["text_category"], name, with_article(name)]
    forms += [f"{style} {name}", f"{style} emoji of {with_article(name)}", f"{name}, {style} style"]
    if words:
        four = ", ".join(dict.fromkeys(words[(first + i) % len(words)] for i in range(4)))
        forms += [f"{name}, {four}", four]
        forms += [with_article(f"{words[i % len(words)]} {name}") for i in (first, first + len(STYLES))]
    return list(dict.fromkeys(forms))


def with_article(name: str) -> str:
    """`a rocket`, `an owl`; names of one thing only (capital letters), numbers and plurals stay as they are."""
    thing = re.split(r" (?:of|with|in|on|and|from|without) ", name)[0]
    if not name[0].islower() or PLURAL.search(thing):
        return name
    return f"{'an' if VOWEL_SOUND.match(name) else 'a'} {name}"


def with_forms(rows: Any) -> Any:
    """A `datasets.Dataset` or `IterableDataset` of emoji rows with the column `FORMS`."""
    if hasattr(rows, "__len__"):
        return rows.add_column(FORMS, [caption_forms(row) for row in rows.select_columns(list(PARTS))])
    return rows.map(lambda row: {FORMS: caption_forms(row)})
