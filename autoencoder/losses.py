"""Loss terms of the autoencoder, as pure functions of tensors (recipe of Rombach et al. 2022, appendix G)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

RECONSTRUCTIONS = ("l1", "l2")
DISCRIMINATOR_LOSSES = ("hinge", "vanilla")


@dataclass(frozen=True)
class LossWeights:
    """Weights of the loss terms; the defaults are those published with latent-diffusion.

    They fit terms that are summed over an image's values and averaged over the batch, and no other reduction.
    The discriminator takes part from step `discriminator_start` on.

    Raises:
        ValueError: an unknown kind, a negative weight or a negative start.
    """

    reconstruction: str = "l1"
    perceptual: float = 1.0
    kl: float = 1e-6
    discriminator: float = 0.5
    discriminator_loss: str = "hinge"
    discriminator_start: int = 50001

    def __post_init__(self) -> None:
        for name, accepted in (
            ("reconstruction", RECONSTRUCTIONS),
            ("discriminator_loss", DISCRIMINATOR_LOSSES),
        ):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}")
        for name in ("perceptual", "kl", "discriminator", "discriminator_start"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}")

    def discriminator_active(self, step: int) -> bool:
        """Whether the adversarial terms count at this step (counted from zero)."""
        return self.discriminator > 0 and step >= self.discriminator_start


def reconstruction(x: Tensor, y: Tensor, kind: str = "l1") -> Tensor:
    """Absolute ("l1") or squared ("l2") difference summed over each example's values: [B, ...] -> [B].

    Raises:
        ValueError: the kind is neither, or the shapes differ.
    """
    if x.shape != y.shape:
        raise ValueError(f"images must have equal shapes, got {tuple(x.shape)} and {tuple(y.shape)}")
    if kind not in RECONSTRUCTIONS:
        raise ValueError(f"kind must be one of {', '.join(RECONSTRUCTIONS)}, got {kind!r}")
    difference = (x - y).abs() if kind == "l1" else (x - y).square()
    return difference.flatten(1).sum(1)


def nll(image: Tensor, target: Tensor, perceptual: Tensor, weights: LossWeights) -> Tensor:
    """Reconstruction plus perceptual distance, summed over an image and averaged over the batch: scalar.

    The distance [B] counts once for each of an image's C*H*W values, because latent-diffusion adds it to
    every value's difference before summing; the published weights presume that.
    """
    values = image[0].numel()
    per_image = reconstruction(image, target, weights.reconstruction) + weights.perceptual * values * perceptual
    return per_image.mean()


def hinge_d_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """1/2 (E max(0, 1 - D(real)) + E max(0, 1 + D(fake))): scalar (Lim & Ye 2017, halved)."""
    return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())


def vanilla_d_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-1/2 (E log s(D(real)) + E log(1 - s(D(fake)))), s the sigmoid: scalar (Goodfellow et al. 2014)."""
    return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: str = "hinge") -> Tensor:
    """The discriminator's loss of the given kind: scalar.

    Raises:
        ValueError: the kind is neither hinge nor vanilla.
    """
    if kind == "hinge":
        return hinge_d_loss(real_logits, fake_logits)
    if kind == "vanilla":
        return vanilla_d_loss(real_logits, fake_logits)
    raise ValueError(f"kind must be one of {', '.join(DISCRIMINATOR_LOSSES)}, got {kind!r}")


def generator_loss(fake_logits: Tensor) -> Tensor:
    """-E D(fake): scalar (Lim & Ye 2017)."""
    return -fake_logits.mean()


def adaptive_weight(nll_grad: Tensor, g_grad: Tensor) -> Tensor:
    """||grad nll|| / (||grad g|| + 1e-4) in [0, 1e4], detached: scalar (Esser et al. 2021, equation 7).

    Both are gradients of the same tensor, the weight of the decoder's last layer.
    """
    ratio: Tensor = nll_grad.norm() / (g_grad.norm() + 1e-4)
    return ratio.clamp(0.0, 1e4).detach()


def last_layer_gradient(features: Tensor, image_grad: Tensor, weight_shape: Sequence[int]) -> Tensor:
    """Gradient of the last convolution's weight, from the loss gradient at its output.

    Args:
        features: the convolution's input [B, C, H, W] (`AutoencoderKL.decode_features`).
        image_grad: d loss / d image [B, D, H, W].
        weight_shape: (D, C, k, k), k odd; stride one and padding k // 2.
    """
    shape = list(weight_shape)
    inputs, padding = features.detach().to(image_grad), shape[-1] // 2
    gradient: Tensor = conv2d_weight(inputs, shape, image_grad, padding=padding)  # type: ignore[no-untyped-call]
    return gradient


def generator_image_gradient(
    nll_loss: Tensor,
    g_loss: Tensor,
    image: Tensor,
    features: Tensor,
    weight_shape: Sequence[int],
    weight: float,
    reduce_mean: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> tuple[Tensor, Tensor]:
    """Gradient [B, D, H, W] at the image of nll + weight * adaptive * g, and the adaptive weight (scalar).

    The losses' networks are traversed once each and the decoder not at all. Continue with
    ``torch.autograd.backward([image, kl_term], [gradient, None])``, the only pass through the decoder.

    Args:
        nll_loss, g_loss: scalars computed from `image`.
        image: the decoder's output [B, D, H, W].
        features: the last convolution's input [B, C, H, W].
        weight_shape: of that convolution's weight, (D, C, k, k).
        weight: the discriminator's weight, 0.5 in the published recipe.
        reduce_mean: averages the last layer's gradients over processes, so that all weigh alike.
    """
    (nll_grad,) = torch.autograd.grad(nll_loss, image)
    (g_grad,) = torch.autograd.grad(g_loss, image)
    adaptive = adaptive_weight(
        reduce_mean(last_layer_gradient(features, nll_grad, weight_shape)),
        reduce_mean(last_layer_gradient(features, g_grad, weight_shape)),
    )
    return nll_grad + weight * adaptive * g_grad, adaptive
