"""Averages made after training, against the closed form of what they stand for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ldm.training.ema import Ema
from ldm.training.post_hoc_ema import (
    Snapshot,
    coefficients,
    combination,
    exponential_profile,
    power_of,
    power_profile,
    weighted_sum,
)


class Weights(nn.Module):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(values.clone())


class Kept(NamedTuple):
    """A snapshot and the averaged weights in it."""

    snapshot: Snapshot
    weights: Tensor


def trained(decay: float, steps: int, every: int) -> tuple[Tensor, list[Kept]]:
    """The weights [steps + 1, 5] of a random walk and the snapshots of its moving average."""
    generator = torch.Generator().manual_seed(0)
    path = torch.randn(steps + 1, 5, generator=generator).cumsum(0) / steps**0.5
    module = Weights(path[0])
    ema, kept = Ema(module, decay), list[Kept]()
    for step in range(1, steps + 1):
        with torch.no_grad():
            module.w.copy_(path[step])
        ema.update()
        if step % every == 0:
            snapshot = Snapshot(Path(f"step_{step:06d}"), ema.updates, decay)
            kept.append(Kept(snapshot, ema.average["w"].clone()))
    return path, kept


def average(kept: list[Kept], profile: Tensor) -> tuple[Tensor, float]:
    parts, error = coefficients([one.snapshot for one in kept], profile)
    found = weighted_sum((part, {"w": one.weights}) for part, one in zip(parts, kept, strict=True))
    return found["w"], error


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.97, 0.9999])
def test_the_profile_is_what_the_moving_average_does(decay: float) -> None:
    path, kept = trained(decay, 200, 50)
    for snapshot, weights in kept:
        profile = exponential_profile(snapshot.updates, decay)
        assert profile.sum() == pytest.approx(1)
        expected = profile @ path[: snapshot.updates + 1].double()
        torch.testing.assert_close(weights.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.15, 0.28])
def test_the_power_profile_has_the_width_that_it_is_named_for(sigma_rel: float) -> None:
    """Its standard deviation over the steps, in parts of the training; and gamma solves the relation of section 3.1."""
    steps = 20_000
    profile, at = power_profile(steps, sigma_rel), torch.arange(steps + 1, dtype=torch.float64) / steps
    mean = profile @ at
    assert float((profile @ (at - mean).square()).sqrt()) == pytest.approx(sigma_rel, rel=2e-3)
    assert profile.sum() == pytest.approx(1)
    gamma = power_of(sigma_rel)
    assert math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3)) == pytest.approx(sigma_rel, rel=1e-9)


def test_published_pairs_of_width_and_power() -> None:
    """Karras et al. 2024: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert power_of(0.05) == pytest.approx(16.97, abs=0.01)
    assert power_of(0.10) == pytest.approx(6.94, abs=0.01)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.3, 1.0])
def test_widths_that_no_power_has_are_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=r"outside \(0, 0.28\]"):
        power_of(sigma_rel)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.15, 0.25])
def test_the_average_is_the_weighted_mean_of_all_steps(sigma_rel: float) -> None:
    """Snapshots at short intervals give the average that summing over every step's weights gives."""
    path, snapshots = trained(0.97, 1000, 10)
    profile = power_profile(1000, sigma_rel)
    found, error = average(snapshots, profile)
    expected = profile @ path.double()
    assert error < 0.1
    torch.testing.assert_close(found.double(), expected, atol=0.02 * float(path.std()), rtol=0)


def test_fewer_snapshots_fit_worse_and_say_so() -> None:
    _, snapshots = trained(0.97, 1000, 10)
    profile = power_profile(1000, 0.1)
    errors = [average(snapshots[::-1][::stride][::-1], profile)[1] for stride in (1, 5, 25)]
    assert errors == sorted(errors) and errors[-1] > 3 * errors[0]


def test_a_profile_that_the_snapshots_have_is_found_exactly() -> None:
    _, snapshots = trained(0.97, 300, 100)
    found, error = average(snapshots, exponential_profile(300, 0.97))
    assert error < 1e-6
    torch.testing.assert_close(found, snapshots[-1].weights, atol=1e-5, rtol=0)


def test_coefficients_add_up_to_one_and_no_other_such_sum_is_nearer() -> None:
    generator = torch.Generator().manual_seed(0)
    responses = torch.rand(4, 30, dtype=torch.float64, generator=generator)
    profile = torch.rand(30, dtype=torch.float64, generator=generator)
    parts, error = combination(responses, profile)
    assert parts.sum() == pytest.approx(1)
    distance = (parts @ responses - profile).norm()
    assert error == pytest.approx(float(distance / profile.norm()))
    for _ in range(50):
        away = torch.randn(4, dtype=torch.float64, generator=generator)
        other = parts + 0.01 * (away - away.mean())
        assert (other @ responses - profile).norm() >= distance


def test_weights_that_never_moved_stay_as_they_are() -> None:
    same = torch.full((3,), 2.5)
    kept = [Kept(Snapshot(Path(), updates, 0.9), same) for updates in (10, 20, 30)]
    found, _ = average(kept, power_profile(30, 0.1))
    torch.testing.assert_close(found, same)
