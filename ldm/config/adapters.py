"""What is trained of a pretrained model, chosen by `adapter.type`, and DreamBooth's prior preservation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ldm.config.common import require, require_at_least, require_positive


@dataclass(frozen=True)
class NoAdapter:
    """The weights themselves are trained."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates alone are trained (Hu et al. 2021); `alpha` null is the rank.

    `targets` are ends of the names of U-Net layers, `text_encoder_targets` of text encoder layers, which are adapted
    where `text_encoder.trainable` is true.
    """

    type: Literal["lora"]
    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    text_encoder_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __post_init__(self) -> None:
        require_at_least(self, "adapter", 1, "rank")
        require_positive(self, "adapter", "alpha")
        for name in ("targets", "text_encoder_targets"):
            require(len(getattr(self, name)) > 0, f"`adapter.{name}` is empty; it must name at least one layer")


@dataclass(frozen=True)
class TextualInversionConfig:
    """The embedding of one new token alone is trained (Gal et al. 2023), from the mean of the initializer's tokens."""

    type: Literal["textual_inversion"]
    token: str
    initializer: str

    def __post_init__(self) -> None:
        require(
            bool(self.token) and not any(letter.isspace() for letter in self.token),
            f"`adapter.token` is {self.token!r}; it must be one word, such as <heart>",
        )


AdapterConfig = NoAdapter | LoraConfig | TextualInversionConfig


@dataclass(frozen=True)
class PriorPreservationConfig:
    """Pictures of what the pretrained model knows keep it what it was (Ruiz et al. 2023, section 3.3).

    Half of every batch are `num_class_images` pictures, whose mean loss counts `prior_loss_weight` times (lambda of
    equation 2). The model draws them beforehand from `class_prompts`, in turn, or from the lines of
    `class_prompts_file`; or they are the first ones of `class_source`, any data source with captions, best what the
    model was trained on. Without any of the three there is no such half.

    With `target` picture the network is to find these pictures under their noise, as those of the subject; with model
    it is to predict what the pretrained model predicts there (the old task's loss of Li & Hoiem 2016, with a squared
    error), a loss that is zero at the start and has no noise of its own. A second, frozen copy of the model is then
    held in memory.
    """

    class_prompts: tuple[str, ...] = ()
    class_prompts_file: str | None = None
    class_source: str | None = None
    target: Literal["picture", "model"] = "picture"
    num_class_images: int = 200
    prior_loss_weight: float = 1.0
    batch_size: int = 8

    def __post_init__(self) -> None:
        require_at_least(self, "prior_preservation", 1, "num_class_images", "batch_size")
        require_positive(self, "prior_preservation", "prior_loss_weight")
        given = [f"`prior_preservation.{name}` is {getattr(self, name)!r}" for name in self._given()]
        require(len(given) < 2, f"{' and '.join(given)}; give one of them")
        require(
            self.wanted or self.target == "picture",
            "`prior_preservation.target` is model, but there are no class pictures; give `class_prompts`, "
            "`class_prompts_file` or `class_source`",
        )

    @property
    def wanted(self) -> bool:
        """Whether there are class pictures."""
        return bool(self._given())

    def _given(self) -> list[str]:
        return [name for name in ("class_prompts", "class_prompts_file", "class_source") if getattr(self, name)]
