"""Outputs of the published U-Nets at full size beside those of diffusers, on the same random weights in fp32.

    python benchmarks/parity_full_size.py sd15 sd21 sdxl

One model at a time, both networks on the same storage: 3.5 GiB for Stable Diffusion 1.5 and 2.1, 10.5 GiB for SDXL.
Prints one JSON line a model and ends with code 1 where the largest difference exceeds 1e-4.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ldm.networks import UNet, UNetConfig

CROSS_DOWN, DOWN, CROSS_UP, UP = "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"
SD: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN],
    "up_block_types": [UP, CROSS_UP, CROSS_UP, CROSS_UP],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {**SD, "attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64},
    "sd21": {
        **SD,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "sample_size": 96,
        "upcast_attention": True,
        "use_linear_projection": True,
    },
    "sdxl": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN],
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": [CROSS_UP, CROSS_UP, UP],
        "use_linear_projection": True,
    },
}
TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=CONFIGS)
    parser.add_argument("--latent-side", type=int, default=32, help="side of the latents, a multiple of 8")
    args = parser.parse_args()
    reports = [compare(name, args.latent_side) for name in args.models]
    sys.exit(any(report["largest_difference"] > TOLERANCE for report in reports))


@torch.no_grad()
def compare(name: str, side: int) -> dict[str, Any]:
    """Both networks on one batch: the largest difference of their outputs, beside the spread of the outputs."""
    config = UNetConfig.from_dict(CONFIGS[name])
    with torch.device("meta"):
        ours = UNet(config).eval()
        theirs = UNet2DConditionModel.from_config(config.to_dict()).eval()
    state = random_state(ours)
    for network in (ours, theirs):
        network.load_state_dict(state, strict=True, assign=True)
    x, t, context, pooled, size_ids = inputs(config, side)
    added = {"text_embeds": pooled, "time_ids": size_ids}
    expected, slow = timed(lambda: theirs(x, t, context, added_cond_kwargs=added, return_dict=False)[0])
    actual, fast = timed(lambda: ours(x, t, context, pooled=pooled, size_ids=size_ids))
    report = {
        "model": name,
        "parameters": sum(value.numel() for value in state.values()),
        "latents": list(x.shape),
        "output_std": float(expected.std()),
        "largest_difference": float((actual - expected).abs().max()),
        "seconds": {"ours": round(fast, 2), "diffusers": round(slow, 2)},
    }
    print(json.dumps(report), flush=True)
    return report


def random_state(network: UNet) -> dict[str, Tensor]:
    """Every parameter random, at the scale that keeps activations near one."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        fan_in = value[0].numel() if value.dim() > 1 else 100
        state[name] = torch.empty(value.shape).uniform_(-1, 1, generator=generator) * (3 / fan_in) ** 0.5
        if "norm" in name and name.endswith("weight"):
            state[name] += 1
    return state


def inputs(config: UNetConfig, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Latents, timesteps and what else the config's network is told, for two rows."""
    generator = torch.Generator().manual_seed(1)
    width = config.cross_attention_dim
    x = torch.randn(2, config.in_channels, side, side, generator=generator)
    context = torch.randn(2, 77, width if isinstance(width, int) else width[0], generator=generator)
    t = torch.tensor([17, 801])
    if config.addition_embed_type is None:
        return x, t, context, None, None
    size_ids = torch.tensor([[1024, 1024, 0, 0, 1024, 1024], [768, 512, 8, 0, 1024, 1024]])
    return x, t, context, torch.randn(2, 1280, generator=generator), size_ids


def timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What a call returns, and its seconds."""
    started = time.perf_counter()
    return run(), time.perf_counter() - started


if __name__ == "__main__":
    main()
