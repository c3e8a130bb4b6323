"""Plain networks: they know no noise schedule, no prompt and no device."""

from .classifier import ClassifierConfig, LatentClassifier
from .config import UNetConfig
from .embeddings import sinusoidal_embedding, uncropped
from .unet import UNet

__all__ = ["ClassifierConfig", "LatentClassifier", "UNet", "UNetConfig", "sinusoidal_embedding", "uncropped"]
