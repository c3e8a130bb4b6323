"""Text towers of the library open_clip, brought to CLIP's own layout.

What comes out is a `ClipTextEncoder`: the export is a plain CLIP folder, for which nobody needs open_clip again.
"""

from __future__ import annotations

import difflib
import logging
from typing import Any

import torch
from torch import Tensor

from conditioning.clip_model import ClipTextConfig, ClipTextModel
from conditioning.clip_text import ClipTextEncoder
from conditioning.tokenizer import END_TOKEN, START_TOKEN, ClipTokenizer, SpecialTokens

PAD_TOKEN = "<|pad|>"
"""open_clip pads with id 0, which is also an exclamation mark; here padding has an id of its own, with the same row."""

SCHEMAS = ("local-dir:", "hf-hub:")
LAYER_NAMES = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


def read_open_clip(name: str, pretrained: str | None = None, skip_layers: int = 0) -> ClipTextEncoder:
    """The text encoder of an open_clip model, with its projection.

    Args:
        name: an architecture such as `ViT-H-14`, or `local-dir:FOLDER` or `hf-hub:OWNER/NAME`, which bring weights.
        pretrained: a tag such as `laion2b_s32b_b79k` or a checkpoint file; belongs to an architecture's name.
        skip_layers: as in `ClipTextEncoder`.

    Raises:
        ValueError: open_clip is missing, the model cannot be had, or its text tower is no causal CLIP transformer.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ValueError("this text encoder needs the package open_clip_torch: pip install 'ldm[text]'") from error
    _check_name(name, pretrained, open_clip.list_models())
    quiet = logging.getLogger().level
    try:
        logging.getLogger().setLevel(logging.ERROR)
        quick = bool(open_clip.get_pretrained_cfg(name, pretrained or "").get("quick_gelu", False))
        model = open_clip.create_model(
            name, pretrained, force_quick_gelu=quick, force_custom_text=True, require_pretrained=True
        )
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"open_clip cannot load {name} with pretrained {pretrained!r}: {reason}") from error
    finally:
        logging.getLogger().setLevel(quiet)
    _check_tower(name, model.text, tokenizer)
    text_model = ClipTextModel.from_state_dict(clip_config(model.text), clip_state(model.text.state_dict()))
    return ClipTextEncoder(clip_tokenizer(tokenizer, model.text.context_length), text_model, skip_layers)


def clip_config(tower: Any) -> ClipTextConfig:
    """The configuration of a text tower, with one more row of embeddings for `PAD_TOKEN`."""
    block = tower.transformer.resblocks[0]
    return ClipTextConfig(
        vocab_size=tower.vocab_size + 1,
        hidden_size=tower.width,
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=len(tower.transformer.resblocks),
        num_attention_heads=tower.heads,
        max_position_embeddings=tower.context_length,
        hidden_act="quick_gelu" if type(block.mlp.gelu).__name__ == "QuickGELU" else "gelu",
        layer_norm_eps=tower.ln_final.eps,
        projection_dim=tower.output_dim,
        bos_token_id=tower.vocab_size - 2,
        eos_token_id=tower.vocab_size - 1,
        pad_token_id=tower.vocab_size,
    )


def clip_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of `ClipTextModel`; one that has no place there keeps its name and will be refused."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "token_embedding.weight":
            renamed["text_model.embeddings.token_embedding.weight"] = torch.cat([tensor, tensor[:1]])
        elif name == "positional_embedding":
            renamed["text_model.embeddings.position_embedding.weight"] = tensor
        elif name == "text_projection":
            renamed["text_projection.weight"] = tensor.T.contiguous()
        elif name.startswith("ln_final."):
            renamed[f"text_model.final_layer_norm.{name.removeprefix('ln_final.')}"] = tensor
        else:
            renamed |= _layer_weights(name, tensor)
    return renamed


def clip_tokenizer(tokenizer: Any, context_length: int) -> ClipTokenizer:
    """The same vocabulary and merges; ids differ for texts that ftfy or HTML unescaping would change first."""
    words = sorted(tokenizer.encoder, key=tokenizer.encoder.get)
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    vocab = {word: index for index, word in enumerate([*words[:-2], START_TOKEN, END_TOKEN, PAD_TOKEN])}
    return ClipTokenizer(vocab, merges, SpecialTokens(pad_token=PAD_TOKEN), model_max_length=context_length)


def _layer_weights(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if not name.startswith("transformer.resblocks."):
        return {name: tensor}
    layer, _, rest = name.removeprefix("transformer.resblocks.").partition(".")
    prefix = f"text_model.encoder.layers.{layer}."
    if rest.startswith("attn.in_proj_"):
        kind = rest.removeprefix("attn.in_proj_")
        return {f"{prefix}self_attn.{q}_proj.{kind}": part for q, part in zip("qkv", tensor.chunk(3), strict=True)}
    known = next((old for old in LAYER_NAMES if rest.startswith(old)), None)
    return {name if known is None else prefix + LAYER_NAMES[known] + rest.removeprefix(known): tensor}


def _check_name(name: str, pretrained: str | None, known: list[str]) -> None:
    if name.startswith(SCHEMAS):
        return
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; it must be one of its models, or {' or '.join(SCHEMAS)}..."
        raise ValueError(f"open_clip has no model {name!r}{hint}")
    if pretrained is None:
        raise ValueError(f"open_clip's {name} needs pretrained weights: a tag or the path of a checkpoint")


def _check_tower(name: str, tower: Any, tokenizer: Any) -> None:
    """The parts of a tower's behaviour that its weights do not tell."""
    plain = {
        "a text transformer of its own": type(tower).__name__ == "TextTransformer",
        "causal attention": getattr(tower, "attn_mask", None) is not None,
        "no class token": getattr(tower, "cls_emb", None) is None,
        "its pooled vector at the end token": getattr(tower, "pool_type", None) in ("argmax", "eos"),
        "a linear projection without bias": isinstance(getattr(tower, "text_projection", None), Tensor),
        "CLIP's byte-pair tokenizer": hasattr(tokenizer, "bpe_ranks") and getattr(tokenizer, "reduction_fn", 0) is None,
    }
    lacking = [feature for feature, there in plain.items() if not there]
    if lacking:
        raise ValueError(
            f"the text tower of open_clip's {name} is no plain CLIP transformer (it has not {lacking[0]}); "
            "text_encoder.type transformers reads many of the others"
        )
