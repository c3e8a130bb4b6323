"""ldm-data: inspect, cache, verify and export, as a user calls them."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldm.cli.data import main, run
from ldm.data.emoji import CAPTIONS, emoji_folder
from ldm.data.latents import LatentCache
from ldm.data.shapes import ShapesDataset
from ldm.data.sources import Columns, open_source
from ldm.data.text_cache import TextCache, distinct_captions
from ldm.data.transforms import to_tensor
from ldm.pretrained import read_model, read_vae


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures: two alike, one damaged, one without a caption, one wide, and a long caption."""
    pictures = tmp_path / "pictures"
    (pictures / "train").mkdir(parents=True)
    captions = ["a red square", "a red square", "a wide one", "never read", None, "so " * 400]
    for n, caption in enumerate(captions):
        size = (64, 32) if n == 2 else (40, 40)
        Image.new("RGB", size, (0 if n < 2 else n, 0, 0)).save(pictures / f"train/{n}.png")
        if caption is not None:
            (pictures / f"train/{n}.txt").write_text(caption)
    (pictures / "train/3.png").write_bytes(b"junk")
    return pictures


def inspected(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    run(["inspect", *argv, "--json"])
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_inspect_says_what_there_is(folder: Path, capsys: pytest.CaptureFixture[str], streaming: list[str]) -> None:
    report = inspected(capsys, str(folder), "--resolution", "48", "--bucket-step", "8", *streaming)
    assert (report["samples"], report["usable"]) == (6, 4)
    assert [Path(r.split(": ")[0]).name for r in report["unreadable"]] == ["3.png"]
    assert [Path(r.split(": ")[0]).name for r in report["without_caption"]] == ["4.png"]
    assert report["captions"] == {
        "count": 4,
        "distinct": 3,
        "duplicates": 1,
        "most_common": [["a red square", 2]],
    }
    assert report["duplicate_pictures"] == 1
    assert report["sizes"]["width"] == {"min": 40, "median": 40, "max": 64}
    assert report["sizes"]["smaller_than_resolution"] == 4
    assert report["buckets"]["48x48"] == 3 and sum(report["buckets"].values()) == 4
    assert report["tokens"]["over_limit"] == 1 and report["tokens"]["longest"] >= 402


def test_inspect_for_a_person(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["inspect", str(folder), "--list", "1"])
    out = capsys.readouterr().out
    assert "4 of 6 samples can be used" in out and "1 unreadable:" in out and "3.png: not a JPEG" in out


def test_cache_verify_and_what_is_in_it(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    argv = ["cache", "shapes", "--model", str(tiny_model_folder), "--output", str(cache), "--max-samples", "10"]
    argv += ["--device", "cpu", "--dtype", "float32", "--shard-size", "4", "--batch-size", "4", "--random-flip"]
    run(argv)
    run(argv)
    run(["verify", str(cache)])
    assert "20 entries intact, 0 of 10 samples were skipped" in capsys.readouterr().out
    vae, opened = read_vae(tiny_model_folder), LatentCache(cache)
    pixels = to_tensor(ShapesDataset("train", 10, 32)[7]["image"])[None]
    with torch.no_grad():
        torch.testing.assert_close(opened.gather([14]), vae.moments(pixels), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(opened.gather([15]), vae.moments(pixels.flip(-1)), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="resolution was 32, is now 64"):
        run([*argv, "--resolution", "64"])
    with pytest.raises(ValueError, match=r"the pictures or captions of .* have changed"):
        run([*argv[:-3], "--random-flip", "--max-samples", "9"])
    shard = cache / "shard_00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"has 1 damaged shards: .*shard_00001\.safetensors differs from its hash"):
        run(["verify", str(cache)])


def test_captions_are_encoded_beside_the_latents_and_verified(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    argv = ["cache", "shapes", "--model", str(tiny_model_folder), "--output", str(cache), "--max-samples", "10"]
    argv += ["--device", "cpu", "--batch-size", "4"]
    run([*argv, "--text-encoder", "{type: pretrained}"])
    run(["verify", str(cache)])
    assert "10 entries intact" in capsys.readouterr().out
    encoder, opened = read_model(tiny_model_folder).text_encoder, LatentCache(cache)
    distinct = distinct_captions(itertools.chain.from_iterable(opened.captions))
    assert len(distinct) > 10
    row = TextCache(cache / "text", distinct).row(distinct[5])
    with torch.no_grad():
        torch.testing.assert_close(row.context, encoder.encode(encoder.tokenize([distinct[5]])).context)
    for section, sentence in {
        "{type: clip_from_scratch}": "--text-encoder is one that is trained",
        "{type: pretrained, trainable: true}": "--text-encoder is one that is trained",
        "{type: t6}": "`text_encoder.type` is 't6'",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            run([*argv, "--text-encoder", section])
    (shard,) = (cache / "text").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"text/shard_00000\.safetensors is missing or damaged"):
        run(["verify", str(cache)])


def test_export_can_be_read_back(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "exported" / "train"
    run(["export", str(folder), str(target)])
    assert capsys.readouterr().err.count("skipped ") == 2
    before, after = open_source(str(folder), "train", 8), open_source(str(target.parent), "train", 8)
    assert len(after) == 4
    for number, index in enumerate((0, 1, 2, 5)):
        assert after[number].captions == before[index].captions
        assert after[number].image.tobytes() == before[index].image.tobytes()
    with pytest.raises(ValueError, match="is not empty"):
        run(["export", str(folder), str(target)])


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["inspect", "no/such/folder"], "is neither a folder nor"),
        (["verify", "nowhere"], "is not a complete latent cache"),
        (["inspect", "shapes", "--max-samples", "0"], "--max-samples is 0"),
        (["inspect", "shapes", "--streaming"], "--streaming reads a whole source"),
    ],
)
def test_bad_input_is_one_sentence(
    argv: list[str], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ldm-data", *argv])
    with pytest.raises(SystemExit) as left:
        main()
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.startswith("error: ") and reason in error and error.count("\n") == 1


def test_the_built_in_emoji() -> None:
    columns = Columns("image", CAPTIONS)
    train = open_source("emoji", "train", 64, columns)
    validation = open_source("emoji", "validation", 64, columns)
    assert (len(train), len(validation)) == (6449, 564)
    example = validation[0]
    assert example.image.size == (64, 64) and len(example.captions) == 4
    assert example.captions[0].endswith(f"emoji of {example.captions[3]}")


def test_every_emoji_has_its_licence_and_its_pixels() -> None:
    import hashlib
    import io

    import pyarrow.parquet as pq

    names: dict[str, set[str]] = {}
    for split in ("train", "validation"):
        table = pq.read_table(emoji_folder() / f"{split}.parquet")
        assert set(table["license"].to_pylist()) == {"Apache-2.0", "CC-BY-4.0", "MIT"} and all(
            table["source"].to_pylist()
        )
        rows = table.to_pylist()
        names[split] = {row["name"] for row in rows if row["split_reason"] != "unseen_combo"}
        for row in rows[::97]:
            with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
                assert (
                    image.format == "WEBP"
                    and hashlib.sha1(image.convert("RGB").tobytes()).hexdigest() == row["pixel_hash"]
                )
    assert not names["train"] & names["validation"]
    assert sum(path.stat().st_size for path in emoji_folder().iterdir()) <= 20e6


def test_missing_emoji_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data\.source emoji: there is no .*train\.parquet; the pictures come with a clone"
    ):
        emoji_folder(tmp_path)
