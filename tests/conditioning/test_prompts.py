"""Prompts to conditions: weights against compel's own output, windows, and rows that ignore their neighbours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import compel
import pytest
import torch
import transformers
from torch.testing import assert_close

from conditioning import (
    ClipTextConfig,
    ClipTextEncoder,
    ClipTextModel,
    ClipTokenizer,
    Conditioning,
    DualTextEncoder,
    condition_batches,
    encode_prompt,
    parse_weights,
)

LENGTH = 16
LONG = "a red circle above a blue square, " * 4 + "a small star"


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    texts = ["a red circle above a blue square, a small star"] * 3
    return ClipTokenizer.train(texts, 620, LENGTH)


def clip(tokenizer: ClipTokenizer, seed: int = 0, projection: bool = False, **settings: Any) -> ClipTextEncoder:
    config = ClipTextConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=20,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = ClipTextModel.from_scratch(replace(config), torch.Generator().manual_seed(seed), projection)
    return ClipTextEncoder(tokenizer, model, **settings)


@pytest.fixture(scope="module")
def encoder(tokenizer: ClipTokenizer) -> ClipTextEncoder:
    return clip(tokenizer)


# --- AUTOMATIC1111's syntax


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red circle", [("a red circle", 1.0)]),
        ("a (red) circle", [("a ", 1.0), ("red", 1.1), (" circle", 1.0)]),
        ("a ((red)) circle", [("a ", 1.0), ("red", 1.21), (" circle", 1.0)]),
        ("a [red] circle", [("a ", 1.0), ("red", 1 / 1.1), (" circle", 1.0)]),
        ("(a red:1.3) circle", [("a red", 1.3), (" circle", 1.0)]),
        ("(a (red:2):.5)", [("a ", 0.5), ("red", 1.0)]),
        ("[(a:1.1)]", [("a", 1.0)]),
        (r"a \(red\) \[x\] \\", [(r"a (red) [x] \ ".strip(), 1.0)]),
        ("time 12:30, (b:0)", [("time 12:30, ", 1.0), ("b", 0.0)]),
        ("a (red", [("a ", 1.0), ("red", 1.1)]),
        ("a) red]", [("a) red]", 1.0)]),
        ("a :1.3) b", [("a :1.3) b", 1.0)]),
        ("(:1.3)", [("", 1.0)]),
        ("", [("", 1.0)]),
    ],
)
def test_weights_are_read(prompt: str, expected: list[tuple[str, float]]) -> None:
    found = parse_weights(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


def test_a_negative_weight_and_an_unknown_syntax_are_named(encoder: ClipTextEncoder) -> None:
    with pytest.raises(ValueError, match=r"the prompt gives the weight -1.5; it must be 0 or more"):
        parse_weights("(a:-1.5)")
    with pytest.raises(ValueError, match="prompt_syntax is 'compel'; accepted: plain, a1111"):
        encode_prompt(encoder, "a", "compel")  # type: ignore[arg-type]


# --- compel as the second implementation


@pytest.mark.parametrize("skip_layers", [0, 1])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("a (red:1.3) circle", "a (red)1.3 circle"),
        ("a (red:0.4) circle", "a (red)0.4 circle"),
        ("(a blue square:0), (small:1.5) star", "(a blue square)0, (small)1.5 star"),
        (LONG.replace("small", "(small:1.4)"), LONG.replace("small", "(small)1.4")),
        (LONG.replace("small", "(small:0.7)"), LONG.replace("small", "(small)0.7")),
    ],
)
def test_weighted_contexts_equal_compels(
    tokenizer: ClipTokenizer, ours: str, theirs: str, skip_layers: int, tmp_path: Path
) -> None:
    encoder = clip(tokenizer, skip_layers=skip_layers)
    encoder.save_parts(tmp_path)
    kinds = compel.ReturnedEmbeddingsType
    reference = compel.Compel(
        transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"),
        transformers.CLIPTextModel.from_pretrained(tmp_path / "text_encoder"),
        truncate_long_prompts=False,
        split_long_text_mode=compel.SplitLongTextMode.BRUTAL,
        returned_embeddings_type=[kinds.LAST_HIDDEN_STATES_NORMALIZED, kinds.PENULTIMATE_HIDDEN_STATES_NORMALIZED][
            skip_layers
        ],
    )
    model = reference.conditioning_provider.text_encoder
    vars(model)["text_model"] = model  # compel asks for the final norm where transformers before 5 had it
    with torch.no_grad():
        found = encode_prompt(encoder, ours, "a1111").context
        plain = encode_prompt(encoder, ours, "plain").context
        expected = reference(theirs)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert plain.shape[1] != found.shape[1] or (plain - found).abs().max() > 1e-3


def test_a_prompt_without_weights_is_the_plain_prompt(encoder: ClipTextEncoder) -> None:
    with torch.no_grad():
        a, b = (encode_prompt(encoder, r"a red \(big\) circle", "a1111"), encode_prompt(encoder, "a red (big) circle"))
    assert torch.equal(a.context, b.context)


# --- windows


def test_a_long_prompt_is_its_windows_one_after_the_other(encoder: ClipTextEncoder) -> None:
    tokens = encoder.tokenizer.ids(LONG)
    room = LENGTH - 2
    rows = encoder.windows(LONG)
    assert len(rows) == -(-len(tokens) // room) > 2 and encoder.truncated(LONG) is None
    inside = [i for row in rows.tolist() for i in row[1:] if i != encoder.tokenizer.eos_token_id]
    assert inside == tokens and (rows[:, 0] == encoder.tokenizer.bos_token_id).all()
    with torch.no_grad():
        whole = encoder.encode_text(LONG)
        alone = [encoder.encode(row[None]) for row in rows]
    assert_close(whole.context, torch.cat([part.context for part in alone], dim=1), atol=1e-6, rtol=1e-6)
    assert_close(whole.pooled, alone[0].pooled, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("text", ["", "a red circle", "a red circle above a blue square, a"])
def test_a_short_prompt_is_one_window(encoder: ClipTextEncoder, text: str) -> None:
    assert torch.equal(encoder.windows(text), encoder.tokenize([text])) and encoder.holds(text)
    assert not encoder.holds(LONG)


def test_two_encoders_are_read_side_by_side(tokenizer: ClipTokenizer) -> None:
    first, second = (clip(tokenizer, seed, seed == 1, skip_layers=1, final_norm=False) for seed in (0, 1))
    dual = DualTextEncoder(first, second)
    with torch.no_grad():
        for text in ("a red circle", LONG):
            a, b, both = (encoder.encode_text(text) for encoder in (first, second, dual))
            assert_close(both.context, torch.cat([a.context, b.context], dim=-1), atol=1e-6, rtol=1e-6)
            assert_close(both.pooled, b.pooled, atol=1e-6, rtol=1e-6)
        weighted = encode_prompt(dual, "a (red:1.4) circle", "a1111").context
        left = encode_prompt(first, "a (red:1.4) circle", "a1111").context
    assert torch.equal(weighted[..., :32], left) and dual.context_dim == 64 and dual.pooled_dim == 20
    assert dual.tokenize(["a", "b"]).shape == (2, 2, LENGTH)


def test_two_encoders_of_different_lengths_are_refused(tokenizer: ClipTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    shorter = ClipTokenizer.from_pretrained(tmp_path)
    shorter.model_max_length = 8
    with pytest.raises(ValueError, match="the tokenizers make rows of 16 and 8 ids"):
        DualTextEncoder(clip(tokenizer), clip(shorter))


# --- batches


def batches(encoder: ClipTextEncoder, prompts: list[str], negative: str | None, size: int = 8) -> list[Any]:
    with torch.no_grad():
        return list(condition_batches(encoder, prompts, negative, 1, size))


def test_a_row_does_not_depend_on_its_neighbours(encoder: ClipTextEncoder) -> None:
    prompts = ["a red circle", LONG, LONG, "a star", "a blue square", ""]
    for negative in (None, "a star", LONG):
        rows = [c.index(torch.tensor([i])) for c, _ in batches(encoder, prompts, negative, 2) for i in range(len(c))]
        alone = [batches(encoder, [prompt], negative)[0][0] for prompt in prompts]
        assert all(torch.equal(a.context, b.context) for a, b in zip(rows, alone, strict=True))


def test_both_conditions_have_one_length(encoder: ClipTextEncoder) -> None:
    found = batches(encoder, ["a red circle", LONG, "a star"], None)
    lengths = [(len(c), c.context.shape[1], u.context.shape) for c, u in found]
    windows = len(encoder.windows(LONG))
    assert lengths == [(1, 16, (1, 16, 32)), (1, 16 * windows, (1, 16 * windows, 32)), (1, 16, (1, 16, 32))]
    ((condition, away),) = batches(encoder, ["a red circle"], LONG)
    with torch.no_grad():
        empty = encoder.null(1).context
    assert condition.context.shape == away.context.shape
    assert_close(condition.context[:, 16:32], empty, atol=0, rtol=0)


def test_repeats_and_sizes_of_batches(encoder: ClipTextEncoder) -> None:
    with torch.no_grad():
        found = [len(c) for c, _ in condition_batches(encoder, ["a", "b"], "c", 3, 4)]
    assert found == [4, 2]


def test_padding_that_does_not_fit_is_refused() -> None:
    row, other = Conditioning(torch.zeros(1, 4, 2)), Conditioning(torch.zeros(1, 3, 2))
    assert row.padded(7, other).context.shape == (1, 7, 2)
    with pytest.raises(ValueError, match="4 positions cannot become 8 with 1 rows of 3 positions"):
        row.padded(8, other)
    with pytest.raises(ValueError, match="4 positions cannot become 3"):
        row.padded(3, other)
