from __future__ import annotations

from collections import Counter

import pytest
import torch

from ldm.data.order import BatchPlan, Slot, permutation, slots
from ldm.seeds import generator, row_uniform, seed_of


def of_steps(plans: list[BatchPlan], num_samples: int, first: int, last: int, seed: int = 3) -> list[list[Slot]]:
    """The rows of every step, put together from all processes and micro-batches."""
    steps: dict[int, list[Slot]] = {step: [] for step in range(first, last)}
    for plan in plans:
        for batch in slots(plan, num_samples, seed, first, last):
            steps[batch[0].step].extend(batch)
    return [sorted(rows, key=lambda slot: slot.row) for rows in steps.values()]


@pytest.mark.parametrize(("num_samples", "size"), [(12, 4), (10, 4), (7, 16), (1, 3)])
def test_every_sample_comes_once_an_epoch(num_samples: int, size: int) -> None:
    rows = [slot for step in of_steps([BatchPlan(size)], num_samples, 0, 3 * num_samples) for slot in step]
    assert [slot.epoch for slot in rows] == [i // num_samples for i in range(len(rows))]
    for epoch in range(len(rows) // num_samples):
        drawn = [slot.index for slot in rows if slot.epoch == epoch]
        assert Counter(drawn) == Counter(range(num_samples))


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = {tuple(permutation(50, seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert torch.equal(permutation(50, 1, 1), permutation(50, 1, 1))


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4)])
def test_processes_and_accumulation_deal_the_same_rows(world: int, accumulation: int) -> None:
    size = 8 // (world * accumulation)
    plans = [BatchPlan(size, accumulation, world, rank) for rank in range(world)]
    assert of_steps(plans, 20, 2, 7) == of_steps([BatchPlan(8)], 20, 2, 7)


def test_every_process_gets_full_micro_batches_in_order() -> None:
    plan = BatchPlan(2, accumulation=2, world=3, rank=1)
    batches = list(slots(plan, 100, 0, 5, 7))
    assert [[slot.row for slot in batch] for batch in batches] == [[2, 3], [8, 9]] * 2
    assert [batch[0].step for batch in batches] == [5, 5, 6, 6]


def test_starting_late_continues_the_same_order() -> None:
    assert of_steps([BatchPlan(4)], 10, 0, 9)[4:] == of_steps([BatchPlan(4)], 10, 4, 9)


def test_seeds_depend_on_every_part_of_the_key() -> None:
    keys: list[tuple[int | str, ...]] = [
        (0,),
        (1,),
        (0, 1),
        (1, 0),
        ("0",),
        (0, "noise", 1),
        (0, "noise", 2),
        (0, "nois", "e1"),
    ]
    seeds = [seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= seed < 2**63 for seed in seeds)
    first = torch.rand(4, generator=generator(0, "x"))
    assert torch.equal(first, torch.rand(4, generator=generator(0, "x")))


def test_row_uniform_is_one_draw_of_each_generator() -> None:
    drawn = row_uniform([generator(0, row) for row in range(5)])
    single = [torch.rand((), generator=generator(0, row)) for row in range(5)]
    assert drawn.shape == (5,) and torch.equal(drawn, torch.stack(single))
