"""Which launches may shard, what is gathered as one, and that whole tensors pass through as they are.

The sharded training itself is in `test_training_runs.py`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch import nn

from ldm.config import AutoencoderTraining, ClassifierTraining, ConfigError, LdmTraining, LoraConfig, PretrainedText
from ldm.config.file import parse_command_line
from ldm.networks import UNet, UNetConfig
from ldm.networks.blocks import Stage
from ldm.training.sharding import ShardingAccelerator, _layers, accelerator_kind, like, own_part, whole, whole_network

ROOT = Path(__file__).parent.parent.parent
CONFIG = ["--config", "train_configs/shapes/quick-ldm.yaml"]


def stage_two(*argv: str) -> LdmTraining:
    return parse_command_line(LdmTraining, [*CONFIG, *argv])[0]


@pytest.fixture(autouse=True)
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FSDP_VERSION", "FSDP_OFFLOAD_PARAMS"):
        monkeypatch.delenv(name, raising=False)
    for mode in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        monkeypatch.setenv(f"ACCELERATE_USE_{mode}", "false")
    monkeypatch.setenv("WORLD_SIZE", "2")


def test_accelerate_is_asked_and_its_own_way_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert accelerator_kind(stage_two()) is Accelerator
    for processes, kind in (("2", ShardingAccelerator), ("1", Accelerator)):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("WORLD_SIZE", processes)
        assert accelerator_kind(stage_two()) is kind
        assert os.environ["ACCELERATE_USE_FSDP"] == "false"


def test_our_file_asks_for_it_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerate's launcher would put into the environment of every process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # accelerate reads one number
    words = ["--config_file", str(ROOT / "train_configs/accelerate/fsdp.yaml"), "train_ldm.py"]
    asked, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert asked.use_fsdp and not asked.cpu
    for name, value in prepare_multi_gpu_env(asked).items():
        if "FSDP" in name:
            monkeypatch.setenv(name, value)
    assert accelerator_kind(stage_two()) is ShardingAccelerator


@pytest.mark.parametrize(
    ("argv", "env", "message"),
    [
        (
            [],
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            "asked for DEEPSPEED.*ZeRO-3.*take train_configs/accelerate/fsdp.yaml",
        ),
        ([], {"ACCELERATE_USE_MEGATRON_LM": "true"}, "asked for MEGATRON_LM.*take train_configs/accelerate/fsdp.yaml"),
        ([], {"FSDP_VERSION": "1"}, "`fsdp_version` is 1; it must be 2"),
        ([], {"FSDP_OFFLOAD_PARAMS": "true"}, "`fsdp_offload_params` is true; it must be false"),
        (["--training.torch_compile", "true"], {}, "`training.torch_compile` is true; it must be false, or take"),
    ],
)
def test_what_cannot_be_combined_names_field_and_remedy(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], env: dict[str, str], message: str
) -> None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", **env}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        accelerator_kind(stage_two(*argv))


def test_an_adapter_is_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    config = dataclasses.replace(
        stage_two("--optimizer.type", "adamw"),
        autoencoder=None,
        pretrained="x",
        text_encoder=PretrainedText(),
        adapter=LoraConfig("lora"),
    )
    with pytest.raises(ConfigError, match=r"`adapter.type` is lora.*; take train_configs/accelerate/ddp.yaml$"):
        accelerator_kind(config)


def test_the_other_trainings_are_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    classifier: Any = object.__new__(ClassifierTraining)
    for config in (AutoencoderTraining("runs/x"), classifier):
        with pytest.raises(ConfigError, match=re.escape("only train_ldm.py shards its weights; take train_configs")):
            accelerator_kind(config)


def test_layers_are_gathered_from_the_inside_out_and_stages_never() -> None:
    unet = UNet(UNetConfig(block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                           up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32))  # fmt: skip
    layers = _layers(unet)
    assert not any(isinstance(layer, (Stage, nn.Linear)) for layer in layers)
    place = {id(layer): index for index, layer in enumerate(layers)}
    assert len(place) == len(layers) > 20
    for layer in layers:
        inner = [place[id(part)] for part in layer.modules() if part is not layer and id(part) in place]
        assert all(index < place[id(layer)] for index in inner)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    outside = [name for name, p in unet.named_parameters() if id(p) not in inside]
    assert {name.split(".")[0] for name in outside} == {"conv_in", "time_embedding", "conv_norm_out", "conv_out"}


def test_a_network_that_is_not_sharded_is_saved_loaded_and_exported_as_it_is() -> None:
    net = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    for part in (net, optimizer):
        state: Any = part.state_dict()
        written = json.dumps(state, default=str)
        assert json.dumps(whole(state, True), default=str) == json.dumps(own_part(state, part), default=str) == written
    assert like(net.weight, net.weight) is net.weight
    assert own_part({"any": 1}, object()) == {"any": 1}
    accelerator: Any = object()
    network: Any = net
    assert whole_network(accelerator, network) is net


def test_every_kind_of_text_encoder_is_sharded_with_the_network(tiny_t5_folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    shared |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(Path(__file__).with_name("sharded_steps.py")), str(tiny_t5_folder)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [{**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    started = [subprocess.Popen(command, cwd=ROOT, env=env, **pipes) for env in ranks]
    said = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0, 0], said[0][1] + said[1][1]
    assert said[0][0].split() == ["clip", "frozen_clip", "dual", "t5", "bf16"]
