"""ldm: train your own latent diffusion text-to-image model, and draw with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.pipeline import TextToImage

__all__ = ["TextToImage"]


def __getattr__(name: str) -> Any:
    if name == "TextToImage":
        from ldm.pipeline import TextToImage

        return TextToImage
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")
