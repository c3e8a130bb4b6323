"""The best of several pictures: which is kept, and that its seed draws it again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.cli import generate
from ldm.data.transforms import to_tensor
from ldm.evaluation.ranking import Ranking, best_rows
from ldm.pipeline import TextToImage


class Brightness:
    """Puts a picture at the angle of its mean level, and a caption at that of the level that it names."""

    dim = 2

    def images(self, x: Tensor) -> Tensor:
        return self._at(x.mean((1, 2, 3)))

    def texts(self, captions: Sequence[str]) -> Tensor:
        return self._at(torch.tensor([1.0 if caption == "bright" else -1.0 for caption in captions]))

    @staticmethod
    def _at(level: Tensor) -> Tensor:
        return torch.stack([torch.cos(level), torch.sin(level)], 1)


@pytest.fixture(scope="module")
def pipe(tiny_model_folder: Path) -> TextToImage:
    return TextToImage.from_pretrained(tiny_model_folder)


def test_the_row_of_the_most_similar_picture() -> None:
    images, captions = torch.randn(5 * 7, 4), torch.randn(5, 4)
    expected = [max(range(7 * n, 7 * n + 7), key=lambda row: float(images[row] @ captions[n])) for n in range(5)]
    assert best_rows(images, captions).tolist() == expected
    assert best_rows(torch.ones(6, 2), torch.ones(2, 2)).tolist() == [0, 3]  # the first of equals


@pytest.mark.parametrize("batch_size", [1, 4, 7, 50])
def test_the_best_candidate_is_kept_with_the_seed_that_draws_it(pipe: TextToImage, batch_size: int) -> None:
    captions = ["bright", "dark", "bright"]
    chosen = Ranking(4, Brightness()).draw(pipe, captions, 20, batch_size=batch_size, steps=2)
    for picture, (caption, (image, seed)) in enumerate(zip(captions, chosen, strict=True)):
        candidates = {s: pipe(caption, seed=s, steps=2)[0] for s in range(20 + 4 * picture, 24 + 4 * picture)}
        levels = {s: float(to_tensor(candidate).mean()) for s, candidate in candidates.items()}
        assert seed == (max if caption == "bright" else min)(levels, key=lambda s: levels[s])
        assert image.tobytes() == candidates[seed].tobytes()


def test_candidates_are_ranked_by_the_words_without_their_weights(pipe: TextToImage) -> None:
    asked = list[str]()

    class Listener(Brightness):
        def texts(self, captions: Sequence[str]) -> Tensor:
            asked.extend(captions)
            return super().texts(captions)

    prompts, ranking = [r"a (very:1.3) [dark] \(old\) star", "[plain]"], Ranking(2, Listener())
    ranking.draw(pipe, prompts, 0, steps=1, prompt_syntax="a1111")
    ranking.draw(pipe, prompts[1:], 0, steps=1)
    assert asked == ["a very dark (old) star", "plain", "[plain]"]


def test_one_candidate_is_what_the_pipeline_draws(pipe: TextToImage) -> None:
    captions = ["bright", "dark", "bright"]
    chosen = Ranking().draw(pipe, captions, 3, batch_size=2, steps=1)
    assert [seed for _, seed in chosen] == [3, 4, 5]
    for one, other in zip(pipe(captions, seed=3, steps=1), chosen, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other.image))


def test_a_ranking_that_cannot_choose_is_refused() -> None:
    with pytest.raises(ValueError, match="candidates is 0; it must be at least 1"):
        Ranking(0)
    with pytest.raises(ValueError, match="2 candidates a picture need a model"):
        Ranking(2)


def test_the_command_names_files_by_the_seeds_that_were_kept(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.cli.options.ranking", lambda args, device: Ranking(args.best_of, Brightness()))
    common = ["--model", str(tiny_model_folder), "--steps", "2", "--json"]
    several = ["-p", "bright", "-p", "dark", "--num-images", "2", "--best-of", "3", "--seed", "9"]
    previews = tmp_path / "previews"
    files = generate.run([*common, *several, "--output", str(tmp_path / "best"), "--preview", str(previews)])["images"]
    for index, file in enumerate(map(Path, files)):
        seed = int(file.stem.partition("seed")[2])
        assert file.name.startswith(f"{index:05d}_") and seed in range(9 + 3 * index, 12 + 3 * index)
        assert (previews / f"{file.stem}_step001.png").is_file()
        again = generate.run([*common, "--from-image", str(file), "--output", str(tmp_path / f"{index}.png")])
        assert Path(again["images"][0]).read_bytes() == file.read_bytes()
    assert len(list(previews.iterdir())) == 4 * 3 * 2  # of all candidates
