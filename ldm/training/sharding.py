"""Sharded training: each process holds its part of every weight, gradient, moment and average.

This is what FSDP2 and ZeRO stage 3 do (Rajbhandari et al. 2020, section 5; Zhao et al. 2023). `accelerate launch` says
whether it is wanted, torch's `fully_shard` does it. A sharded weight is a `DTensor`: elementwise work such as an update
or an average needs nothing from the other processes, a forward pass gathers one layer after the other, in all
processes together. States and exports hold whole tensors, as those of any other run.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from conditioning import TextEncoder
from ldm.config import AutoencoderTraining, ClassifierTraining, ConfigError, LdmTraining, NoAdapter
from ldm.networks.blocks import Stage
from ldm.tasks.text_to_image import ConditionedUNet

REPLICATED = "take train_configs/accelerate/ddp.yaml"


def accelerator_kind(config: AutoencoderTraining | ClassifierTraining | LdmTraining) -> type[Accelerator]:
    """The one that shards, where the launcher asked for FSDP2 over several processes; accelerate's own way, for which
    it needs a GPU, is then turned off.

    Raises:
        ConfigError: it asked for another way to shard, or for one that this config cannot have.
    """
    plain: type[Accelerator] = Accelerator
    for mode in ("DEEPSPEED", "MEGATRON_LM"):
        if _flag(f"ACCELERATE_USE_{mode}"):
            raise ConfigError(
                f"accelerate was asked for {mode}, but weights are sharded by FSDP2 here, which does what ZeRO-3 does; "
                "take train_configs/accelerate/fsdp.yaml"
            )
    if not _flag("ACCELERATE_USE_FSDP"):
        return plain
    if not isinstance(config, LdmTraining):
        raise ConfigError(f"accelerate was asked for FSDP, but only train_ldm.py shards its weights; {REPLICATED}")
    for hindrance in _hindrances(config):
        raise ConfigError(f"accelerate was asked for FSDP, but {hindrance}")
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    return ShardingAccelerator if int(os.environ.get("WORLD_SIZE", "1")) > 1 else plain


def _hindrances(config: LdmTraining) -> Iterator[str]:
    """What stands against sharding, each with its remedy."""
    if (version := os.environ.get("FSDP_VERSION", "2")) != "2":
        yield f"`fsdp_version` is {version}; it must be 2"
    if _flag("FSDP_OFFLOAD_PARAMS"):
        yield "`fsdp_offload_params` is true; it must be false"
    if not isinstance(config.adapter, NoAdapter):
        yield f"`adapter.type` is {config.adapter.type}, of which there is little to shard; {REPLICATED}"
    if config.training.torch_compile:
        yield f"`training.torch_compile` is true; it must be false, or {REPLICATED}"


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


class ShardingAccelerator(Accelerator):  # type: ignore[misc]  # accelerate is not typed
    """An accelerator that shards the one network it prepares, which stays the same object.

    The casts of a forward pass are not kept for a second use in it: they would add up to a whole network.
    """

    def __init__(self, **settings: Any) -> None:
        handlers = [*settings.pop("kwargs_handlers"), AutocastKwargs(cache_enabled=False)]
        super().__init__(**settings, kwargs_handlers=handlers)

    def prepare(self, network: ConditionedUNet) -> ConditionedUNet:
        """The U-Net and a trained text encoder sharded, a frozen one whole; layer by layer moved to the device."""
        self.outline = _without_weights(network)
        self.prepare_model(network, device_placement=False, evaluation_mode=True)
        mesh = init_device_mesh(self.device.type, (self.num_processes,))
        for root in _roots(network):
            for module in [*_layers(root), root]:
                fully_shard(module, mesh=mesh, reshard_after_forward=True)
        if not network.text_encoder.trainable:
            network.text_encoder.to(self.device)
        return network


def _roots(network: ConditionedUNet) -> list[nn.Module]:
    """The modules that are called from outside: the U-Net, and the models in a trained text encoder."""
    encoders = [part for part in network.text_encoder.modules() if isinstance(part, TextEncoder) and part.trainable]
    models = [child for encoder in encoders for child in encoder.children()]
    return [network.unet, *(model for model in models if not isinstance(model, TextEncoder))]


def _layers(root: nn.Module) -> list[nn.Module]:
    """What is gathered and let go as one: the entries of the root's module lists, inner ones first.

    A stage of the U-Net is too large for that, and changes a list that it is given; a single matrix is too small.
    """
    lists = [module for module in root.modules() if isinstance(module, nn.ModuleList)]
    return [layer for each in reversed(lists) for layer in each if not isinstance(layer, (Stage, nn.Linear))]


def _without_weights(network: ConditionedUNet) -> ConditionedUNet:
    """A copy whose parameters are on the meta device; fully_shard lets nobody copy a network afterwards."""
    parameters = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in network.parameters()}
    return copy.deepcopy(network, parameters)


def whole_network(accelerator: Accelerator, network: ConditionedUNet) -> ConditionedUNet:
    """The network for export: with whole weights, in the main process only, where it is sharded; every process must
    call it."""
    if not isinstance(accelerator, ShardingAccelerator):
        return network
    weights = {p: whole(p.detach(), accelerator.is_main_process) for p in network.parameters()}
    if accelerator.is_main_process:
        parameters = {p: nn.Parameter(weight) for p, weight in weights.items()}
        named = {name: parameters[p] for name, p in network.named_parameters(remove_duplicate=False)}  # tied ones twice
        accelerator.outline.load_state_dict(network.state_dict() | named, assign=True)
    return accelerator.outline


def whole(tree: Any, keep: bool) -> Any:
    """A tree of tensors, numbers, lists and dicts with every sharded tensor gathered, one after the other, to the CPU.

    Every process must call it; one that does not `keep` gets None in their place.
    """
    if isinstance(tree, DTensor):
        tensor = gathered(tree)
        return tensor.cpu() if keep else None
    if isinstance(tree, Mapping):
        return {key: whole(value, keep) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [whole(value, keep) for value in tree]
    return tree


def gathered(value: Tensor) -> Tensor:
    """A sharded tensor as a whole one, any other as it is; every process must call it."""
    full: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return full


def local(value: Tensor) -> Tensor:
    """What this process holds of a sharded tensor, which shares its memory; any other tensor as it is."""
    part: Tensor = value.to_local() if isinstance(value, DTensor) else value
    return part


def like(value: Tensor, own: Tensor | None) -> Tensor:
    """A whole tensor, or this process' part of it where `own` of the same shape is sharded."""
    if not isinstance(own, DTensor) or value.shape != own.shape:
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def own_part(state: Any, part: object) -> Any:
    """Of a state of whole tensors, what `part` can load: a sharded network or optimiser its share, others all."""
    if isinstance(part, nn.Module):
        own = part.state_dict()
        return {name: like(value, own.get(name)) for name, value in state.items()}
    if isinstance(part, torch.optim.Optimizer):
        parameters = [p for group in part.param_groups for p in group["params"]]
        of_each = state["state"].items()
        return {**state, "state": {i: {k: like(v, parameters[i]) for k, v in kept.items()} for i, kept in of_each}}
    return state
