"""More than 60 malformed archives and captions beside good ones: what is good is read, the rest is counted and named.

Each is read within the limits of time and memory that `conftest.py` sets.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.data.folders import folder_rows
from ldm.data.sources import Columns, Example, open_source, open_stream, to_example
from ldm.data.tars import BAD, TarRows, samples_of, stream_rows
from ldm.data.text import BadText, captions_of, decode
from ldm.data.transforms import BadImage

COLUMNS = Columns("png", ("txt", "json"))

pytestmark = pytest.mark.usefixtures("prompt", "lean")


def picture(level: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 60, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def pair(name: str, caption: bytes = b"a caption") -> list[tuple[tarfile.TarInfo, bytes]]:
    return [member(f"{name}.png", picture()), member(f"{name}.txt", caption)]


GOOD = [pair("good-0"), pair("good-1")]


def write(path: Path, members: Sequence[tuple[tarfile.TarInfo, bytes]]) -> Path:
    """A tar of one good sample, the members, and another good sample."""
    with tarfile.open(path, "w") as tar:
        for info, data in (*GOOD[0], *members, *GOOD[1]):
            tar.addfile(info, io.BytesIO(data))
    return path


def read(path: Path) -> tuple[list[str], list[str]]:
    """Names of the usable samples, and the reasons of the others."""
    rows, names, reasons = TarRows.of([str(path)]), [], []
    for index in range(len(rows)):
        try:
            names.append(to_example(rows[index], COLUMNS, "?").key)
        except BadImage as error:
            reasons.append(str(error))
    return names, reasons


NESTED = b'{"caption": ' + b"[" * 100_000
HOSTILE: dict[str, list[tuple[tarfile.TarInfo, bytes]]] = {
    "a name that leads out": pair("../outside"),
    "a name that leads out deeper": pair("a/../../outside"),
    "an absolute name": pair("/etc/outside"),
    "a symbolic link": [member("x.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
    "a hard link": [member("x.png", type=tarfile.LNKTYPE, linkname="good-0.png")],
    "a link out": [member("x.txt", type=tarfile.SYMTYPE, linkname="../../secret")],
    "a device": [member("x.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5)],
    "a block device": [member("x.png", type=tarfile.BLKTYPE)],
    "a pipe": [member("x.png", type=tarfile.FIFOTYPE)],
    "a name given twice": [*pair("x", b""), *pair("good-0")],
    "a member given twice": [*pair("x"), member("x.txt", b"another")],
    "no picture": [member("x.txt", b"a caption")],
    "no caption": [member("x.png", picture())],
    "an empty caption": pair("x", b""),
    "a caption of blanks": pair("x", b" \r\n\t "),
    "Latin-1": pair("x", "caf\u00e9".encode("latin-1")),
    "Shift-JIS": pair("x", "\u732b\u306e\u7d75".encode("shift-jis")),
    "GB18030": pair("x", "\u732b\u7684\u753b".encode("gb18030")),
    "half of a UTF-16": pair("x", b"\xff\xfea\x00b"),
    "JSON cut off": [member("x.png", picture()), member("x.json", b'{"caption": "a')],
    "JSON too deep": [member("x.png", picture()), member("x.json", NESTED)],
    "JSON without caption": [member("x.png", picture()), member("x.json", b'{"width": 8}')],
    "JSON that is a number": [member("x.png", picture()), member("x.json", b"7")],
    "JSON with a number too long": [
        member("x.png", picture()),
        member("x.json", b'{"caption": ' + b"9" * 5_000 + b"}"),
    ],
    "JSON with half a surrogate pair": [member("x.png", picture()), member("x.json", b'{"caption": "\\ud800"}')],
    "JSON in Latin-1": [member("x.png", picture()), member("x.json", b'{"caption": "caf\xe9"}')],
    "a picture of text": [member("x.png", b"not a picture"), member("x.txt", b"a")],
    "an empty picture": [member("x.png"), member("x.txt", b"a")],
    "a compressed picture": [member("x.png.gz", gzip.compress(picture())), member("x.txt", b"a")],
    "a compressed bomb": [member("x.txt.gz", gzip.compress(bytes(10_000_000))), member("x.png", picture())],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_members_are_named_and_the_good_ones_read(tmp_path: Path, case: str) -> None:
    archive = write(tmp_path / "a.tar", HOSTILE[case])
    names, reasons = read(archive)
    assert names == ["good-0", "good-1"]
    assert reasons and all(reason.startswith(f"{archive}: ") and "\n" not in reason for reason in reasons)
    assert list(stream_rows([str(archive)])) == [TarRows.of([str(archive)])[i] for i in range(2 + len(reasons))]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tar"]


@pytest.mark.parametrize("part", range(1, 17))
def test_a_tar_that_was_cut_off_gives_what_is_whole(tmp_path: Path, part: int) -> None:
    archive = write(tmp_path / "a.tar", [m for n in range(4) for m in pair(f"x{n}")])
    end = max(m.start + m.size for s in samples_of(str(archive)) for m in s.members.values())
    cut = end * part // 17
    archive.write_bytes(archive.read_bytes()[:cut])
    names, reasons = read(archive)
    assert names == ["good-0", "x0", "x1", "x2", "x3", "good-1"][: len(names)] and len(names) < 6
    assert reasons and all(reason.startswith(f"{archive}: ") for reason in reasons)


@pytest.mark.parametrize("header", range(6))
def test_a_damaged_header_ends_the_tar_by_name(tmp_path: Path, header: int) -> None:
    archive = write(tmp_path / "a.tar", pair("x"))
    data = bytearray(archive.read_bytes())
    with tarfile.open(archive) as tar:
        places = [info.offset for info in tar.getmembers()]
    data[places[header] + 100 : places[header] + 160] = b"\xff" * 60
    archive.write_bytes(data)
    names, reasons = read(archive)
    assert names == ["good-0", "x", "good-1"][: header // 2]
    assert any("a.tar: " in reason and "damaged" in reason for reason in reasons)


@pytest.mark.parametrize("data", [b"", b"x" * 2000, bytes(10_240), gzip.compress(bytes(2000), mtime=0)])
def test_what_is_no_tar_ends_with_one_sentence(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    for opened in (
        lambda path: open_source(path, "train", 8),
        lambda path: open_stream(path, "train", Columns(), 0, 1),
    ):
        with pytest.raises(ValueError, match=r"a\.tar"):
            opened(str(tmp_path / "a.tar"))


class Canary:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_no_pickle_is_ever_executed(tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    poison = pickle.dumps(Canary(canary))
    array = io.BytesIO()
    np.save(array, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    packed = io.BytesIO()
    np.savez(packed, a=np.array([Canary(canary)], dtype=object))
    payloads = {"npy": array.getvalue(), "npz": packed.getvalue()}
    suffixes = (
        "pkl",
        "pickle",
        "pyd",
        "pth",
        "pt",
        "bin",
        "ckpt",
        "joblib",
        "npy",
        "npz",
        "txt",
        "json",
        "png",
        "dill",
    )
    members = [m for s in suffixes for m in [*pair(f"with-{s}"), member(f"with-{s}.{s}", payloads.get(s, poison))]]
    folder = tmp_path / "tars"
    folder.mkdir()
    write(folder / "train.tar", members)
    source = open_source(str(folder), "train", 8)
    usable = []
    for index in range(len(source)):
        try:
            usable.append(source[index].key)
        except BadImage:
            continue
    assert {"good-0", "with-pkl", "with-npy", "good-1"} <= set(usable) and "with-txt" not in usable
    for _, item in open_stream(str(folder), "train", Columns(), 0, 4).examples():
        assert isinstance(item, (Example, BadImage))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for n, suffix in enumerate(("png", "jpg", "txt", "pkl")):
        (pictures / f"{n}.{suffix}").write_bytes(poison)
    (pictures / "0.txt").write_bytes(poison)
    with pytest.raises(ValueError):
        open_source(str(pictures), "train", 8)
    assert not canary.exists()
    with pytest.raises(FileExistsError):
        canary.mkdir()
        pickle.loads(poison)


# --- captions and metadata


def test_captions_in_any_marked_encoding() -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert decode("caf\u00e9 \u732b".encode(encoding)) == "caf\u00e9 \u732b"
    for mark, encoding in ((b"\xfe\xff", "utf-16-be"), (b"\0\0\xfe\xff", "utf-32-be")):
        assert decode(mark + "\u732b".encode(encoding)) == "\u732b"
    for data in (b"caf\xe9", b"\xff\xfeab\x00", "\u732b\u7684\u753b".encode("gb18030")):
        with pytest.raises(BadText):
            decode(data)


def test_captions_are_cut_where_no_encoder_reads_on() -> None:
    assert captions_of("x" * 1_000_000) == ["x" * 10_000]
    assert captions_of(["a", "", None, 7, " b "]) == ["a", "b"]


def bad(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [row[BAD] for row in rows if BAD in row]


LINES = {
    "not JSON": b'{"file_name": "x.png", "text"',
    "an array": b'["x.png", "a"]',
    "a number": b"7",
    "no file_name": b'{"text": "a"}',
    "an empty file_name": b'{"file_name": "", "text": "a"}',
    "a number as file_name": b'{"file_name": 7, "text": "a"}',
    "Latin-1 in the caption": b'{"file_name": "x.png", "text": "caf\xe9"}',
    "Latin-1 in the file name": b'{"file_name": "caf\xe9.png", "text": "a"}',
    "half a surrogate pair": b'{"file_name": "x.png", "text": "\\udfff"}',
    "nested too deep": NESTED,
}


@pytest.mark.parametrize("case", LINES)
def test_a_bad_line_of_metadata_spoils_itself_alone(tmp_path: Path, case: str) -> None:
    good = [json.dumps({"file_name": f"{n}.png", "text": f"number {n}"}).encode() for n in range(2)]
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join([good[0], LINES[case], good[1]]))
    rows = folder_rows(tmp_path, "image", ["text"]).rows
    assert [row["text"] for row in rows if BAD not in row] == [["number 0"], ["number 1"]]
    assert len(bad(rows)) == 1 and str(tmp_path) in bad(rows)[0]


def test_bad_rows_of_a_table(tmp_path: Path) -> None:
    long = b'"' + b"x" * 200_000 + b'"'
    lines = [b"file_name,text", b"0.png,zero", b",nothing", b"1.png,caf\xe9", b"2.png," + long, b"3.png,three"]
    (tmp_path / "metadata.csv").write_bytes(b"\r\n".join(lines))
    rows = folder_rows(tmp_path, "image", ["text"]).rows
    assert [row["text"] for row in rows if BAD not in row] == [["zero"], ["three"]]
    assert len(bad(rows)) == 3 and all(str(tmp_path) in reason for reason in bad(rows))


def test_tables_with_a_mark_of_their_encoding(tmp_path: Path) -> None:
    text = '{"file_name": "0.png", "text": "caf\u00e9"}\n'
    for encoding in ("utf-16", "utf-8-sig", "utf-32"):
        (tmp_path / "metadata.jsonl").write_bytes(text.encode(encoding))
        assert folder_rows(tmp_path, "image", ["text"]).rows[0]["text"] == ["caf\u00e9"]


def test_rows_of_the_same_picture_are_put_together(tmp_path: Path) -> None:
    lines = [{"file_name": "a.png", "text": t} for t in ("one", "two", "one")] + [
        {"file_name": "b.png", "text": "three"}
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [row["text"] for row in folder_rows(tmp_path, "image", ["text"]).rows] == [["one", "two"], ["three"]]


def test_pictures_in_no_row_are_counted_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a.png", "b.png", "deep/c.jpg", "d.gif"):
        (tmp_path / name).write_bytes(picture())
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "./a.png", "text": "a"}')
    found = folder_rows(tmp_path, "image", ["text"])
    assert [Path(p).name for p in found.left_out] == ["b.png", "d.gif", "c.jpg"]
    assert len(open_source(str(tmp_path), "train", 8)) == 1
    assert "warning: 3 pictures have no row in the metadata and are left out, such as" in capsys.readouterr().err


def test_pictures_without_captions_are_bad_samples(tmp_path: Path) -> None:
    for n, text in enumerate((b"zero", None, b"caf\xe9", b"", "drei".encode("utf-16"))):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
        if text is not None:
            (tmp_path / f"{n}.txt").write_bytes(text)
    rows = folder_rows(tmp_path, "image", ["text"]).rows
    assert [row.get("text") for row in rows] == [["zero"], None, None, [], ["drei"]]
    assert "1.png: no caption, there is no 1.txt beside it" in rows[1][BAD]
    assert "2.png: a caption with text that is not UTF-8 (byte 3)" in rows[2][BAD]


def test_a_file_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(name, "wb") as file:
        file.write(picture())
    for path in (tmp_path / "good.png", tmp_path / "good.txt"):
        path.write_bytes(picture() if path.suffix == ".png" else b"good")
    (reason,) = bad(folder_rows(tmp_path, "image", ["text"]).rows)
    assert "caf" in reason and reason.encode()
