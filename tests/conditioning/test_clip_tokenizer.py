"""ClipTokenizer against transformers' CLIPTokenizer, and the training of its vocabulary."""

from __future__ import annotations

import json
import pickle
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from conditioning import ClipTokenizer

LENGTH = 24
COLORS = ["red", "green", "blue", "yellow", "purple", "white", "black", "gray"]
KINDS = ["circle", "square", "triangle", "star", "photograph", "photo", "background"]
GLUE = ["a", "small", "large", "above", "below", "to", "the", "left", "right", "of", "on"]
WORDS = COLORS + KINDS + GLUE + ["naïve", "café", "don't", "it's", "we've", "東京", "2024", "🎨", "well-known"]
TEXTS = [
    "",
    " ",
    "\n\t  \r\n",
    "a small red circle above a large blue square",
    "A SMALL Red CIRCLE",
    "don't won't I'll we've they're I'm he'd it's 'S 'T",
    "hello,world!!! (really?) [yes] {no} <html> &amp; a/b\\c",
    "3.14159 + 2,718 = 5'859 №42 ½ ² ①",
    "naïve café Ångström ﬁancée straße ŒUVRE İstanbul",
    "e\u0301 vs é, A\u030a vs Å",
    "東京タワー 北京 서울 ไทย हिन्दी العربية עברית",
    "🎨🖼️ 👩‍👩‍👧‍👦 🇫🇷 👍🏽 ❤️",
    "\u200bzero\u200dwidth\ufeff nbsp\u00a0here \u3000wide",
    "control \x00 \x07 \x7f chars",
    "<|startoftext|> inside <|endoftext|> text",
    "<|STARTOFTEXT|><|EndOfText|>glued<|endoftext|>glued",
    "xylophone quizzical zyzzyva",
    "___snake_case__ --flag=value #tag @user $100 50% ~^`",
    "a photo of <new-token> and <NEW-token>, more<new-token>text",
    "wow! what! !!! ! a!b",
    " ".join(["a small red circle above a large blue square"] * 20),
    "word" * 100,
    "🎨" * 60,
    "\U0001f9ff\U00010348\ud7ff\ue000",
]


def captions() -> list[str]:
    rng = random.Random(7)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(200)]


def random_texts(count: int) -> list[str]:
    rng = random.Random(3)
    ranges = [(0x20, 0x7E)] * 4 + [
        (0xA0, 0x24F),
        (0x370, 0x5FF),
        (0x4E00, 0x4FFF),
        (0x1F300, 0x1F6FF),
        (9, 13),
    ]

    def char() -> str:
        return chr(rng.randint(*rng.choice(ranges)))

    return ["".join(char() for _ in range(rng.randint(0, 60))) for _ in range(count)]


ALL_TEXTS = TEXTS + captions()[:80] + random_texts(150)


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return ClipTokenizer.train(captions(), vocab_size=600, max_length=LENGTH)


@pytest.fixture(scope="module")
def folder(tokenizer: ClipTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return path


def reference_ids(path: Path, texts: list[str], length: int = LENGTH) -> Tensor:
    reference = transformers.CLIPTokenizer.from_pretrained(path)
    encoded = reference(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids: Tensor = encoded.input_ids
    return ids


def reference_folder(source: Path, target: Path, **special: str) -> Path:
    """The vocabulary of `source` as a folder that transformers wrote."""
    vocab = json.loads((source / "vocab.json").read_text())
    merges = [tuple(line.split(" ")) for line in (source / "merges.txt").read_text().splitlines()[1:]]
    written = transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH, **special)
    written.add_tokens(["<new-token>"])
    written.save_pretrained(target)
    return target


def assert_reads_as_transformers(path: Path) -> None:
    assert torch.equal(ClipTokenizer.from_pretrained(path)(ALL_TEXTS, LENGTH), reference_ids(path, ALL_TEXTS))


def test_saved_folder_gives_transformers_the_same_ids(tokenizer: ClipTokenizer, folder: Path) -> None:
    assert len(ALL_TEXTS) >= 200
    ids = tokenizer(ALL_TEXTS)
    assert torch.equal(ids, reference_ids(folder, ALL_TEXTS))
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    assert auto.model_max_length == LENGTH
    assert torch.equal(ids, auto(ALL_TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids)


@pytest.mark.parametrize("length", [2, 3, 24, 77])
def test_any_length_as_transformers(tokenizer: ClipTokenizer, folder: Path, length: int) -> None:
    assert torch.equal(tokenizer(TEXTS, length), reference_ids(folder, TEXTS, length))


def test_saved_folder_reads_back(tokenizer: ClipTokenizer, folder: Path) -> None:
    again = ClipTokenizer.from_pretrained(folder)
    assert torch.equal(again(ALL_TEXTS), tokenizer(ALL_TEXTS))
    assert (again.vocab_size, again.model_max_length) == (tokenizer.vocab_size, LENGTH)


@pytest.mark.parametrize("special", [{}, {"pad_token": "!"}, {"pad_token": "<pad>", "unk_token": "?"}])
def test_reads_folder_written_by_transformers(folder: Path, tmp_path: Path, special: dict[str, str]) -> None:
    path = reference_folder(folder, tmp_path, **special)
    assert_reads_as_transformers(path)


def test_added_tokens_survive_saving(folder: Path, tmp_path: Path) -> None:
    read = ClipTokenizer.from_pretrained(reference_folder(folder, tmp_path / "theirs", pad_token="!"))
    read.save_pretrained(tmp_path / "ours")
    assert_reads_as_transformers(tmp_path / "ours")
    assert torch.equal(ClipTokenizer.from_pretrained(tmp_path / "ours")(TEXTS), read(TEXTS))
    assert read.count("<new-token>") == 3


@pytest.mark.parametrize("normalized", [True, False])
def test_reads_vocab_and_merges_of_an_old_folder(folder: Path, tmp_path: Path, normalized: bool) -> None:
    """The files of Stable Diffusion 1: no tokenizer.json, special tokens as objects in two places."""
    flags = {"lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}
    roles = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    objects = {role: {"content": content, **flags} for role, content in roles.items()}
    config = {role: {"__type": "AddedToken", **token} for role, token in objects.items()}
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    pad = {"pad_token": "<|endoftext|>", "model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | pad))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({**objects, "pad_token": "<|endoftext|>"}))
    vocab_size = len(json.loads((tmp_path / "vocab.json").read_text()))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<new-token>": vocab_size}))
    assert_reads_as_transformers(tmp_path)


def test_reads_special_tokens_from_their_map_alone(folder: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    roles = {"bos_token": "?", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "!"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(roles))
    assert_reads_as_transformers(tmp_path)


def test_reads_merges_written_as_strings(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert_reads_as_transformers(tmp_path)
    assert ClipTokenizer.from_pretrained(tmp_path).model_max_length == 77


def test_pickles_for_data_workers(tokenizer: ClipTokenizer) -> None:
    assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(ALL_TEXTS), tokenizer(ALL_TEXTS))


def test_unlimited_length_of_transformers_is_clips(folder: Path, tmp_path: Path) -> None:
    transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=int(1e30)).save_pretrained(tmp_path)
    assert ClipTokenizer.from_pretrained(tmp_path).model_max_length == 77


def test_count_includes_both_ends_and_ignores_truncation(tokenizer: ClipTokenizer, folder: Path) -> None:
    reference = transformers.CLIPTokenizer.from_pretrained(folder)
    assert [tokenizer.count(text) for text in TEXTS] == [len(reference(text).input_ids) for text in TEXTS]


def test_truncated_is_the_text_behind_the_last_kept_token(tokenizer: ClipTokenizer) -> None:
    kept, cut = " ".join(["circle"] * (LENGTH - 2)), "Square, STAR"
    assert tokenizer.truncated(kept) is None
    assert tokenizer.truncated(f"{kept} {cut}") == cut
    long = f"{kept}  {cut}"
    assert torch.equal(tokenizer([long]), tokenizer([kept]))


def test_padding_and_truncation_keep_the_end_token(tokenizer: ClipTokenizer) -> None:
    short, long = tokenizer(["", "circle " * 50])
    assert short.tolist() == [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * (LENGTH - 1)
    assert long[-1] == tokenizer.eos_token_id
    assert (long == tokenizer.eos_token_id).sum() == 1
    assert tokenizer([]).shape == (0, LENGTH)


def test_vocabulary_has_clips_layout(folder: Path) -> None:
    vocab = json.loads((folder / "vocab.json").read_text())
    tokens = sorted(vocab, key=vocab.__getitem__)
    assert [vocab[token] for token in tokens] == list(range(len(tokens)))
    assert len(tokens) == 600
    assert tokens[0] == "!" and tokens[256] == "!</w>"
    assert all(token + "</w>" == tokens[256 + index] for index, token in enumerate(tokens[:256]))
    assert tokens[-2:] == ["<|startoftext|>", "<|endoftext|>"]


def test_no_text_maps_to_the_unknown_token(tokenizer: ClipTokenizer) -> None:
    texts = [chr(code) for code in (*range(1, 0x300), 0x4E00, 0x1F3A8, 0x10FFFF)]
    for text in texts:
        ids = tokenizer([text], tokenizer.count(text))[0]
        assert (ids == tokenizer.eos_token_id).sum() == 1


def test_training_does_not_depend_on_the_order_of_captions(
    tokenizer: ClipTokenizer, folder: Path, tmp_path: Path
) -> None:
    shuffled = random.Random(1).sample(captions(), k=len(captions()))
    ClipTokenizer.train(iter(shuffled), vocab_size=600, max_length=LENGTH).save_pretrained(tmp_path)
    names = ["merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_each_merge_joins_a_most_frequent_pair(tmp_path: Path) -> None:
    """The definition of BPE (Sennrich et al. 2016, algorithm 1), replayed on words of ASCII letters."""
    rng = random.Random(5)
    text = ["".join(rng.choices("abcde", k=rng.randint(1, 7))) for _ in range(120)]
    ClipTokenizer.train([" ".join(text)], vocab_size=540, max_length=8).save_pretrained(tmp_path)
    merges = [tuple(line.split(" ")) for line in (tmp_path / "merges.txt").read_text().splitlines()[1:]]
    words = Counter((*word[:-1], word[-1] + "</w>") for word in text)
    assert len(merges) >= 20
    for merge in merges:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        assert pairs[merge] == max(pairs.values())
        words = Counter({_merged(word, merge): count for word, count in words.items()})


def _merged(word: tuple[str, ...], merge: tuple[str, ...]) -> tuple[str, ...]:
    out: list[str] = []
    rest = list(word)
    while rest:
        step = 2 if tuple(rest[:2]) == merge else 1
        out.append("".join(rest[:step]))
        rest = rest[step:]
    return tuple(out)


def test_small_corpus_stops_early() -> None:
    tokenizer = ClipTokenizer.train(["red red", "blue"], vocab_size=5000, max_length=8)
    assert tokenizer.vocab_size == 512 + 2 + 2
    assert tokenizer.count("red") == 3
    assert tokenizer.count("blue") == 6


def test_bad_input_is_named(tokenizer: ClipTokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size is 513, expected at least 514"):
        ClipTokenizer.train(["a"], vocab_size=513)
    with pytest.raises(ValueError, match="max_length is 1"):
        tokenizer(["a"], max_length=1)
    with pytest.raises(TypeError, match="'a red circle'"):
        tokenizer("a red circle")
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor vocab\.json"):
        ClipTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece", "vocab": {}}}))
    with pytest.raises(ValueError, match="WordPiece"):
        ClipTokenizer.from_pretrained(tmp_path)
