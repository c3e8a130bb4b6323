"""Scores of pictures against captions, and open_clip models from local files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from ldm.data.transforms import to_images
from ldm.evaluation.features import feature_net
from ldm.evaluation.text_image import OpenClip, candidate_rows, clip_scores, r_precision

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def units(count: int, width: int, seed: int) -> Tensor:
    return normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP of random weights in open_clip's own folder layout."""
    path = tmp_path_factory.mktemp("clip")
    settings = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": "shortest"}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": settings}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{path}", load_weights=False)
    torch.save(model.state_dict(), path / "open_clip_pytorch_model.bin")
    return path


def test_the_score_of_known_angles() -> None:
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    texts = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    assert_close(clip_scores(images, texts), torch.tensor([100.0, 60.0, 0.0]))


def test_candidates_are_different_and_the_first_is_the_own_one() -> None:
    own = [0, 49, 17, 17]
    rows = candidate_rows(own, 50, 32)
    assert rows.shape == (4, 32) and rows[:, 0].tolist() == own
    assert all(len(set(row)) == 32 and set(row) <= set(range(50)) for row in rows.tolist())
    assert torch.equal(rows, candidate_rows(own, 50, 32)) and not torch.equal(rows[2], rows[3])
    assert not torch.equal(rows, candidate_rows(own, 50, 32, seed=1))
    assert sorted(candidate_rows([3], 5, 5)[0].tolist()) == [0, 1, 2, 3, 4]


def test_every_other_caption_is_a_candidate_as_often() -> None:
    counts = torch.bincount(candidate_rows([2] * 3000, 11, 4)[:, 1:].flatten(), minlength=11)
    assert counts[2] == 0
    assert_close(counts[[0, 1, *range(3, 11)]] / 3000, torch.full((10,), 0.3), atol=0.04, rtol=0)


@pytest.mark.parametrize(("pool", "count"), [(31, 32), (10, 1)])
def test_too_few_captions_are_refused(pool: int, count: int) -> None:
    with pytest.raises(
        ValueError, match=f"among {count} captions needs so many different ones, and 2 at least; got {pool}"
    ):
        candidate_rows([0], pool, count)


def test_a_model_that_sees_everything_is_always_right() -> None:
    texts = units(40, 64, 0)
    assert r_precision(texts, texts, candidate_rows(range(40), 40)).mean() == 1


def test_a_model_that_tells_nothing_apart_is_right_by_chance() -> None:
    """All captions alike: exactly 1/32. Unrelated vectors: 1/32 within four standard errors."""
    alike = r_precision(units(10, 8, 0), torch.ones(40, 8) / 8**0.5, candidate_rows(range(10), 40))
    assert_close(alike, torch.full((10,), 1 / 32))
    count, chance = 4000, 1 / 32
    random = r_precision(units(count, 8, 1), units(200, 8, 2), candidate_rows([i % 200 for i in range(count)], 200))
    assert abs(float(random.mean()) - chance) < 4 * (chance * (1 - chance) / count) ** 0.5


def test_half_a_point_for_a_tie_of_two() -> None:
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert r_precision(texts[:1], texts, torch.tensor([[0, 1, 2]])).tolist() == [0.5]


@torch.no_grad()
def test_a_folder_of_open_clip_is_used_as_open_clip_uses_it(folder: Path) -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer, captions = open_clip.get_tokenizer(f"local-dir:{folder}"), ["a cat", "two dogs on a very long walk", ""]
    x = torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(1)) * 2 - 1
    pixels = torch.stack([preprocess(image) for image in to_images(x)])
    net = OpenClip(f"local-dir:{folder}")
    assert_close(net.images(x), model.eval().encode_image(pixels, normalize=True))
    assert_close(net.texts(captions), model.encode_text(tokenizer(captions), normalize=True))
    assert net.dim == 16 and not any(parameter.requires_grad for parameter in net.parameters())
    features = feature_net(f"open_clip:local-dir:{folder}")
    assert_close(features(x), net.images(x))


@torch.no_grad()
def test_many_captions_are_encoded_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, captions = OpenClip(f"local-dir:{folder}"), [f"picture {i}" for i in range(7)]
    whole = net.texts(captions)
    monkeypatch.setattr("ldm.evaluation.text_image.TEXTS_AT_ONCE", 3)
    assert_close(net.texts(captions), whole)


def absent(path: Path) -> tuple[str, Path | None, str]:
    return f"local-dir:{path / 'nothing'}", None, "nothing holds no open_clip_config.json"


def with_weights(path: Path) -> tuple[str, Path | None, str]:
    return f"local-dir:{path}", path / "extra.pt", r"its weights are in its folder, so .*extra\.pth? would not be read"


def unnamed_weights(path: Path) -> tuple[str, Path | None, str]:
    return "ViT-B-32", None, "must be a local checkpoint, got no file"


def absent_weights(path: Path) -> tuple[str, Path | None, str]:
    return "ViT-B-32", path / "absent.pt", r"absent\.pt, which is not there"


def unknown(path: Path) -> tuple[str, Path | None, str]:
    return "ViT-Z", path / "open_clip_pytorch_model.bin", "open_clip cannot load it from "


@pytest.mark.parametrize("case", [absent, with_weights, unnamed_weights, absent_weights, unknown])
def test_what_cannot_be_loaded_is_said(case: Callable[[Path], tuple[str, Path | None, str]], folder: Path) -> None:
    name, weights, sentence = case(folder)
    with pytest.raises(ValueError, match=sentence):
        OpenClip(name, weights)


def test_a_folder_without_weights_is_not_taken_for_a_model(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    with pytest.raises(ValueError, match="open_clip cannot load it"):
        OpenClip(f"local-dir:{tmp_path}")
