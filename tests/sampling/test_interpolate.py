from __future__ import annotations

import pytest
import torch

from ldm.sampling import lerp_conditions, slerp


def _randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_noise_keeps_its_size_and_turns_evenly() -> None:
    first, second = _randn(4, 16, 16, seed=0), _randn(4, 16, 16, seed=1)
    way = slerp(first, second, torch.linspace(0, 1, 5))
    assert torch.equal(way[0], first) or torch.allclose(way[0], first, atol=1e-6)
    torch.testing.assert_close(way[-1], second)
    assert way.flatten(1).std(1).sub(1).abs().max() < 0.05
    flat = torch.nn.functional.normalize(way.flatten(1).double(), dim=1)
    angles = (flat[:-1] * flat[1:]).sum(1).clamp(-1, 1).acos()
    torch.testing.assert_close(angles, angles.mean().expand(4), atol=1e-2, rtol=0)


def test_equal_ends_stay() -> None:
    noise = _randn(2, 3, 3, seed=0)
    torch.testing.assert_close(slerp(noise, noise, torch.tensor([0.3, 0.9])), noise.expand(2, 2, 3, 3))


def test_conditions_go_straight_and_masks_unite() -> None:
    first = {"context": torch.zeros(1, 2, 3), "context_mask": torch.tensor([[True, False]]), "pooled": None}
    second = {"context": torch.ones(1, 2, 3), "context_mask": torch.tensor([[True, True]]), "pooled": None}
    mixed = lerp_conditions(first, second, torch.tensor([0.0, 0.25, 1.0]))
    assert mixed["context"] is not None and mixed["context"][:, 0, 0].tolist() == [0.0, 0.25, 1.0]
    assert mixed["context_mask"] is not None and mixed["context_mask"].all() and len(mixed["context_mask"]) == 3
    assert mixed["pooled"] is None
    with pytest.raises(ValueError, match=r"context has shapes \[1, 2, 3\] and \[1, 4, 3\]"):
        lerp_conditions({"context": first["context"]}, {"context": torch.ones(1, 4, 3)}, torch.tensor([0.5]))
