"""ActNorm: its first batch decides, every process starts alike; the projected discriminator beside the patch one;
labels that they are told."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.testing import assert_close

from autoencoder import (
    EfficientNetFeatureDistance,
    PatchDiscriminator,
    ProjectedDiscriminator,
    discriminator_loss,
)
from autoencoder.discriminator import ActNorm, conditioned


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


class Ramps(EfficientNetFeatureDistance):
    """Three stages that average the picture over 2, 4 and 8 pixels."""

    def stages(self, x: Tensor) -> list[Tensor]:
        return [F.avg_pool2d(x, side).repeat(1, 2, 1, 1) for side in (2, 4, 8)]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_stages_of_a_projected_discriminator_weigh_alike() -> None:
    critic = ProjectedDiscriminator(Ramps(), 4, rng(0)).eval()
    x = torch.rand(2, 3, 32, 48, generator=rng(1)) * 2 - 1
    logits = critic(x)
    assert logits.shape == (2, 3, 8, 12)
    maps = [stage / stage.square().mean((1, 2, 3), keepdim=True).sqrt() for stage in critic.features.stages(x)]
    own = [head(stage) for head, stage in zip(critic.heads, maps, strict=True)]
    assert_close(logits[:, :1], F.avg_pool2d(own[0], 2), atol=1e-5, rtol=1e-4)
    assert_close(logits[:, 1:2], own[1], atol=1e-5, rtol=1e-4)
    assert_close(logits[:, 2:], own[2].repeat_interleave(2, 2).repeat_interleave(2, 3), atol=1e-5, rtol=1e-4)
    assert_close(critic(3 * x), logits, atol=1e-4, rtol=1e-4)


def test_a_projected_discriminator_trains_its_heads_and_reaches_the_picture() -> None:
    critic = ProjectedDiscriminator(EfficientNetFeatureDistance(), 8, rng(0))
    x = torch.rand(2, 3, 64, 64, generator=rng(1)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logits = critic(x)
    assert logits.shape == (2, 4, 16, 16)
    logits.float().mean().backward()
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)
    assert all((p.grad is not None) == name.startswith("heads.") for name, p in critic.named_parameters())
    assert not any(p.requires_grad for p in critic.features.parameters())
    one, same, other = (ProjectedDiscriminator(Ramps(), 8, rng(seed)).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    drawn = [name for name in one if name.endswith(("original", "_u", "_v")) and one[name].numel() > 1]
    assert drawn and not any(torch.equal(one[name], other[name]) for name in drawn)


def test_a_projected_discriminator_tells_blur_after_sixteen_steps() -> None:
    """Discs with sharp edges beside the same ones averaged over 3 pixels; the mean logit ranks what it never saw."""
    grid = torch.linspace(-1, 1, 64)
    spots = torch.rand(160, 3, generator=rng(2))
    x, y, radius = (spots[:, i].view(-1, 1, 1) for i in range(3))
    inside = (grid - x + 0.5).square() + (grid.view(-1, 1) - y + 0.5).square() < (0.2 + 0.4 * radius).square()
    colour = torch.rand(160, 3, 1, 1, generator=rng(3)) * 2 - 1
    sharp = torch.where(inside.unsqueeze(1), colour, torch.ones(()))
    blurred = F.avg_pool2d(F.pad(sharp, (1, 1, 1, 1), mode="replicate"), 3, 1)

    critic = ProjectedDiscriminator(EfficientNetFeatureDistance(), 32, rng(0))
    optimizer = torch.optim.Adam(critic.parameters(), 1e-3, betas=(0.5, 0.99))
    for step in range(16):
        rows = slice(8 * step, 8 * step + 8)
        optimizer.zero_grad()
        discriminator_loss(critic(sharp[rows]), critic(blurred[rows])).backward()
        optimizer.step()
    with torch.no_grad():
        real, fake = (critic(images[128:]).mean((1, 2, 3)) for images in (sharp, blurred))
    assert (real > fake).float().mean().item() > 0.95


def test_a_label_adds_the_logit_of_its_own_map() -> None:
    maps = torch.randn(4, 3, 2, 5, generator=rng(0))
    logits = conditioned(maps, torch.tensor([1, -100, 0, 1]))
    expected = [maps[0, 0] + maps[0, 2], maps[1, 0], maps[2, 0] + maps[2, 1], maps[3, 0] + maps[3, 2]]
    assert torch.equal(logits, torch.stack(expected).unsqueeze(1))
    assert torch.equal(conditioned(maps, None), maps[:, :1])


@pytest.mark.parametrize("kind", ["patch", "projected"])
def test_a_discriminator_that_knows_the_label_tells_pictures_with_the_wrong_one(kind: str) -> None:
    """Bright pictures have label 0, dark ones 1. The others are the same pictures with the labels exchanged, so that
    nothing but the label tells them apart."""
    critic: nn.Module
    if kind == "patch":
        critic = PatchDiscriminator(3, 8, 1, "none", generator=rng(0), labels=2)
    else:
        critic = ProjectedDiscriminator(Ramps(), 8, rng(0), labels=2)
    label = torch.arange(16) % 2
    noise = torch.rand(9, 16, 3, 32, 32, generator=rng(1)) - 0.5
    pictures = noise + (0.5 - label.float()).view(-1, 1, 1, 1)
    optimizer = torch.optim.Adam(critic.parameters(), 3e-3, betas=(0.5, 0.99))
    for x in pictures[:8].repeat(5, 1, 1, 1, 1):
        optimizer.zero_grad()
        discriminator_loss(critic(x, label), critic(x, 1 - label)).backward()
        optimizer.step()
    with torch.no_grad():
        right, wrong = (critic(pictures[8], y).mean((1, 2, 3)) for y in (label, 1 - label))
    assert bool((right > wrong).all())
