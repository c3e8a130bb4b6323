from __future__ import annotations

import pytest
import torch

from ldm.process import LossHistory

STEPS = 4
SIZES = torch.tensor([1.0, 2.0, 0.5, 4.0])


def _full(sizes: torch.Tensor = SIZES, share: float = 0.0) -> LossHistory:
    empty = LossHistory.empty(len(sizes))
    history = LossHistory(empty.squares, empty.counts, share)
    for sign in torch.tensor([1.0, -1.0] * 5):
        history = history.updated(torch.arange(len(sizes)), sign * sizes)
    return history


def _even(count: int) -> torch.Tensor:
    return (torch.arange(count) + 0.5) / count


def test_draws_are_uniform_until_every_step_has_ten_losses() -> None:
    history = LossHistory.empty(STEPS)
    for _ in range(9):
        history = history.updated(torch.arange(STEPS), SIZES)
    for _ in range(20):
        history = history.updated(torch.tensor([0, 1, 2]), SIZES[:3])
    t, weight = history.draw(_even(400))
    assert torch.bincount(t).tolist() == [100] * STEPS and torch.equal(weight, torch.ones(400))
    t, _ = history.updated(torch.tensor([3]), SIZES[3:]).draw(_even(400))
    assert torch.bincount(t).tolist() != [100] * STEPS


def test_steps_are_drawn_in_proportion_to_the_root_mean_square_of_their_losses() -> None:
    t, _ = _full().draw(_even(7500))
    torch.testing.assert_close(torch.bincount(t) / 7500, SIZES / SIZES.sum())


def test_the_weighted_mean_is_that_of_uniform_steps_and_has_no_variance_left() -> None:
    t, weight = _full().draw(_even(7500))
    weighted = weight * SIZES[t]
    torch.testing.assert_close(weighted, SIZES.mean().expand(7500))


def test_the_oldest_loss_is_forgotten() -> None:
    history = _full(torch.ones(2))
    for loss in range(1, 11):
        history = history.updated(torch.tensor([0]), torch.tensor([float(loss)]))
    rms = (sum(i * i for i in range(1, 11)) / 10) ** 0.5
    torch.testing.assert_close(history.probabilities(), torch.tensor([rms, 1.0], dtype=torch.float64) / (rms + 1))
    twice = history.updated(torch.tensor([0, 0]), torch.tensor([0.0, 0.0]))
    rms = (sum(i * i for i in range(3, 11)) / 10) ** 0.5
    torch.testing.assert_close(twice.probabilities(), torch.tensor([rms, 1.0], dtype=torch.float64) / (rms + 1))


def test_a_history_is_its_two_tensors() -> None:
    history = _full()
    before = history.squares.clone()
    again = LossHistory(history.squares.clone(), history.counts.clone(), history.uniform_share)
    t, losses = torch.tensor([2, 0, 2]), torch.tensor([9.0, 3.0, 1.0])
    assert torch.equal(history.updated(t, losses).squares, again.updated(t, losses).squares)
    assert torch.equal(history.squares, before)


def test_steps_without_loss_stay_within_reach() -> None:
    silent = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(_full(silent, 0.1).probabilities(), torch.tensor([0.05, 0.95], dtype=torch.float64))
    assert torch.equal(_full(torch.zeros(2)).probabilities(), torch.full((2,), 0.5, dtype=torch.float64))


def test_states_of_another_kind_are_refused() -> None:
    good = LossHistory.empty(3)
    with pytest.raises(ValueError, match=r"squares is .*; accepted: float64 \[T, 10\]"):
        LossHistory(good.squares.float(), good.counts)
    with pytest.raises(ValueError, match=r"counts is .*; accepted: int64 \[3\]"):
        LossHistory(good.squares, good.counts[:2])
    with pytest.raises(ValueError, match=r"uniform_share is 1\.5; accepted: 0 to 1"):
        LossHistory(good.squares, good.counts, 1.5)
