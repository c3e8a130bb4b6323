"""What the denoiser is told: text encoders, weighted and long prompts, and classifier-free-guidance dropout."""

from __future__ import annotations

from conditioning.clip_model import ClipTextConfig, ClipTextModel, canonical_state_dict
from conditioning.clip_text import ClipTextEncoder
from conditioning.dropout import drop_captions, dropped_rows
from conditioning.dual_text import DualTextEncoder
from conditioning.encoder import TextEncoder
from conditioning.folders import index_entries, read_transformers_encoder, text_folders
from conditioning.open_clip_text import read_open_clip
from conditioning.prompts import PromptSyntax, condition_batches, encode_prompt
from conditioning.t5_text import T5TextEncoder
from conditioning.tokenizer import ClipTokenizer
from conditioning.transformers_text import TransformersTextEncoder
from conditioning.types import Conditioning
from conditioning.weighting import parse_weights

__all__ = [
    "ClipTextConfig",
    "ClipTextEncoder",
    "ClipTextModel",
    "ClipTokenizer",
    "Conditioning",
    "DualTextEncoder",
    "PromptSyntax",
    "T5TextEncoder",
    "TextEncoder",
    "TransformersTextEncoder",
    "canonical_state_dict",
    "condition_batches",
    "drop_captions",
    "dropped_rows",
    "encode_prompt",
    "index_entries",
    "parse_weights",
    "read_open_clip",
    "read_transformers_encoder",
    "text_folders",
]
