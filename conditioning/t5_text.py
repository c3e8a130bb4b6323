"""The encoder half of T5, mT5 or UMT5 (Raffel et al. 2020; Imagen, Saharia et al. 2022, section 2.1)."""

from __future__ import annotations

import os
from typing import Any

from conditioning.transformers_text import READING, TransformersTextEncoder

ENCODERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
"""`model_type` of the config -> class of transformers; decoder weights in the file are not read."""


class T5TextEncoder(TransformersTextEncoder):
    """T5's final states after the last norm, [B, L, d_model].

    T5's positions are relative, so `max_length` is a choice and no limit of the model; Imagen's is 128.
    """

    @classmethod
    def _read(cls, folder: str | os.PathLike[str]) -> tuple[Any, Any]:
        import transformers

        kind = transformers.AutoConfig.from_pretrained(folder).model_type
        if kind not in ENCODERS:
            raise ValueError(f"its model_type is {kind!r}; accepted: {', '.join(ENCODERS)}")
        model, report = getattr(transformers, ENCODERS[kind]).from_pretrained(folder, **READING)
        return model, report
