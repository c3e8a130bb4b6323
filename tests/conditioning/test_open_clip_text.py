"""`read_open_clip`: a text tower of open_clip as a plain CLIP, against open_clip's own outputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from conditioning import ClipTextEncoder, read_open_clip

PROMPTS = ["a red circle!", "", "HELLO,  blue   squares' (2)", "many words " * 60]
VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, str]]:
    """An open_clip model with random weights and its name as a local folder."""

    def write(text: dict[str, Any] | None = None, custom: bool = False, **more: Any) -> tuple[Any, str]:
        config = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT | (text or {}), **more}
        torch.manual_seed(0)
        model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config).eval()
        folder = tmp_path_factory.mktemp("open_clip")
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, folder / "open_clip_model.safetensors")
        (folder / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": config | {"custom_text": custom}, "preprocess_cfg": {}})
        )
        return model, f"local-dir:{folder}"

    return write


def their_states(model: Any, ids: Tensor, skip_layers: int) -> Tensor:
    """The hidden states [B, L, D] after open_clip's own block, through its final norm."""
    blocks = list(model.transformer.resblocks)
    seen: list[Tensor] = []
    hook = blocks[len(blocks) - 1 - skip_layers].register_forward_hook(lambda *call: seen.append(call[2]))
    model.encode_text(ids)
    hook.remove()
    states: Tensor = model.ln_final(seen[0])
    return states


@pytest.mark.parametrize("skip_layers", [0, 1])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_outputs_equal_open_clips_own(
    written: Callable[..., tuple[Any, str]], quick_gelu: bool, skip_layers: int
) -> None:
    theirs, name = written(quick_gelu=quick_gelu)
    ours = read_open_clip(name, skip_layers=skip_layers)
    ids = open_clip.get_tokenizer(name)(PROMPTS)
    with torch.no_grad():
        condition = ours.encode(ours.tokenize(PROMPTS))
        assert_close(condition.pooled, theirs.encode_text(ids), atol=1e-5, rtol=1e-5)
        assert_close(condition.context, their_states(theirs, ids, skip_layers), atol=1e-5, rtol=1e-5)


def test_token_ids_are_open_clips_with_a_padding_of_their_own(written: Callable[..., tuple[Any, str]]) -> None:
    _, name = written()
    ours, theirs = read_open_clip(name).tokenize(PROMPTS), open_clip.get_tokenizer(name)(PROMPTS)
    assert (ours == 49408).any() and torch.equal(ours.masked_fill(ours == 49408, 0), theirs)


def test_a_checkpoint_file_belongs_to_an_architecture(
    written: Callable[..., tuple[Any, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, name = written()
    folder = Path(name.removeprefix("local-dir:"))
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    (folder / "tiny-test-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-test-clip.json")
    ours = read_open_clip("tiny-test-clip", str(folder / "open_clip_model.safetensors"))
    ids = open_clip.get_tokenizer(name)(PROMPTS)
    with torch.no_grad():
        assert_close(ours.encode(ours.tokenize(PROMPTS)).pooled, theirs.encode_text(ids), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="tiny-test-clip needs pretrained weights: a tag or the path of a checkpoint"):
        read_open_clip("tiny-test-clip")


def test_the_export_is_a_clip_that_transformers_reads(written: Callable[..., tuple[Any, str]], tmp_path: Path) -> None:
    theirs, name = written()
    read_open_clip(name).save_parts(tmp_path)
    again = ClipTextEncoder.from_pretrained(tmp_path / "text_encoder", tmp_path / "tokenizer")
    reference: Any = transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path / "text_encoder")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    ids = tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = theirs.encode_text(open_clip.get_tokenizer(name)(PROMPTS))
        assert_close(again.encode(again.tokenize(PROMPTS)).pooled, expected, atol=1e-5, rtol=1e-5)
        assert_close(reference(ids).text_embeds, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "lacking"),
    [
        ({"no_causal_mask": True}, "causal attention"),
        ({"embed_cls": True, "output_tokens": True}, "no class token"),
        ({"pool_type": "last"}, "its pooled vector at the end token"),
        ({"proj_bias": True}, "a linear projection without bias"),
        ({"ls_init_value": 0.1}, "text_model|transformer.resblocks.0.ls_1.gamma"),
    ],
)
def test_other_towers_are_refused(written: Callable[..., tuple[Any, str]], text: dict[str, Any], lacking: str) -> None:
    _, name = written(text, custom=True)
    with pytest.raises(ValueError, match=lacking):
        read_open_clip(name)


def test_names_that_are_not_known_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="open_clip has no model 'ViT-H14'; did you mean ViT-H-14"):
        read_open_clip("ViT-H14", "laion2b_s32b_b79k")
    with pytest.raises(ValueError, match="open_clip cannot load local-dir:"):
        read_open_clip(f"local-dir:{tmp_path}")
    with pytest.raises(ValueError, match=r"cannot load ViT-B-32 with pretrained 'no_such_tag'"):
        read_open_clip("ViT-B-32", "no_such_tag")
