from __future__ import annotations

import pytest
import torch

from ldm.process import offset_noise, perturbed_noise


def _generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def test_the_offset_is_one_number_a_channel_of_the_given_variance() -> None:
    eps = torch.randn(500, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    added = offset_noise(eps, 0.5, _generators(500, 7)) - eps
    torch.testing.assert_close(added, added[..., :1, :1].expand_as(added), atol=1e-6, rtol=0)
    each = added[..., 0, 0]
    assert abs(each.mean()) < 0.05 and each.std().item() == pytest.approx(0.5, rel=0.05)
    assert torch.corrcoef(each.T)[0, 1].abs() < 0.15


def test_the_perturbation_raises_the_variance_by_its_square() -> None:
    eps = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    perturbed = perturbed_noise(eps, 0.5, _generators(64, 7))
    assert perturbed.dtype == torch.float64
    assert perturbed.var().item() == pytest.approx(1.25, rel=0.05)
    assert abs(torch.corrcoef(torch.stack([eps.flatten(), (perturbed - eps).flatten()]))[0, 1]) < 0.03


@pytest.mark.parametrize("change", [offset_noise, perturbed_noise])
def test_a_row_depends_on_its_generator_alone(change) -> None:  # type: ignore[no-untyped-def]
    eps = torch.zeros(3, 2, 4, 4)
    whole, last = change(eps, 0.1, _generators(3)), change(eps[:1], 0.1, _generators(1, 2))
    assert torch.equal(whole[2:], last) and not torch.equal(whole[:1], last)
    assert torch.equal(change(eps, 0.0, _generators(3)), eps)
    with pytest.raises(ValueError, match="2 generators for a batch of 3; accepted: one an image"):
        change(eps, 0.1, _generators(2))
