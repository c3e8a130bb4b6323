"""AutoencoderKL, the first stage of latent diffusion (Rombach et al. 2022, section 3.1), and the folder of a model."""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from autoencoder.blocks import Decoder, Encoder
from autoencoder.config import AutoencoderConfig, VQConfig
from autoencoder.gaussian import DiagonalGaussian

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

Config = TypeVar("Config")


class Reconstruction(NamedTuple):
    """A training forward: image [B, 3, H, W], the last layer's input [B, D, H, W], moments [B, 2C, h, w]."""

    image: Tensor
    features: Tensor
    moments: Tensor

    @property
    def posterior(self) -> DiagonalGaussian:
        return DiagonalGaussian(self.moments)


class ConvolutionalAutoencoder(nn.Module, ABC):
    """What `AutoencoderKL` and `VQModel` share: encoder, decoder, 1x1 convolutions around the latents, the folder."""

    config: AutoencoderConfig | VQConfig
    encoder: Encoder
    decoder: Decoder
    quant_conv: nn.Conv2d | None
    post_quant_conv: nn.Conv2d | None

    @property
    def downsample_factor(self) -> int:
        """Image pixels along one side of a latent position."""
        return self.config.downsample_factor

    @property
    def last_layer(self) -> Tensor:
        """Weight [3, D, 3, 3] of the decoder's last convolution, where the adversarial weight is measured."""
        return self.decoder.conv_out.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.last_layer.dtype

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Trade time for memory: keep block boundaries only and recompute the rest in the backward pass."""
        self.encoder.gradient_checkpointing = enabled
        self.decoder.gradient_checkpointing = enabled

    def _encoded(self, x: Tensor) -> Tensor:
        """What leaves the encoder and its 1x1 convolution, [B, D, H/f, W/f], for images [B, 3, H, W] in [-1, 1]."""
        channels, factor = self.config.in_channels, self.downsample_factor
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(
                f"images must be [B, {channels}, H, W] with H and W multiples of {factor}, got shape {tuple(x.shape)}"
            )
        h: Tensor = self.encoder(x)
        return h if self.quant_conv is None else self.quant_conv(h)

    def decode_features(self, z: Tensor) -> Tensor:
        """The last convolution's input [B, block_out_channels[0], f*h, f*w] for raw latents z [B, C, h, w].

        Raises:
            ValueError: z has not the latents' number of channels.
        """
        first = self.decoder.conv_in if self.post_quant_conv is None else self.post_quant_conv
        channels = first.in_channels
        if z.ndim != 4 or z.shape[1] != channels:
            raise ValueError(f"latents must be [B, {channels}, h, w], got shape {tuple(z.shape)}")
        return self.decoder.features(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def decode(self, z: Tensor) -> Tensor:
        """Images [B, 3, f*h, f*w], about [-1, 1] and not clamped, from raw latents z [B, C, h, w]."""
        image: Tensor = self.decoder.conv_out(self.decode_features(z))
        return image

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Channels C of the raw latents."""

    @abstractmethod
    def moments(self, x: Tensor) -> Tensor:
        """Mean and log-variance [B, 2C, H/f, W/f] of the latents of images x [B, 3, H, W] in [-1, 1]."""

    @abstractmethod
    def project(self, z: Tensor) -> Tensor:
        """What the decoder was trained on that is nearest to latents z [B, C, h, w]: z itself, or the nearest codes."""

    def reconstruct(self, x: Tensor) -> Tensor:
        """Images x [B, 3, H, W] in [-1, 1], encoded without noise and decoded, not clamped."""
        return self.decode(self.project(self.moments(x).chunk(2, dim=1)[0]))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and diffusion_pytorch_model.safetensors; each file appears whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        _write(folder / WEIGHTS_NAME, save(state, metadata={"format": "pt"}))
        _write(folder / CONFIG_NAME, (json.dumps(self.config.to_dict(), indent=2) + "\n").encode())


class AutoencoderKL(ConvolutionalAutoencoder):
    """Convolutional autoencoder with a Gaussian bottleneck; parameter names are those of diffusers' class."""

    config: AutoencoderConfig

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else None

    def moments(self, x: Tensor) -> Tensor:
        """Mean and log-variance [B, 2C, H/f, W/f] of q(z | x) for images x [B, 3, H, W] in [-1, 1].

        Raises:
            ValueError: the channels are not the config's, or H or W is no multiple of the factor f.
        """
        return self._encoded(x)

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    def project(self, z: Tensor) -> Tensor:
        return z

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Posterior over raw latents [B, C, H/f, W/f] of images [B, 3, H, W] in [-1, 1]; see `moments`."""
        return DiagonalGaussian(self.moments(x))

    def forward(self, x: Tensor, noise: Tensor | None = None, error: Tensor | None = None) -> Reconstruction:
        """Encode, take z = mean + std * noise (None: the posterior's mode), decode; a distributed wrapper calls it.

        `error` [B, C, h, w] is added to z before it is decoded.
        """
        moments = self.moments(x)
        z = DiagonalGaussian(moments).sample(noise)
        features = self.decode_features(z if error is None else z + error.to(z))
        return Reconstruction(self.decoder.conv_out(features), features, moments)

    @classmethod
    def from_scratch(cls, config: AutoencoderConfig, seed: int) -> AutoencoderKL:
        """A network to train, a function of the seed alone.

        The last layer of every residual branch is zero, so that training starts from an almost linear autoencoder: on
        flat colours this saves it thousands of steps on a plateau where brightness is coded and colour is not.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(config)
        zero_residual_branches(model)
        return model

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> AutoencoderKL:
        """Read diffusers' ``vae/`` folder (config.json, diffusion_pytorch_model.safetensors), in eval mode.

        Raises:
            ValueError: a file is missing or unreadable, or its keys or shapes are not this config's; the
                sentence names the file and the key.
        """
        folder = Path(folder)
        config = read_config(folder / CONFIG_NAME, AutoencoderConfig.from_dict)
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, folder / WEIGHTS_NAME, device, dtype)
        return model.eval()


def zero_residual_branches(model: nn.Module) -> None:
    """Zero the last layer of every residual branch: the network starts almost linear."""
    for name, parameter in model.named_parameters():
        if ".conv2." in name or ".to_out.0." in name:
            torch.nn.init.zeros_(parameter)


def read_config(path: Path, parse: Callable[[dict[str, Any]], Config]) -> Config:
    """What `parse` makes of the JSON object in `path`.

    Raises:
        ValueError: the file is missing, unreadable or refused by `parse`; the sentence names the file.
    """
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot read the autoencoder's config ({error})") from error
    if type(values) is not dict:
        raise ValueError(f"{path}: the autoencoder's config must be a JSON object, got {type(values).__name__}")
    try:
        return parse(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_weights(model: nn.Module, path: Path, device: str | torch.device, dtype: torch.dtype) -> None:
    """Replace the model's parameters, which may be on the meta device, by those of a safetensors file.

    Raises:
        ValueError: the file is missing or unreadable, or its keys or shapes are not the model's.
    """
    state = _read_weights(path, model.state_dict())
    model.load_state_dict({key: value.to(device, dtype) for key, value in state.items()}, assign=True)


def _read_weights(path: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of `path` under today's key names, checked against the keys and shapes of `wanted`."""
    try:
        state = {current_key(key): value for key, value in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot read the autoencoder's weights ({error})") from error
    for title, keys in (
        ("lacks", wanted.keys() - state.keys()),
        ("has the unknown", state.keys() - wanted.keys()),
    ):
        if keys:
            raise ValueError(f"{path}: {title} key {min(keys)!r} ({len(keys)} such keys)")
    for key, value in state.items():
        if value.shape != wanted[key].shape:
            raise ValueError(f"{path}: key {key!r} has shape {tuple(value.shape)}, expected {tuple(wanted[key].shape)}")
    return state


def current_key(key: str) -> str:
    """Today's name of a parameter; older diffusers named the projections query, key, value and proj_attn."""
    return re.sub(
        r"(\.attentions\.\d+\.)(query|key|value|proj_attn)(?=\.)",
        lambda found: found[1] + OLD_ATTENTION_NAMES[found[2]],
        key,
    )


def _write(path: Path, content: bytes) -> None:
    """Write beside `path`, flush to disk, rename: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
