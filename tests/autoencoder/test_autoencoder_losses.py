"""Loss terms and discriminator against hand computation, other implementations and gradients taken twice."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
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
    label_logits,
    last_layer_gradient,
    nll,
    reconstruction,
    vanilla_d_loss,
)
from autoencoder.losses import DiscriminatorPenalties, LeCam, LossState, discriminator_accuracy, r1_penalty


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(seed: int, size: int = 16) -> Tensor:
    return torch.rand(2, 3, size, size, generator=rng(seed)) * 2 - 1


@pytest.mark.parametrize(("kind", "torch_loss"), [("l1", F.l1_loss), ("l2", F.mse_loss)])
def test_reconstruction_is_a_sum_per_example(kind: str, torch_loss: Any) -> None:
    x, y = images(0), images(1)
    expected = torch.stack([torch_loss(a, b, reduction="sum") for a, b in zip(x, y, strict=True)])
    assert_close(reconstruction(x, y, kind), expected)


def test_charbonnier_by_numpy_and_smooth_where_images_are_equal() -> None:
    x, y = images(0), images(1)
    x[:, :, 0] = y[:, :, 0]
    expected = np.sqrt((x - y).double().numpy() ** 2 + 1e-6).reshape(2, -1).sum(1)
    assert_close(reconstruction(x, y, "charbonnier").double(), torch.from_numpy(expected), rtol=1e-5, atol=0.0)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(reconstruction(x, y, "charbonnier").sum(), x)
    assert torch.equal(gradient[:, :, 0], torch.zeros(2, 3, 16))
    assert_close(gradient[:, :, 1:], ((x - y) / ((x - y) ** 2 + 1e-6).sqrt())[:, :, 1:].detach())


def test_reconstruction_refuses_unknown_kinds_and_broadcasting() -> None:
    with pytest.raises(ValueError, match="l1, l2, charbonnier, got 'huber'"):
        reconstruction(images(0), images(1), "huber")
    with pytest.raises(ValueError, match="equal shapes"):
        reconstruction(images(0), images(1)[:1])


def test_nll_equals_the_published_elementwise_form() -> None:
    """latent-diffusion: sum(|x - y| + w * p broadcast over every value) / batch."""
    x, y, distance = images(2), images(3), torch.tensor([0.25, 1.5])
    weights = LossWeights(perceptual=0.7)
    expected = ((x - y).abs() + 0.7 * distance.view(2, 1, 1, 1)).sum() / 2
    assert_close(nll(x, y, distance, weights), expected)


def test_nll_with_a_log_variance_equals_the_published_elementwise_form() -> None:
    """latent-diffusion: sum((|x - y| + w * p) / exp(logvar) + logvar over every value) / batch."""
    x, y, distance, logvar = images(2), images(3), torch.tensor([0.25, 1.5]), torch.tensor(-0.7)
    elementwise = (x - y).abs() + 0.7 * distance.view(2, 1, 1, 1)
    expected = (elementwise / torch.exp(logvar) + logvar).sum() / 2
    assert_close(nll(x, y, distance, LossWeights(perceptual=0.7), logvar), expected)


def test_the_best_log_variance_is_the_log_of_the_mean_error() -> None:
    """d/ds (R exp(-s) + N s) = 0 at s = log(R / N)."""
    x, y, distance = images(2), images(3), torch.zeros(2)
    best = (x - y).abs().mean().log().requires_grad_()
    (gradient,) = torch.autograd.grad(nll(x, y, distance, LossWeights(), best), best)
    assert abs(gradient.item()) < 1e-2
    assert x[0].numel() == 768


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


def test_accuracy_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0, 0.0]), torch.tensor([-3.0, 0.0, 1.0, -0.1])
    assert discriminator_accuracy(real, fake).item() == 0.5 * (2 / 4 + 2 / 4)


def test_r1_of_a_linear_discriminator_is_its_weights_square() -> None:
    """D(x) = w . x has the gradient w everywhere; as a mean of patches too."""
    weight = torch.randn(3 * 8 * 8, generator=rng(23), requires_grad=True)
    x = images(24, 8).requires_grad_()
    penalty = r1_penalty((x.flatten(1) @ weight)[:, None], x)
    assert_close(penalty, 0.5 * weight.square().sum())
    (gradient,) = torch.autograd.grad(penalty, weight)
    assert_close(gradient, weight.detach())
    corner = weight.view(1, 3, 8, 8)[:, :, :4, :4]
    assert_close(r1_penalty(F.conv2d(x, corner, stride=4), x), 0.5 * 4 * corner.square().sum() / 4**2)


def test_r1_equals_finite_differences_for_a_deep_discriminator() -> None:
    critic = PatchDiscriminator(base_channels=4, num_layers=1, norm="none", generator=rng(25)).double()
    x = images(26, 8)[:1].double().requires_grad_()
    shifted = x.detach() + 1e-6 * torch.eye(192, dtype=torch.float64).view(192, 3, 8, 8)
    slopes = (critic(shifted).mean((1, 2, 3)) - critic(x).mean()) / 1e-6
    assert_close(r1_penalty(critic(x), x), 0.5 * slopes.square().sum(), rtol=1e-4, atol=0.0)


def test_lecam_by_hand() -> None:
    """Averages of the first step are its means, then 0.99 of themselves; real logits are held to the fake average."""
    lecam = LeCam()
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-2.0, 0.0])
    assert lecam(real, fake).item() == 0.0
    lecam.update(torch.tensor(2.0), torch.tensor(-1.0))
    assert lecam.averages.tolist() == [2.0, -1.0]
    assert lecam(real, fake).item() == pytest.approx((4 + 16) / 2 + (16 + 4) / 2)
    lecam.update(torch.tensor(4.0), torch.tensor(-3.0))
    assert lecam.averages.tolist() == pytest.approx([2.02, -1.02])


def test_the_loss_state_is_read_back_and_only_then_learns() -> None:
    state = LossState(0.5, learn_logvar=True)
    state.lecam.update(torch.tensor(2.0), torch.tensor(-1.0))
    other = LossState()
    assert not other.logvar.requires_grad
    other.load_state_dict(state.state_dict())
    assert other.logvar.item() == 0.5 and other.lecam.averages.tolist() == [2.0, -1.0]
    assert other.lecam.updates.item() == 1


def test_penalties_are_off_by_default_lazy_and_checked() -> None:
    assert (DiscriminatorPenalties().r1, DiscriminatorPenalties().lecam) == (0.0, 0.0)
    lazy = DiscriminatorPenalties(r1=2.0, r1_every=3)
    assert [lazy.r1_weight(step) for step in range(5)] == [6.0, 0.0, 0.0, 6.0, 0.0]
    assert math.isclose(sum(lazy.r1_weight(step) for step in range(300)), 2.0 * 300)
    with pytest.raises(ValueError, match="r1_every must be at least 1, got 0"):
        DiscriminatorPenalties(r1_every=0)
    with pytest.raises(ValueError, match="lecam must be at least 0, got -1"):
        DiscriminatorPenalties(lecam=-1.0)


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
    assert weights.adversary_active(50001) and not weights.adversary_active(50000)
    warm = LossWeights(discriminator_start=5, discriminator_warmup=3)
    assert [step for step in range(10) if warm.discriminator_active(step)] == [5, 6, 7, 8, 9]
    assert [step for step in range(10) if warm.adversary_active(step)] == [8, 9]
    assert not LossWeights(discriminator=0.0, discriminator_start=0).adversary_active(10**6)
    with pytest.raises(ValueError, match=r"reconstruction.*l1, l2, charbonnier, got 'l3'"):
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


@pytest.mark.parametrize("norm", ["batch", "group", "act", "none"])
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
    with pytest.raises(ValueError, match="batch, group, act, none, got 'layer'"):
        PatchDiscriminator(norm="layer")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        PatchDiscriminator(num_layers=0)


@pytest.mark.parametrize(("channels", "labels"), [(4, 3), (8, 4), (16, 2)])
def test_label_logits_are_the_mean_latent_along_orthonormal_directions(channels: int, labels: int) -> None:
    """One label's direction alone raises its own logit by its length over the temperature and no other's."""
    directions = label_logits(torch.eye(channels, dtype=torch.float64)[:, :, None, None], labels, 1.0).T
    assert_close(directions @ directions.T, torch.eye(labels, dtype=torch.float64))
    assert_close(directions.sum(1), torch.zeros(labels, dtype=torch.float64), atol=1e-12, rtol=0)
    z = torch.randn(2, channels, 3, 5, dtype=torch.float64, generator=rng(0))
    expected = torch.einsum("bchw,kc->bk", z, directions) / 15 / 0.2
    assert_close(label_logits(z, labels, 0.2), expected)
    moved = z + 3.0 * directions[1].view(1, -1, 1, 1)
    gained = torch.zeros(2, labels, dtype=torch.float64)
    gained[:, 1] = 3.0 / 0.2
    assert_close(label_logits(moved, labels, 0.2) - expected, gained)


@pytest.mark.parametrize("labels", [1, 4])
def test_too_few_or_too_many_labels_are_refused(labels: int) -> None:
    with pytest.raises(ValueError, match=f"4 latent channels tell 2 to 3 labels apart, got {labels}"):
        label_logits(torch.zeros(1, 4, 2, 2), labels, 0.2)
