from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
import torch
from PIL import Image

from ldm.data.batches import PixelBatch, Transform, stream_batches
from ldm.data.order import BatchPlan
from ldm.data.sources import HOLDOUT, Columns, Example, open_source, open_stream
from ldm.data.transforms import BadImage


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def picture(number: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, 60, 0)).save(buffer, kind)
    return buffer.getvalue()


def number_of(example: Example) -> int:
    """The number that the picture was drawn from."""
    return int(example.image.getpixel((4, 4))[0])  # type: ignore[index]


def write_folder(folder: Path, numbers: Sequence[int], sidecars: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for n in numbers:
        (folder / f"{n:03d}.png").write_bytes(picture(n))
        if sidecars:
            (folder / f"{n:03d}.txt").write_text(f"number {n}\n")


def write_parquet(path: Path, numbers: Sequence[int], damaged: Sequence[int] = (), image: str = "image") -> None:
    """What `Dataset.to_parquet` writes for an Image column: a struct of bytes and path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {
        image: [{"bytes": b"junk" if n in damaged else picture(n), "path": f"{n:03d}.png"} for n in numbers],
        "text": [f"number {n}" for n in numbers],
    }
    features = datasets.Features({image: datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))


def write_tar(path: Path, numbers: Sequence[int], damaged: Sequence[int] = (), caption: str = "txt") -> None:
    with tarfile.open(path, "w") as tar:
        for n in numbers:
            text = f"number {n}" if caption == "txt" else json.dumps({"caption": f"number {n}"})
            for suffix, data in (("jpg", b"junk" if n in damaged else picture(n, "JPEG")), (caption, text.encode())):
                info = tarfile.TarInfo(f"{n:03d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def captions(source: Any) -> list[tuple[str, ...]]:
    return [source[i].captions for i in range(len(source))]


def test_metadata_jsonl(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", range(3), sidecars=False)
    lines = [
        {"file_name": "000.png", "text": "one\u2028caption", "stars": 5},
        {"file_name": "002.png", "text": ["two", "captions"], "stars": "many"},
    ]
    (tmp_path / "train" / "metadata.jsonl").write_text(
        "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in lines), encoding="utf-8"
    )
    source = open_source(str(tmp_path), "train", 8)
    assert captions(source) == [("one\u2028caption",), ("two", "captions")]
    assert [number_of(source[i]) for i in range(2)] == [0, 2]
    assert source[1].key.endswith("002.png")


def test_metadata_csv_is_text_whatever_it_looks_like(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", range(4), sidecars=False)
    rows = [
        "file_name,text,other",
        "000.png,NA,1",
        '001.png,"a, b",2',
        "002.png,007,",
        '003.png,"two\nlines",x,too,many',
    ]
    (tmp_path / "train" / "metadata.csv").write_text("\n".join(rows), encoding="utf-8-sig")
    assert captions(open_source(str(tmp_path), "train", 8)) == [("NA",), ("a, b",), ("007",), ("two\nlines",)]


def test_every_line_of_a_sidecar_is_a_caption(tmp_path: Path) -> None:
    write_folder(tmp_path / "d" / "deep", [3])
    (tmp_path / "d" / "deep" / "003.txt").write_bytes("\ufefffirst\r\n\r\n  second caf\u00e9 \n".encode())
    source = open_source(str(tmp_path / "d"), "train", 8)
    assert captions(source) == [("first", "second caf\u00e9")]


def test_train_and_validation_subfolders(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", range(60))
    write_folder(tmp_path / "validation", [100, 101])
    assert len(open_source(str(tmp_path), "train", 8)) == 60
    assert captions(open_source(str(tmp_path), "validation", 8)) == [("number 100",), ("number 101",)]


def test_train_and_validation_parquet_files(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", range(60))
    write_parquet(tmp_path / "validation-0.parquet", [100])
    assert len(open_source(str(tmp_path), "train", 8)) == 60
    assert captions(open_source(str(tmp_path), "validation", 8)) == [("number 100",)]


@pytest.mark.parametrize("kind", ["folder", "parquet", "tar"])
def test_a_split_that_is_not_there_is_named_and_never_cut_from_train(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        write_folder(tmp_path / "train", range(60))
    elif kind == "parquet":
        write_parquet(tmp_path / "train.parquet", range(60))
    else:
        write_tar(tmp_path / "train.tar", range(60))
    with pytest.raises(ValueError, match=r"'train' but no 'validation'.*hold out every 50th"):
        open_source(str(tmp_path), "validation", 8)


@pytest.mark.parametrize("kind", ["folder", "parquet", "tar"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_fiftieth_example_is_held_out(tmp_path: Path, kind: str, streaming: bool) -> None:
    if kind == "folder":
        write_folder(tmp_path / "d", range(120))
        source = str(tmp_path / "d")
    elif kind == "parquet":
        write_parquet(tmp_path / "0.parquet", range(70))
        write_parquet(tmp_path / "1.parquet", range(70, 120))
        source = str(tmp_path / "*.parquet")
    else:
        write_tar(tmp_path / "0.tar", range(70))
        write_tar(tmp_path / "1.tar", range(70, 120))
        source = str(tmp_path / "*.tar")
    held = set(range(HOLDOUT - 1, 120, HOLDOUT))
    for split, expected in (("validation", held), ("train", set(range(120)) - held)):
        if streaming:
            stream = open_stream(source, split, Columns(), seed=0, shuffle_buffer=16)
            for epoch in range(3):
                items = [item for _, item in stream.examples(epoch)]
                assert {item.captions for item in items} == {(f"number {n}",) for n in expected}  # type: ignore[union-attr]
                assert len(items) == len(expected)
        else:
            opened = open_source(source, split, 8)
            assert captions(opened) == [(f"number {n}",) for n in sorted(expected)]


@pytest.mark.parametrize("count", [2, 3, 49, 50])
def test_few_examples_are_still_split_in_two(tmp_path: Path, count: int) -> None:
    write_folder(tmp_path / "d", range(count))
    parts = [captions(open_source(str(tmp_path / "d"), split, 8)) for split in ("train", "validation")]
    assert len(parts[1]) == 1
    assert sorted(parts[0] + parts[1]) == sorted((f"number {n}",) for n in range(count))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_with_only_train_is_held_out_too(monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    rows = datasets.Dataset.from_dict({"image": [picture(n) for n in range(100)], "text": list(map(str, range(100)))})
    rows = rows.cast_column("image", datasets.Image())
    splits = {"train": rows, "test": rows.select(range(3))}
    for names in (["train"], ["train", "test"]):
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda source, names=names: names)
        monkeypatch.setattr(
            datasets, "load_dataset", lambda source, split, streaming: splits[split].to_iterable_dataset() if streaming else splits[split]
        )  # fmt: skip
        found = []
        for split in ("train", "validation" if names == ["train"] else "test"):
            if streaming:
                items = open_stream("owner/pictures", split, Columns(), 0, 4).examples()
                found.append({item.captions[0] for _, item in items})  # type: ignore[union-attr]
            else:
                found.append({texts[0] for texts in captions(open_source("owner/pictures", split, 8))})
        assert found[1] == ({"49", "99"} if names == ["train"] else {"0", "1", "2"})
        assert found[0] == {str(n) for n in range(100)} - (found[1] if names == ["train"] else set())


def test_other_splits_need_data_that_has_them(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", range(60))
    with pytest.raises(ValueError, match=r"a\.parquet has no splits of its own.*'test'"):
        open_source(str(tmp_path / "a.parquet"), "test", 8)


@pytest.mark.parametrize("caption", ["txt", "json"])
def test_webdataset_keys_pictures_and_captions(tmp_path: Path, caption: str) -> None:
    write_tar(tmp_path / "train-0.tar", [5, 6, 7], damaged=[6], caption=caption)
    source = open_source(str(tmp_path), "train", 8)
    assert (source[0].key, source[2].key) == ("005", "007")
    assert source[2].captions == ("number 7",) and abs(number_of(source[2]) - 7) < 4
    with pytest.raises(BadImage, match="006"):
        source[1]


def test_a_damaged_picture_in_parquet_is_one_bad_example(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", range(4), damaged=[2])
    source = open_source(str(tmp_path), "train", 8)
    assert [number_of(source[i]) for i in (0, 1, 3)] == [0, 1, 3]
    with pytest.raises(BadImage, match=r"002\.png: not a JPEG"):
        source[2]
    stream = open_stream(str(tmp_path), "train", Columns(), 0, 4)
    assert [type(item) for _, item in stream.examples(shuffle=False)] == [Example, Example, BadImage, Example]


def test_an_example_without_caption_is_bad(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", [0, 1])
    (tmp_path / "train" / "001.txt").write_text(" \n")
    source = open_source(str(tmp_path), "train", 8)
    assert source[0].captions == ("number 0",)
    with pytest.raises(BadImage, match=r"001\.png: no caption"):
        source[1]


def test_max_samples_takes_the_first(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", range(5))
    assert captions(open_source(str(tmp_path), "train", 8, max_samples=2)) == [("number 0",), ("number 1",)]
    assert len(open_source(str(tmp_path), "train", 8, max_samples=99)) == 5


def test_shapes_have_the_same_face() -> None:
    source = open_source("shapes", "train", 24, max_samples=3, shapes_per_image=1, seed=5)
    assert len(source) == 3 and source[0].image.size == (24, 24) and len(source[0].captions) > 1
    assert source.name != open_source("shapes", "train", 24, max_samples=3, shapes_per_image=2, seed=5).name


def test_names_tell_columns_apart(tmp_path: Path) -> None:
    write_folder(tmp_path / "d", [0], sidecars=False)
    (tmp_path / "d" / "metadata.jsonl").write_text('{"file_name": "000.png", "text": "a", "short": "b"}')
    names = {open_source(str(tmp_path / "d"), "train", 8, Columns("image", (c,))).name for c in ("text", "short")}
    assert len(names) == 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path, kind: str, streaming: bool) -> None:
    write_folder(tmp_path / "d", [0], sidecars=False)
    (tmp_path / "d" / "metadata.jsonl").write_text('{"file_name": "000.png", "text": "a"}')
    write_parquet(tmp_path / "a.parquet", range(3), image="photo")
    source = str(tmp_path / ("d" if kind == "folder" else "a.parquet"))
    wrong = [Columns("image", ("caption",)), Columns("photo", ("caption",))][kind == "parquet"]
    with pytest.raises(ValueError, match=rf"{source} has no column 'caption'; it has .*text.*data\.caption_columns"):
        open_stream(source, "train", wrong, 0, 1) if streaming else open_source(source, "train", 8, wrong)
    if kind == "parquet":
        with pytest.raises(ValueError, match=r"has no column 'image'; it has photo, text: set data\.image_column"):
            open_stream(source, "train", Columns(), 0, 1) if streaming else open_source(source, "train", 8)
        assert number_of(open_source(source, "train", 8, Columns("photo"))[1]) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"text": "a"}', "metadata.jsonl, line 1 has no file_name"),
        ('\n{"file_name":', r"metadata\.jsonl, line 2 is not JSON"),
        ("[1]", r"metadata\.jsonl, line 1 is not an object"),
    ],
)
def test_damaged_metadata_is_named(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(ValueError, match=reason):
        open_source(str(tmp_path), "train", 8)


@pytest.mark.parametrize("name", ["none", "none/deep/er", "none.parquet", "some/*.tar", "../none"])
def test_what_does_not_exist_is_named(tmp_path: Path, name: str) -> None:
    source = str(tmp_path / name) if name.startswith("none") and "." not in name else name
    with pytest.raises(ValueError, match="is neither a folder nor") as error:
        open_source(source, "train", 8)
    assert repr(source) in str(error.value)


def test_an_empty_folder_and_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no metadata\.jsonl"):
        open_source(str(tmp_path / "empty"), "train", 8)
    for name in ("a.parquet", "a.tar"):
        (tmp_path / name).write_bytes(b"x" * 2000)
        with pytest.raises(ValueError, match=rf"{name} cannot be read as"):
            open_source(str(tmp_path / name), "train", 8)
    write_parquet(tmp_path / "one.parquet", range(1))
    with pytest.raises(ValueError, match=r"one\.parquet has no examples in its split 'validation'"):
        open_source(str(tmp_path / "one.parquet"), "validation", 8)


def test_a_hub_id_offline_gives_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^data\.source 'owner/pictures' cannot be opened: .+") as error:
        open_source("owner/pictures", "train", 8)
    assert "\n" not in str(error.value)


def stream_of(folder: Path, kind: str, damaged: Sequence[int] = (), files: int = 2) -> Any:
    """40 numbered examples over several files, read as a stream."""
    write = write_parquet if kind == "parquet" else write_tar
    for i in range(files):
        write(folder / f"train-{i}.{kind}", range(40 * i // files, 40 * (i + 1) // files), damaged)
    return open_stream(str(folder), "train", Columns(), seed=1, shuffle_buffer=8)


def same(a: Sequence[PixelBatch], b: Sequence[PixelBatch]) -> bool:
    return [(x.keys, x.rows, x.image.tolist()) for x in a] == [(x.keys, x.rows, x.image.tolist()) for x in b]


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_stream_gives_everything_once_an_epoch_in_another_order(tmp_path: Path, kind: str) -> None:
    stream = stream_of(tmp_path, kind)
    epochs = [[item.captions[0] for _, item in stream.examples(epoch)] for epoch in (0, 0, 1)]
    assert epochs[0] == epochs[1] != epochs[2]
    assert sorted(epochs[0]) == sorted(epochs[2]) == sorted(f"number {n}" for n in range(40))


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_stream_resumes_at_a_step(tmp_path: Path, kind: str) -> None:
    plan, transform = BatchPlan(4, accumulation=2), Transform(8, random_flip=True)
    whole = list(stream_batches(stream_of(tmp_path, kind), transform, plan, 0, 12))
    assert len(whole) == 24 and all(batch.image.shape == (4, 3, 8, 8) for batch in whole)
    again = open_stream(str(tmp_path), "train", Columns(), seed=1, shuffle_buffer=8)
    assert same(list(stream_batches(again, transform, plan, 7, 12)), whole[14:])


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (1, 2)])
def test_a_stream_is_dealt_alike_to_processes_and_accumulation(tmp_path: Path, world: int, accumulation: int) -> None:
    stream, transform = stream_of(tmp_path, "parquet", damaged=[3, 30]), Transform(8)
    parts = [
        batch
        for rank in range(world)
        for batch in stream_batches(stream, transform, BatchPlan(3, accumulation, world, rank), 0, 9)
    ]
    whole = list(stream_batches(stream, transform, BatchPlan(6), 0, 9))
    by_row = {
        row: sorted(k for b in parts for k, r in zip(b.keys, b.rows, strict=True) if r == row) for row in range(6)
    }
    assert by_row == {row: sorted(b.keys[row] for b in whole) for row in range(6)}
    assert sorted(n for b in parts for n in b.skipped) == sorted(n for b in whole for n in b.skipped)
    assert {name[:3] for batch in whole for name in batch.skipped} == {"003", "030"}


def test_a_resumed_stream_does_not_name_again_what_was_skipped_before(tmp_path: Path) -> None:
    stream, transform, plan = stream_of(tmp_path, "tar", damaged=range(0, 40, 2)), Transform(8), BatchPlan(2)
    whole = list(stream_batches(stream, transform, plan, 0, 10))
    tail = list(stream_batches(stream, transform, plan, 6, 10))
    assert [batch.skipped for batch in tail] == [batch.skipped for batch in whole[6:]]
    assert same(tail, whole[6:])


def test_a_stream_without_a_usable_sample_ends(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, "tar", damaged=range(40))
    with pytest.raises(ValueError, match=r"none of the samples .* 0\d\d: not a JPEG"):
        next(stream_batches(stream, Transform(8), BatchPlan(2), 0, 1))


def test_a_stream_of_pictures_is_that_of_the_files(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, "parquet")
    batch = next(stream_batches(stream, Transform(8), BatchPlan(4), 0, 1))
    numbers = torch.tensor([int(key.removesuffix(".png")) for key in batch.keys])
    assert torch.allclose((batch.image[:, 0, 4, 4] + 1) * 127.5, numbers.float(), atol=1e-3)
