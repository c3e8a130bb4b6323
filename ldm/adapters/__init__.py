"""What is added to a finished model and taken out again: low-rank adapters of its layers."""

from __future__ import annotations

from ldm.adapters.branches import LoraBranches
from ldm.adapters.lora_files import LORA_NAMES, holds_lora, read_lora, write_diffusers_lora, write_kohya_lora
from ldm.adapters.low_rank import Lora, LowRank, MergedLoras, adapted_parts

__all__ = [
    "LORA_NAMES",
    "Lora",
    "LoraBranches",
    "LowRank",
    "MergedLoras",
    "adapted_parts",
    "holds_lora",
    "read_lora",
    "write_diffusers_lora",
    "write_kohya_lora",
]
