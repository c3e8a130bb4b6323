"""What the denoiser is told: CLIP-architecture text encoding and classifier-free-guidance dropout."""

from __future__ import annotations

from conditioning.clip_text import ClipTextConfig, ClipTextEncoder, ClipTextModel, canonical_state_dict
from conditioning.dropout import drop_captions
from conditioning.tokenizer import ClipTokenizer
from conditioning.types import Conditioning

__all__ = [
    "ClipTextConfig",
    "ClipTextEncoder",
    "ClipTextModel",
    "ClipTokenizer",
    "Conditioning",
    "canonical_state_dict",
    "drop_captions",
]
