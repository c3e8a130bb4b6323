from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn

from ldm.config import OptimizerConfig
from ldm.training.optim import adamw, learning_rate, set_learning_rate


def config(**changes: Any) -> OptimizerConfig:
    return dataclasses.replace(OptimizerConfig(learning_rate=2e-3), **changes)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("constant", [2e-3, 2e-3, 2e-3, 2e-3, 2e-3]),
        ("linear", [2e-3, 1.5e-3, 1e-3, 0.5e-3, 0.0]),
        ("cosine", [2e-3, 2e-3 * (2 + 2**0.5) / 4, 1e-3, 2e-3 * (2 - 2**0.5) / 4, 0.0]),
    ],
)
def test_the_rate_at_the_quarters(scheduler: str, expected: list[float]) -> None:
    """cos² of 0, 22.5, 45, 67.5 and 90 degrees, times the rate."""
    rates = [learning_rate(step, 100, config(lr_scheduler=scheduler)) for step in (0, 25, 50, 75, 100)]
    assert rates == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
def test_warm_up_climbs_in_equal_parts_and_decay_starts_after_it(scheduler: str) -> None:
    chosen = config(lr_scheduler=scheduler, lr_warmup_steps=10)
    rates = [learning_rate(step, 110, chosen) for step in range(111)]
    assert rates[:10] == pytest.approx([2e-3 * (n + 1) / 10 for n in range(10)])
    assert rates[10] == 2e-3
    assert rates[60] == pytest.approx(2e-3 if scheduler == "constant" else 1e-3)
    assert all(later <= earlier for earlier, later in pairwise(rates[10:]))


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
def test_without_warm_up_the_rates_are_those_of_diffusers(scheduler: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-3)
    theirs = get_scheduler(scheduler, optimizer, num_warmup_steps=0, num_training_steps=40)
    for step in range(41):
        assert learning_rate(step, 40, config(lr_scheduler=scheduler)) == pytest.approx(
            theirs.get_last_lr()[0], abs=1e-12
        )
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_rates_stay_in_range_where_warm_up_fills_or_passes_the_run(scheduler: str) -> None:
    for warmup in (0, 5, 9):
        rates = [learning_rate(s, 5, config(lr_scheduler=scheduler, lr_warmup_steps=warmup)) for s in range(20)]
        assert all(0 <= rate <= 2e-3 for rate in rates)


def test_adamw_steps_as_pytorchs_plain_one_and_leaves_frozen_weights() -> None:
    mine, theirs = (nn.Linear(3, 2), nn.Linear(3, 2))
    theirs.load_state_dict(mine.state_dict())
    mine.bias.requires_grad_(False)
    chosen = config(adam_beta1=0.8, adam_beta2=0.95, adam_weight_decay=0.1, adam_epsilon=1e-6)
    optimizer = adamw(mine.parameters(), chosen, 1e-2)
    plain = torch.optim.AdamW([theirs.weight], 1e-2, (0.8, 0.95), 1e-6, 0.1, fused=False, foreach=False)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]
    for step in range(5):
        for layer, chosen_optimizer in ((mine, optimizer), (theirs, plain)):
            layer.weight.grad = torch.full((2, 3), 0.1 * (step + 1)) * torch.arange(6).reshape(2, 3)
            chosen_optimizer.step()
    torch.testing.assert_close(mine.weight, theirs.weight, atol=1e-6, rtol=1e-6)


def test_set_learning_rate_reaches_every_group() -> None:
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(3)], lr=1.0)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25] * 3
