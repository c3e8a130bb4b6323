from __future__ import annotations

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from ldm.sampling import randn_rows


def _generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_rows_are_those_that_diffusers_draws_from_a_list_of_generators() -> None:
    ours = randn_rows((3, 4, 8, 8), _generators(1, 2, 3))
    assert torch.equal(ours, randn_tensor((3, 4, 8, 8), generator=_generators(1, 2, 3)))


def test_a_row_depends_on_its_generator_alone() -> None:
    many, one = randn_rows((3, 4, 8, 8), _generators(1, 2, 3)), randn_rows((1, 4, 8, 8), _generators(3))
    assert torch.equal(many[2], one[0])


def test_lower_precision_rounds_the_same_noise() -> None:
    full, half = (
        randn_rows((2, 5), _generators(1, 2)),
        randn_rows((2, 5), _generators(1, 2), dtype=torch.float16),
    )
    assert torch.equal(full.half(), half)


def test_another_number_of_generators_is_refused() -> None:
    with pytest.raises(ValueError, match="2 generators for a batch of 3; accepted: one an image"):
        randn_rows((3, 4), _generators(1, 2))
