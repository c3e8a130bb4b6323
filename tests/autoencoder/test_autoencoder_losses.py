"""Loss terms and discriminator against hand computation, other implementations and gradients taken twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from autoencoder import (
    AutoencoderConfig,
    AutoencoderKL,
    LossWeights,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_image_gradient,
    generator_loss,
    hinge_d_loss,
    last_layer_gradient,
    nll,
    reconstruction,
    vanilla_d_loss,
)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(seed: int, size: int = 16) -> Tensor:
    return torch.rand(2, 3, size, size, generator=rng(seed)) * 2 - 1


@pytest.mark.parametrize(("kind", "torch_loss"), [("l1", F.l1_loss), ("l2", F.mse_loss)])
def test_reconstruction_is_a_sum_per_example(kind: str, torch_loss: Any) -> None:
    x, y = images(0), images(1)
    expected = torch.stack([torch_loss(a, b, reduction="sum") for a, b in zip(x, y, strict=True)])
    assert_close(reconstruction(x, y, kind), expected)


def test_reconstruction_refuses_unknown_kinds_and_broadcasting() -> None:
    with pytest.raises(ValueError, match="l1, l2, got 'huber'"):
        reconstruction(images(0), images(1), "huber")
    with pytest.raises(ValueError, match="equal shapes"):
        reconstruction(images(0), images(1)[:1])


def test_nll_equals_the_published_elementwise_form() -> None:
    """latent-diffusion: sum(|x - y| + w * p broadcast over every value) / batch."""
    x, y, distance = images(2), images(3), torch.tensor([0.25, 1.5])
    weights = LossWeights(perceptual=0.7)
    expected = ((x - y).abs() + 0.7 * distance.view(2, 1, 1, 1)).sum() / 2
    assert_close(nll(x, y, distance, weights), expected)


def test_perceptual_weight_changes_the_gradient() -> None:
    x, target = images(4).requires_grad_(), images(5)
    grads = []
    for weight in (0.0, 50.0):
        distance = (x - target).square().mean((1, 2, 3))
        grads.append(torch.autograd.grad(nll(x, target, distance, LossWeights(perceptual=weight)), x)[0])
    assert not torch.allclose(grads[0], grads[1])


def test_hinge_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge_d_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))
    assert generator_loss(fake).item() == pytest.approx(2 / 3)


def test_vanilla_equals_binary_cross_entropy() -> None:
    real, fake = torch.randn(2, 1, 4, 4, generator=rng(6)), torch.randn(2, 1, 4, 4, generator=rng(7))
    cross_entropy = F.binary_cross_entropy_with_logits
    expected = 0.5 * (cross_entropy(real, torch.ones_like(real)) + cross_entropy(fake, torch.zeros_like(fake)))
    assert_close(vanilla_d_loss(real, fake), expected)


def test_discriminator_loss_picks_by_kind() -> None:
    real, fake = torch.randn(8, generator=rng(8)), torch.randn(8, generator=rng(9))
    assert_close(discriminator_loss(real, fake, "hinge"), hinge_d_loss(real, fake))
    assert_close(discriminator_loss(real, fake, "vanilla"), vanilla_d_loss(real, fake))
    with pytest.raises(ValueError, match="hinge, vanilla, got 'lsgan'"):
        discriminator_loss(real, fake, "lsgan")


def test_adaptive_weight_by_hand_and_clamped() -> None:
    assert adaptive_weight(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])).item() == pytest.approx(5 / 2.0001)
    assert adaptive_weight(torch.tensor([1e6]), torch.zeros(1)).item() == pytest.approx(1e4)
    assert adaptive_weight(torch.zeros(1), torch.ones(1)).item() == 0.0
    assert not adaptive_weight(torch.ones(1, requires_grad=True), torch.ones(1)).requires_grad


def test_weights_are_the_published_ones_and_checked() -> None:
    weights = LossWeights()
    assert (weights.reconstruction, weights.perceptual, weights.kl, weights.discriminator) == (
        "l1",
        1.0,
        1e-6,
        0.5,
    )
    assert not weights.discriminator_active(50000)
    assert weights.discriminator_active(50001)
    assert not LossWeights(discriminator=0.0).discriminator_active(10**6)
    with pytest.raises(ValueError, match=r"reconstruction.*l1, l2, got 'l3'"):
        LossWeights(reconstruction="l3")
    with pytest.raises(ValueError, match="kl must not be negative, got -1"):
        LossWeights(kl=-1.0)


def losses_at(model: AutoencoderKL, critic: PatchDiscriminator, target: Tensor) -> tuple[Any, Tensor, Tensor, Tensor]:
    shape = model.moments(target).chunk(2, 1)[0].shape
    out = model(target, torch.randn(shape, generator=rng(12)).to(target))
    distance = (out.image - target).square().mean((1, 2, 3))
    nll_loss = nll(out.image, target, distance, LossWeights())
    return out, nll_loss, generator_loss(critic(out.image)), 1e-3 * out.posterior.kl().mean()


def test_fast_path_equals_gradients_taken_at_the_last_layer() -> None:
    """Esser et al.'s way, two gradients at the last layer and one backward, gives the same update."""
    torch.manual_seed(0)
    model = AutoencoderKL(AutoencoderConfig(block_out_channels=(16, 32), norm_num_groups=8)).double()
    critic = PatchDiscriminator(base_channels=8, num_layers=2, generator=rng(11)).double()
    target = images(10).double()

    _, nll_loss, g_loss, kl = losses_at(model, critic, target)
    nll_grad = torch.autograd.grad(nll_loss, model.last_layer, retain_graph=True)[0]
    g_grad = torch.autograd.grad(g_loss, model.last_layer, retain_graph=True)[0]
    slow = adaptive_weight(nll_grad, g_grad)
    expected = torch.autograd.grad(nll_loss + kl + 0.5 * slow * g_loss, list(model.parameters()))

    out, nll_loss, g_loss, kl = losses_at(model, critic, target)
    gradient, fast = generator_image_gradient(nll_loss, g_loss, out.image, out.features, model.last_layer.shape, 0.5)
    critic.zero_grad()
    torch.autograd.backward([out.image, kl], [gradient, None])

    assert 0 < slow.item() < 1e4
    assert_close(fast, slow, rtol=1e-9, atol=0.0)
    for parameter, reference in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert_close(parameter.grad, reference, rtol=1e-9, atol=1e-9 * float(gradient.norm()))
    assert all(parameter.grad is None for parameter in critic.parameters())


def test_last_layer_gradient_equals_autograd() -> None:
    features = torch.randn(2, 6, 9, 7, generator=rng(13))
    weight = torch.randn(3, 6, 3, 3, generator=rng(14), requires_grad=True)
    image_grad = torch.randn(2, 3, 9, 7, generator=rng(15))
    (expected,) = torch.autograd.grad(F.conv2d(features, weight, padding=1), weight, image_grad)
    assert_close(last_layer_gradient(features, image_grad, weight.shape), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("spectral", [False, True])
def test_discriminator_scores_patches(norm: str, spectral: bool) -> None:
    critic = PatchDiscriminator(base_channels=8, num_layers=3, norm=norm, spectral_norm=spectral, generator=rng(16))
    logits = critic(images(17, 64))
    assert logits.shape == (2, 1, 6, 6)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in critic.parameters())


def test_three_layers_see_seventy_pixels() -> None:
    """The gradient of one central logit covers exactly 70x70 pixels (Isola et al. 2017)."""
    critic = PatchDiscriminator(base_channels=4, num_layers=3, norm="none", generator=rng(18))
    x = (torch.rand(1, 3, 128, 128, generator=rng(19)) * 2 - 1).requires_grad_()
    logits = critic(x)
    logits[0, 0, 7, 7].backward()
    assert x.grad is not None
    touched = x.grad.abs().sum((0, 1)) > 0
    assert int(touched.any(0).sum()) == 70
    assert int(touched.any(1).sum()) == 70


def test_discriminator_initialisation_is_from_the_generator() -> None:
    first, second = (PatchDiscriminator(generator=rng(20)) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    weights = torch.cat([p.flatten() for p in first.parameters() if p.ndim == 4])
    scales = torch.cat([p for name, p in first.named_parameters() if p.ndim == 1 and name.endswith("weight")])
    assert weights.std().item() == pytest.approx(0.02, rel=0.01)
    assert abs(weights.mean().item()) < 1e-4
    assert scales.mean().item() == pytest.approx(1.0, abs=0.005)


def test_spectral_norm_bounds_every_layer() -> None:
    critic = PatchDiscriminator(base_channels=8, norm="none", spectral_norm=True, generator=rng(21))
    for _ in range(30):
        critic(images(22, 32))
    for layer in critic.layers:
        if isinstance(layer, torch.nn.Conv2d):
            top = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2)
            assert top.item() == pytest.approx(1.0, abs=0.05)


def test_discriminator_refuses_impossible_settings() -> None:
    with pytest.raises(ValueError, match="batch, group, none, got 'layer'"):
        PatchDiscriminator(norm="layer")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        PatchDiscriminator(num_layers=0)
