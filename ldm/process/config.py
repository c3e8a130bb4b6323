"""Which process a model has: a beta table or a rectified flow, told apart by the class in scheduler_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.process.flow import FLOW_CLASS, FlowConfig
from ldm.process.schedule import DiffusionConfig

ProcessConfig = DiffusionConfig | FlowConfig


def process_from_dict(config: Mapping[str, Any]) -> ProcessConfig:
    """Read a scheduler_config.json. Raises ValueError naming the key that is not accepted."""
    flow = config.get("_class_name") == FLOW_CLASS
    return FlowConfig.from_dict(config) if flow else DiffusionConfig.from_dict(config)
