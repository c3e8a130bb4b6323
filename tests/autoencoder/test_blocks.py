"""Building blocks of encoder and decoder against torch's own operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from autoencoder.blocks import Upsample


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 1, 1), (4, 5, 8), (16, 3, 2)])
def test_upsampling_is_a_doubling_and_a_convolution(channels: int, height: int, width: int) -> None:
    """The one transposed convolution and the two operations: same picture, same gradients of everything."""
    torch.manual_seed(0)
    block = Upsample(channels).double()
    x = torch.randn(2, channels, height, width, dtype=torch.float64, requires_grad=True)
    one, two = block(x), block.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert_close(one, two, atol=1e-12, rtol=0.0)
    cotangent = torch.randn_like(two)
    inputs = (x, *block.parameters())
    assert_close(
        torch.autograd.grad(one, inputs, cotangent), torch.autograd.grad(two, inputs, cotangent), atol=1e-11, rtol=0.0
    )


@torch.no_grad()
def test_upsampling_respects_another_padding() -> None:
    """Circular padding, which makes seamless textures: shifting the picture shifts the result."""
    torch.manual_seed(0)
    block = Upsample(3)
    block.conv.padding_mode = "circular"
    x = torch.randn(1, 3, 4, 6)
    assert_close(block(x.roll(1, 3)), block(x).roll(2, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_upsampling_in_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block, x = Upsample(8), torch.randn(1, 8, 4, 4)
    expected = block(x)
    assert_close(block.to(dtype)(x.to(dtype)).float(), expected, atol=0.05, rtol=0.05)
