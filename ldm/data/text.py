"""Captions as people store them: bytes in some encoding, lists, objects; what cannot be read says why."""

from __future__ import annotations

import codecs
from typing import Any

MAX_CAPTION = 10_000
"""Characters of a caption that are kept; text encoders read far fewer."""
MAX_TEXT_BYTES = 1 << 20
"""Bytes of a caption file that are read."""

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte-order marks, the longer of two that start alike first."""


class BadText(ValueError):  # noqa: N818
    """Text that cannot be used; the message says why."""


def decode(data: bytes) -> str:
    """UTF-8, or what a byte-order mark says.

    Raises:
        BadText: when the bytes are of another encoding, which nothing tells for sure.
    """
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise BadText(f"text that is not {encoding.upper()} (byte {error.start})") from error


def captions_of(value: Any) -> list[str]:
    """The captions in a cell: text, bytes, a list of them, or an object with `text` or `caption`.

    Empty ones are left out, longer ones than `MAX_CAPTION` characters are cut.

    Raises:
        BadText: for bytes of an unknown encoding or text that is not Unicode.
    """
    if isinstance(value, dict):
        value = value.get("text") or value.get("caption")
    values = value if isinstance(value, (list, tuple)) else [value]
    texts = [decode(text) if isinstance(text, bytes) else text for text in values]
    return [_checked(text.strip()) for text in texts if isinstance(text, str) and text.strip()]


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadText("text with half a surrogate pair, which is not Unicode") from error
    return text[:MAX_CAPTION]


def first_line(error: Exception) -> str:
    """What an error says, without the lines after its first; the name of its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
