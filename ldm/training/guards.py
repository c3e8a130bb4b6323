"""What watches a training run and speaks up: names of skipped batches, a discriminator or posterior that collapsed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from autoencoder import Autoencoder, DiagonalGaussian, LatentStatistics, VQModel
from autoencoder.vq import codebook_usage


def named_batch(step: int, keys: Sequence[str], most: int = 32) -> str:
    """A step and the names of the samples it saw, for instance `step 7 (a.png, b.png)`; beyond `most` only a count."""
    rest = [f"{len(keys) - most} more"] if len(keys) > most else []
    return f"step {step} ({', '.join([*keys[:most], *rest])})"


class NonFiniteGuard:
    """Counts updates that were skipped because a loss or gradient was not finite; stops after `limit` in a row."""

    def __init__(self, limit: int = 10) -> None:
        self.limit, self.in_a_row, self.total = limit, 0, 0

    def allows(self, norm: Tensor, where: str) -> bool:
        """True when the update may happen.

        Raises:
            FloatingPointError: after `limit` skipped updates in a row, naming the last batch.
        """
        if bool(torch.isfinite(norm)):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        self.total += 1
        if self.in_a_row >= self.limit:
            raise FloatingPointError(
                f"{self.limit} updates in a row had a non-finite loss or gradient, the last at {where}; "
                "lower optimizer.learning_rate or look at those samples"
            )
        return False


class DiscriminatorWatch:
    """Tells when the discriminator wins so clearly that its gradient says little.

    That is when over the last `window` updates it was right on more than `accuracy` of the patches, or its loss was
    below `loss`. The window is not part of a run's state; after a restart it fills again.
    """

    def __init__(self, window: int = 200, accuracy: float = 0.99, loss: float = 0.01, pause: int = 1000) -> None:
        self.accuracy, self.loss, self.pause = accuracy, loss, pause
        self.seen: deque[Tensor] = deque(maxlen=window)
        self.reported: int | None = None

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Counts the `discriminator_accuracy` and `discriminator` loss of one update; waits for no device."""
        self.seen.append(torch.stack([terms["discriminator_accuracy"], terms["discriminator"]]).detach())

    def warning(self, step: int) -> str | None:
        """One line once the window is full and the discriminator collapsed, at most once in `pause` steps."""
        recent = self.reported is not None and step - self.reported < self.pause
        if recent or len(self.seen) < (self.seen.maxlen or 0):
            return None
        accuracy, loss = torch.stack(list(self.seen)).mean(0).tolist()
        if not (accuracy > self.accuracy or loss < self.loss):
            return None
        self.reported = step
        return (
            f"step {step}: warning: over {len(self.seen)} steps the discriminator was right on {accuracy:.1%} of the "
            f"patches with a loss of {loss:.3g}; lower discriminator.learning_rate_ratio, raise discriminator.r1 or "
            "discriminator.lecam, or start later (loss.discriminator_start)"
        )


class LatentWatch(Protocol):
    """What a validation finds out about the latents."""

    def figures(self) -> dict[str, float]:
        """Scalars to log."""
        ...

    def warning(self, step: int) -> str | None:
        """One line where the latents collapsed."""
        ...


def watched_latents(vae: Autoencoder, batches: Sequence[Tensor]) -> LatentWatch:
    """The watch that fits the model, having seen images [B, 3, H, W] in batches."""
    if isinstance(vae, VQModel):
        return CodebookWatch.of(vae, batches)
    return PosteriorWatch.of(vae.moments(images) for images in batches)


class CodebookWatch:
    """Finds a codebook of which few codes are in use.

    Args:
        indices: the code of every position that was seen, int64.
        codes: how many there are.
        threshold: least fraction of the codes that must occur, where there are enough positions to show it.
    """

    def __init__(self, indices: Tensor, codes: int, threshold: float = 0.1) -> None:
        self.codes, self.threshold = codes, threshold
        self.perplexity, self.used = (float(value) for value in codebook_usage(indices, codes))
        self.reachable = min(1.0, indices.numel() / codes)

    @classmethod
    def of(cls, vae: VQModel, batches: Sequence[Tensor]) -> CodebookWatch:
        """A watch that has seen images [B, 3, H, W] in batches."""
        seen = [vae.quantize(vae.encode(images)).indices.flatten() for images in batches]
        return cls(torch.cat(seen), vae.config.num_vq_embeddings)

    def figures(self) -> dict[str, float]:
        return {"codebook_used": self.used, "codebook_perplexity": self.perplexity}

    def warning(self, step: int) -> str | None:
        """One line where the codebook collapsed."""
        if self.used >= self.threshold * self.reachable:
            return None
        return (
            f"step {step}: warning: {self.used:.1%} of the {self.codes} codes are in use (perplexity "
            f"{self.perplexity:.1f}); try codebook.update ema, or lower codebook.num_vq_embeddings"
        )


class PosteriorWatch:
    """Finds latent channels that carry no information about the image.

    For each channel it measures E_x KL(q(z | x) || N(m, s^2)) in nats per position, with m and s^2 the channel's mean
    and variance over the data: (log s^2 - E log var) / 2. No Gaussian prior gives a smaller value, and the mutual
    information of image and latent is at most that (Hoffman & Johnson 2016), so a channel below `threshold` is dead
    whatever its scale. The KL to N(0, 1) would miss a constant channel that was never pulled to the prior.
    """

    def __init__(self, threshold: float = 1e-2) -> None:
        self.threshold = threshold
        self.statistics: LatentStatistics | None = None
        self.logvar: Tensor | float = 0.0

    @classmethod
    def of(cls, moments: Iterable[Tensor]) -> PosteriorWatch:
        """A watch that has seen all batches of moments."""
        watch = cls()
        for batch in moments:
            watch.add(batch)
        return watch

    def add(self, moments: Tensor) -> None:
        """Counts one batch of moments [B, 2C, h, w]."""
        seen = LatentStatistics.of(moments)
        self.statistics = seen if self.statistics is None else self.statistics + seen
        self.logvar = self.logvar + DiagonalGaussian(moments.double()).logvar.sum((0, 2, 3))

    def nats(self) -> Tensor:
        """The information bound of every channel, float64 [C].

        Raises:
            ValueError: nothing was counted.
        """
        if self.statistics is None:
            raise ValueError("the posterior watch has seen no batch of moments; it needs at least one")
        spread = self.statistics.channel_std.log()
        return spread - 0.5 * self.logvar / self.statistics.sums[0]

    def dead_channels(self) -> list[int]:
        """Indices of the channels below the threshold."""
        return [index for index, nats in enumerate(self.nats().tolist()) if nats < self.threshold]

    def figures(self) -> dict[str, float]:
        """The number of dead channels, and mean and standard deviation of the latents by channel."""
        if self.statistics is None:
            return {}
        mean, std = self.statistics.channel_mean.tolist(), self.statistics.channel_std.tolist()
        found = {"dead_channels": float(len(self.dead_channels()))}
        found |= {f"latent_mean/{index}": value for index, value in enumerate(mean)}
        return found | {f"latent_std/{index}": value for index, value in enumerate(std)}

    def warning(self, step: int) -> str | None:
        """One line that names the dead channels, if there are any."""
        dead = self.dead_channels()
        if not dead:
            return None
        return (
            f"step {step}: warning: {len(dead)} of {len(self.nats())} latent channels ({', '.join(map(str, dead))}) "
            f"carry less than {self.threshold:g} nats a position; lower loss.kl or autoencoder.latent_channels"
        )
