"""Training configurations: frozen dataclasses, and what each refuses. `ldm.config.file` fills them from YAML."""

from ldm.config.adapters import (
    AdapterConfig,
    LoraConfig,
    NoAdapter,
    PriorPreservationConfig,
    TextualInversionConfig,
)
from ldm.config.classifier import ClassifierTraining
from ldm.config.common import (
    TRACKERS,
    BucketConfig,
    ConfigError,
    DataConfig,
    OptimizerConfig,
    TrainingConfig,
    check_buckets,
)
from ldm.config.stage_one import (
    AutoencoderLossConfig,
    AutoencoderTraining,
    CodebookConfig,
    DiscriminatorConfig,
    LatentLabelsConfig,
    PerceptualConfig,
    ReconstructionValidation,
)
from ldm.config.stage_two import LatentCacheConfig, LdmTraining, ObjectiveConfig, SampleValidation
from ldm.config.text_encoders import (
    DualClip,
    OpenClip,
    PretrainedClip,
    PretrainedT5,
    PretrainedText,
    PretrainedTransformer,
    ScratchClip,
    TextEncoderConfig,
)

__all__ = [
    "TRACKERS",
    "AdapterConfig",
    "AutoencoderLossConfig",
    "AutoencoderTraining",
    "BucketConfig",
    "ClassifierTraining",
    "CodebookConfig",
    "ConfigError",
    "DataConfig",
    "DiscriminatorConfig",
    "DualClip",
    "LatentCacheConfig",
    "LatentLabelsConfig",
    "LdmTraining",
    "LoraConfig",
    "NoAdapter",
    "ObjectiveConfig",
    "OpenClip",
    "OptimizerConfig",
    "PerceptualConfig",
    "PretrainedClip",
    "PretrainedT5",
    "PretrainedText",
    "PretrainedTransformer",
    "PriorPreservationConfig",
    "ReconstructionValidation",
    "SampleValidation",
    "ScratchClip",
    "TextEncoderConfig",
    "TextualInversionConfig",
    "TrainingConfig",
    "check_buckets",
]
