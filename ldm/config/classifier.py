"""The configuration of `train_classifier.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ldm.config.common import OptimizerConfig, TrainingConfig, require
from ldm.networks.classifier import ClassifierConfig


@dataclass(frozen=True)
class ClassifierTraining:
    """Everything `train_classifier.py` needs.

    `model` is the model folder or hub id to be guided, which gives scale and noise of the latents; `latents` the cache
    that its training left, `latents/` in its run folder. A caption that names exactly one of `classifier.labels` is of
    that class, others do not count.
    """

    output_dir: str
    model: str
    latents: str
    classifier: ClassifierConfig
    seed: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        require(not self.training.ema_snapshots, "`training.ema_snapshots` is true; it is for train_ldm.py")
