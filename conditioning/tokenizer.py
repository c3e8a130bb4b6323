"""CLIP's byte-level BPE tokenizer on the `tokenizers` library.

Radford et al. 2021 (CLIP), section 2.4: lower-cased byte pair encoding with `</w>` closing each word, the
text bracketed by start and end tokens. Folders are those of transformers' CLIPTokenizer, and so are the ids.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor

CLIP_MAX_LENGTH = 77
"""Context length of OpenAI's CLIP, which a folder without `model_max_length` gets."""

START_TOKEN = "<|startoftext|>"
END_TOKEN = "<|endoftext|>"
WORD_END = "</w>"

_UNLIMITED = 10**6
_MARK_OFFSET = 0xE000
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

Merges = list[tuple[str, str]]


@dataclass(frozen=True)
class SpecialTokens:
    """The four tokens with a role; each is an entry of the vocabulary."""

    bos_token: str = START_TOKEN
    eos_token: str = END_TOKEN
    unk_token: str = END_TOKEN
    pad_token: str = END_TOKEN


class ClipTokenizer:
    """Text to token ids exactly as transformers' CLIPTokenizer with padding to a fixed length and truncation.

    Args:
        vocab: token -> id.
        merges: BPE merges, most frequent first.
        special: which tokens start, end and pad a text.
        added: tokens that are cut out of the text before BPE, in the order of their ids; the special tokens
            follow them where they are missing.
        model_max_length: length of an id row, start and end token included.

    Raises:
        ValueError: `model_max_length` below 2, or an empty special token.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        special: SpecialTokens = SpecialTokens(),
        added: Sequence[AddedToken] = (),
        model_max_length: int = CLIP_MAX_LENGTH,
    ) -> None:
        _require_length(model_max_length)
        self.special = special
        self.model_max_length = model_max_length
        self._vocab, self._merges = dict(vocab), list(merges)
        self._tokenizer = _build(self._vocab, self._merges, special, added)
        self.bos_token_id = self._id_of(special.bos_token)
        self.eos_token_id = self._id_of(special.eos_token)
        self.pad_token_id = self._id_of(special.pad_token)
        self._tokenizer.post_processor = processors.RobertaProcessing(
            (special.eos_token, self.eos_token_id), (special.bos_token, self.bos_token_id), False, False
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included: the rows that an embedding table needs."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def __call__(self, texts: Sequence[str], max_length: int | None = None) -> Tensor:
        """Ids [B, L] (long) with L = `max_length`, or `model_max_length` when None.

        Too long a text loses its tail and keeps its end token; too short a one is padded on the right.

        Raises:
            TypeError: `texts` is one string instead of a list of them.
            ValueError: `max_length` is below 2.
        """
        if isinstance(texts, str):
            raise TypeError(f"texts is the string {texts!r}, expected a list of strings")
        length = self.model_max_length if max_length is None else max_length
        _require_length(length)
        rows = [self._fit(self._tokenizer.encode(text).ids, length) for text in texts]
        return torch.tensor(rows, dtype=torch.long).reshape(len(rows), length)

    def windows(self, text: str) -> Tensor:
        """Ids [N, model_max_length]: all tokens of `text` in pieces, each between start and end token and padded."""
        ids, room = self.ids(text), self.model_max_length - 2
        if room < 1:
            raise ValueError(
                f"model_max_length is {self.model_max_length}, expected at least 3 to cut a text in pieces"
            )
        pieces = [ids[start : start + room] for start in range(0, max(1, len(ids)), room)]
        rows = [self._fit([self.bos_token_id, *piece, self.eos_token_id], room + 2) for piece in pieces]
        return torch.tensor(rows, dtype=torch.long)

    def ids(self, text: str) -> list[int]:
        """The tokens of `text` alone, without start and end token."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def with_token(self, token: str) -> ClipTokenizer:
        """The same tokenizer with one more token, which is cut out of the text before BPE and gets the next free id.

        Raises:
            ValueError: it has the token already, or would not find it in a text.
        """
        known = self._tokenizer.get_added_tokens_decoder()
        if self._tokenizer.token_to_id(token) is not None:
            raise ValueError(f"the tokenizer has the token {token!r} already; choose another word")
        added = [*(known[index] for index in sorted(known)), AddedToken(token, normalized=True)]
        extended = ClipTokenizer(self._vocab, self._merges, self.special, added, self.model_max_length)
        if extended.ids(token) != [self.vocab_size]:
            raise ValueError(f"the token {token!r} is not found in a text; take a word such as '<heart>'")
        return extended

    def restricted(self, texts: Iterable[str]) -> tuple[ClipTokenizer, list[int]]:
        """The tokenizer that knows the bytes and the tokens of `texts` only, and the former id of each of its ids.

        Texts made of the same words become the same tokens; other words fall into smaller pieces.
        """
        parts = {left + right: (left, right) for left, right in self._merges}
        names = {index: token for token, index in self._vocab.items()}
        letters = _byte_letters()
        roles = {token for token in vars(self.special).values() if token in self._vocab}
        known = {*letters, *(letter + WORD_END for letter in letters), *roles} & self._vocab.keys()
        waiting = {names[index] for text in texts for index in self.ids(text) if index in names}
        while waiting:
            token = waiting.pop()
            if token not in known:
                known.add(token)
                waiting.update(parts.get(token, ()))
        kept = [index for token, index in sorted(self._vocab.items(), key=lambda entry: entry[1]) if token in known]
        vocab = {names[index]: place for place, index in enumerate(kept)}
        merges = [pair for pair in self._merges if "".join(pair) in known]
        table = self._tokenizer.get_added_tokens_decoder()
        added = [table[index] for index in sorted(table)]
        smaller = ClipTokenizer(vocab, merges, self.special, added, self.model_max_length)
        return smaller, [*kept, *(index for index in sorted(table) if index not in names)]

    def count(self, text: str) -> int:
        """Number of tokens of the whole `text`, start and end token included, before any truncation."""
        return len(self._tokenizer.encode(text).ids)

    def truncated(self, text: str) -> str | None:
        """The end of `text` that does not fit into `model_max_length`, or None when all of it fits."""
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        room = self.model_max_length - 2
        return text[offsets[room][0] :] if len(offsets) > room else None

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> ClipTokenizer:
        """Read a tokenizer folder of transformers or of `save_pretrained`.

        Vocabulary and merges come from `tokenizer.json` or else `vocab.json` and `merges.txt`; length and
        special tokens from `tokenizer_config.json`, in older folders from `special_tokens_map.json` and
        `added_tokens.json` too.

        Raises:
            FileNotFoundError: the folder holds no vocabulary.
            ValueError: the vocabulary is not a BPE, or contradicts the configuration.
        """
        path = Path(folder)
        vocab, merges = _read_bpe(path)
        config = _read_json(path / "tokenizer_config.json")
        added = _read_added(path, config)
        if "added_tokens_decoder" not in config:
            config |= _read_json(path / "special_tokens_map.json")
        named = {name: config[name] for name in _SPECIAL_NAMES if config.get(name) is not None}
        special = SpecialTokens(**{name: _content(value) for name, value in named.items()})
        known = {token.content for token in added}
        added += [_special_token(value) for value in named.values() if _content(value) not in known]
        return cls(vocab, merges, special, added, _max_length(config))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that transformers' CLIPTokenizer and AutoTokenizer read to the same ids."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        merges = "".join(f"{left} {right}\n" for left, right in self._merges)
        write_atomically(path / "vocab.json", _json_bytes(self._vocab, indent=None))
        write_atomically(path / "merges.txt", f"#version: 0.2\n{merges}".encode())
        write_atomically(path / "tokenizer.json", self._tokenizer.to_str().encode())
        write_atomically(path / "special_tokens_map.json", _json_bytes(vars(self.special)))
        write_atomically(path / "tokenizer_config.json", _json_bytes(self._config()))

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, max_length: int = CLIP_MAX_LENGTH) -> ClipTokenizer:
        """Learn merges from `captions`; the same captions in any order give the same tokenizer.

        The vocabulary is laid out as CLIP's: 256 bytes, 256 bytes that end a word, merges, start and end
        token, so every text has an encoding. It is smaller than `vocab_size` where no pair is left that
        occurs twice.

        Raises:
            ValueError: `vocab_size` below 514 or `max_length` below 2.
        """
        letters = _byte_letters()
        tokens = letters + [letter + WORD_END for letter in letters]
        if vocab_size < len(tokens) + 2:
            raise ValueError(f"vocab_size is {vocab_size}, expected at least {len(tokens) + 2}")
        merges = _learn_merges(captions, vocab_size - 2)
        tokens += [left + right for left, right in merges] + [START_TOKEN, END_TOKEN]
        vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
        return cls(vocab, merges, model_max_length=max_length)

    def _id_of(self, token: str) -> int:
        index = self._tokenizer.token_to_id(token)
        if index is None:
            raise ValueError(f"special token is {token!r}, expected a token of the vocabulary")
        return index

    def _fit(self, ids: list[int], length: int) -> list[int]:
        if len(ids) > length:
            return [*ids[: length - 1], self.eos_token_id]
        return ids + [self.pad_token_id] * (length - len(ids))

    def _config(self) -> dict[str, Any]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {
            "add_prefix_space": False,
            "added_tokens_decoder": {str(index): _token_fields(added[index]) for index in sorted(added)},
            **vars(self.special),
            "clean_up_tokenization_spaces": False,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": self.model_max_length,
            "tokenizer_class": "CLIPTokenizer",
        }


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file at `path` by `data`; a reader sees the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _build(vocab: dict[str, int], merges: Merges, special: SpecialTokens, added: Sequence[AddedToken]) -> Tokenizer:
    model = BPE(
        vocab=vocab,
        merges=merges,
        continuing_subword_prefix="",
        end_of_word_suffix=WORD_END,
        unk_token=special.unk_token,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = _normalizer()
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    known = {token.content for token in added}
    roles = [token for token in dict.fromkeys(vars(special).values()) if token not in known]
    tokenizer.add_tokens([*added, *map(_special_token, roles)])
    return tokenizer


def _normalizer() -> normalizers.Normalizer:
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    return normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _byte_letters() -> list[str]:
    """The 256 printable letters that stand for bytes, in the order of CLIP's vocabulary."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _learn_merges(captions: Iterable[str], num_tokens: int) -> Merges:
    """Merges that grow the 512 letters to at most `num_tokens` tokens.

    The trainer numbers letters with a suffix by the order of a hash map, on which ties then depend. So the
    last letter of each word is a letter of its own here, at a private-use code point: those are numbered by
    their code.
    """
    letters = _byte_letters()
    marks = {letter: chr(_MARK_OFFSET + index) for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = BpeTrainer(
        vocab_size=num_tokens,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=[*letters, *marks.values()],
    )
    tokenizer.train_from_iterator(_marked_words(captions, marks), trainer)
    unmark = {ord(mark): letter + WORD_END for letter, mark in marks.items()}
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(left.translate(unmark), right.translate(unmark)) for left, right in merges]


def _marked_words(captions: Iterable[str], marks: Mapping[str, str]) -> Iterable[str]:
    normalizer, pre_tokenizer = _normalizer(), _pre_tokenizer()
    for caption in captions:
        words = pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(caption))
        yield " ".join(word[:-1] + marks[word[-1]] for word, _ in words)


def _read_bpe(folder: Path) -> tuple[dict[str, int], Merges]:
    single, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if single.is_file():
        return _bpe_of_json(single)
    if vocab.is_file() and merges.is_file():
        return BPE.read_file(str(vocab), str(merges))
    raise FileNotFoundError(f"{folder} has neither tokenizer.json nor vocab.json with merges.txt")


def _bpe_of_json(path: Path) -> tuple[dict[str, int], Merges]:
    model = _read_json(path)["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"{path} holds a {model['type']} model, expected BPE")
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return model["vocab"], [(left, right) for left, right in pairs]


def _read_added(folder: Path, config: Mapping[str, Any]) -> list[AddedToken]:
    if "added_tokens_decoder" in config:
        fields = {int(index): token for index, token in config["added_tokens_decoder"].items()}
    else:
        extra = _read_json(folder / "added_tokens.json")
        fields = {index: {"content": content} for content, index in extra.items()}
        listed = _read_json(folder / "tokenizer.json").get("added_tokens", [])
        fields |= {token["id"]: token for token in listed}
    return [_added_token(fields[index]) for index in sorted(fields)]


def _added_token(fields: Mapping[str, Any]) -> AddedToken:
    return AddedToken(fields["content"], **{flag: fields[flag] for flag in _FLAGS if flag in fields})


def _special_token(value: str | Mapping[str, Any]) -> AddedToken:
    fields = {"content": value, "normalized": False} if isinstance(value, str) else dict(value)
    return _added_token(fields | {"special": True})


def _content(value: str | Mapping[str, Any]) -> str:
    return value if isinstance(value, str) else str(value["content"])


def _token_fields(token: AddedToken) -> dict[str, Any]:
    return {"content": token.content} | {flag: getattr(token, flag) for flag in _FLAGS}


def _max_length(config: Mapping[str, Any]) -> int:
    """transformers writes 1e30 for a tokenizer without limit, which means the same as no entry."""
    length = int(config.get("model_max_length") or CLIP_MAX_LENGTH)
    return length if length < _UNLIMITED else CLIP_MAX_LENGTH


def _require_length(length: int) -> None:
    if length < 2:
        raise ValueError(f"max_length is {length}, expected at least 2 (start and end token)")


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def _json_bytes(content: Mapping[str, Any], indent: int | None = 2) -> bytes:
    return (json.dumps(content, indent=indent, ensure_ascii=False) + "\n").encode()
