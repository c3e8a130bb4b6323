"""VQModel: the first stage with a codebook in place of a Gaussian (Rombach et al. 2022, section 3.1, "VQ-reg.")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder.blocks import Decoder, Encoder, conv3x3
from autoencoder.config import VQConfig
from autoencoder.gaussian import LEAST_LOGVAR
from autoencoder.model import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    AutoencoderKL,
    ConvolutionalAutoencoder,
    load_weights,
    read_config,
    zero_residual_branches,
)

Rule = Literal["loss", "ema"]


@dataclass(frozen=True)
class CodebookUpdate:
    """How the codebook learns: by the gradient of its loss, or as moving averages of what is assigned to each code.

    Attributes:
        rule: "loss" (van den Oord et al. 2017, eq. 3) or "ema" (their appendix A.1; Razavi et al. 2019, section 2.1).
        decay: gamma of the averages, in [0, 1); "ema" only.
        smoothing: the count that Laplace smoothing adds to every code, positive; "ema" only.

    Raises:
        ValueError: a value is outside the range above.
    """

    rule: Rule = "loss"
    decay: float = 0.99
    smoothing: float = 1e-5

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"rule must be one of {', '.join(get_args(Rule))}, got {self.rule!r}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {self.decay!r}")
        if not self.smoothing > 0:
            raise ValueError(f"smoothing must be positive, got {self.smoothing!r}")


class Quantized(NamedTuple):
    """Latents on the codebook, and what became of the codes in this batch.

    Attributes:
        z: [B, D, h, w], the nearest code of every position; its gradient passes to the encoder unchanged.
        indices: [B, h, w], int64, which code that is.
        codebook_loss: scalar, mean of (sg[latents] - code)^2; zero where averages move the codebook.
        commitment_loss: scalar, mean of (latents - sg[code])^2.
        perplexity: scalar in [1, K], exp of the entropy of the codes' frequencies.
        used: scalar in (0, 1], fraction of the codes that occur.
    """

    z: Tensor
    indices: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor
    perplexity: Tensor
    used: Tensor

    def loss(self, beta: float = 0.25) -> Tensor:
        """Codebook loss + beta * commitment loss (van den Oord et al. 2017, eq. 3, second and third term).

        diffusers' class, by default, multiplies the codebook loss by beta instead.
        """
        return self.codebook_loss + beta * self.commitment_loss


class VQReconstruction(NamedTuple):
    """A training forward: image [B, 3, H, W], last layer's input [B, E, H, W], latents [B, D, h, w] and their codes."""

    image: Tensor
    features: Tensor
    latents: Tensor
    quantized: Quantized


class VectorQuantizer(nn.Module):
    """A codebook of K vectors with D entries; [B, D, h, w] -> `Quantized`.

    With the rule "ema" it keeps two float32 averages, counts [K] and sums [K, D], which are no part of the state
    dict. They start where the codebook is their quotient, again whenever weights are loaded.
    """

    counts: Tensor
    sums: Tensor

    def __init__(self, codes: int, dim: int, update: CodebookUpdate) -> None:
        super().__init__()
        self.update = update
        self.embedding = nn.Embedding(codes, dim)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)
        if update.rule == "ema":
            self.embedding.weight.requires_grad_(False)
            self._start_averages()
            self.register_load_state_dict_post_hook(lambda module, _: module._start_averages())  # type: ignore[no-untyped-call]

    def _start_averages(self) -> None:
        sums = self.embedding.weight.detach().float().clone()
        self.register_buffer("counts", sums.new_ones(len(sums)), persistent=False)
        self.register_buffer("sums", sums, persistent=False)

    def forward(self, latents: Tensor) -> Quantized:
        codebook = self.embedding.weight
        indices = nearest_codes(latents, codebook)
        codes = self.embedding(indices).permute(0, 3, 1, 2)
        commitment_loss = F.mse_loss(latents, codes.detach())
        averaged = self.update.rule == "ema"
        codebook_loss = torch.zeros_like(commitment_loss) if averaged else F.mse_loss(codes, latents.detach())
        z = codes.detach() + (latents - latents.detach())
        return Quantized(z, indices, codebook_loss, commitment_loss, *codebook_usage(indices, len(codebook)))

    @torch.no_grad()
    def absorb(self, counts: Tensor, sums: Tensor) -> None:
        """Take a batch's `code_statistics` into the averages, and the codebook from those."""
        decay, smoothing = self.update.decay, self.update.smoothing
        self.counts.lerp_(counts.to(self.counts), 1 - decay)
        self.sums.lerp_(sums.to(self.sums), 1 - decay)
        total = self.counts.sum()
        smoothed = (self.counts + smoothing) / (total + len(self.counts) * smoothing) * total
        self.embedding.weight.copy_(self.sums / smoothed.unsqueeze(1))


class VQModel(ConvolutionalAutoencoder):
    """Convolutional autoencoder with a vector-quantised bottleneck; parameter names are those of diffusers' class."""

    config: VQConfig
    quant_conv: nn.Conv2d
    post_quant_conv: nn.Conv2d

    def __init__(self, config: VQConfig, update: CodebookUpdate = CodebookUpdate()) -> None:
        super().__init__()
        self.config = config
        channels, dim = config.latent_channels, config.embed_dim
        self.encoder = Encoder(config)
        self.encoder.conv_out = conv3x3(config.block_out_channels[-1], channels)
        self.quant_conv = nn.Conv2d(channels, dim, 1)
        self.quantize = VectorQuantizer(config.num_vq_embeddings, dim, update)
        self.post_quant_conv = nn.Conv2d(dim, channels, 1)
        self.decoder = Decoder(config)

    def encode(self, x: Tensor) -> Tensor:
        """Latents before quantisation [B, D, H/f, W/f] of images x [B, 3, H, W] in [-1, 1].

        A denoiser works on these, times `scaling_factor`; its output is quantised before it is decoded.

        Raises:
            ValueError: the channels are not the config's, or H or W is no multiple of the factor f.
        """
        return self._encoded(x)

    @property
    def latent_channels(self) -> int:
        return self.config.embed_dim

    def moments(self, x: Tensor) -> Tensor:
        """`encode` as a Gaussian without spread [B, 2D, H/f, W/f], for everything that reads posteriors."""
        latents = self.encode(x)
        return torch.cat([latents, torch.full_like(latents, LEAST_LOGVAR)], dim=1)

    def project(self, z: Tensor) -> Tensor:
        codes: Tensor = self.quantize(z).z
        return codes

    def forward(self, x: Tensor) -> VQReconstruction:
        """Encode, quantise, decode; a distributed wrapper calls it."""
        latents = self.encode(x)
        quantized: Quantized = self.quantize(latents)
        features = self.decode_features(quantized.z)
        return VQReconstruction(self.decoder.conv_out(features), features, latents, quantized)

    def update_codebook(self, counts: Tensor, sums: Tensor) -> None:
        """One step of the averages from `code_statistics`, after they are added up over micro-batches and processes.

        N <- decay N + (1 - decay) n;  m <- decay m + (1 - decay) sum of latents;  code = m / N, N smoothed so that
        codes without members stay finite (van den Oord et al. 2017, appendix A.1).

        Raises:
            ValueError: the rule is not "ema".
        """
        if self.quantize.update.rule != "ema":
            raise ValueError(f"update_codebook needs the rule 'ema', got {self.quantize.update.rule!r}")
        self.quantize.absorb(counts, sums)

    def codebook_state(self) -> dict[str, Tensor]:
        """Copies of the averages that a run needs to go on, counts [K] and sums [K, D]; empty for the rule "loss"."""
        return {name: buffer.clone() for name, buffer in self.quantize.named_buffers()}

    def load_codebook_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up averages from `codebook_state`; to be called after the weights are loaded.

        Raises:
            ValueError: names or shapes are not those of this model and its rule.
        """
        wanted = {name: tuple(buffer.shape) for name, buffer in self.quantize.named_buffers()}
        given = {name: tuple(value.shape) for name, value in state.items()}
        if given != wanted:
            raise ValueError(f"codebook state must hold tensors of the shapes {wanted}, got {given}")
        for name, buffer in self.quantize.named_buffers():
            buffer.copy_(state[name])

    @classmethod
    def from_scratch(cls, config: VQConfig, seed: int, update: CodebookUpdate = CodebookUpdate()) -> VQModel:
        """A network to train, a function of the seed alone; residual branches start at zero as in `AutoencoderKL`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(config, update)
        zero_residual_branches(model)
        return model

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        update: CodebookUpdate = CodebookUpdate(),
    ) -> VQModel:
        """Read diffusers' ``vqvae/`` folder (config.json, diffusion_pytorch_model.safetensors), in eval mode.

        Raises:
            ValueError: a file is missing or unreadable, or its keys or shapes are not this config's; the
                sentence names the file and the key.
        """
        folder = Path(folder)
        config = read_config(folder / CONFIG_NAME, VQConfig.from_dict)
        with torch.device("meta"):
            model = cls(config, update)
        load_weights(model, folder / WEIGHTS_NAME, device, dtype)
        return model.eval()


Autoencoder = AutoencoderKL | VQModel
"""Either kind of first stage."""


@torch.no_grad()
def nearest_codes(latents: Tensor, codebook: Tensor) -> Tensor:
    """Indices [B, h, w] of the codes [K, D] at the least squared distance from latents [B, D, h, w], in float32.

    |x - e|^2 = |x|^2 - 2 x.e + |e|^2, of which the first term decides nothing.
    """
    flat, codes = _rows(latents), codebook.float()
    with torch.autocast(latents.device.type, enabled=False):
        nearest = torch.addmm(codes.square().sum(1), flat, codes.T, alpha=-2).argmin(1)
    return nearest.view(latents.shape[0], *latents.shape[2:])


@torch.no_grad()
def code_statistics(latents: Tensor, indices: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Members of each code [K] and the sum of their latents [K, D], float32, from [B, D, h, w] and [B, h, w].

    Statistics of parts of a batch add up to those of the batch.
    """
    flat = _rows(latents)
    sums = flat.new_zeros(codes, flat.shape[1]).index_add_(0, indices.flatten(), flat)
    return torch.bincount(indices.flatten(), minlength=codes).float(), sums


def codebook_usage(indices: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Perplexity exp(-sum p log p) of the codes' frequencies p in a batch, and the fraction of the codes that occur."""
    counts = torch.bincount(indices.flatten(), minlength=codes).float()
    perplexity = torch.special.entr(counts / counts.sum()).sum().exp()
    return perplexity, (counts > 0).float().mean()


def _rows(latents: Tensor) -> Tensor:
    """[B, D, h, w] -> float32 [B*h*w, D]."""
    return latents.float().permute(0, 2, 3, 1).flatten(0, 2)
