"""Stage one's task in a loop as the training script drives it: adversarial start, penalties, fine-tuning."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from autoencoder import AutoencoderConfig, AutoencoderKL, Reconstruction, discriminator_loss, label_logits, nll
from conditioning import ClipTextConfig, ClipTextEncoder, ClipTextModel, ClipTokenizer
from ldm.build import (
    build_autoencoder,
    build_bottleneck,
    build_discriminator,
    build_loss_state,
    build_loss_weights,
    build_penalties,
    build_source,
)
from ldm.config import (
    AutoencoderLossConfig,
    AutoencoderTraining,
    ConfigError,
    DataConfig,
    DiscriminatorConfig,
    LatentLabelsConfig,
    OptimizerConfig,
)
from ldm.data.batches import PixelBatch
from ldm.data.fingerprint import encoder_hash
from ldm.data.latent_errors import write_latent_errors
from ldm.interop.checkpoint import read_folder
from ldm.networks import UNet, UNetConfig
from ldm.pretrained import Model, write_model
from ldm.process import DiffusionConfig
from ldm.seeds import generator
from ldm.single_file import write_single_file
from ldm.tasks.autoencoder import AutoencoderTask
from ldm.tasks.labels import LatentLabels
from ldm.training.optim import adamw

SHAPE = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, scaling_factor=0.7, shift_factor=0.2)
LOSS = AutoencoderLossConfig(perceptual=0.0, kl=1e-3, discriminator=0.2, discriminator_start=2)
CRITIC = DiscriminatorConfig(num_layers=1, base_channels=4, norm="group")
Weights = dict[str, Tensor]


def config(**changes: Any) -> AutoencoderTraining:
    defaults = {"data": DataConfig(resolution=16), "autoencoder": SHAPE, "loss": LOSS, "discriminator": CRITIC}
    return AutoencoderTraining("out", **{**defaults, **changes})


def batch(step: int) -> PixelBatch:
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(100 + step)) * 2 - 1
    return PixelBatch(image, ("a.png", "b.png"), (0, 1))


def data() -> tuple[str, str]:
    """Name and fingerprint of the data of `config`."""
    source = build_source(DataConfig(resolution=16), "train", 0)
    return source.name, source.fingerprint()


def blank(count: int) -> PixelBatch:
    return PixelBatch(torch.zeros(count, 3, 16, 16), tuple(f"{i}.png" for i in range(count)), tuple(range(count)))


class Run:
    """The parts that `train_autoencoder.py` builds, and its loop without placement, data and files."""

    def __init__(self, chosen: AutoencoderTraining) -> None:
        self.vae = build_autoencoder(chosen)
        self.critic = build_discriminator(chosen.discriminator, chosen.seed)
        self.state = build_loss_state(chosen.loss)
        weights, penalties = build_loss_weights(chosen.loss), build_penalties(chosen.discriminator)
        bottleneck = build_bottleneck(chosen, self.vae, lambda x: x)
        self.task = AutoencoderTask(
            self.vae,
            self.critic,
            None,
            weights,
            penalties,
            self.state,
            bottleneck,
            chosen.seed,
            lambda x: x,
            chosen.discriminator.labels,
        )
        rates = OptimizerConfig(learning_rate=1e-3, adam_weight_decay=0.1)
        self.optimizer = adamw(self.vae.parameters(), rates, 1e-3, undecayed=self.state.parameters())
        self.d_optimizer = adamw(self.critic.parameters(), rates, 1e-3)

    def step(self, step: int) -> Weights:
        loss = self.task.generator_loss(batch(step), step)
        loss.surrogate.backward()
        terms = dict(loss.terms)
        if loss.fake_logits is not None:
            d_loss, d_terms = self.task.discriminator_loss(batch(step), loss.fake_logits, step)
            d_loss.backward()
            terms |= d_terms
            self.d_optimizer.step()
        self.optimizer.step()
        self.task.remember(terms)
        self.optimizer.zero_grad()
        self.d_optimizer.zero_grad()
        return terms

    def weights(self) -> Weights:
        return {name: value.clone() for name, value in self.vae.state_dict().items()}


def equal(one: Weights, other: Weights) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_with_and_without_an_adversary_runs_part_exactly_at_its_start() -> None:
    on, off = Run(config()), Run(config(loss=dataclasses.replace(LOSS, discriminator=0.0)))
    before = {name: value.clone() for name, value in on.critic.state_dict().items()}
    for step in range(2):
        assert on.step(step).keys() == off.step(step).keys()
        assert equal(on.weights(), off.weights()) and equal(on.critic.state_dict(), before)
    for step in (2, 3):
        assert {"generator", "adaptive_weight", "discriminator", "logits_real"} <= on.step(step).keys()
        assert "discriminator" not in off.step(step)
        assert not equal(on.weights(), off.weights()) and not equal(on.critic.state_dict(), before)


def test_a_discriminator_that_warms_up_learns_while_the_autoencoder_does_not_hear_of_it() -> None:
    warm = dataclasses.replace(LOSS, discriminator_start=1, discriminator_warmup=2)
    on, off = Run(config(loss=warm)), Run(config(loss=dataclasses.replace(LOSS, discriminator=0.0)))
    for step in range(4):
        before = {name: value.clone() for name, value in on.critic.state_dict().items()}
        terms = on.step(step)
        off.step(step)
        assert equal(on.critic.state_dict(), before) == (step < 1) == ("discriminator" not in terms)
        assert equal(on.weights(), off.weights()) == (step < 3) == ("generator" not in terms)


def test_runs_of_one_seed_are_equal_and_of_two_seeds_are_not() -> None:
    one, same, other = Run(config()), Run(config()), Run(config(seed=1))
    for step in range(3):
        for run in (one, same, other):
            run.step(step)
    assert equal(one.weights(), same.weights()) and not equal(one.weights(), other.weights())


@pytest.mark.parametrize("adversarial", [False, True])
def test_the_log_variance_gets_the_gradient_of_the_nll(adversarial: bool) -> None:
    start = 0 if adversarial else 9
    run = Run(config(loss=dataclasses.replace(LOSS, learn_logvar=True, logvar_init=-0.4, discriminator_start=start)))
    loss = run.task.generator_loss(batch(0), 0)
    loss.surrogate.backward()
    logvar = torch.tensor(-0.4, requires_grad=True)
    expected = nll(loss.image, batch(0).image, torch.zeros(2), run.task.weights, logvar)
    assert_close(loss.terms["nll"], expected.detach())
    expected.backward()
    assert run.state.logvar.grad is not None and logvar.grad is not None
    assert_close(run.state.logvar.grad, logvar.grad, rtol=1e-5, atol=0.0)
    assert loss.terms["logvar"].item() == pytest.approx(-0.4)


def test_the_log_variance_divides_the_image_gradient_of_the_decoder() -> None:
    """d(nll)/d(weights) is exp(-logvar) times that without one; the KL is switched off to see it."""
    plain = Run(config(loss=dataclasses.replace(LOSS, kl=0.0)))
    wide = Run(config(loss=dataclasses.replace(LOSS, kl=0.0, logvar_init=math.log(4.0))))
    for run in (plain, wide):
        run.task.generator_loss(batch(0), 0).surrogate.backward()
    assert wide.state.logvar.grad is None
    for one, other in zip(plain.vae.parameters(), wide.vae.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert_close(other.grad, one.grad / 4, rtol=1e-5, atol=1e-6)


def test_the_log_variance_trains_without_weight_decay_and_is_no_part_of_the_model() -> None:
    run = Run(config(loss=dataclasses.replace(LOSS, learn_logvar=True, logvar_init=1.0)))
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.1, 0.0]
    for step in range(2):
        run.step(step)
    assert run.state.logvar.item() == pytest.approx(1.0 - 2 * 1e-3, abs=1e-4)
    assert not any("logvar" in name for name in run.vae.state_dict())


def test_the_discriminator_gets_the_gradient_of_passes_of_its_own() -> None:
    """Its logits of the reconstructions come from the generator's pass; the autoencoder's graph takes no part."""
    run = Run(config(loss=dataclasses.replace(LOSS, discriminator_start=0)))
    loss = run.task.generator_loss(batch(0), 0)
    loss.surrogate.backward()
    assert loss.fake_logits is not None and all(p.grad is None for p in run.critic.parameters())
    generators = [p.grad.clone() for p in run.vae.parameters() if p.grad is not None]
    run.task.discriminator_loss(batch(0), loss.fake_logits, 0)[0].backward()
    found = [p.grad for p in run.critic.parameters()]
    expected = discriminator_loss(run.critic(batch(0).image), run.critic(loss.image))
    assert_close(found, list(torch.autograd.grad(expected, list(run.critic.parameters()))))
    assert_close([p.grad for p in run.vae.parameters() if p.grad is not None], generators, atol=0, rtol=0)


def test_r1_is_counted_lazily_and_logged_by_itself() -> None:
    critic = dataclasses.replace(CRITIC, r1=3.0, r1_every=2)
    run = Run(config(discriminator=critic, loss=dataclasses.replace(LOSS, discriminator_start=0)))
    image = batch(9).image
    for step, factor in ((0, 6.0), (1, 0.0), (2, 6.0)):
        loss, terms = run.task.discriminator_loss(batch(step), run.critic(image), step)
        real = batch(step).image.requires_grad_()
        logits = run.critic(real)
        (gradient,) = torch.autograd.grad(logits.mean((1, 2, 3)).sum(), real)
        penalty = 0.5 * gradient.square().sum((1, 2, 3)).mean()
        adversarial = discriminator_loss(logits, run.critic(image))
        assert_close(loss, adversarial + factor * penalty)
        assert_close(terms["discriminator"], adversarial.detach())
        assert ("r1" in terms) == (factor > 0)
        if factor:
            assert_close(terms["r1"], penalty)
            loss.backward()
            assert all(parameter.grad is not None for parameter in run.critic.parameters())


def test_lecam_remembers_every_update_and_is_logged_by_itself() -> None:
    run = Run(config(discriminator=dataclasses.replace(CRITIC, lecam=0.3)))
    run.step(0)
    assert run.state.lecam.updates.item() == 0
    seen = [run.step(step) for step in (2, 3, 4)]
    real, fake = (float(seen[0][name]) for name in ("logits_real", "logits_fake"))
    for terms in seen[1:]:
        real = 0.99 * real + 0.01 * float(terms["logits_real"])
        fake = 0.99 * fake + 0.01 * float(terms["logits_fake"])
    assert run.state.lecam.averages.tolist() == pytest.approx([real, fake], abs=1e-6)
    assert seen[0]["lecam"].item() == 0.0 and seen[1]["lecam"].item() > 0.0
    loss, terms = run.task.discriminator_loss(batch(5), run.critic(batch(6).image), 5)
    assert_close(loss.detach(), terms["discriminator"] + 0.3 * terms["lecam"])


def test_penalties_that_are_off_change_nothing() -> None:
    plain, off = Run(config()), Run(config(discriminator=dataclasses.replace(CRITIC, r1=0.0, lecam=0.0, r1_every=1)))
    for step in range(4):
        assert plain.step(step).keys() == off.step(step).keys()
    assert equal(plain.weights(), off.weights()) and equal(plain.critic.state_dict(), off.critic.state_dict())
    assert off.state.lecam.updates.item() == 0


def test_act_norm_starts_at_the_adversarial_start() -> None:
    run = Run(config(discriminator=dataclasses.replace(CRITIC, norm="act")))
    scales = [p for name, p in run.critic.named_parameters() if name.endswith("weight") and p.ndim == 1]
    assert len(scales) == 1
    run.step(1)
    assert torch.equal(scales[0], torch.ones_like(scales[0]))
    run.step(2)
    assert not torch.allclose(scales[0], torch.ones_like(scales[0]), atol=0.1)


# --- fine-tuning


@pytest.fixture
def pretrained(tmp_path: Path) -> AutoencoderKL:
    """A random model, saved as `tmp_path/model/vae`."""
    torch.manual_seed(5)
    vae = AutoencoderKL(SHAPE)
    vae.save_pretrained(tmp_path / "model" / "vae")
    return vae


def tuning(folder: Path, **changes: Any) -> AutoencoderTraining:
    return config(autoencoder=AutoencoderConfig(), pretrained=str(folder), **changes)


@pytest.mark.parametrize("name", ["model", "model/vae"])
def test_a_pretrained_start_is_the_pretrained_model(tmp_path: Path, pretrained: AutoencoderKL, name: str) -> None:
    run = Run(tuning(tmp_path / name))
    assert run.vae.config == pretrained.config and run.vae.training
    assert equal(run.weights(), dict(pretrained.state_dict()))
    with torch.no_grad():
        posterior = pretrained.encode(batch(0).image)
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        expected = pretrained.decode(posterior.mean + posterior.std * noise)
        assert_close(run.vae(batch(0).image, noise).image, expected)
    first = run.task.generator_loss(batch(0), 0)
    assert_close(first.image, Run(tuning(tmp_path / name)).task.generator_loss(batch(0), 0).image)
    file = tmp_path / "model/vae/diffusion_pytorch_model.safetensors"
    before = file.read_bytes()
    run.step(0)
    assert not equal(run.weights(), dict(pretrained.state_dict())) and file.read_bytes() == before


@pytest.mark.parametrize("latent_noise", [0.0, 0.5])
def test_a_frozen_encoder_stays_bit_equal_while_the_decoder_trains(
    tmp_path: Path, pretrained: AutoencoderKL, latent_noise: float
) -> None:
    run = Run(tuning(tmp_path / "model", freeze_encoder=True, latent_noise=latent_noise))
    for step in range(3):
        terms = run.step(step)
        assert terms["kl"].item() > 0
    assert "generator" in terms
    for name, value in pretrained.state_dict().items():
        frozen = name.startswith(("encoder.", "quant_conv."))
        assert torch.equal(run.vae.state_dict()[name], value) == frozen, name


def test_latent_noise_has_levels_from_a_half_normal_in_units_of_the_latents(
    tmp_path: Path, pretrained: AutoencoderKL
) -> None:
    """Level |N(0, tau^2)|, so their mean is tau sqrt(2 / pi) and their mean square tau^2; each within 4 errors."""
    asked: list[Tensor] = []

    def model(image: Tensor, noise: Tensor, error: Tensor) -> Reconstruction:
        asked.append(error * SHAPE.scaling_factor)
        return pretrained(image, noise, error)

    bottleneck = build_bottleneck(tuning(tmp_path / "model", freeze_encoder=True, latent_noise=0.5), pretrained, abs)
    rows = [generator(7, "latent", row) for row in range(2000)]
    with torch.no_grad():
        bottleneck(model, blank(2000), rows, 0)  # type: ignore[arg-type]  # called as a module is
        bottleneck(model, blank(2), [generator(7, "latent", row) for row in (5, 3)], 0)  # type: ignore[arg-type]
    assert torch.equal(asked[1], asked[0][[5, 3]])
    levels = asked[0].square().mean((1, 2, 3)).sqrt()
    assert levels.mean().item() == pytest.approx(0.5 * (2 / math.pi) ** 0.5, rel=4 * 0.017)
    assert levels.square().mean().item() == pytest.approx(0.25, rel=4 * 0.032)
    assert (asked[0] / levels.view(-1, 1, 1, 1)).mean().abs().item() < 4 / (2000 * 256) ** 0.5


@pytest.mark.parametrize(("latent_noise", "share"), [(0.0, 0.75), (0.5, 0.25)])
def test_measured_errors_take_the_place_of_noise_in_their_share_of_the_pictures(
    tmp_path: Path, pretrained: AutoencoderKL, latent_noise: float, share: float
) -> None:
    """2,000 pictures, each with its own error; the share within 4 standard errors of a coin's."""
    asked: list[Tensor] = []

    def model(image: Tensor, noise: Tensor, error: Tensor) -> Reconstruction:
        asked.append(error)
        return pretrained(image, noise, error)

    drawn = torch.randn(2000, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    write_latent_errors(tmp_path / "errors.safetensors", blank(2000).keys, drawn, encoder_hash(pretrained), data())
    settings = {"freeze_encoder": True, "latent_noise": latent_noise, "latent_errors_share": share}
    chosen = tuning(tmp_path / "model", **settings, latent_errors=str(tmp_path / "errors.safetensors"))
    bottleneck = build_bottleneck(chosen, pretrained, abs)
    with torch.no_grad():
        bottleneck(model, blank(2000), [generator(7, "latent", row) for row in range(2000)], 0)  # type: ignore[arg-type]
    measured = (asked[0] - drawn).abs().amax((1, 2, 3)) < 2e-3  # half precision in the file
    assert measured.float().mean().item() == pytest.approx(share, abs=4 * (0.75 * 0.25 / 2000) ** 0.5)
    others = asked[0][~measured] * SHAPE.scaling_factor
    assert others.square().mean().item() == pytest.approx(latent_noise**2, rel=4 * 0.064)


@pytest.mark.parametrize(
    ("encoder", "shape", "message"),
    [
        ("another", (4, 8, 8), "made with another encoder than that of `pretrained`"),
        (None, (4, 8, 8), "made of 'other', which is not what `data` has now, 'shapes:train:0:None:16'"),
        (None, (4, 4, 4), r"rows are \[4, 4, 4\]; those of `pretrained` at `data.resolution` 16 would be \[4, 8, 8\]"),
    ],
)
def test_errors_of_other_latents_are_refused(
    tmp_path: Path, pretrained: AutoencoderKL, encoder: str | None, shape: tuple[int, ...], message: str
) -> None:
    file = tmp_path / "errors.safetensors"
    write_latent_errors(file, ("a",), torch.zeros(1, *shape), encoder or encoder_hash(pretrained), ("other", "data"))
    chosen = tuning(tmp_path / "model", freeze_encoder=True, latent_errors=str(file))
    with pytest.raises(ConfigError, match=message):
        build_bottleneck(chosen, pretrained, abs)


LABELS = LatentLabelsConfig(("red", "blue"), weight=30.0)


def captioned(*captions: str) -> PixelBatch:
    image = torch.rand(len(captions), 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = tuple(range(len(captions)))
    return PixelBatch(image, tuple(map(str, rows)), rows, captions=captions)


def test_latents_learn_to_tell_the_label_that_the_caption_names(tmp_path: Path, pretrained: AutoencoderKL) -> None:
    """Eight pictures of noise: only what the captions say tells them apart. The third names both, the last none."""
    captions = ("a red ball", "blue", "red and blue", "a RED hat", "blue sky", "red", "a blue dog", "a redder ball")
    pictures = captioned(*captions)
    run = Run(tuning(tmp_path / "model", latent_labels=LABELS, loss=dataclasses.replace(LOSS, discriminator=0.0)))
    terms = []
    for step in range(60):
        loss = run.task.generator_loss(pictures, step)
        loss.surrogate.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        terms.append(loss.terms)
    assert all(item["labelled"].item() == 6 / 8 for item in terms)
    assert terms[-1]["label_right"].item() == 6 / 8
    assert terms[-1]["label"] < 0.1 < terms[0]["label"]


def test_the_labels_add_their_weighted_cross_entropy(tmp_path: Path, pretrained: AutoencoderKL) -> None:
    pictures = captioned("red", "blue", "green")
    with_labels, without = (
        Run(tuning(tmp_path / "model", latent_labels=labels)) for labels in (LABELS, LatentLabelsConfig())
    )
    surrogates = [run.task.generator_loss(pictures, 0).surrogate for run in (with_labels, without)]
    mean = pretrained.encode(pictures.image[:2]).mean
    logits = label_logits(mean, 2, LABELS.temperature / SHAPE.scaling_factor)
    assert_close(
        surrogates[0] - surrogates[1], 30 * F.cross_entropy(logits, torch.tensor([0, 1])) * 2 / 3, rtol=1e-3, atol=1e-3
    )


def test_the_loss_of_labels_is_the_same_however_the_batch_is_cut() -> None:
    """Three pictures with a label, then one, then none: value and gradient are the means over the three parts."""
    labels = LatentLabels(("red", "blue"), 2.0, 0.5)
    captions = ("red", "blue", "a red hat", "red and blue", "blue", "", "green", "red, blue", "", "", "none", "bluer")
    latents = torch.randn(12, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    results = []
    for size in (12, 4):
        z = latents.clone().requires_grad_()
        parts = [labels.loss(z[i : i + size], captions[i : i + size]) for i in range(0, 12, size)]
        loss = torch.stack([part[0] for part in parts]).mean()
        terms = {name: torch.stack([part[1][name] for part in parts]).mean() for name in parts[0][1]}
        results.append((loss.detach(), torch.autograd.grad(loss, z)[0], terms))
    assert_close(*results)
    assert results[0][2]["labelled"].item() == pytest.approx(4 / 12)
    assert parts[2][0].item() == 0 and torch.equal(results[1][1][8:], torch.zeros(4, 4, 2, 2))


def test_more_labels_than_channels_can_tell_are_refused(tmp_path: Path, pretrained: AutoencoderKL) -> None:
    chosen = tuning(tmp_path / "model", latent_labels=LatentLabelsConfig(("a", "b", "c", "d")))
    with pytest.raises(ConfigError, match="holds 4 labels; the 4 latent channels of `pretrained` tell at most 3 apart"):
        build_bottleneck(chosen, pretrained, abs)


def test_the_discriminator_is_told_the_label_that_the_caption_names() -> None:
    """In its warm-up and after; the third names both and the last none. The logits serve both losses."""
    critic = dataclasses.replace(CRITIC, labels=("red", "blue"))
    run = Run(config(discriminator=critic, loss=dataclasses.replace(LOSS, discriminator_warmup=1)))
    pictures, label = captioned("a red ball", "blue", "red and blue", "green"), torch.tensor([0, 1, -1, -1])
    for step in (2, 3):
        loss = run.task.generator_loss(pictures, step)
        assert loss.fake_logits is not None
        assert torch.equal(loss.fake_logits, run.critic(loss.image, label))
    real = run.critic(pictures.image, label)
    assert not torch.equal(real, run.critic(pictures.image, label.roll(1)))
    found, terms = run.task.discriminator_loss(pictures, loss.fake_logits, 3)
    assert_close(found, discriminator_loss(real, loss.fake_logits))
    assert terms["discriminator_labelled"].item() == 0.5


def test_latent_noise_is_added_to_the_sample_that_is_decoded(tmp_path: Path, pretrained: AutoencoderKL) -> None:
    x, z = batch(0).image, torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        posterior = pretrained.encode(x)
        expected = pretrained.decode(posterior.mean + posterior.std * z[0] + 0.3 * z[1])
        assert_close(pretrained(x, z[0], 0.3 * z[1]).image, expected)


def test_the_kl_of_a_frozen_encoder_is_not_in_the_loss(tmp_path: Path, pretrained: AutoencoderKL) -> None:
    heavy, light = (
        Run(tuning(tmp_path / "model", freeze_encoder=True, loss=dataclasses.replace(LOSS, kl=kl))) for kl in (1e3, 0.0)
    )
    surrogates = [run.task.generator_loss(batch(0), 0).surrogate for run in (heavy, light)]
    assert torch.equal(*surrogates)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"pretrained": "./nowhere"}, ["`pretrained`", "nowhere"]),
        ({"data": DataConfig(resolution=15)}, ["`data.resolution` is 15", "`pretrained`", "multiple of 2"]),
    ],
)
def test_a_pretrained_model_that_cannot_serve_is_refused(
    tmp_path: Path, pretrained: AutoencoderKL, changes: dict[str, Any], names: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        build_autoencoder(dataclasses.replace(tuning(tmp_path / "model"), **changes))
    assert all(name in str(error.value) for name in names) and "\n" not in str(error.value)


def test_a_model_in_a_single_file_of_the_original_layout_is_a_start_too(tmp_path: Path) -> None:
    """Written with the tests' tiny model; the autoencoder's tensors come back under their own names."""
    shape = AutoencoderConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    torch.manual_seed(5)
    vae = AutoencoderKL(shape)
    unet = UNet(
        UNetConfig(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            norm_num_groups=4,
            attention_head_dim=2,
        )
    )
    tokenizer = ClipTokenizer.train(["a red circle"] * 3, 600, 8)
    text = ClipTextConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    encoder = ClipTextEncoder(tokenizer, ClipTextModel.from_scratch(text, torch.Generator().manual_seed(1)))
    write_model(Model(vae, unet, encoder, DiffusionConfig()), tmp_path / "model")
    write_single_file(read_folder(tmp_path / "model"), tmp_path / "model.safetensors")
    tuned = build_autoencoder(tuning(tmp_path / "model.safetensors", freeze_encoder=True))
    assert tuned.state_dict().keys() == vae.state_dict().keys()
    assert equal(dict(tuned.state_dict()), dict(vae.state_dict()))
    assert not any(parameter.requires_grad for parameter in tuned.encoder.parameters())
