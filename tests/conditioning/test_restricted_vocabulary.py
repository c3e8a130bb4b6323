"""A CLIP's text encoder with the tokens of some captions only: the same states for them, and a reading of all others."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from transformers import CLIPTextModel
from transformers import CLIPTokenizer as TheirTokenizer

from conditioning import ClipTextEncoder, ClipTextModel, ClipTokenizer
from conditioning.clip_model import ClipTextConfig
from conditioning.open_clip_text import read_open_clip
from conditioning.tokenizer import SpecialTokens

CAPTIONS = ["a glossy 3d emoji of red heart", "woman's hat", "two-hump camel, flat style", "naïve café ☃"]
SAME_WORDS = ["red heart", "a flat heart of a woman", "", "camel 3d"]
OTHERS = ["xylophone", "日本", "a purple hippopotamus!?", "Ω≈ç√"]


@pytest.fixture(scope="module")
def whole() -> ClipTextEncoder:
    """CLIP's own merges on a small tower of random weights, with a padding token of its own."""
    clip = SimpleTokenizer()
    vocab = dict(clip.encoder)
    merges = sorted(clip.bpe_ranks, key=clip.bpe_ranks.__getitem__)
    special = SpecialTokens(pad_token="<|pad|>")
    tokenizer = ClipTokenizer(vocab, merges, special, model_max_length=16)
    config = ClipTextConfig(
        tokenizer.vocab_size, 8, 16, 2, 2, 16, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return ClipTextEncoder(tokenizer, ClipTextModel.from_scratch(config, torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def small(whole: ClipTextEncoder) -> ClipTextEncoder:
    return whole.restricted(CAPTIONS)


def pieces(tokenizer: ClipTokenizer, text: str) -> list[str]:
    names = {index: token for token, index in tokenizer._vocab.items()}
    return [names[index] for index in tokenizer.ids(text)]


def test_texts_of_the_same_words_have_the_same_tokens_and_states(
    whole: ClipTextEncoder, small: ClipTextEncoder
) -> None:
    assert small.tokenizer.vocab_size < 700 < 49_000 < whole.tokenizer.vocab_size
    for text in [*CAPTIONS, *SAME_WORDS]:
        assert pieces(small.tokenizer, text) == pieces(whole.tokenizer, text)
    with torch.no_grad():
        one, other = (encoder.encode(encoder.tokenize(CAPTIONS + SAME_WORDS)) for encoder in (whole, small))
    assert torch.equal(one.context, other.context)
    assert one.pooled is not None and other.pooled is not None and torch.equal(one.pooled, other.pooled)


@pytest.mark.parametrize("text", OTHERS)
def test_other_words_fall_into_pieces_and_none_is_lost(
    text: str, whole: ClipTextEncoder, small: ClipTextEncoder
) -> None:
    found = pieces(small.tokenizer, text)
    assert "".join(found) == "".join(pieces(whole.tokenizer, text))
    assert len(found) > len(pieces(whole.tokenizer, text)) and "<|endoftext|>" not in found


def test_transformers_reads_the_folder_to_the_same_ids(small: ClipTextEncoder, tmp_path: Path) -> None:
    small.save_as(tmp_path, "text_encoder", "tokenizer")
    theirs = TheirTokenizer.from_pretrained(tmp_path / "tokenizer")
    texts = [*CAPTIONS, *SAME_WORDS, *OTHERS]
    ids = theirs(texts, padding="max_length", truncation=True, max_length=16, return_tensors="pt").input_ids
    assert torch.equal(ids, small.tokenize(texts))
    model = CLIPTextModel.from_pretrained(tmp_path / "text_encoder").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).last_hidden_state, small.encode(ids).context, atol=1e-5, rtol=0)


def test_restricting_again_changes_nothing(small: ClipTextEncoder) -> None:
    again = small.restricted(CAPTIONS)
    assert again.tokenizer._vocab == small.tokenizer._vocab and again.tokenizer._merges == small.tokenizer._merges
    assert torch.equal(again.tokenize(CAPTIONS), small.tokenize(CAPTIONS))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), small.parameters(), strict=True))


def test_an_open_clip_tower_keeps_its_padding(tmp_path: Path) -> None:
    text = {"context_length": 12, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    model = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False)
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    encoder = read_open_clip(f"local-dir:{tmp_path}")
    smaller = encoder.restricted(CAPTIONS)
    with torch.no_grad():
        one, other = (one.encode(one.tokenize(CAPTIONS)) for one in (encoder, smaller))
    assert torch.equal(one.context, other.context)
