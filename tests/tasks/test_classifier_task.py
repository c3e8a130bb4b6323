"""A classifier of noisy latents: what it is trained on, and that following it raises the accuracy of samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.networks import ClassifierConfig, LatentClassifier
from ldm.process import NoiseSchedule, Objective, Prediction, timesteps
from ldm.sampling import classifier_gradient, named_sampler
from ldm.tasks.labels import UNLABELLED, class_indices

CONFIG = ClassifierConfig(("low", "middle", "high"), in_channels=2, block_out_channels=(32,), norm_num_groups=2)
SCHEDULE = NoiseSchedule.scaled_linear(0.00085, 0.012, 1000)
MEANS = torch.tensor([[-1.0, 0.0], [0.0, 0.8], [1.0, 0.0]])[:, :, None, None]
STD = 2.0
"""Three overlapping classes of latents [2, 4, 4]: N(mean, STD²), each mean the same at every position."""


def test_a_caption_belongs_to_the_one_class_that_it_names() -> None:
    captions = ["A red Circle", "two circles", "a star above a circle", "a star, large", ""]
    assert class_indices(captions, ("circle", "star")).tolist() == [0, UNLABELLED, UNLABELLED, 1, UNLABELLED]
    assert class_indices(["the c++ book", "c", "abc++"], ("c++", "java")).tolist() == [0, UNLABELLED, UNLABELLED]


def test_a_new_classifier_prefers_no_class_and_is_saved_whole(tmp_path: Path) -> None:
    classifier = LatentClassifier.from_scratch(CONFIG, torch.Generator().manual_seed(0))
    x, t = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 10, 500, 999])
    assert torch.equal(classifier(x, t), torch.zeros(5, 3))
    with torch.no_grad():
        classifier.linear_out.weight.normal_(generator=torch.Generator().manual_seed(2))
    classifier.save_pretrained(tmp_path)
    again = LatentClassifier.from_pretrained(tmp_path)
    assert again.config == CONFIG and torch.equal(again(x, t), classifier(x, t))
    log_probs = torch.stack([again.log_prob(label)(x, t) for label in CONFIG.labels])
    torch.testing.assert_close(log_probs.exp().sum(0), torch.ones(5))


def test_what_is_no_classifier_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} is not a classifier"):
        LatentClassifier.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"labels": ["one"]}')
    with pytest.raises(ValueError, match=r"`labels` is .* at least 2 classes"):
        LatentClassifier.from_pretrained(tmp_path)
    classifier = LatentClassifier.from_scratch(CONFIG, torch.Generator())
    with pytest.raises(ValueError, match="label is 'tall'; this classifier knows low, middle, high"):
        classifier.log_prob("tall")


def _posterior(x: Tensor, variance: Tensor | float, scale: Tensor | float = 1.0) -> Tensor:
    """p(class | x) [B, 3] for x ~ N(scale·mean, variance), exactly."""
    distance = (x[:, None] - scale * MEANS).square().flatten(2).sum(2)
    return (-distance / (2 * torch.as_tensor(variance).reshape(-1, 1))).softmax(1)


def _unconditional(x: Tensor, t: Tensor) -> Prediction:
    """E[x0 | x_t] of the whole mixture."""
    alpha, sigma = SCHEDULE.alpha_sigma(t, like=x)
    full = alpha**2 * STD**2 + sigma**2
    weights = _posterior(x, full.flatten(), alpha[:, None])
    each = MEANS + (alpha * STD**2 / full)[:, None] * (x[:, None] - alpha[:, None] * MEANS)
    x0 = (weights[:, :, None, None, None] * each).sum(1)
    return Prediction(x0, (x - alpha * x0) / sigma)


@pytest.fixture(scope="module")
def trained() -> LatentClassifier:
    """A classifier trained on noised draws of the three classes."""
    generator = torch.Generator().manual_seed(0)
    classifier = LatentClassifier.from_scratch(CONFIG, generator)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=3e-3)
    objective = Objective(SCHEDULE)
    for _ in range(250):
        y = torch.randint(3, (128,), generator=generator)
        x0 = MEANS[y] + STD * torch.randn(128, 2, 4, 4, generator=generator)
        noised = objective.draw(x0, generator)
        loss = torch.nn.functional.cross_entropy(classifier(noised.x_t, noised.t), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return classifier.eval()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_accuracy_of_samples_rises_with_the_scale(trained: LatentClassifier, sampler: str) -> None:
    """By the trained classifier itself, and by Bayes' rule, which it never saw (algorithms 1 and 2)."""
    visited = timesteps(25, 1000, "trailing")
    x = torch.randn(300, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    own, exact = [], []
    for scale in (0.0, 1.0, 4.0):
        gradient = classifier_gradient(trained.log_prob("middle"), scale, SCHEDULE)
        draw = named_sampler(sampler, gradient=gradient)
        z = draw(_unconditional, x, SCHEDULE, visited, [torch.Generator().manual_seed(i) for i in range(300)])
        own.append(float((trained(z, torch.zeros(300, dtype=torch.long)).argmax(1) == 1).float().mean()))
        exact.append(float((_posterior(z, STD**2).argmax(1) == 1).float().mean()))
    for accuracy in (own, exact):
        assert accuracy[0] + 0.1 < accuracy[1] and accuracy[1] + 0.05 < accuracy[2], (own, exact)
