"""The processes that `accelerate launch` started, for an evaluation."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ldm.evaluation.sharing import Share
from ldm.training.launch import use_all_cores
from ldm.training.processes import start_all_processes

PATIENCE = timedelta(hours=12)
"""How long processes wait for the one that trains a reader of labels."""


def process_share(cpu: bool) -> tuple[Share, torch.device]:
    """This process's share of the work, and its device; alone where nothing was launched. `cpu`: whatever there is."""
    start_all_processes()
    state = PartialState(cpu=cpu or not torch.cuda.is_available(), timeout=PATIENCE)
    if state.num_processes > 1:
        use_all_cores()
    return Share(state.process_index, state.num_processes, gather_object), state.device
