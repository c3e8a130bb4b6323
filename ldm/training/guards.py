"""What watches a training run and speaks up: names of skipped batches, a discriminator or posterior that collapsed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, pstdev
from typing import Protocol

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from autoencoder import Autoencoder, DiagonalGaussian, LatentStatistics, VQModel
from autoencoder.vq import codebook_usage

SKIPS_IN_A_ROW = 10
"""So many updates in a row that must not happen end a run."""


def named_batch(step: int, keys: Sequence[str], most: int = 32) -> str:
    """A step and the names of the samples it saw, for instance `step 7 (a.png, b.png)`; beyond `most` only a count."""
    rest = [f"{len(keys) - most} more"] if len(keys) > most else []
    return f"step {step} ({', '.join([*keys[:most], *rest])})" if keys else f"step {step}"


class UpdateGuard:
    """Decides before every update whether it may happen, counts those that may not, and stops after `limit` in a row.

    A loss or gradient that is not finite never passes. With `spike` given, neither does a loss that lies more than
    `spike` standard deviations (at least 1 % of the mean's size) above the mean of the last `window` losses; it is
    judged once a quarter of the window is known. A spike enters the window cut to that bound, so that a lasting change
    of level is accepted after a while. The window is part of a run's state.
    """

    def __init__(self, spike: float | None = None, window: int = 200, limit: int = SKIPS_IN_A_ROW) -> None:
        self.spike, self.limit = spike, limit
        self.losses: deque[float] = deque(maxlen=window)
        self.in_a_row, self.total = 0, 0

    def refusal(self, loss: Tensor, norm: Tensor, step: int, keys: Sequence[str] = ()) -> str | None:
        """Why the update must not happen, as one line; None when it may. Every process must call it.

        Args:
            loss, norm: the loss and the gradient's norm, scalars that are the same in every process.
            keys: names of this process's samples in the step, where they are known; those of all are told.

        Raises:
            FloatingPointError: after `limit` refusals in a row, naming the last batch.
        """
        reason = self._reason(*torch.stack([loss.float(), norm.float()]).tolist())
        if reason is None:
            self.in_a_row = 0
            return None
        where = named_batch(step, gather_object(list(keys)))
        self.in_a_row += 1
        self.total += 1
        if self.in_a_row >= self.limit:
            raise FloatingPointError(
                f"{self.limit} updates in a row were skipped, the last at {where}: {reason}; lower "
                "optimizer.learning_rate or look at those samples"
            )
        return f"{where}: {reason}, no update"

    def _reason(self, loss: float, norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return "a loss or gradient is not finite"
        bound = self._bound()
        if self.spike is not None:
            self.losses.append(min(loss, bound))
        return f"a loss of {loss:.4g} above {bound:.4g} is a spike" if loss > bound else None

    def _bound(self) -> float:
        if self.spike is None or 4 * len(self.losses) < (self.losses.maxlen or 0):
            return math.inf
        middle = fmean(self.losses)
        return middle + self.spike * max(pstdev(self.losses, middle), 0.01 * abs(middle))

    def state_dict(self) -> dict[str, list[float]]:
        return {"losses": list(self.losses)}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        self.losses.clear()
        self.losses.extend(state.get("losses", []))


class RunningStatistics:
    """A network's buffers as the last update left them; a batch that is refused has already moved them."""

    def __init__(self, module: nn.Module) -> None:
        self.buffers = list(module.buffers())
        self.kept = [buffer.clone() for buffer in self.buffers]

    def keep(self) -> None:
        """Takes the present values as good."""
        for kept, buffer in zip(self.kept, self.buffers, strict=True):
            kept.copy_(buffer)

    def restore(self) -> None:
        """Puts the kept values back."""
        for kept, buffer in zip(self.kept, self.buffers, strict=True):
            buffer.copy_(kept)


def label_warning(step: int, row: Mapping[str, float]) -> str | None:
    """One line when no picture since the last report had a label of those in a setting, so that they do nothing.

    Args:
        row: the averages that were reported, the shares of pictures with a label among them where there are labels.
    """
    settings = {"labelled": "latent_labels.names", "discriminator_labelled": "discriminator.labels"}
    idle = [setting for term, setting in settings.items() if row.get(term, 1.0) == 0]
    if not idle:
        return None
    return f"step {step}: warning: no caption named exactly one of {' or of '.join(idle)}; look at the captions' words"


class DiscriminatorWatch:
    """Tells when the discriminator's gradient says little, because it wins clearly or because it has learnt nothing.

    It wins when over the last `window` updates it was right on more than `accuracy` of the patches, or its loss was
    below `loss`. It has learnt nothing when it was right on less than `chance` of them: the adaptive weight then
    scales noise up to the reconstruction's gradient. The window is not part of a run's state; after a restart it fills
    again.
    """

    def __init__(
        self, window: int = 200, accuracy: float = 0.99, loss: float = 0.01, chance: float = 0.51, pause: int = 1000
    ) -> None:
        self.accuracy, self.loss, self.chance, self.pause = accuracy, loss, chance, pause
        self.seen: deque[Tensor] = deque(maxlen=window)
        self.reported: int | None = None

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Counts the `discriminator_accuracy` and `discriminator` loss of one update; waits for no device."""
        self.seen.append(torch.stack([terms["discriminator_accuracy"], terms["discriminator"]]).detach())

    def warning(self, step: int) -> str | None:
        """One line once the window is full and the discriminator of no use, at most once in `pause` steps."""
        recent = self.reported is not None and step - self.reported < self.pause
        if recent or len(self.seen) < (self.seen.maxlen or 0):
            return None
        accuracy, loss = torch.stack(list(self.seen)).mean(0).tolist()
        if accuracy > self.accuracy or loss < self.loss:
            advice = "raise discriminator.r1 or discriminator.lecam, or start later (loss.discriminator_start)"
        elif accuracy < self.chance:
            advice = "let it learn alone first (loss.discriminator_warmup), or choose discriminator.type: projected"
        else:
            return None
        self.reported = step
        return (
            f"step {step}: warning: over {len(self.seen)} steps the discriminator was right on {accuracy:.1%} of the "
            f"patches with a loss of {loss:.3g}; lower discriminator.learning_rate_ratio, {advice}"
        )


class LatentWatch(Protocol):
    """What a validation finds out about the latents."""

    def figures(self) -> dict[str, float]:
        """Scalars to log."""
        ...

    def warning(self, step: int) -> str | None:
        """One line where the latents collapsed."""
        ...


def watched_latents(vae: Autoencoder, batches: Iterable[Tensor]) -> LatentWatch:
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
    def of(cls, vae: VQModel, batches: Iterable[Tensor]) -> CodebookWatch:
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
