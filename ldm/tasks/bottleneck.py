"""What differs between the two kinds of latent space in a training step: how they are regularised and what they log."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from autoencoder import Reconstruction, VQModel, VQReconstruction, code_statistics
from ldm.data.batches import PixelBatch
from ldm.sampling import randn_rows
from ldm.tasks.labels import LatentLabels


class Bottled(NamedTuple):
    """Reconstructions [B, 3, H, W], the last layer's input [B, E, H, W], the weighted regulariser (None: constant)."""

    image: Tensor
    features: Tensor
    loss: Tensor | None
    terms: dict[str, Tensor]


class Bottleneck(Protocol):
    """A latent space under training; `term` names the unweighted regulariser among its terms."""

    term: str

    def __call__(self, model: nn.Module, batch: PixelBatch, rows: Sequence[torch.Generator], step: int) -> Bottled:
        """Encodes and decodes a batch with the model, which may be wrapped; draws from `rows`, one for each picture."""
        ...

    def remember(self) -> None:
        """Called once an update has happened, by every process."""
        ...

    def parts(self) -> Mapping[str, CodebookBottleneck]:
        """What a run's state must hold beside the weights."""
        ...


class GaussianBottleneck:
    """Samples of the posterior and weight * KL(q(z | x) || N(0, 1)), summed over a latent, averaged over the batch; and
    the cross-entropy of `labels`, where there are any.

    A frozen encoder's KL is a constant and only logged.

    Args:
        weight: of the KL, 1e-6 in the published recipe.
        latent_channels: C.
        downsample_factor: by which latents are smaller than images, whatever their shape.
        error: tau; each picture's latent is decoded with Gaussian noise of standard deviation |N(0, tau^2)| added, in
            the units of the raw latents (Zheng et al. 2025, Diffusion Transformers with Representation Autoencoders,
            noise-augmented decoding).
        drawn: the errors [B, C, h, w] that stage two makes of the pictures of those names, in the same units, or None;
            they take the place of noise in a share `drawn_share` of the pictures.
        labels: that the posterior means are to tell, or None.
    """

    term = "kl"

    def __init__(
        self,
        weight: float,
        latent_channels: int,
        downsample_factor: int,
        error: float = 0.0,
        drawn: Callable[[Sequence[str]], Tensor] | None = None,
        drawn_share: float = 0.0,
        labels: LatentLabels | None = None,
    ) -> None:
        self.weight, self.latent_channels, self.downsample_factor = weight, latent_channels, downsample_factor
        self.error, self.drawn, self.drawn_share, self.labels = error, drawn, drawn_share, labels

    def __call__(self, model: nn.Module, batch: PixelBatch, rows: Sequence[torch.Generator], step: int) -> Bottled:
        height, width = (side // self.downsample_factor for side in batch.image.shape[2:])
        shape = (len(rows), self.latent_channels, height, width)
        noise, error = randn_rows(shape, rows), None
        if self.error > 0:
            level = self.error * randn_rows((len(rows), 1, 1, 1), rows).abs()
            error = level * randn_rows(shape, rows)
        if self.drawn is not None:
            chosen = torch.cat([torch.rand(1, generator=row) for row in rows]) < self.drawn_share
            other = torch.zeros(shape) if error is None else error
            error = torch.where(chosen.view(-1, 1, 1, 1), self.drawn(batch.keys), other)
        device = batch.image.device
        out: Reconstruction = model(batch.image, noise.to(device), None if error is None else error.to(device))
        kl = out.posterior.kl().mean()
        loss, terms = self.weight * kl, {"kl": kl.detach()}
        if self.labels is not None:
            label, of_labels = self.labels.loss(out.posterior.mean, batch.captions)
            loss, terms = loss + label, terms | of_labels
        return Bottled(out.image, out.features, loss if loss.requires_grad else None, terms)

    def remember(self) -> None:
        """There is nothing to remember."""

    def parts(self) -> Mapping[str, CodebookBottleneck]:
        return {}


class CodebookBottleneck:
    """The nearest codes and weight * (codebook loss + commitment * commitment loss) (van den Oord et al. 2017, eq. 3).

    Both losses are means over the latents' values and count once for each value of an image, as the reconstruction
    does; the published weights presume that. Where moving averages move the codebook, what its codes were assigned is
    gathered over the micro-batches of a step, averaged over processes, and absorbed once the update has happened. The
    statistics are scaled to one member a code on average, so that they do not depend on how the batch is cut.

    Args:
        vae: the model without its wrapper.
        weight, commitment: 1 and 0.25 in the published recipe.
        reduce_mean: averages a tensor over all processes.
    """

    term = "commitment"

    def __init__(self, vae: VQModel, weight: float, commitment: float, reduce_mean: Callable[[Tensor], Tensor]) -> None:
        self.vae, self.weight, self.commitment, self.reduce_mean = vae, weight, commitment, reduce_mean
        self.codes = len(vae.quantize.embedding.weight)
        self.step, self.gathered = -1, list[Tensor]()

    def __call__(self, model: nn.Module, batch: PixelBatch, rows: Sequence[torch.Generator], step: int) -> Bottled:
        out: VQReconstruction = model(batch.image)
        found = out.quantized
        self._gather(step, out.latents.detach(), found.indices)
        loss = self.weight * batch.image[0].numel() * found.loss(self.commitment)
        terms = {
            "codebook": found.codebook_loss.detach(),
            "commitment": found.commitment_loss.detach(),
            "perplexity": found.perplexity,
            "codes_used": found.used,
        }
        return Bottled(out.image, out.features, loss if loss.requires_grad else None, terms)

    def remember(self) -> None:
        """Moves the codebook's averages by the step that was gathered last, where it has any."""
        if self.vae.quantize.update.rule == "ema":
            statistics = self.reduce_mean(torch.stack(self.gathered).mean(0))
            self.vae.update_codebook(statistics[:, 0], statistics[:, 1:])

    def parts(self) -> Mapping[str, CodebookBottleneck]:
        return {} if self.vae.quantize.update.rule == "loss" else {"codebook": self}

    def state_dict(self) -> dict[str, Tensor]:
        """The codebook's averages; to be loaded after the weights."""
        return self.vae.codebook_state()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.vae.load_codebook_state(state)

    def _gather(self, step: int, latents: Tensor, indices: Tensor) -> None:
        if step != self.step:
            self.step, self.gathered = step, []
        counts, sums = code_statistics(latents, indices, self.codes)
        self.gathered.append(torch.cat([counts.unsqueeze(1), sums], dim=1) * (self.codes / indices.numel()))
