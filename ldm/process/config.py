"""Which process a model has, told apart by the class in scheduler_config.json.

A beta table, a rectified flow or a variance exploding process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.process.diffusion_config import DiffusionConfig
from ldm.process.flow import FLOW_CLASS, FlowConfig
from ldm.process.ve import VE_CLASS, VeConfig

ProcessConfig = DiffusionConfig | FlowConfig | VeConfig


def process_from_dict(config: Mapping[str, Any]) -> ProcessConfig:
    """Read a scheduler_config.json. Raises ValueError naming the key that is not accepted."""
    name = config.get("_class_name")
    if name == FLOW_CLASS:
        return FlowConfig.from_dict(config)
    return VeConfig.from_dict(config) if name == VE_CLASS else DiffusionConfig.from_dict(config)
