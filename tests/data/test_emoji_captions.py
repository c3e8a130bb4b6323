"""The ways in which the emoji source says a picture: what people type must be among them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ldm.data.emoji import CAPTIONS, FORMS, STYLES, caption_forms, with_article
from ldm.data.sources import Columns, RowSource, Source, open_source, open_stream

COLUMNS = Columns("image", (FORMS,))
OWN_ID = re.compile(r"noto|twemoji|glossy 3d|flat fluent")


@pytest.fixture(scope="module")
def train() -> Source:
    return open_source("emoji", "train", 64, COLUMNS)


@pytest.fixture(scope="module")
def captions(train: RowSource) -> list[list[str]]:
    return list(train.rows[FORMS])


def row(**changed: Any) -> dict[str, Any]:
    texts = dict.fromkeys(CAPTIONS, "a twemoji emoji of owl")
    return {
        "name": "owl",
        "style": "twemoji",
        "keywords": ["bird", "owl", "143", "night bird", "UG"],
        **texts,
        **changed,
    }


@pytest.mark.parametrize("prompt", ["cat", "glossy 3d pizza", "flat fluent emoji of a rocket", "a happy grinning cat"])
def test_free_prompts_are_captions(prompt: str, captions: list[list[str]]) -> None:
    assert any(prompt in forms for forms in captions)


def test_every_word_of_a_happy_cat_face_is_learnt_without_a_style(captions: list[list[str]]) -> None:
    free = [caption for forms in captions for caption in forms if not OWN_ID.search(caption)]
    assert "a cat face" in free
    assert any(re.search(r"\bhappy\b.*\bcat\b", caption) for caption in free)


def test_a_style_stands_first_last_or_nowhere(captions: list[list[str]]) -> None:
    for forms in captions[::50]:
        style = next(match.group() for match in map(OWN_ID.search, forms) if match)
        assert any(caption.startswith(style) for caption in forms)
        assert any(caption.endswith(f"{style} style") for caption in forms)
        assert sum(style not in caption for caption in forms) >= 2
        assert len(set(forms)) == len(forms) >= 8


def test_no_caption_names_another_style(train: RowSource, captions: list[list[str]]) -> None:
    for style, forms in zip(train.rows["style"], captions, strict=True):
        assert {match for caption in forms for match in OWN_ID.findall(caption)} == {STYLES[style]}


def test_the_first_caption_is_the_one_to_evaluate_with(train: RowSource, captions: list[list[str]]) -> None:
    assert [forms[0] for forms in captions] == list(train.rows["text"])
    assert train[7].captions == tuple(captions[7])


def test_codes_phrases_and_words_of_the_name_are_no_keywords() -> None:
    joined = " | ".join(caption_forms(row()))
    assert "a bird owl" in joined and not re.search(r"143|night bird|UG|owl owl", joined)


def test_a_row_without_keywords_has_captions() -> None:
    assert caption_forms(row(keywords=[])) == [
        "a twemoji emoji of owl", "owl", "an owl", "twemoji owl", "twemoji emoji of an owl", "owl, twemoji style",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rocket", "a rocket"),
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("umbrella", "an umbrella"),
        ("hourglass done", "an hourglass done"),
        ("glasses", "glasses"),
        ("cactus", "a cactus"),
        ("octopus", "an octopus"),
        ("grinning cat with smiling eyes", "a grinning cat with smiling eyes"),
        ("women with bunny ears", "a women with bunny ears"),
        ("Libra", "Libra"),
        ("1st place medal", "1st place medal"),
    ],
)
def test_articles(name: str, said: str) -> None:
    assert with_article(name) == said


def test_a_stream_says_the_same(train: RowSource) -> None:
    streamed = open_stream("emoji", "validation", COLUMNS, 0, 10)
    held = open_source("emoji", "validation", 64, COLUMNS)
    (_, first), *_ = streamed.examples(shuffle=False)
    assert first.captions == held[0].captions


def test_the_forms_are_part_of_the_fingerprint(train: RowSource, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = open_source("emoji", "train", 64, Columns("image", CAPTIONS))
    assert plain[0].captions[0] == train[0].captions[0] and plain.fingerprint() != train.fingerprint()
    again = open_source("emoji", "train", 64, COLUMNS)
    assert again.fingerprint() == train.fingerprint()
    monkeypatch.setattr("ldm.data.sources.caption_forms", lambda row: ["another way"])
    assert open_source("emoji", "train", 64, COLUMNS).fingerprint() != train.fingerprint()
