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
