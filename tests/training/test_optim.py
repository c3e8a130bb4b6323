from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn

from ldm.config import OptimizerConfig
from ldm.training.optim import (
    Muon,
    adamw,
    hidden_matrices,
    learning_rate,
    optimizer_of,
    orthogonalized,
    set_learning_rate,
)


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


def gradients(weight: torch.Tensor, step: int) -> torch.Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_muon_steps_as_pytorchs_own_on_matrices(shape: tuple[int, int]) -> None:
    start = gradients(torch.empty(shape), 99)
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    chosen = config(muon_momentum=0.9, adam_weight_decay=0.1)
    optimizer = Muon([mine], [nn.Parameter(torch.zeros(2))], chosen)
    plain = torch.optim.Muon(
        [theirs], lr=2e-3, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw", nesterov=True
    )
    for step in range(4):
        mine.grad, theirs.grad = gradients(start, step), gradients(start, step)
        optimizer.step()
        plain.step()
    moved = (theirs - start).norm()
    # PyTorch's iterates in bfloat16, ours in float32: eight bits of mantissa allow for a percent or two
    assert (mine - theirs).norm() < 0.03 * moved


def test_orthogonalized_keeps_the_singular_vectors_and_levels_the_values() -> None:
    u, _ = torch.linalg.qr(gradients(torch.empty(20, 20), 0).double())
    v, _ = torch.linalg.qr(gradients(torch.empty(30, 20), 1).double())
    values = torch.logspace(0, -2, 20, dtype=torch.float64)
    levelled = u.T @ orthogonalized(u @ values.diag() @ v.T) @ v
    torch.testing.assert_close(levelled, levelled.diag().diag(), atol=1e-9, rtol=0)
    assert levelled.diag().min() > 0.65 and levelled.diag().max() < 1.2
    torch.testing.assert_close(orthogonalized(values.diag().float()[:, :7]).shape, torch.Size([20, 7]))


def test_muon_treats_a_convolution_as_its_matrix_and_leaves_the_rest_to_adamw() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv_in, self.body, self.conv_out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 3, 3)
            self.words = nn.Embedding(5, 8)

    net, plain = Net(), Net()
    plain.load_state_dict(net.state_dict())
    start = net.body.weight.detach().clone()
    optimizer, reference = optimizer_of(net, config(type="muon")), adamw(plain.parameters(), config(), 2e-3)
    assert hidden_matrices(net)[0] is net.body.weight and len(hidden_matrices(net)) == 1
    for own, other in zip(net.parameters(), plain.parameters(), strict=True):
        own.grad = other.grad = gradients(own, own.numel())
    expected = orthogonalized(net.body.weight.grad.flatten(1)).view_as(start)  # type: ignore[union-attr]
    optimizer.step()
    reference.step()
    for (name, own), other in zip(net.named_parameters(), plain.parameters(), strict=True):
        if name != "body.weight":
            torch.testing.assert_close(own, other)
    torch.testing.assert_close(start - net.body.weight, 2e-3 * 0.2 * 72**0.5 * expected, atol=1e-6, rtol=1e-4)


def test_muon_goes_on_from_its_state_bit_for_bit() -> None:
    def run(optimizer: torch.optim.Optimizer, layer: nn.Linear, steps: range) -> None:
        for step in steps:
            layer.weight.grad, layer.bias.grad = gradients(layer.weight, step), gradients(layer.bias, step)
            optimizer.step()

    whole = nn.Linear(6, 4)
    layer = nn.Linear(6, 4)
    layer.load_state_dict(whole.state_dict())
    chosen = config(type="muon")
    run(optimizer_of(whole, chosen), whole, range(4))
    first = optimizer_of(layer, chosen)
    run(first, layer, range(2))
    second = optimizer_of(layer, chosen)
    second.load_state_dict(first.state_dict())
    run(second, layer, range(2, 4))
    assert torch.equal(layer.weight, whole.weight) and torch.equal(layer.bias, whole.bias)
