"""Loss terms of the autoencoder, as pure functions of tensors (recipe of Rombach et al. 2022, appendix G)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

RECONSTRUCTIONS = ("l1", "l2", "charbonnier")
DISCRIMINATOR_LOSSES = ("hinge", "vanilla")
CHARBONNIER_EPS = 1e-3


@dataclass(frozen=True)
class LossWeights:
    """Weights of the loss terms; the defaults are those published with latent-diffusion.

    They fit terms that are summed over an image's values and averaged over the batch, and no other reduction.
    The discriminator takes part from step `discriminator_start` on; for its first `discriminator_warmup` steps it
    learns and the autoencoder does not hear of it yet.

    Raises:
        ValueError: an unknown kind, a negative weight or a negative start.
    """

    reconstruction: str = "l1"
    perceptual: float = 1.0
    kl: float = 1e-6
    discriminator: float = 0.5
    discriminator_loss: str = "hinge"
    discriminator_start: int = 50001
    discriminator_warmup: int = 0

    def __post_init__(self) -> None:
        for name, accepted in (
            ("reconstruction", RECONSTRUCTIONS),
            ("discriminator_loss", DISCRIMINATOR_LOSSES),
        ):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}")
        for name in ("perceptual", "kl", "discriminator", "discriminator_start", "discriminator_warmup"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}")

    def discriminator_active(self, step: int) -> bool:
        """Whether the discriminator learns at this step (counted from zero)."""
        return self.discriminator > 0 and step >= self.discriminator_start

    def adversary_active(self, step: int) -> bool:
        """Whether the autoencoder learns from the discriminator at this step (counted from zero)."""
        return self.discriminator_active(step) and step >= self.discriminator_start + self.discriminator_warmup


@dataclass(frozen=True)
class DiscriminatorPenalties:
    """Weights of the discriminator's regularisers; 0 switches one off.

    R1 is computed at every `r1_every`-th step only and then counts `r1_every` times (lazy regularisation, Karras et
    al. 2020, section 3.1).

    Raises:
        ValueError: a negative weight or an interval below one.
    """

    r1: float = 0.0
    r1_every: int = 16
    lecam: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("r1", 0), ("r1_every", 1), ("lecam", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)!r}")

    def r1_weight(self, step: int) -> float:
        """What the R1 penalty is multiplied by at this step (counted from zero)."""
        return self.r1 * self.r1_every if step % self.r1_every == 0 else 0.0


def reconstruction(x: Tensor, y: Tensor, kind: str = "l1") -> Tensor:
    """Difference d of two images, summed over each example's values: [B, ...] -> [B].

    "l1" is |d|, "l2" d^2 and "charbonnier" sqrt(d^2 + eps^2) with eps = 1e-3: like l1, but smooth at zero
    (Charbonnier et al. 1994, with the eps of Lai et al. 2018).

    Raises:
        ValueError: the kind is none of them, or the shapes differ.
    """
    if x.shape != y.shape:
        raise ValueError(f"images must have equal shapes, got {tuple(x.shape)} and {tuple(y.shape)}")
    if kind not in RECONSTRUCTIONS:
        raise ValueError(f"kind must be one of {', '.join(RECONSTRUCTIONS)}, got {kind!r}")
    difference = (x - y).flatten(1)
    match kind:
        case "l1":
            return difference.abs().sum(1)
        case "l2":
            return difference.square().sum(1)
        case _:
            return (difference.square() + CHARBONNIER_EPS**2).sqrt().sum(1)


def nll(
    image: Tensor, target: Tensor, perceptual: Tensor, weights: LossWeights, logvar: Tensor | float = 0.0
) -> Tensor:
    """rec / exp(logvar) + logvar, summed over an image's values and averaged over the batch: scalar.

    rec is reconstruction plus perceptual distance. The distance [B] and `logvar` (scalar) count once for each of an
    image's C*H*W values, because latent-diffusion adds both to every value's difference before summing; the published
    weights presume that.
    """
    values = image[0].numel()
    per_image = reconstruction(image, target, weights.reconstruction) + weights.perceptual * values * perceptual
    logvar = torch.as_tensor(logvar, dtype=per_image.dtype, device=per_image.device)
    return per_image.mean() * torch.exp(-logvar) + values * logvar


def label_logits(mean: Tensor, labels: int, temperature: float) -> Tensor:
    """How far the latents of each picture lean towards each label: logits [B, labels] of latents [B, C, h, w].

    Their mean over space, dotted with one fixed direction for each label, over the temperature (in units of the
    latents). The directions are orthonormal: rows of the cosine transform of length C, without the constant one.
    Cross-entropy on these logits moves the mean, to which all places add, so errors at single places matter little.

    Raises:
        ValueError: fewer than two labels, or not fewer than latent channels.
    """
    channels = mean.shape[1]
    if not 2 <= labels < channels:
        raise ValueError(f"{channels} latent channels tell 2 to {channels - 1} labels apart, got {labels}")
    order = torch.arange(1, labels + 1, dtype=torch.float64).unsqueeze(1)
    place = (torch.arange(channels, dtype=torch.float64) + 0.5) / channels
    directions = (2 / channels) ** 0.5 * torch.cos(math.pi * order * place)
    logits: Tensor = mean.mean((2, 3)) @ directions.T.to(mean) / temperature
    return logits


class LeCam(nn.Module):
    """LeCam regularisation: keeps the discriminator's outputs near their moving averages (Tseng et al. 2021, eq. 4).

    `averages` [2] are a_R and a_F, of the mean logits on real and on reconstructed pictures; before the first update
    there is nothing to keep to and the penalty is zero.
    """

    averages: Tensor
    updates: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("averages", torch.zeros(2))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """E (D(real) - a_F)^2 + E (D(fake) - a_R)^2: scalar."""
        average_real, average_fake = self.averages[0], self.averages[1]
        penalty: Tensor = (real_logits - average_fake).square().mean() + (fake_logits - average_real).square().mean()
        return penalty * (self.updates > 0)

    @torch.no_grad()
    def update(self, real_mean: Tensor, fake_mean: Tensor) -> None:
        """Moves the averages towards the mean logits (scalars) of one step; the first step sets them."""
        weight = torch.where(self.updates > 0, 1 - self.decay, 1.0)
        self.averages.lerp_(torch.stack([real_mean, fake_mean]).to(self.averages), weight.to(self.averages))
        self.updates += 1


class LossState(nn.Module):
    """What the losses learn and remember: `logvar` of `nll` (scalar), a parameter, and `lecam`'s averages.

    Args:
        logvar: the initial log-variance, which stays as it is unless `learn_logvar`.
    """

    def __init__(self, logvar: float = 0.0, learn_logvar: bool = False) -> None:
        super().__init__()
        self.logvar = nn.Parameter(torch.tensor(float(logvar)), requires_grad=learn_logvar)
        self.lecam = LeCam()


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


def discriminator_accuracy(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Share of patches told right, real logits > 0 and fake logits < 0, both kinds weighing half: scalar."""
    right = (real_logits > 0).float().mean() + (fake_logits < 0).float().mean()
    return 0.5 * right


def r1_penalty(real_logits: Tensor, real: Tensor) -> Tensor:
    """1/2 E ||grad_x D(x)||^2 on real images: scalar with a graph (Mescheder et al. 2018, eq. 9, without gamma).

    D(x) is the mean of an image's patch logits, as in the adversarial losses.

    Args:
        real_logits: [B, S, h, w], computed from `real`.
        real: [B, C, H, W], requiring gradients.
    """
    (gradient,) = torch.autograd.grad(real_logits.flatten(1).mean(1).sum(), real, create_graph=True)
    return 0.5 * gradient.square().flatten(1).sum(1).mean()


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
    g_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Gradient [B, D, H, W] at the image of nll + weight * adaptive * g, and the adaptive weight (scalar).

    The losses' networks are traversed once each and the decoder not at all; the graph of `g_loss` is kept, for the
    discriminator's own loss. Continue with
    ``torch.autograd.backward([image, kl_term], [gradient, None])``, the only pass through the decoder.

    Args:
        nll_loss, g_loss: scalars computed from `image`.
        image: the decoder's output [B, D, H, W].
        features: the last convolution's input [B, C, H, W].
        weight_shape: of that convolution's weight, (D, C, k, k).
        weight: the discriminator's weight, 0.5 in the published recipe.
        reduce_mean: averages the last layer's gradients over processes, so that all weigh alike.
        g_scale: the adversarial gradient is computed so many times as large and divided afterwards, because that of a
            mean over many patches underflows in half precision; a power of two changes nothing else.
    """
    (nll_grad,) = torch.autograd.grad(nll_loss, image)
    (g_grad,) = torch.autograd.grad(g_loss, image, torch.full_like(g_loss, g_scale), retain_graph=True)
    g_grad = g_grad / g_scale
    out_channels, *kernel = weight_shape
    both = torch.cat([nll_grad, g_grad], dim=1)
    at_last_layer = reduce_mean(last_layer_gradient(features, both, (2 * out_channels, *kernel)))
    adaptive = adaptive_weight(*at_last_layer.chunk(2))
    return nll_grad + weight * adaptive * g_grad, adaptive
