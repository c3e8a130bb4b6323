"""What is added to a finished model and taken out again: low-rank updates of its layers, and a learned token."""

from __future__ import annotations

from ldm.adapters.adapter import Adapter
from ldm.adapters.branches import LoraBranches
from ldm.adapters.lora_files import LORA_NAMES, holds_lora, read_lora, write_diffusers_lora, write_kohya_lora
from ldm.adapters.low_rank import Lora, LowRank, MergedLoras, adapted_parts
from ldm.adapters.textual_inversion import TextualInversion

__all__ = [
    "LORA_NAMES",
    "Adapter",
    "Lora",
    "LoraBranches",
    "LowRank",
    "MergedLoras",
    "TextualInversion",
    "adapted_parts",
    "holds_lora",
    "read_lora",
    "write_diffusers_lora",
    "write_kohya_lora",
]
