"""Frozen networks that judge pictures: pooled features for a Fréchet distance, feature maps for a perceptual one."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoencoder import LPIPS, Autoencoder, EfficientNetFeatureDistance
from autoencoder.perceptual import EFFICIENTNETS, FeatureDistance, load_efficientnet
from ldm.data.text import first_line
from ldm.evaluation.text_image import OpenClip

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
FEATURES = ("efficientnet_lite0", "efficientnet_lite2", "inception", "timm:NAME", "open_clip:NAME")
MIN_VARIANCE = 1e-6
"""Added to a channel's variance, whose root has no derivative at 0."""
PERCEPTUAL = ("efficientnet_lite0", "efficientnet_lite2", "lpips_vgg", "lpips_alex", "lpips_squeeze")


class FeatureNet(Protocol):
    """Images [B, 3, H, W] in [-1, 1] -> features [B, dim]."""

    @property
    def dim(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor: ...


class EfficientNetFeatures(nn.Module):
    """The 1,280 pooled features before the classifier; pictures are resized to the side of the training pictures.

    Args:
        name: "efficientnet_lite0" or "efficientnet_lite2".

    Raises:
        ValueError: the package with the weights is not installed; the sentence says which.
    """

    dim = 1280

    def __init__(self, name: str) -> None:
        super().__init__()
        key = name.replace("_", "-")
        self.net, self.side = load_efficientnet(key), EFFICIENTNETS[key].side
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        resized = F.interpolate(x.float(), (self.side, self.side), mode="bilinear", antialias=True)
        maps: Tensor = self.net.extract_features((127.5 * resized + 0.5) / 128.0)
        return maps.mean((2, 3))


class InceptionFeatures(nn.Module):
    """The 2,048 pooled features of the Inception network of published FIDs, as torch-fidelity converted it.

    Args:
        weights: that conversion as a local file (a state dict, .pth); nothing is downloaded.

    Raises:
        ValueError: no such file, not those weights, or torch-fidelity is not installed.
    """

    dim = 2048

    def __init__(self, weights: str | Path | None) -> None:
        super().__init__()
        if weights is None or not Path(weights).is_file():
            given = "no file" if weights is None else f"{weights}, which is not there"
            raise ValueError(f"`weights` must be a local copy of torch-fidelity's {INCEPTION_FILE}, got {given}")
        module = _installed("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity")
        try:
            torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity reads it as any pickle
            self.net = module.FeatureExtractorInceptionV3("inception", ["2048"], str(weights))
        except Exception as error:  # what torch raises depends on what the file is
            raise ValueError(f"{weights} does not hold the weights {INCEPTION_FILE}: {first_line(error)}") from error
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        levels = x.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
        pooled: Tensor = self.net(levels)[0]
        return pooled


class TimmFeatures(nn.Module):
    """The pooled features before the classifier of any image model of the library timm, at its own input size.

    Args:
        name: timm's name of the architecture, such as `resnet50` or `vit_small_patch14_dinov2`.
        weights: its checkpoint as a local file (.safetensors, or a state dict of torch's); nothing is downloaded.

    Raises:
        ValueError: timm is not installed or has no such model, or the file does not hold its weights.
    """

    def __init__(self, name: str, weights: str | Path | None) -> None:
        super().__init__()
        timm, transforms = _installed("timm", "'ldm[eval]'"), _installed("torchvision.transforms", "torchvision")
        if weights is None or not Path(weights).is_file():
            given = "no file" if weights is None else f"{weights}, which is not there"
            raise ValueError(f"`weights` must be a local checkpoint of timm's {name}, got {given}")
        try:
            self.net = timm.create_model(name, pretrained=False, num_classes=0)
            state = timm.models.load_state_dict(str(weights), use_ema=False, weights_only=True)
            missing, extra = self.net.load_state_dict(state, strict=False)
        except Exception as error:  # what timm and torch raise depends on what the file is
            raise ValueError(f"timm cannot load {name} from {weights}: {first_line(error)}") from error
        head = self.net.pretrained_cfg.get("classifier") or ()
        strange = [key for key in extra if not key.startswith(tuple([head] if isinstance(head, str) else head))]
        if missing or strange:
            wrong = f"key {missing[0]!r} is missing" if missing else f"key {strange[0]!r} has no place"
            raise ValueError(f"{weights} does not hold the weights of timm's {name}: {wrong}")
        settings = timm.data.resolve_data_config({}, model=self.net)
        self.size = tuple(settings["input_size"][1:])
        self.normalise = transforms.Normalize(settings["mean"], settings["std"])
        self.requires_grad_(False).eval()
        self.dim = int(self(torch.zeros(1, 3, *self.size)).shape[1])

    def forward(self, x: Tensor) -> Tensor:
        resized = F.interpolate(x.float(), self.size, mode="bicubic", antialias=True).clamp(-1, 1)
        features: Tensor = self.net(self.normalise((resized + 1) / 2))
        return features


class LookFeatures(nn.Module):
    """How pictures are drawn rather than what they show: mean and deviation over space of each channel of the four
    stages of EfficientNet-Lite0, the statistics that carry style (Huang and Belongie 2017, section 5).

    Raises:
        ValueError: the package with the weights is not installed; the sentence says which.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = EfficientNetFeatureDistance("efficientnet-lite0")
        self.dim = int(self(torch.zeros(1, 3, 64, 64)).shape[1])

    def forward(self, x: Tensor) -> Tensor:
        moments = [torch.var_mean(maps, (2, 3), correction=0) for maps in self.net.stages(x.float())]
        return torch.cat([part for var, mean in moments for part in (mean, (var + MIN_VARIANCE).sqrt())], 1)


@dataclass(frozen=True)
class Decoded:
    """What `net` makes of pictures as an autoencoder gives them back, clamped to [-1, 1]: real pictures as a latent
    diffusion would draw them at its very best.

    Raises:
        ValueError: when called, where the autoencoder overflows in half precision.
    """

    vae: Autoencoder
    net: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        image = self.vae.reconstruct(x.to(self.vae.dtype)).float()
        if not bool(image.isfinite().all()):
            raise ValueError(f"the model's autoencoder overflows in {self.vae.dtype}; it needs --device cpu")
        return self.net(image.clamp(-1, 1))


FeatureModule = EfficientNetFeatures | InceptionFeatures | TimmFeatures | OpenClip


def feature_net(name: str, weights: str | Path | None = None) -> FeatureModule:
    """The network of that name in FEATURES; `weights` is the local file that those without a package need.

    `timm:NAME` and `open_clip:NAME` name an architecture of that library, `open_clip:local-dir:FOLDER` a whole model.

    Raises:
        ValueError: unknown name, or its weights cannot be had.
    """
    library, _, model = name.partition(":")
    match library:
        case "inception":
            return InceptionFeatures(weights)
        case "timm":
            return TimmFeatures(model, weights)
        case "open_clip":
            return OpenClip(model, weights)
        case "efficientnet_lite0" | "efficientnet_lite2":
            _refuse(weights)
            return EfficientNetFeatures(name)
    raise ValueError(f"not one of {', '.join(FEATURES)}")


def perceptual_distance(name: str, weights: str | Path | None = None) -> FeatureDistance:
    """The distance of that name in PERCEPTUAL; `weights` is a local file of the backbone of an LPIPS, and no other.

    Raises:
        ValueError: unknown name, or its weights cannot be had.
    """
    if name not in PERCEPTUAL:
        raise ValueError(f"not one of {', '.join(PERCEPTUAL)}")
    if name.startswith("lpips_"):
        return LPIPS(name.removeprefix("lpips_"), weights)
    _refuse(weights)
    return EfficientNetFeatureDistance(name.replace("_", "-"))


def _refuse(weights: str | Path | None) -> None:
    if weights is not None:
        raise ValueError(f"its weights come in a package, so {weights} would not be read")


def _installed(module: str, packages: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{module} is not installed: run `pip install {packages}`") from error
