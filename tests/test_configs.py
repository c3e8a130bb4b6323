"""Every file under train_configs/ loads, fits together and builds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from autoencoder import LossState
from conditioning import ClipTextConfig, ClipTextModel
from ldm.build import (
    build_autoencoder,
    build_batches,
    build_bottleneck,
    build_classifier,
    build_discriminator,
    build_loss_weights,
    build_objective,
    build_penalties,
    build_perceptual,
    build_source,
    check_resolution,
)
from ldm.config import AutoencoderTraining, ClassifierTraining, LdmTraining, ScratchClip
from ldm.config.file import dump_config, load_config
from ldm.data.order import BatchPlan
from ldm.networks import UNet
from ldm.tasks.autoencoder import AutoencoderTask
from ldm.tasks.text_to_image import ConditionedUNet
from ldm.training.fine_tuning import build_trained, starting_model
from ldm.training.optim import adamw

FOLDER = Path(__file__).parent.parent / "train_configs"
FILES = [f for f in sorted(FOLDER.rglob("*.yaml")) if "accelerate" not in f.relative_to(FOLDER).parts]
STAGE_ONE = [f for f in FILES if "autoencoder" in f.name]
CLASSIFIERS = [f for f in FILES if "classifier" in f.name]
FINE_TUNING = [f for f in FILES if f.name in ("dreambooth.yaml", "textual_inversion.yaml")]
STAGE_TWO = [f for f in FILES if f not in STAGE_ONE + CLASSIFIERS + FINE_TUNING]


def named(files: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", files, ids=[str(f.relative_to(FOLDER)) for f in files])


def written_by(export: str | None) -> AutoencoderTraining | None:
    """The stage-one config that makes an export from scratch, where it is one of ours; fine-tuning is followed back."""
    candidates = [load_config(AutoencoderTraining, path) for path in STAGE_ONE]
    found = next((c for c in candidates if f"{c.output_dir}/export" == export), None)
    return written_by(found.pretrained) if found is not None and found.pretrained else found


def from_scratch(config: LdmTraining) -> LdmTraining:
    """The stage-two config of ours that makes what this one goes on from; itself, where it is trained from scratch."""
    if config.pretrained is None:
        return config
    candidates = [load_config(LdmTraining, path) for path in STAGE_TWO]
    return from_scratch(next(c for c in candidates if f"{c.output_dir}/export" == config.pretrained))


@named(STAGE_TWO)
def test_what_goes_on_from_another_training_fits_it(path: Path) -> None:
    config = load_config(LdmTraining, path)
    origin = from_scratch(config)
    assert config.data == origin.data
    if config.pretrained:
        assert replace(config.latents, folder=None) == origin.latents
        assert config.latents.folder == f"{origin.output_dir}/latents"


def test_there_are_configs_of_both_stages() -> None:
    assert STAGE_ONE and STAGE_TWO


@named(STAGE_ONE)
def test_a_stage_one_file_builds(path: Path) -> None:
    config = load_config(AutoencoderTraining, path)
    side = config.data.resolution
    with torch.device("meta"):
        vae = build_autoencoder(written_by(config.pretrained) or config)
        image = vae.decode(vae.moments(torch.zeros(1, 3, side, side)).chunk(2, 1)[0])
    assert image.shape == (1, 3, side, side)
    logits = build_discriminator(config.discriminator, 0)(torch.zeros(2, 3, side, side))
    assert len(logits) == 2 and logits.ndim == 4
    build_loss_weights(config.loss)


@named([path for path in STAGE_ONE if path.parent.name == "reference"])
def test_a_reference_recipe_makes_a_step_in_small(path: Path) -> None:
    """An eighth of the widths, 32 pixels, and the packaged network in place of LPIPS, which must be downloaded."""
    published = load_config(AutoencoderTraining, path)
    widths = str([width // 8 for width in published.autoencoder.block_out_channels])
    small = {
        "data.source": "shapes",
        "data.resolution": "32",
        "autoencoder.block_out_channels": widths,
        "autoencoder.norm_num_groups": "8",
        "perceptual.type": "efficientnet_lite0",
        "loss.discriminator_start": "0",
    }
    config = load_config(AutoencoderTraining, path, [f"--{key}={value}" for key, value in small.items()])
    vae, critic, state = build_autoencoder(config), build_discriminator(config.discriminator, 0), LossState()
    task = AutoencoderTask(
        vae,
        critic,
        build_perceptual(config.perceptual),
        build_loss_weights(config.loss),
        build_penalties(config.discriminator),
        state,
        build_bottleneck(config, vae, lambda value: value),
        0,
        lambda value: value,
    )
    batch = next(build_batches(config.data, BatchPlan(2), 0, 0, 1))
    loss = task.generator_loss(batch, 0)
    loss.surrogate.backward()
    assert loss.fake_logits is not None
    d_loss, terms = task.discriminator_loss(batch, loss.fake_logits, 0)
    d_loss.backward()
    for name, value in (loss.terms | terms).items():
        assert bool(torch.isfinite(value).all()), name
    for part in (vae, critic):
        before = [parameter.detach().clone() for parameter in part.parameters()]
        adamw(part.parameters(), config.optimizer, config.optimizer.learning_rate).step()
        changed = [not torch.equal(a, b) for a, b in zip(before, part.parameters(), strict=True)]
        assert sum(changed) > 0.2 * len(changed), "branches that start at zero do not pass a gradient yet"


@named(STAGE_TWO)
def test_a_stage_two_file_builds(path: Path) -> None:
    config = load_config(LdmTraining, path)
    build_objective(config)
    config = from_scratch(config)
    stage_one = written_by(config.autoencoder)
    factor = stage_one.autoencoder.downsample_factor if stage_one else 8
    check_resolution(config, factor)
    side, length, width = config.data.resolution // factor, 77, config.unet.cross_attention_dim
    assert isinstance(width, int)
    if isinstance(config.text_encoder, ScratchClip):
        text = config.text_encoder
        assert text.hidden_size == width
        with torch.device("meta"):
            ClipTextModel(
                ClipTextConfig(
                    vocab_size=text.vocab_size,
                    hidden_size=text.hidden_size,
                    intermediate_size=4 * text.hidden_size,
                    num_hidden_layers=text.num_hidden_layers,
                    num_attention_heads=text.num_attention_heads,
                    max_position_embeddings=text.max_length,
                )
            )
        length = text.max_length
    with torch.device("meta"):
        unet = UNet(config.unet)
        x = torch.zeros(2, config.unet.in_channels, side, side)
        out = unet(x, torch.zeros(2), torch.zeros(2, length, width))
    assert out.shape == x.shape


@named(STAGE_TWO)
def test_a_stage_two_file_fits_the_stage_one_file_that_it_names(path: Path) -> None:
    config = from_scratch(load_config(LdmTraining, path))
    if config.autoencoder is None or not config.autoencoder.startswith("runs/"):
        return
    stage_one = written_by(config.autoencoder)
    assert stage_one is not None, f"no config writes {config.autoencoder}"
    assert config.unet.in_channels == config.unet.out_channels == stage_one.autoencoder.latent_channels
    assert config.data.resolution == stage_one.data.resolution
    assert config.data.source == stage_one.data.source


@named(FINE_TUNING)
def test_a_fine_tuning_file_fits_the_model_and_the_pictures_that_it_names(path: Path) -> None:
    given = load_config(LdmTraining, path)
    config, base = starting_model(given)
    assert base is not None and base.text_encoder.trainable == getattr(given.text_encoder, "trainable", False)
    check_resolution(config, base.vae.downsample_factor)
    network = ConditionedUNet(base.unet, base.text_encoder, base.vae.downsample_factor)
    trained = build_trained(config, network)
    assert {id(p) for p in network.parameters() if p.requires_grad} == {id(p) for p in trained.parameters()}
    assert len(build_source(config.data, config.data.split, 0)) == 5


@named(CLASSIFIERS)
def test_a_classifiers_file_builds_for_the_stage_two_file_that_it_names(path: Path) -> None:
    config = load_config(ClassifierTraining, path)
    stage_two = next(c for c in (load_config(LdmTraining, f) for f in STAGE_TWO) if c.output_dir in config.model)
    assert config.latents == f"{stage_two.output_dir}/latents"
    classifier = build_classifier(config, stage_two.unet.in_channels)
    logits = classifier(torch.zeros(2, stage_two.unet.in_channels, 16, 16), torch.tensor([3, 700]))
    assert logits.shape == (2, len(config.classifier.labels))


@named(FILES)
def test_a_file_survives_the_way_into_a_run_folder(path: Path, tmp_path: Path) -> None:
    kind = AutoencoderTraining if path in STAGE_ONE else ClassifierTraining if path in CLASSIFIERS else LdmTraining
    config = load_config(kind, path)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(kind, tmp_path / "config.yaml") == config
