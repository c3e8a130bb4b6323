"""CLIP's own vocabulary, for the single files of others, which name no tokenizer."""

from __future__ import annotations

import gzip
import tempfile
from importlib.util import find_spec
from pathlib import Path

from tokenizers import pre_tokenizers

from conditioning import ClipTokenizer
from conditioning.tokenizer import END_TOKEN, START_TOKEN, WORD_END, SpecialTokens
from ldm.interop.checkpoint import TOKENIZER_FILES
from ldm.interop.tensors import ModelError

MERGES = 49152 - 256 - 2
VOCAB_SIZE = 49408
HUB_ID = "openai/clip-vit-large-patch14"
PROBE, PROBE_IDS = "a photo of a cat", (49406, 320, 1125, 539, 320, 2368, 49407)
"""What CLIP's tokenizer, and no other, makes of a text."""


def clip_tokenizer_files(pad_token: str = END_TOKEN) -> dict[str, str]:
    """The tokenizer folder of CLIP, from the package open_clip or else the Hugging Face cache or hub.

    Args:
        pad_token: Stable Diffusion 1 pads with the end token, OpenCLIP's towers with "!", whose id is 0.

    Raises:
        ModelError: it can be had from nowhere.
    """
    tokenizer = _of_open_clip(pad_token) or _of_hub()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        written = {name: Path(folder) / name for name in TOKENIZER_FILES}
        return {name: path.read_text(encoding="utf-8") for name, path in written.items() if path.is_file()}


def is_clip_tokenizer(tokenizer: ClipTokenizer) -> bool:
    """Whether a tokenizer gives CLIP's ids."""
    return tokenizer.vocab_size == VOCAB_SIZE and tuple(tokenizer([PROBE], 7)[0].tolist()) == PROBE_IDS


def _of_open_clip(pad_token: str) -> ClipTokenizer | None:
    found = find_spec("open_clip")
    if found is None or found.origin is None:
        return None
    lines = gzip.decompress((Path(found.origin).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges = [(left, right) for left, right in (line.split() for line in lines.split("\n")[1 : MERGES + 1])]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + WORD_END for letter in letters), *(left + right for left, right in merges)]
    vocab = {token: index for index, token in enumerate([*tokens, START_TOKEN, END_TOKEN])}
    return ClipTokenizer(vocab, merges, SpecialTokens(pad_token=pad_token))


def _of_hub() -> ClipTokenizer:
    from huggingface_hub import snapshot_download

    try:
        return ClipTokenizer.from_pretrained(snapshot_download(HUB_ID, allow_patterns=list(TOKENIZER_FILES)))
    except Exception as error:  # every way in which a download can fail
        raise ModelError(
            "CLIP's vocabulary is not at hand: install the package open_clip_torch, or put a folder `tokenizer` beside "
            "the file"
        ) from error
