"""One backward pass and some of the loop's parts on sharded networks against whole ones; run by test_sharding on two ranks.

Every kind of text encoder, and once autocast's bfloat16; prints the name of each case that agrees.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from conditioning import (
    ClipTextConfig,
    ClipTextEncoder,
    ClipTextModel,
    ClipTokenizer,
    DualTextEncoder,
    T5TextEncoder,
    TextEncoder,
)
from ldm.data.shapes import captions, scene
from ldm.networks import UNet, UNetConfig
from ldm.tasks.text_to_image import ConditionedUNet
from ldm.training.ema import Ema
from ldm.training.sharding import ShardingAccelerator, gathered, whole_network

TEXTS = ["a red circle", "a small blue square", "a green star", ""]


def clip(trainable: bool, width: int = 32, projection: bool = False) -> ClipTextEncoder:
    tokenizer = ClipTokenizer.train((c for i in range(100) for c in captions(scene(i, "train"))), 600, 24)
    config = ClipTextConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=width, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=24, projection_dim=20, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = ClipTextModel.from_scratch(config, torch.Generator().manual_seed(1), projection)
    skip = int(projection)
    return ClipTextEncoder(tokenizer, model, skip_layers=skip, trainable=trainable, final_norm=not skip)


def network(encoder: TextEncoder, **pooled: object) -> ConditionedUNet:
    torch.manual_seed(0)
    unet = UNet(
        UNetConfig(
            block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=encoder.context_dim,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=8, attention_head_dim=2,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **pooled,
        )
    )  # fmt: skip
    return ConditionedUNet(unet, encoder)


def cases(t5: Path) -> Iterator[tuple[str, ConditionedUNet]]:
    yield "clip", network(clip(True))
    yield "frozen_clip", network(clip(False))
    dual = DualTextEncoder(clip(True, 32, True), clip(True, 40, True))
    size = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 20}
    yield "dual", network(dual, addition_embed_type="text_time", **size)
    yield "t5", network(T5TextEncoder.from_pretrained(t5, t5, 20, trainable=True))
    yield "bf16", network(clip(True))


def backward(net: nn.Module, x: Tensor, t: Tensor, tokens: Tensor) -> None:
    net(x, t, tokens).float().square().mean().backward()


def compare(name: str, net: ConditionedUNet) -> None:
    """Gradients, their norm, the average and the network for export, sharded and whole."""
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if name == "bf16" else {"rtol": 1e-4, "atol": 1e-6}
    AcceleratorState._reset_state()
    accelerator = ShardingAccelerator(mixed_precision="bf16" if name == "bf16" else "no", kwargs_handlers=[])
    whole = copy.deepcopy(net)
    assert accelerator.prepare(net) is net
    sharded = {n: p for n, p in net.named_parameters() if isinstance(p, DTensor)}
    assert sharded.keys() == {
        n for n, p in net.named_parameters() if n.startswith("unet.") or net.text_encoder.trainable
    }
    x, t = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([1, 300, 600, 900])
    tokens, rows = (
        net.text_encoder.tokenize(TEXTS),
        slice(2 * accelerator.process_index, 2 * accelerator.process_index + 2),
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
        backward(whole, x, t, tokens)
    for _ in range(2):
        net.zero_grad()
        backward(net, x[rows], t[rows], tokens[rows])
    for n, p in whole.named_parameters():
        found = dict(net.named_parameters())[n].grad
        assert (found is None) == (p.grad is None), n
        if p.grad is not None and found is not None:
            assert_close(gathered(found), p.grad, **tolerance, msg=lambda text, n=n: f"{name} {n}: {text}")
    norms = [nn.utils.clip_grad_norm_(which.parameters(), 1e-3) for which in (net, whole)]
    assert_close(gathered(norms[0]), norms[1], **tolerance)
    ema = Ema(net, 0.5)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.0)
    ema.update()
    with ema.applied(), torch.no_grad():
        first = net.unet(x, t, context=net.text_encoder.encode(tokens).context, **told(net, x, tokens))
        finished = whole_network(accelerator, net)
        assert not torch.isnan(first).any()
        if accelerator.is_main_process:
            for n, p in finished.named_parameters():
                assert type(p) is nn.Parameter
                assert_close(p, 0.1 * dict(whole.named_parameters())[n], rtol=1e-6, atol=0)
            print(name)


def told(net: ConditionedUNet, x: Tensor, tokens: Tensor) -> dict[str, Tensor | None]:
    """What an SDXL network is told besides."""
    if not net.reads_pooled:
        return {}
    return {"pooled": net.text_encoder.encode(tokens).pooled, "size_ids": torch.zeros(len(x), 6)}


if __name__ == "__main__":
    for name, net in cases(Path(sys.argv[1])):
        compare(name, net)
