"""A codebook in stage one's task: its loss, its averages, what is built for it, and its latents behind LatentCodec."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from autoencoder import AutoencoderConfig, AutoencoderKL, LatentCodec, VQModel, fold_into_convolutions, nll
from ldm.build import (
    build_autoencoder,
    build_bottleneck,
    build_discriminator,
    build_loss_state,
    build_loss_weights,
    build_penalties,
)
from ldm.config import (
    AutoencoderLossConfig,
    AutoencoderTraining,
    CodebookConfig,
    ConfigError,
    DataConfig,
    DiscriminatorConfig,
    LatentLabelsConfig,
)
from ldm.data.batches import PixelBatch
from ldm.pretrained import read_vae
from ldm.tasks.autoencoder import AutoencoderTask
from ldm.training.guards import CodebookWatch, PosteriorWatch, watched_latents
from ldm.training.latent_scale import latent_scale

SHAPE = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=3)
CODES = CodebookConfig(num_vq_embeddings=16)


def config(**changes: Any) -> AutoencoderTraining:
    loss = AutoencoderLossConfig(perceptual=0.0, discriminator=0.2, discriminator_start=1)
    critic = DiscriminatorConfig(num_layers=1, base_channels=4, norm="group")
    chosen = {"data": DataConfig(resolution=16), "autoencoder": SHAPE, "codebook": CODES, "loss": loss}
    return AutoencoderTraining("out", discriminator=critic, **{**chosen, **changes})


def images(count: int = 4) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(5)) * 2 - 1


def batch(rows: Tensor) -> PixelBatch:
    return PixelBatch(rows, ("",) * len(rows), tuple(range(len(rows))))


def task_of(
    chosen: AutoencoderTraining, vae: VQModel, reduce_mean: Callable[[Tensor], Tensor] = lambda value: value
) -> AutoencoderTask:
    critic = build_discriminator(chosen.discriminator, 0)
    weights, penalties = build_loss_weights(chosen.loss), build_penalties(chosen.discriminator)
    state, bottleneck = build_loss_state(chosen.loss), build_bottleneck(chosen, vae, reduce_mean)
    return AutoencoderTask(vae, critic, None, weights, penalties, state, bottleneck, 0, reduce_mean)


def vq(chosen: AutoencoderTraining) -> VQModel:
    """The model of a config, its codes spread like its latents so that several occur."""
    vae = build_autoencoder(chosen)
    assert isinstance(vae, VQModel)
    with torch.no_grad():
        latents = vae.encode(images()).transpose(0, 1).flatten(1).T
        picks = torch.linspace(0, len(latents) - 1, len(vae.quantize.embedding.weight)).long()
        vae.quantize.embedding.weight.copy_(latents[picks])
    return vae


def test_the_config_builds_the_model_that_its_shape_and_codebook_say() -> None:
    chosen = config(codebook=CodebookConfig(num_vq_embeddings=16, vq_embed_dim=5, update="ema", decay=0.5))
    vae = build_autoencoder(chosen)
    assert isinstance(vae, VQModel) and vae.latent_channels == 5
    assert vae.config.block_out_channels == (8, 16) and vae.config.latent_channels == 3
    assert (vae.quantize.update.rule, vae.quantize.update.decay) == ("ema", 0.5)
    assert isinstance(build_autoencoder(config(codebook=CodebookConfig())), AutoencoderKL)


@pytest.mark.parametrize("beta", [0.25, 2.0])
def test_the_gradient_is_that_of_the_whole_loss(beta: float) -> None:
    """nll + weight * values * (codebook + beta * commitment) by autograd, straight through the codes."""
    chosen = config(codebook=dataclasses.replace(CODES, weight=0.7, commitment=beta))
    vae = vq(chosen).double()  # gradients of a sum of 3,072 squares: float32 leaves 3 digits
    loss = task_of(chosen, vae).generator_loss(batch(images().double()), 0)
    loss.surrogate.backward()
    got = {name: parameter.grad for name, parameter in vae.named_parameters()}
    vae.zero_grad()
    latents = vae.encode(images().double())
    indices = torch.cdist(latents.permute(0, 2, 3, 1).flatten(0, 2), vae.quantize.embedding.weight).argmin(1)
    codes = vae.quantize.embedding.weight[indices].view(4, 8, 8, 3).permute(0, 3, 1, 2)
    image = vae.decode(latents + (codes - latents).detach())
    pull, commit = (codes - latents.detach()).square().mean(), (latents - codes.detach()).square().mean()
    expected = nll(image, images().double(), torch.zeros(4), build_loss_weights(chosen.loss))
    (expected + 0.7 * 768 * (pull + beta * commit)).backward()
    assert_close(loss.terms["codebook"], pull.detach())
    assert loss.terms["codes_used"] * 16 == len(indices.unique())
    for name, parameter in vae.named_parameters():
        value = got[name]
        assert parameter.grad is not None and value is not None
        assert_close(value, parameter.grad, rtol=1e-7, atol=1e-9 * float(parameter.grad.norm()) + 1e-12)


def test_terms_name_the_codebook_and_the_adversary_joins_at_its_start() -> None:
    task = task_of(config(), vq(config()))
    terms = [task.generator_loss(batch(images()), step).terms for step in (0, 1)]
    assert {"codebook", "commitment", "perplexity", "codes_used", "nll", "l1"} <= terms[0].keys()
    assert "kl" not in terms[0] and "generator" not in terms[0] and "generator" in terms[1]


def averaged_codes(parts: list[list[Tensor]]) -> Tensor:
    """The codebook after one update whose batch was cut into processes (outer) and micro-batches (inner)."""
    chosen = config(codebook=dataclasses.replace(CODES, update="ema", decay=0.5))
    ranks: list[AutoencoderTask] = []
    sums: list[Tensor] = []
    for micro_batches in parts:
        vae = vq(chosen)
        ranks.append(task_of(chosen, vae, lambda value: torch.stack(sums).mean(0) if sums else value))
        for rows in micro_batches:
            ranks[-1].generator_loss(batch(rows), 0)
    gathered = [torch.stack(rank.bottleneck.gathered).mean(0) for rank in ranks]  # type: ignore[attr-defined]
    sums.extend(gathered)
    for rank in ranks:
        rank.remember({})
    codes = [rank.model.quantize.embedding.weight.detach() for rank in ranks]  # type: ignore[union-attr]
    assert all(torch.equal(other, codes[0]) for other in codes)
    return codes[0]


def test_averages_do_not_depend_on_how_a_batch_is_cut() -> None:
    x = images(8)
    whole = averaged_codes([[x]])
    before = vq(config()).quantize.embedding.weight.detach()
    assert not torch.allclose(whole, before)
    for cut in ([[x[:4]], [x[4:]]], [[x[:4], x[4:]]], [[x[:2], x[2:4]], [x[4:6], x[6:]]]):
        assert_close(averaged_codes(cut), whole, atol=1e-6, rtol=1e-5)


def test_a_step_that_was_not_taken_leaves_no_trace_in_the_averages() -> None:
    chosen = config(codebook=dataclasses.replace(CODES, update="ema", decay=0.5))
    kept, disturbed = vq(chosen), vq(chosen)
    tasks = [task_of(chosen, vae) for vae in (kept, disturbed)]
    tasks[1].generator_loss(batch(-images()), 0)
    for task in tasks:
        task.generator_loss(batch(images()), 1)
        task.remember({})
    assert torch.equal(kept.quantize.embedding.weight, disturbed.quantize.embedding.weight)


def test_training_uses_the_codes_and_lowers_the_loss() -> None:
    chosen = config(codebook=dataclasses.replace(CODES, update="ema", decay=0.9))
    vae = vq(chosen)
    task, optimizer = task_of(chosen, vae), torch.optim.Adam([p for p in vae.parameters() if p.requires_grad], 2e-3)
    losses = []
    for _ in range(30):
        loss = task.generator_loss(batch(images()), 0)
        loss.surrogate.backward()
        optimizer.step()
        optimizer.zero_grad()
        task.remember(loss.terms)
        losses.append(float(loss.terms["nll"]))
    assert losses[-1] < 0.85 * losses[0]
    assert float(loss.terms["codes_used"]) >= 3 / 16


@torch.no_grad()
def test_an_export_has_centred_latents_of_unit_variance_and_diffusers_reads_it(tmp_path: Path) -> None:
    chosen = config()
    vae = vq(chosen)
    with torch.no_grad():
        picture = vae.reconstruct(images())
        found = latent_scale(vae, [vae.moments(images())], chosen)
        vae.config = dataclasses.replace(vae.config, **found)
        assert_close(vae.reconstruct(images()), picture, atol=1e-5, rtol=1e-5)
    vae.save_pretrained(tmp_path / "vae")
    read = read_vae(tmp_path)
    z = LatentCodec.from_config(read).encode(images())
    assert z.mean((0, 2, 3)).abs().max() < 1e-4
    assert float(z.square().mean()) == pytest.approx(1.0, abs=1e-3)
    theirs = diffusers.VQModel.from_pretrained(tmp_path / "vae")
    assert_close(LatentCodec.from_config(read).decode(z), theirs(images()).sample.clamp(-1, 1), atol=1e-4, rtol=1e-4)
    noisy = z + 1e-4 * torch.randn_like(z)
    assert_close(LatentCodec.from_config(read).decode(noisy), LatentCodec.from_config(read).decode(z))


def test_folding_a_spread_by_channel_would_change_the_codes() -> None:
    with pytest.raises(ValueError, match="shifted, but not scaled channel by channel"):
        fold_into_convolutions(vq(config()), torch.zeros(3), torch.ones(3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze_encoder": True, "latent_noise": 0.5}, "`latent_noise` is 0.5, but `pretrained` has a codebook"),
        (
            {"latent_labels": LatentLabelsConfig(("red", "blue"))},
            "`latent_labels.names` is ['red', 'blue'], but `pretrained` has a codebook",
        ),
    ],
)
def test_what_is_for_gaussian_latents_is_refused_for_codes(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    vq(config()).save_pretrained(tmp_path / "vae")
    plain = {"autoencoder": AutoencoderConfig(), "codebook": CodebookConfig(), "pretrained": str(tmp_path)}
    chosen = config(**plain, **changes)
    with pytest.raises(ConfigError, match=re.escape(message)):
        task_of(chosen, build_autoencoder(chosen))


def test_a_frozen_encoder_keeps_its_codebook(tmp_path: Path) -> None:
    vq(config()).save_pretrained(tmp_path / "vae")
    plain = CodebookConfig(update="ema")
    chosen = config(autoencoder=AutoencoderConfig(), codebook=plain, pretrained=str(tmp_path), freeze_encoder=True)
    vae = build_autoencoder(chosen)
    assert isinstance(vae, VQModel)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    task = task_of(chosen, vae)
    optimizer = torch.optim.Adam([p for p in vae.parameters() if p.requires_grad], 1e-2)
    for _ in range(3):
        loss = task.generator_loss(batch(images()), 0)
        loss.surrogate.backward()
        optimizer.step()
        optimizer.zero_grad()
        task.remember(loss.terms)
    for name, value in vae.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(("encoder.", "quant_conv.", "quantize."))


def test_the_watch_that_fits_speaks_up_when_few_codes_are_used() -> None:
    vae = vq(config())
    watch = watched_latents(vae, [images(2), images(2)])
    assert isinstance(watch, CodebookWatch) and watch.warning(7) is None
    assert 0.2 < watch.figures()["codebook_used"] <= 1
    with torch.no_grad():
        vae.quantize.embedding.weight[1:] = 1e3
    warning = watched_latents(vae, [images()]).warning(7)
    assert warning is not None and "6.2% of the 16 codes" in warning and "step 7" in warning
    assert CodebookWatch(torch.arange(4), 1000).warning(1) is None
    assert isinstance(watched_latents(AutoencoderKL(SHAPE), [images()]), PosteriorWatch)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"autoencoder": dataclasses.replace(SHAPE, use_quant_conv=False)}, ["`autoencoder.use_quant_conv` is False"]),
        ({"autoencoder": AutoencoderConfig(), "pretrained": "x"}, ["`codebook.num_vq_embeddings` is 16", "'x'"]),
    ],
)
def test_a_codebook_that_fits_nothing_is_refused(changes: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        config(**changes)
    assert all(name in str(error.value) for name in names)
