"""A latent cache of a stream: the same entries as by number, resumable, shared by processes."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.data.batches import SkipCounter
from ldm.data.latent_writing import build_cache, finish_cache
from ldm.data.latents import CacheSettings, LatentCache, verify_cache
from ldm.data.mapped import MappedTensors
from ldm.data.sources import Columns, Source, Stream, open_source, open_stream


def encode(x: Tensor) -> Tensor:
    return x[:, :2, ::2, ::2]


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two archives of 11 numbered pictures each, of which number 3 is damaged."""
    folder = tmp_path_factory.mktemp("tars")
    for part in range(2):
        with tarfile.open(folder / f"train-{part}.tar", "w") as tar:
            for n in range(11 * part, 11 * part + 11):
                buffer = io.BytesIO()
                Image.new("RGB", (8, 8), (n, 0, 0)).save(buffer, "PNG")
                data = b"junk" if n == 3 else buffer.getvalue()
                for suffix, content in (("png", data), ("txt", f"number {n}\u00e9".encode())):
                    info = tarfile.TarInfo(f"{n:03d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def settings(source: Source | Stream) -> CacheSettings:
    return CacheSettings(source.name, source.fingerprint(), 4, True, False, "abc", "float32")


def stream(tars: Path) -> Stream:
    return open_stream(str(tars), "train", Columns(), 0, 1)


def build(folder: Path, source: Source | Stream, rank: int = 0, world: int = 1) -> int:
    return build_cache(folder, source, settings(source), encode, 3, 4, SkipCounter(1.0), rank, world)


def test_a_stream_and_random_access_give_the_same_cache(tmp_path: Path, tars: Path) -> None:
    by_number = open_source(str(tars), "train", 4)
    for name, source in (("stream", stream(tars)), ("number", by_number)):
        finish_cache(tmp_path / name, build(tmp_path / name, source))
    one, two = (LatentCache(tmp_path / name) for name in ("stream", "number"))
    assert len(one) == len(two) == 21 and one.skipped == two.skipped and "003" in one.skipped[0]
    assert list(one.captions) == list(two.captions) == [[f"number {n}\u00e9"] for n in range(22) if n != 3]
    assert torch.equal(one.gather(range(21)), two.gather(range(21)))
    assert [one.key(i) for i in (0, 3, 20)] == ["000", "004", "021"]


def test_processes_share_a_stream_and_a_killed_one_goes_on(tmp_path: Path, tars: Path) -> None:
    counts = [build(tmp_path, stream(tars), rank, 2) for rank in (1, 0)]
    assert counts == [6, 6]
    lost = tmp_path / "shard_00002.safetensors"
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors") if path != lost}
    lost.unlink()
    finish_cache(tmp_path, build(tmp_path, stream(tars)))
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    cache = LatentCache(tmp_path, settings(stream(tars)))
    levels = ((cache.gather(range(21))[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert levels == [n for n in range(22) if n != 3] and cache.read == 22


def test_other_data_under_the_same_name_are_refused_and_a_copy_is_not(tmp_path: Path, tars: Path) -> None:
    before = settings(open_source(str(tars), "train", 4))
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tars.glob("*.tar"):
        (copy / path.name).write_bytes(path.read_bytes())
    assert settings(open_source(str(copy), "train", 4)).fingerprint == before.fingerprint
    data = (copy / "train-1.tar").read_bytes()
    (copy / "train-1.tar").write_bytes(data.replace(b"number 12", b"NUMBER 12"))
    assert settings(open_source(str(copy), "train", 4)).fingerprint != before.fingerprint
    other = open_source(str(tars), "train", 4, max_samples=5)
    assert settings(other).fingerprint != before.fingerprint


def test_every_flipped_byte_of_a_shard_is_found(tmp_path: Path, tars: Path) -> None:
    finish_cache(tmp_path, build(tmp_path, open_source(str(tars), "train", 4)))
    path = tmp_path / "shard_00001.safetensors"
    whole = path.read_bytes()
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        assert [problem for problem in verify_cache(tmp_path) if str(path) in problem]
    path.write_bytes(whole)
    assert verify_cache(tmp_path) == []


@pytest.mark.parametrize("data", [b"", b"x" * 7, b"\xff" * 64, (1 << 40).to_bytes(8, "little") + b"{}"])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError):
        MappedTensors(tmp_path / "x")


def test_mapped_tensors_are_those_that_were_saved(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).half(),
        "float": torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(1)),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "long": torch.arange(4),
        "int": torch.arange(3, dtype=torch.int32),
        "none": torch.empty(0, 2),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"note": "kept"})
    mapped = MappedTensors(tmp_path / "x.safetensors")
    for name, value in load_file(tmp_path / "x.safetensors").items():
        assert torch.equal(torch.from_numpy(mapped[name].copy()), value)
    mapped.release()
    assert mapped["long"].tolist() == [0, 1, 2, 3]
