"""Pictures to start from and masks, at the size of the picture that is drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from autoencoder import LatentCodec
from ldm.data.transforms import resize_and_crop, to_rgb, to_tensor


@dataclass(frozen=True)
class Canvas:
    """Fits pictures and masks to `height` and `width` in pixels; on `device`, in float32."""

    codec: LatentCodec
    height: int
    width: int
    device: torch.device

    def latents(self, image: Image.Image) -> Tensor:
        """A picture encoded, [1, C, h, w]."""
        return self._encoded(self._pixels(image))

    def keep(self, mask: Image.Image, like: Tensor) -> Tensor:
        """1 where the mask is black and the picture stays, else 0, [1, 1, h, w] at the size of the latents `like`."""
        return 1 - _shrunk(self._redrawn(mask), like)

    def inpainting_channels(self, image: Image.Image, mask: Image.Image) -> Tensor:
        """What an inpainting U-Net reads besides, [1, 1 + C, h, w]: 1 where it draws anew, and the rest's latents."""
        redrawn = self._redrawn(mask)
        seen = self._encoded(self._pixels(image) * (1 - redrawn))
        return torch.cat([_shrunk(redrawn, seen), seen], dim=1)

    def _pixels(self, image: Image.Image) -> Tensor:
        return to_tensor(resize_and_crop(to_rgb(image), (self.width, self.height)))[None].to(self.device)

    def _encoded(self, pixels: Tensor) -> Tensor:
        return self.codec.encode(pixels).float()

    def _redrawn(self, mask: Image.Image) -> Tensor:
        """1 where the mask is white, else 0, [1, 1, H, W]; a grey is one of the two."""
        sized = mask.convert("L").resize((self.width, self.height), Image.Resampling.LANCZOS)
        return (to_tensor(sized.convert("RGB"))[None, :1] >= 0).float().to(self.device)


def _shrunk(mask: Tensor, like: Tensor) -> Tensor:
    return interpolate(mask, like.shape[2:])
