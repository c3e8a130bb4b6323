"""Plain networks: they know no noise schedule, no prompt and no device."""

from .config import UNetConfig
from .embeddings import sinusoidal_embedding, uncropped
from .unet import UNet

__all__ = ["UNet", "UNetConfig", "sinusoidal_embedding", "uncropped"]
