"""What watches a run, against sums by hand and posteriors whose information is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from ldm.training.guards import (
    DiscriminatorWatch,
    PosteriorWatch,
    RunningStatistics,
    UpdateGuard,
    label_warning,
    named_batch,
)


def test_a_batch_is_named_by_its_step_and_samples() -> None:
    assert named_batch(7, ["a.png", "b.png"]) == "step 7 (a.png, b.png)" and named_batch(7, []) == "step 7"
    assert named_batch(7, ["a", "b", "c", "d"], most=2) == "step 7 (a, b, 2 more)"


def terms(accuracy: float, loss: float) -> dict[str, Tensor]:
    return {"discriminator_accuracy": torch.tensor(accuracy), "discriminator": torch.tensor(loss)}


@pytest.mark.parametrize(
    ("accuracy", "loss", "speaks"),
    [
        (0.995, 0.5, "discriminator.r1"),
        (0.6, 0.005, "discriminator.r1"),
        (0.505, 1.0, "loss.discriminator_warmup"),
        (0.985, 0.02, None),
        (0.52, 1.0, None),
        (math.nan, math.nan, None),
    ],
)
def test_the_discriminator_watch_speaks_when_it_wins_or_learns_nothing(
    accuracy: float, loss: float, speaks: str | None
) -> None:
    watch = DiscriminatorWatch(window=4)
    for _ in range(3):
        watch.add(terms(accuracy, loss))
    assert watch.warning(3) is None
    watch.add(terms(accuracy, loss))
    warning = watch.warning(4)
    assert (warning is not None) == (speaks is not None)
    if warning is not None and speaks is not None:
        assert "\n" not in warning and "step 4" in warning and speaks in warning
        assert "discriminator.learning_rate_ratio" in warning


def test_the_discriminator_watch_takes_the_mean_of_its_window() -> None:
    watch = DiscriminatorWatch(window=4)
    for accuracy in (0.0, 0.98, 1.0, 1.0, 0.985):
        watch.add(terms(accuracy, 1.0))
    assert "99.1%" in (watch.warning(5) or "")
    watch.add(terms(0.9, 1.0))
    assert watch.warning(5000) is None


def test_the_discriminator_watch_pauses_between_warnings() -> None:
    watch = DiscriminatorWatch(window=1)
    watch.add(terms(1.0, 0.0))
    assert [step for step in range(100, 3000, 100) if watch.warning(step)] == [100, 1100, 2100]


def moments(mean: Tensor, std: Tensor) -> Tensor:
    return torch.cat([mean, 2 * std.log()], dim=1)


def test_labels_that_no_caption_names_are_reported() -> None:
    assert label_warning(50, {"labelled": 0.0}) == (
        "step 50: warning: no caption named exactly one of latent_labels.names; look at the captions' words"
    )
    assert label_warning(50, {"labelled": 0.0, "discriminator_labelled": 0.0}) == (
        "step 50: warning: no caption named exactly one of latent_labels.names or of discriminator.labels; look at the "
        "captions' words"
    )
    assert label_warning(50, {"labelled": 0.5, "discriminator_labelled": 0.0}) == (
        "step 50: warning: no caption named exactly one of discriminator.labels; look at the captions' words"
    )
    assert label_warning(50, {"labelled": 0.01}) is None and label_warning(50, {"nll": 1.0}) is None


def test_the_bound_is_the_mean_divergence_from_the_channels_own_gaussian() -> None:
    rng = torch.Generator().manual_seed(0)
    mean, std = (
        torch.randn(6, 2, 4, 4, generator=rng).double() + 3,
        torch.rand(6, 2, 4, 4, generator=rng).double() + 0.1,
    )
    watch = PosteriorWatch.of(moments(mean, std).split(2))
    for channel in range(2):
        m, s = mean[:, channel], std[:, channel]
        marginal = Normal(m.mean(), ((m - m.mean()).square().mean() + s.square().mean()).sqrt())
        expected = kl_divergence(Normal(m, s), marginal).mean()
        assert watch.nats()[channel].item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_channel_of_known_information() -> None:
    """Gaussian means of variance 3 seen through noise of variance 1 carry log(1 + 3) / 2 nats."""
    mean = 3**0.5 * torch.randn(64, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    watch = PosteriorWatch.of([moments(mean, torch.ones_like(mean))])
    assert watch.nats().item() == pytest.approx(math.log(2), abs=0.01)


def test_dead_channels_are_found_at_every_place_and_scale() -> None:
    """Channel 0 is the prior, 1 is constant and precise, 3 drowns in its noise; only 2 lives."""
    signal = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    flat = torch.zeros_like(signal)
    mean = torch.cat([flat, flat + 5, signal, 0.01 * signal], 1)
    std = torch.cat([flat + 1, flat + 0.01, flat + 0.1, flat + 1], 1)
    watch = PosteriorWatch.of([moments(mean, std)])
    assert watch.dead_channels() == [0, 1, 3]
    warning = watch.warning(500) or ""
    assert warning.startswith("step 500: warning: 3 of 4 latent channels (0, 1, 3)") and "\n" not in warning
    assert "loss.kl" in warning


def test_living_channels_give_no_warning_and_nothing_gives_an_error() -> None:
    signal = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    assert PosteriorWatch.of([moments(signal, torch.full_like(signal, 0.1))]).warning(1) is None
    with pytest.raises(ValueError, match="no batch of moments"):
        PosteriorWatch().nats()


def refusals(guard: UpdateGuard, losses: list[float], norm: float = 1.0) -> list[bool]:
    return [guard.refusal(torch.tensor(loss), torch.tensor(norm), 0) is not None for loss in losses]


def test_the_guard_skips_what_is_not_finite_and_counts() -> None:
    guard = UpdateGuard(limit=3)
    nan, inf = float("nan"), float("inf")
    assert refusals(guard, [1.0, nan, inf, 2.0, -inf, 0.0]) == [False, True, True, False, True, False]
    assert guard.total == 3 and guard.in_a_row == 0
    assert refusals(guard, [1.0], norm=nan) == [True]


def test_the_guard_ends_the_run_after_its_limit_in_a_row() -> None:
    guard = UpdateGuard(limit=3)
    bad, one = torch.tensor(float("nan")), torch.tensor(1.0)
    assert guard.refusal(bad, one, 1) == "step 1: a loss or gradient is not finite, no update"
    assert guard.refusal(one, bad, 2) is not None
    with pytest.raises(FloatingPointError, match=r"3 updates in a row .* the last at step 3 \(a, b\): a loss or"):
        guard.refusal(bad, one, 3, ["a", "b"])


def test_a_spike_is_a_loss_far_above_the_last_ones() -> None:
    """Losses of mean 1 and deviation 0.1: the bound is 1.3 with three deviations, once a quarter is known."""
    guard = UpdateGuard(spike=3.0, window=8)
    assert refusals(guard, [0.9, 9.0]) == [False, False]
    guard.load_state_dict({"losses": [0.9, 1.1] * 4})
    assert refusals(guard, [1.29, -50.0]) == [False, False]
    guard.load_state_dict({"losses": [0.9, 1.1] * 4})
    assert guard.refusal(torch.tensor(1.31), torch.tensor(1.0), 5) == (
        "step 5: a loss of 1.31 above 1.3 is a spike, no update"
    )
    assert guard.state_dict()["losses"][-1] == pytest.approx(1.3)


def test_a_constant_loss_may_move_by_a_hundredth() -> None:
    guard = UpdateGuard(spike=2.0, window=4)
    guard.load_state_dict({"losses": [5.0] * 4})
    assert refusals(guard, [5.09]) == [False]
    guard.load_state_dict({"losses": [5.0] * 4})
    assert refusals(guard, [5.11]) == [True]


def test_a_lasting_change_of_level_is_accepted() -> None:
    guard = UpdateGuard(spike=3.0, window=20, limit=50)
    guard.load_state_dict({"losses": [0.9, 1.1] * 10})
    assert refusals(guard, [2.0])[0] and not all(refusals(guard, [2.0] * 30))


def test_a_restored_guard_decides_as_the_old_one() -> None:
    losses = [1.0 + 0.1 * math.sin(7 * i) + (3.0 if i % 11 == 0 else 0.0) for i in range(60)]
    whole, first, second = (UpdateGuard(spike=2.0, window=12) for _ in range(3))
    expected = refusals(whole, losses)
    found = refusals(first, losses[:31])
    second.load_state_dict(first.state_dict())
    assert found + refusals(second, losses[31:]) == expected and any(expected)


def test_without_a_wish_no_loss_is_a_spike() -> None:
    guard = UpdateGuard()
    assert not any(refusals(guard, [1.0] * 300 + [1e30])) and guard.state_dict() == {"losses": []}


def test_a_refused_batch_leaves_no_trace_in_batch_norm() -> None:
    norm = nn.BatchNorm2d(2)
    kept = RunningStatistics(norm)
    norm(torch.rand(4, 2, 3, 3, generator=torch.Generator().manual_seed(0)))
    kept.keep()
    before = {name: value.clone() for name, value in norm.named_buffers()}
    norm(torch.full((4, 2, 3, 3), float("nan")))
    assert norm.running_mean is not None and norm.running_mean.isnan().all()
    kept.restore()
    assert all(torch.equal(value, before[name]) for name, value in norm.named_buffers())
    assert norm.num_batches_tracked is not None and int(norm.num_batches_tracked) == 1
