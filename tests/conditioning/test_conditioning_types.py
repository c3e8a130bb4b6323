"""Conditioning: rows that are moved, chosen, repeated and joined with all their fields."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import Tensor

from conditioning import Conditioning


def rows(count: int, offset: int = 0, mask: bool = True, pooled: bool = True, length: int = 3) -> Conditioning:
    """Row i holds the value offset + i in every field (the mask its parity)."""
    value = torch.arange(offset, offset + count, dtype=torch.float32)
    return Conditioning(
        value[:, None, None].expand(count, length, 2).clone(),
        (value[:, None] % 2 == 0).expand(count, length).clone() if mask else None,
        value[:, None].expand(count, 4).clone() if pooled else None,
    )


def values(conditioning: Conditioning) -> list[float]:
    """The value of each row, after a check that all fields agree on it."""
    value: Tensor = conditioning.context[:, 0, 0]
    assert torch.equal(conditioning.context, value[:, None, None].expand_as(conditioning.context))
    if conditioning.context_mask is not None:
        expected = (value[:, None] % 2 == 0).expand_as(conditioning.context_mask)
        assert torch.equal(conditioning.context_mask, expected)
    if conditioning.pooled is not None:
        assert torch.equal(conditioning.pooled, value[:, None].expand_as(conditioning.pooled))
    return value.tolist()


FIELDS = pytest.mark.parametrize(("mask", "pooled"), [(True, True), (True, False), (False, True), (False, False)])


@FIELDS
def test_row_operations_keep_fields_together(mask: bool, pooled: bool) -> None:
    batch, other = rows(4, mask=mask, pooled=pooled), rows(4, 10, mask, pooled)
    choice = torch.tensor([True, False, False, True])
    assert len(batch) == 4
    assert values(batch.index(torch.tensor([3, 0, 3]))) == [3, 0, 3]
    assert values(batch.index(choice)) == [0, 3]
    assert values(batch.repeat_interleave(2)) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert values(batch.where(choice, other)) == [0, 11, 12, 3]
    assert values(batch.where(choice, other.index(torch.tensor([2])))) == [0, 12, 12, 3]
    joined = Conditioning.cat([other, batch, batch.index(torch.tensor([1]))])
    assert values(joined) == [10, 11, 12, 13, 0, 1, 2, 3, 1]
    assert (joined.context_mask is not None, joined.pooled is not None) == (mask, pooled)


@FIELDS
def test_to_casts_all_but_the_mask(mask: bool, pooled: bool) -> None:
    moved = rows(2, mask=mask, pooled=pooled).to("meta", torch.float16)
    assert (moved.context.dtype, moved.context.device.type) == (torch.float16, "meta")
    if moved.context_mask is not None:
        assert (moved.context_mask.dtype, moved.context_mask.device.type) == (torch.bool, "meta")
    if moved.pooled is not None:
        assert (moved.pooled.dtype, moved.pooled.device.type) == (torch.float16, "meta")
    assert rows(2).to(dtype=torch.float64).context.device.type == "cpu"


def test_gradients_reach_only_the_chosen_rows() -> None:
    batch, other = rows(2), rows(2)
    batch.context.requires_grad_()
    other.context.requires_grad_()
    batch.where(torch.tensor([True, False]), other).context.sum().backward()
    assert batch.context.grad is not None and other.context.grad is not None
    assert batch.context.grad[:, 0, 0].tolist() == [1, 0]
    assert other.context.grad[:, 0, 0].tolist() == [0, 1]


def test_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        rows(1).context = torch.zeros(1, 1, 1)  # type: ignore[misc]


def test_bad_shapes_are_named() -> None:
    context = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"context has shape \(2, 3\)"):
        Conditioning(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"torch\.int64 \(2, 3\), expected torch\.bool \(2, 3\)"):
        Conditioning(context, torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(2, 4\), expected torch\.bool \(2, 3\)"):
        Conditioning(context, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"pooled has shape \(3, 5\), expected \[2, P\]"):
        Conditioning(context, pooled=torch.zeros(3, 5))


def test_parts_that_do_not_join_are_refused() -> None:
    keep = torch.tensor([True, False])
    for other in (rows(2, mask=False), rows(2, pooled=False), rows(2, length=5)):
        with pytest.raises(ValueError, match="cannot join"):
            rows(2).where(keep, other)
        with pytest.raises(ValueError, match="cannot join"):
            Conditioning.cat([rows(2), other])
    with pytest.raises(ValueError, match="at least one"):
        Conditioning.cat([])
    with pytest.raises(ValueError, match="3 rows, expected 1 or 2"):
        rows(2).where(keep, rows(3))
    with pytest.raises(ValueError, match=r"\(3,\), expected torch\.bool \(2,\)"):
        rows(2).where(torch.ones(3, dtype=torch.bool), rows(2))
