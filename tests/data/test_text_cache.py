"""The cache of encoded captions: what it gives back, what it refuses, and what it goes on with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conditioning import Conditioning, TextEncoder
from ldm.data import text_cache
from ldm.data.cache_files import StaleCache
from ldm.data.text_cache import TextCache, build_text_cache, distinct_captions, text_settings, verify_text_cache
from ldm.tasks.captions import CachedCaptions

CAPTIONS = [f"caption {i:02d}" for i in range(70)]


class Letters(TextEncoder):
    """Encodes a text as its letters' codes, so that every condition can be told from the text."""

    trainable = False

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))
        self.encoded = 0

    context_dim = pooled_dim = 1
    parts: dict[str, tuple[str, str]] = {}  # noqa: RUF012

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[ord(letter) for letter in text.ljust(12)[:12]] for text in texts])

    def encode(self, tokens: Tensor) -> Conditioning:
        self.encoded += len(tokens)
        context = tokens[..., None] * self.scale
        return Conditioning(context, tokens != ord(" "), context.sum(1))

    def save_parts(self, folder: Path) -> None:
        raise AssertionError("a cache of texts writes no encoder")


def filled(folder: Path, encoder: Letters, captions: list[str] = CAPTIONS, weights: str = "w") -> TextCache:
    distinct = distinct_captions(captions)
    build_text_cache(folder, distinct, encoder, text_settings(distinct, encoder, weights))
    return TextCache(folder, distinct)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_cache, "SHARD_SIZE", 16)


def test_every_caption_comes_back(tmp_path: Path) -> None:
    encoder = Letters()
    cache = filled(tmp_path, encoder)
    assert len(list(tmp_path.glob("shard_*"))) == 5
    texts = ["caption 69", "", "caption 00", "caption 15", "caption 16", "caption 69"]
    found, expected = Conditioning.cat([cache.row(text) for text in texts]), encoder.encode(encoder.tokenize(texts))
    assert torch.equal(found.context, expected.context) and found.context_mask is not None
    assert torch.equal(found.context_mask, expected.context_mask) and torch.equal(found.pooled, expected.pooled)
    with pytest.raises(KeyError, match="caption 70"):
        cache.row("caption 70")


def test_a_dropped_caption_is_the_empty_prompt(tmp_path: Path) -> None:
    cache = filled(tmp_path, Letters())
    found = CachedCaptions(cache)(["caption 01", "caption 02"], 0.5, torch.tensor([0.4, 0.6]))
    assert torch.equal(found.context, torch.cat([cache.row("").context, cache.row("caption 02").context]))


def test_a_caption_of_no_cache_is_given_beside_it(tmp_path: Path) -> None:
    encoder = Letters()
    other = encoder.encode(encoder.tokenize(["held out"]))
    told = CachedCaptions(filled(tmp_path, encoder), {"held out": other})
    found = told(["held out", "caption 02", "held out"], 0.5, torch.tensor([0.6, 0.6, 0.4]))
    expected = encoder.encode(encoder.tokenize(["held out", "caption 02", ""]))
    assert torch.equal(found.context, expected.context)


def test_equal_captions_are_encoded_once(tmp_path: Path) -> None:
    encoder = Letters()
    filled(tmp_path, encoder, [*CAPTIONS, *CAPTIONS, ""])
    assert encoder.encoded == len(CAPTIONS) + 1
    filled(tmp_path, encoder)
    assert encoder.encoded == len(CAPTIONS) + 1


def test_a_killed_run_goes_on_with_the_missing_shard(tmp_path: Path) -> None:
    filled(tmp_path, Letters())
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "shard_00002.safetensors").unlink()
    encoder = Letters()
    filled(tmp_path, encoder)
    assert encoder.encoded == 16


@pytest.mark.parametrize(("captions", "weights"), [(CAPTIONS[1:], "w"), (CAPTIONS, "other")])
def test_other_captions_or_another_encoder_are_refused(tmp_path: Path, captions: list[str], weights: str) -> None:
    filled(tmp_path, Letters())
    with pytest.raises(StaleCache, match=f"{tmp_path} were made from something else"):
        filled(tmp_path, Letters(), captions, weights)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    filled(tmp_path, Letters())
    path = tmp_path / "shard_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"shard_00001\.safetensors is missing or damaged; delete"):
        TextCache(tmp_path, distinct_captions(CAPTIONS))


def test_damage_is_found_before_the_encodings_are_used(tmp_path: Path) -> None:
    filled(tmp_path / "text", Letters())
    assert verify_text_cache(tmp_path / "text") == verify_text_cache(tmp_path / "nothing") == []
    path = tmp_path / "text" / "shard_00003.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert [problem.split(" is missing")[0] for problem in verify_text_cache(tmp_path / "text")] == [str(path)]
    (tmp_path / "text" / "manifest.json").unlink()
    assert "is not complete" in verify_text_cache(tmp_path / "text")[0]
