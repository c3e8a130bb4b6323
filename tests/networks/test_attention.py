"""Attention written out for bf16 on a CPU, beside torch's own function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.networks.attention import SHORT, attend


def tokens(seed: int, count: int) -> Tensor:
    return torch.randn(2, 3, count, 8, generator=torch.Generator().manual_seed(seed))


def seen(count: int) -> Tensor:
    """[2, 1, 1, count], True for all keys of the first row and for the first three of the second."""
    return torch.arange(count).expand(2, 1, 1, count) < torch.tensor([count, 3]).view(2, 1, 1, 1)


def with_gradients(attention: Any, inputs: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    """The output and the gradients of its squared sum with respect to q, k and v."""
    rows = [x.detach().clone().requires_grad_() for x in inputs]
    out = attention(*rows, mask)
    return [out.detach(), *torch.autograd.grad(out.double().square().sum(), rows)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keys", [5, SHORT])
def test_values_and_gradients_are_those_of_torch(keys: int, masked: bool) -> None:
    inputs = [tokens(0, 7).bfloat16(), tokens(1, keys).bfloat16(), tokens(2, keys).bfloat16()]
    mask = seen(keys) if masked else None
    ours = with_gradients(attend, inputs, mask)
    theirs = with_gradients(F.scaled_dot_product_attention, [x.double() for x in inputs], mask)
    for found, exact in zip(ours, theirs, strict=True):
        assert found.dtype == torch.bfloat16
        # bf16 keeps 8 bits: an error of 2^-8 in each of a handful of operations
        assert float((found.double() - exact).abs().max()) < 0.03 * float(exact.abs().max())


def test_hidden_keys_in_bf16_have_no_part() -> None:
    q, k, v = (tokens(seed, 5).bfloat16() for seed in range(3))
    far = v.clone()
    far[1, :, 3:] = 1e4
    assert torch.equal(attend(q, k, v, seen(5)), attend(q, k, far, seen(5)))
