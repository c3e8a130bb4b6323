"""Dropping captions to null: rate and exactness."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conditioning import drop_captions

NULL = torch.tensor([7, 8, 8])


def uniform(count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(0))


def dropped_rows(ids: Tensor) -> Tensor:
    """Which rows are the null prompt, after a check that the others are whole captions."""
    dropped = (ids == NULL).all(dim=1)
    assert torch.equal(ids[~dropped], torch.ones_like(ids[~dropped]))
    return dropped


def test_rate_is_the_probability() -> None:
    count, probability = 20_000, 0.1
    ids = torch.ones(count, 3, dtype=torch.long)
    rate = dropped_rows(drop_captions(ids, NULL, probability, uniform(count)))
    five_sigma = 5 * (probability * (1 - probability) / count) ** 0.5
    assert abs(rate.double().mean().item() - probability) < five_sigma
    assert torch.equal(ids, torch.ones_like(ids))


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_extremes_are_exact(probability: float) -> None:
    ids = drop_captions(torch.ones(1000, 3, dtype=torch.long), NULL, probability, uniform(1000))
    assert dropped_rows(ids).sum().item() == 1000 * probability


def test_each_row_follows_its_own_number() -> None:
    draws = torch.tensor([0.1, 0.6, 0.29])
    dropped = dropped_rows(drop_captions(torch.ones(3, 3, dtype=torch.long), NULL, 0.3, draws))
    assert dropped.tolist() == [True, False, True]


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_bad_probability_is_named(probability: float) -> None:
    with pytest.raises(ValueError, match=f"probability is {probability}"):
        drop_captions(torch.ones(2, 3, dtype=torch.long), NULL, probability, uniform(2))


def test_null_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"null_tokens has shape \(3,\), expected \(4,\)"):
        drop_captions(torch.ones(2, 4, dtype=torch.long), NULL, 0.5, uniform(2))
