"""The text tower of CLIP (Radford et al. 2021, section 2.4): a causal pre-norm transformer.

Parameter names are those on disk of transformers' CLIPTextModel, so `text_encoder/` folders pass both ways.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.nn import functional

from conditioning.tokenizer import write_atomically

ACTIVATIONS = ("quick_gelu", "gelu")
LEGACY_EOS_TOKEN_ID = 2
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class ClipTextConfig:
    """Architecture; the names and defaults are the keys and defaults of transformers' CLIPTextConfig.

    Raises:
        ValueError: `hidden_act` is unknown, or `hidden_size` is no multiple of `num_attention_heads`.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 1

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}, expected one of {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, expected a multiple of"
                f" num_attention_heads = {self.num_attention_heads}"
            )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ClipTextConfig:
        """Read a `config.json`; keys that do not change the outputs (dropout, versions, ...) are ignored.

        In the file of a whole CLIPModel the text tower's keys stand under `text_config`.
        """
        content = content.get("text_config", content)
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in names})

    def to_dict(self) -> dict[str, Any]:
        """The keys of a `config.json`, `architectures` excepted."""
        return {"model_type": "clip_text_model", **asdict(self)}

    def require_skippable(self, layers: int) -> None:
        """Raises a ValueError where leaving out so many last layers would leave none."""
        if not 0 <= layers < self.num_hidden_layers:
            raise ValueError(f"skip_layers is {layers}, expected 0 to {self.num_hidden_layers - 1}")


class _Embeddings(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding = _zero_embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = _zero_embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        length, limit = input_ids.shape[1], self.position_embedding.num_embeddings
        if length > limit:
            raise ValueError(f"input_ids has {length} positions, expected at most {limit}")
        tokens: Tensor = self.token_embedding(input_ids)
        return tokens + self.position_embedding.weight[:length]


def _zero_embedding(count: int, width: int) -> nn.Embedding:
    """An embedding for weights to come; torch's default draw imports its compiler on the meta device, a second lost."""
    return nn.Embedding(count, width, _weight=torch.zeros(count, width))


class _Attention(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        return x.view(batch, length, self.num_heads, width // self.num_heads).transpose(1, 2)


class _Mlp(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.activation = _quick_gelu if config.hidden_act == "quick_gelu" else functional.gelu
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.activation(self.fc1(x)))
        return out


class _Layer(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = _Mlp(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class _Encoder(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor | None, skip_layers: int) -> tuple[Tensor, Tensor]:
        """Outputs of the layer `skip_layers` before the last one, and of the last."""
        hidden = x
        for depth, layer in enumerate(self.layers, start=1):
            x = layer(x, mask)
            if depth == len(self.layers) - skip_layers:
                hidden = x
        return hidden, x


class _Transformer(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, input_ids: Tensor, skip_layers: int, final_norm: bool, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        hidden, last = self.encoder(self.embeddings(input_ids), _causal_mask(attention_mask), skip_layers)
        normed = self.final_layer_norm(last)
        if skip_layers and final_norm:
            hidden = self.final_layer_norm(hidden)
        return (normed if final_norm and not skip_layers else hidden), normed


class ClipTextModel(nn.Module):
    """CLIP's text tower; `with_projection` adds the projection into the joint space of text and image."""

    def __init__(self, config: ClipTextConfig, with_projection: bool = False) -> None:
        super().__init__()
        self.config = config
        self.text_model = _Transformer(config)
        self.text_projection = (
            nn.Linear(config.hidden_size, config.projection_dim, bias=False) if with_projection else None
        )

    def forward(
        self,
        input_ids: Tensor,
        skip_layers: int = 0,
        final_norm: bool = True,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode token ids [B, L].

        `skip_layers` = n takes the hidden states n layers before the last one (1: the penultimate), passed
        through the final layer norm, as diffusers' `clip_skip`; `final_norm` False leaves that norm out, as
        SDXL does (Podell et al. 2023, section 2.1). The pooled vector always has the full depth and the norm:
        it is the state at the first end token, or at the highest id when `eos_token_id` is 2, a value that
        CLIP configurations once held wrongly and that transformers reads in this way. `attention_mask` [B, L]
        is 0 where no token may look; its first column must be 1.

        Returns:
            hidden states [B, L, hidden_size], and the pooled vector [B, hidden_size], or [B, projection_dim]
            with projection.

        Raises:
            ValueError: L exceeds `max_position_embeddings`, or `skip_layers` leaves no layer.
        """
        self.config.require_skippable(skip_layers)
        hidden, last = self.text_model(input_ids, skip_layers, final_norm, attention_mask)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        pooled = last[rows, self._end_positions(input_ids)]
        return hidden, pooled if self.text_projection is None else self.text_projection(pooled)

    @classmethod
    def from_scratch(
        cls, config: ClipTextConfig, generator: torch.Generator, with_projection: bool = False
    ) -> ClipTextModel:
        """A new model on the CPU whose weights are a function of `generator` (a CPU generator) alone.

        Normal weights with the standard deviations of transformers' CLIPTextModel: embeddings 0.02; with
        D = hidden_size and N layers q, k, v and fc2 1/sqrt(2 N D), out_proj and the projection 1/sqrt(D),
        fc1 1/sqrt(2 D). Biases are 0, norms the identity.
        """
        with torch.device("meta"):
            model = cls(config, with_projection)
        model.to_empty(device="cpu")
        for name, parameter in model.named_parameters():
            _initialize(name, parameter, config, generator)
        return model

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> ClipTextModel:
        """Read a `text_encoder/` folder (`config.json`, `model.safetensors`) into fp32 weights on the CPU.

        The projection is there when the file holds `text_projection.weight`.

        Raises:
            FileNotFoundError: one of the two files is missing.
            ValueError: weights are missing, left over or of another shape than the configuration says.
        """
        path = Path(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (path / name).is_file():
                raise FileNotFoundError(f"{path} has no {name}, which a text encoder folder needs")
        content = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        return cls.from_state_dict(ClipTextConfig.from_dict(content), load_file(path / WEIGHTS_FILE))

    @classmethod
    def from_state_dict(cls, config: ClipTextConfig, state: Mapping[str, Tensor]) -> ClipTextModel:
        """A model in fp32 on the weights `state` under any of the names that `canonical_state_dict` knows.

        Raises:
            ValueError: weights are missing, left over or of another shape than `config` says.
        """
        weights = {name: tensor.float() for name, tensor in canonical_state_dict(state).items()}
        with torch.device("meta"):
            model = cls(config, with_projection="text_projection.weight" in weights)
        try:
            model.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise ValueError(f"weights do not fit the CLIP text configuration: {error}") from error
        return model

    def without_last(self, layers: int) -> ClipTextModel:
        """The same tower less its last `layers` layers: its output is this one's with `skip_layers`.

        Raises:
            ValueError: no layer would be left.
        """
        self.config.require_skippable(layers)
        config = replace(self.config, num_hidden_layers=self.config.num_hidden_layers - layers)
        dropped = tuple(
            f"text_model.encoder.layers.{n}." for n in range(config.num_hidden_layers, self.config.num_hidden_layers)
        )
        kept = {n: t for n, t in self.state_dict().items() if not n.startswith((*dropped, "text_projection."))}
        return ClipTextModel.from_state_dict(config, kept)

    def with_vocabulary(self, ids: Sequence[int], bos: int, eos: int, pad: int) -> ClipTextModel:
        """The same tower with the rows `ids` of its token embedding, and what its start, end and padding are now."""
        config = replace(self.config, vocab_size=len(ids), bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)
        name = "text_model.embeddings.token_embedding.weight"
        state = self.state_dict()
        return ClipTextModel.from_state_dict(config, {**state, name: state[name][torch.tensor(ids)]})

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors`, which any version of transformers reads."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        content = {"architectures": [self.architecture], **self.config.to_dict()}
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_atomically(path / WEIGHTS_FILE, serialize(state, metadata={"format": "pt"}))
        write_atomically(path / CONFIG_FILE, (json.dumps(content, indent=2) + "\n").encode())

    @property
    def architecture(self) -> str:
        """The class of transformers that reads the folder."""
        return "CLIPTextModel" if self.text_projection is None else "CLIPTextModelWithProjection"

    def _end_positions(self, input_ids: Tensor) -> Tensor:
        if self.config.eos_token_id == LEGACY_EOS_TOKEN_ID:
            return input_ids.argmax(dim=-1)
        return (input_ids == self.config.eos_token_id).int().argmax(dim=-1)


def canonical_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring the weights of any transformers version to the names used here.

    transformers before 5 writes `text_model.*`, 5 writes the same names without that prefix; old files also
    carry the constant `position_ids`, which is dropped. Of a whole CLIPModel, which is known by its vision tower,
    only the text tower is kept.
    """
    kept = {name: tensor for name, tensor in state.items() if not name.endswith("position_ids")}
    if any(name.startswith("vision_model.encoder.") for name in kept):
        kept = {name: tensor for name, tensor in kept.items() if name.startswith("text_model.")}
    prefixes = ("text_model.", "text_projection.")
    return {name if name.startswith(prefixes) else f"text_model.{name}": kept[name] for name in kept}


def _causal_mask(attention_mask: Tensor | None) -> Tensor | None:
    """[B, 1, L, L] bool, True where a token may look; None stands for all earlier tokens."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    length = attention_mask.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
    return earlier & attention_mask.bool()[:, None, None, :]


def _quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): Hendrycks & Gimpel 2016, "Gaussian Error Linear Units", section 2."""
    return x * torch.sigmoid(1.702 * x)


def _initialize(name: str, parameter: Tensor, config: ClipTextConfig, generator: torch.Generator) -> None:
    if name.endswith(".bias"):
        nn.init.zeros_(parameter)
    elif "layer_norm" in name:
        nn.init.ones_(parameter)
    else:
        nn.init.normal_(parameter, std=_weight_std(name, config), generator=generator)


def _weight_std(name: str, config: ClipTextConfig) -> float:
    if "embedding" in name:
        return 0.02
    width: float = config.hidden_size**-0.5
    if "out_proj" in name or "text_projection" in name:
        return width
    if "fc1" in name:
        return width * 2**-0.5
    depth: float = (2 * config.num_hidden_layers) ** -0.5
    return width * depth
