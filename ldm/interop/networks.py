"""Networks from the parts of a checkpoint, strictly: every tensor has its place, every place its tensor."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from autoencoder import Autoencoder, AutoencoderConfig, AutoencoderKL, CodebookUpdate, VQConfig, VQModel
from autoencoder.config import BlocksConfig
from autoencoder.model import current_key
from conditioning import ClipTextConfig, ClipTextModel, ClipTokenizer
from ldm.interop.checkpoint import Part
from ldm.interop.tensors import ModelError, check_state, load_strictly
from ldm.networks import UNet
from ldm.networks.config import UNetConfig

PARSERS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "unet": UNetConfig.from_dict,
    "vae": AutoencoderConfig.from_dict,
    "vqvae": VQConfig.from_dict,
    "text_encoder": ClipTextConfig.from_dict,
    "text_encoder_2": ClipTextConfig.from_dict,
}
"""config.json of a part -> our config."""
Network = TypeVar("Network", bound=nn.Module)
Value = TypeVar("Value")


def explained(source: Path, function: Callable[..., Value], *values: Any) -> Value:
    """The function's result; what goes wrong in it is a ModelError that names `source`."""
    try:
        return function(*values)
    except ModelError:
        raise
    except KeyError as error:
        raise ModelError(f"{source}: the key `{error.args[0]}` is missing") from error
    except (ValueError, TypeError, ArithmeticError, AttributeError, IndexError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(reason if str(source) in reason else f"{source}: {reason}") from error


def parsed(part: Part, name: str) -> Any:
    """The typed config of a part. Raises ModelError for one that is wrong, or asks for more layers than tensors."""
    config = explained(part.config_source, PARSERS[name], part.config)
    explained(part.config_source, _refuse_deep, config, part)
    return config


def _refuse_deep(config: Any, part: Part) -> None:
    deep = layers(config)
    if deep > len(part.state):
        raise ModelError(f"{part.config_source} names {deep} layers, but {part.source} holds {len(part.state)} tensors")


def layers(config: UNetConfig | BlocksConfig | ClipTextConfig) -> int:
    """How many layers a config asks for, counted before any is built."""
    if isinstance(config, UNetConfig):
        return sum(level.layers * (1 + level.depth) for level in config.down_levels()) + config.mid_level().depth
    if isinstance(config, BlocksConfig):
        return config.layers_per_block * len(config.block_out_channels)
    return config.num_hidden_layers


def build_unet(part: Part) -> UNet:
    """The U-Net of a checkpoint, in float32 and eval mode."""
    return _built(UNet, parsed(part, "unet"), part)


def build_vae(part: Part, update: CodebookUpdate = CodebookUpdate()) -> Autoencoder:
    """The autoencoder of a checkpoint, in float32 and eval mode; old names of its attention are understood.

    Its config's `_class_name` says which kind it is, AutoencoderKL without; `update` is how a codebook learns.
    """
    current = {current_key(key): value for key, value in part.state.items()}
    renamed = replace(part, state=current)
    if part.config.get("_class_name") == "VQModel":
        return _built(lambda config: VQModel(config, update), parsed(part, "vqvae"), renamed)
    return _built(AutoencoderKL, parsed(part, "vae"), renamed)


def build_text_model(part: Part) -> ClipTextModel:
    """A text tower of a checkpoint, in float32 and eval mode, with its projection where it has one."""
    projects = "text_projection.weight" in part.state
    return _built(lambda config: ClipTextModel(config, projects), parsed(part, "text_encoder"), part)


def check_part(part: Part, name: str) -> None:
    """Raises ModelError unless the part's tensors are those that its config asks for; nothing is computed."""
    projects = "text_projection.weight" in part.state
    networks: Mapping[str, Callable[[Any], nn.Module]] = {"unet": UNet, "vae": AutoencoderKL}
    network = networks.get(name, lambda config: ClipTextModel(config, projects))
    expected = explained(part.config_source, on_meta, network, parsed(part, name)).state_dict()
    state = {current_key(key): value for key, value in part.state.items()} if name == "vae" else part.state
    check_state(part.source, state, expected)


def build_tokenizer(files: Mapping[str, str], source: Path) -> ClipTokenizer:
    """A tokenizer from the texts of its folder."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        return explained(source, ClipTokenizer.from_pretrained, folder)


def on_meta(network: Callable[[Any], Network], config: Any) -> Network:
    """A network without memory, for weights to come."""
    with torch.device("meta"):
        return network(config)


def _built(network: Callable[[Any], Network], config: Any, part: Part) -> Network:
    module: Network = explained(part.config_source, on_meta, network, config)
    load_strictly(module, part.state, part.source)
    return module.eval()
