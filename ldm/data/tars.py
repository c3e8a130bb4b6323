"""WebDataset tars: an index over their members, and the rows behind it, with random access and without unpacking.

The reader of the `datasets` library copies every archive into a cache of its own, opens compressed members, and ends at
the first damaged text or repeated name. This one reads tar headers only, takes pictures and captions by their place in
the file, and gives a bad row with a reason for whatever it passes over, so that each is counted and named. Members are
never unpacked, so their names cannot lead out of a folder, and no member is ever unpickled.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from ldm.data.text import decode, first_line

BAD = "__bad__"
"""The key of a row that holds nothing but the reason why it cannot be used."""
PICTURES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "json")
MAX_MEMBER_BYTES = 256 << 20


@dataclass(frozen=True)
class Member:
    """Where the bytes of one file stand in its archive."""

    start: int
    size: int


@dataclass
class Sample:
    """The members of one archive that share a name up to its first dot; or why a part of it is passed over."""

    archive: str
    key: str
    members: dict[str, Member] = field(default_factory=dict)
    bad: str | None = None


def samples_of(archive: str) -> Iterator[Sample]:
    """The samples of one archive, in its order; damage ends it with a bad one that says so.

    Members of a sample stand together, as the format asks; a name that comes again later is a duplicate.
    """
    seen: set[str] = set()
    current: Sample | None = None
    for name, part in _members(archive):
        key, extension = _split(name)
        if isinstance(part, str):
            yield Sample(archive, key, bad=f"{archive}: {name + ': ' if name else ''}{part}")
        elif current is None or current.key != key:
            if current is not None:
                yield current
            repeated = f"{archive}: {key}: a sample of this name came before" if key in seen else None
            seen.add(key)
            current = Sample(archive, key, {extension: part}, repeated)
        elif extension in current.members:
            current.bad = f"{archive}: {key}: there are two members {extension!r}"
        else:
            current.members[extension] = part
    if current is not None:
        yield current


def _members(archive: str) -> Iterator[tuple[str, Member | str]]:
    """Name and place of every member, or the reason why it is passed over; folders are left out."""
    try:
        with tarfile.open(archive, "r:", encoding="utf-8", errors="replace") as tar:
            reached = 0
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would remember every header
                if info.size < 0 or tar.offset <= reached:
                    raise ValueError(f"the header at byte {info.offset:,} points backwards")
                reached = tar.offset
                if not info.isdir():
                    yield info.name, _refusal(info) or Member(info.offset_data, info.size)
            _check_end(archive, tar.offset)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        yield "", f"damaged from here on ({first_line(error)})"


def _refusal(info: tarfile.TarInfo) -> str | None:
    path = PurePosixPath(info.name)
    if path.is_absolute() or ".." in path.parts:
        return "a name that leads out of the archive"
    if not info.isreg() or info.issparse():
        return "a link, device or other special member"
    if info.size > MAX_MEMBER_BYTES:
        return f"{info.size:,} bytes, more than {MAX_MEMBER_BYTES:,}"
    return None


def _check_end(archive: str, end: int) -> None:
    """Complains about a damaged header, which `tarfile` takes for the end: behind the last member zeros must stand."""
    with open(archive, "rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        raise ValueError(f"the header at byte {end:,} cannot be read")


def _split(name: str) -> tuple[str, str]:
    """`folder/name.left.jpg` -> (`folder/name`, `left.jpg`); the extension in small letters."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    return str(path.with_name(stem)) if stem else name, extension.lower()


def read_row(sample: Sample) -> dict[str, Any]:
    """The row of a sample: `__key__`, `__url__` (the archive), and pictures and captions; or `{BAD: reason}`."""
    if sample.bad is not None:
        return {BAD: sample.bad}
    row: dict[str, Any] = {"__key__": sample.key, "__url__": sample.archive}
    try:
        with open(sample.archive, "rb") as file:
            for extension, member in sample.members.items():
                if extension in (*PICTURES, *CAPTIONS):
                    row[extension] = _value(file, extension, member)
    except (OSError, ValueError, RecursionError) as error:
        return {BAD: f"{sample.archive}: {sample.key}: {first_line(error)}"}
    return row


def _value(file: Any, extension: str, member: Member) -> Any:
    file.seek(member.start)
    data = file.read(member.size)
    if len(data) < member.size:
        raise ValueError(f"member {extension!r} is cut off")
    if extension != "json":
        return data
    try:
        return json.loads(decode(data))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"member 'json' is not JSON: {first_line(error)}") from error


class TarRows:
    """The rows of some archives by number; only the index, about 300 bytes a sample, is in memory."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    @classmethod
    def of(cls, archives: Sequence[str]) -> TarRows:
        """Reads the headers of all archives."""
        return cls([sample for archive in archives for sample in samples_of(archive)])

    @property
    def column_names(self) -> list[str]:
        """Extensions of pictures and captions that some sample has."""
        found = {extension for sample in self.samples for extension in sample.members}
        return [name for name in (*PICTURES, *CAPTIONS) if name in found]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return read_row(self.samples[index])

    def select(self, indices: Sequence[int]) -> TarRows:
        """The rows of these numbers."""
        return TarRows([self.samples[i] for i in indices])


def stream_rows(archives: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of all archives, one after another, with no index of them in memory."""
    for archive in archives:
        for sample in samples_of(archive):
            yield read_row(sample)
