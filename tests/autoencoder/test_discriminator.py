"""ActNorm: its first batch decides, every process starts alike, a state is read back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, distributed
from torch.testing import assert_close

from autoencoder import PatchDiscriminator
from autoencoder.discriminator import ActNorm


def features(seed: int, count: int = 4) -> Tensor:
    """[count, 3, 5, 5] with a mean and a spread of its own in each channel."""
    noise = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return noise * torch.tensor([0.1, 2.0, 30.0]).view(1, 3, 1, 1) + torch.tensor([5.0, -1.0, 0.0]).view(1, 3, 1, 1)


def test_the_first_batch_leaves_with_zero_mean_and_unit_variance() -> None:
    norm, first, second = ActNorm(3), features(0), features(1)
    out = norm(first)
    assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0.0)
    assert_close(out.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0.0)
    reference = torch.nn.BatchNorm2d(3, eps=1e-12)
    assert_close(out, reference(first), atol=1e-3, rtol=1e-3)
    weight = norm.weight.detach().clone()
    norm(second)
    assert torch.equal(norm.weight, weight)


def test_weight_and_bias_train_from_the_first_batch_on() -> None:
    norm = ActNorm(3)
    norm(features(0)).square().sum().backward()
    assert norm.weight.grad is not None and norm.bias.grad is not None
    assert bool((norm.weight.grad != 0).all())


def test_a_fresh_norm_passes_everything_in_eval_mode() -> None:
    norm = ActNorm(3).eval()
    assert torch.equal(norm(features(0)), features(0)) and not norm.initialised


def test_a_batch_that_is_not_finite_is_passed_over() -> None:
    norm = ActNorm(3)
    norm(features(0) * float("nan"))
    assert not norm.initialised and torch.equal(norm.weight, torch.ones(3))
    assert bool(torch.isfinite(norm(features(0))).all()) and norm.initialised


def test_a_constant_channel_stays_finite() -> None:
    assert torch.equal(ActNorm(1)(torch.full((2, 1, 4, 4), 0.5)), torch.zeros(2, 1, 4, 4))


def test_two_processes_start_from_the_statistics_of_both_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ActNorm(3)
    whole(features(0, 6))
    mine, theirs = features(0, 6).split([2, 4])
    values = theirs.double().transpose(0, 1).flatten(1)
    sums = torch.stack([torch.full((3,), 100.0).double(), values.sum(1), values.square().sum(1)])
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor: tensor.add_(sums))
    half = ActNorm(3)
    half(mine)
    assert_close(half.weight, whole.weight)
    assert_close(half.bias, whole.bias)


def test_a_discriminator_that_was_read_back_is_not_initialised_again() -> None:
    critic, other = (PatchDiscriminator(base_channels=4, num_layers=1, norm="act") for _ in range(2))
    first, second = torch.rand(2, 2, 3, 16, 16).unbind()
    critic(first)
    other.load_state_dict(critic.state_dict())
    assert torch.equal(other(second), critic(second))
    fresh = PatchDiscriminator(base_channels=4, num_layers=1, norm="act")
    fresh.load_state_dict(PatchDiscriminator(base_channels=4, num_layers=1, norm="act").state_dict())
    norms = [layer for layer in fresh.layers if isinstance(layer, ActNorm)]
    assert len(norms) == 1 and not norms[0].initialised
