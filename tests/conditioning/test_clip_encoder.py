"""ClipTextEncoder: prompts to Conditioning, against transformers' tokenizer and model on the same folders."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.testing import assert_close

from conditioning import ClipTextConfig, ClipTextEncoder, ClipTextModel, ClipTokenizer

LENGTH = 16
PROMPTS = ["a red circle", "", "a LARGE blue square, below a small star!", "circle " * 40]


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return ClipTokenizer.train(["a red circle", "a blue square", "a small red star"] * 3, 540, LENGTH)


@pytest.fixture(scope="module")
def config(tokenizer: ClipTokenizer) -> ClipTextConfig:
    return ClipTextConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@pytest.fixture
def model(config: ClipTextConfig) -> ClipTextModel:
    return ClipTextModel.from_scratch(config, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("skip_layers", [0, 1])
def test_folders_give_transformers_the_same_conditioning(
    tokenizer: ClipTokenizer, model: ClipTextModel, skip_layers: int, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    model.save_pretrained(tmp_path / "text_encoder")
    encoder = ClipTextEncoder.from_pretrained(tmp_path / "text_encoder", tmp_path / "tokenizer", skip_layers)
    reference: Any = transformers.CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    read = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    ids = read(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = reference(ids, output_hidden_states=True)
        context = reference.final_layer_norm(expected.hidden_states[-(skip_layers + 1)])
        conditioning = encoder.encode(encoder.tokenize(PROMPTS))
    assert torch.equal(encoder.tokenize(PROMPTS), ids)
    assert_close(conditioning.context, context, atol=1e-5, rtol=1e-5)
    assert_close(conditioning.pooled, expected.pooler_output, atol=1e-5, rtol=1e-5)
    assert conditioning.context_mask is None


def test_null_is_the_empty_prompt(tokenizer: ClipTokenizer, model: ClipTextModel) -> None:
    encoder = ClipTextEncoder(tokenizer, model)
    null, expected = encoder.null(3), encoder(encoder.tokenize(["", "", ""]))
    assert_close(null.context, expected.context, atol=1e-6, rtol=1e-6)
    assert_close(null.pooled, expected.pooled, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("trainable", [True, False])
def test_trainable_decides_about_gradients(tokenizer: ClipTokenizer, model: ClipTextModel, trainable: bool) -> None:
    encoder = ClipTextEncoder(tokenizer, model, trainable=trainable)
    context = encoder(encoder.tokenize(PROMPTS)).context
    assert context.requires_grad is trainable
    assert {parameter.requires_grad for parameter in encoder.parameters()} == {trainable}
    assert len(list(encoder.parameters())) == len(model.state_dict())


def test_parts_that_do_not_fit_are_refused(tokenizer: ClipTokenizer, config: ClipTextConfig) -> None:
    def encoder(config: ClipTextConfig, skip_layers: int = 0) -> ClipTextEncoder:
        return ClipTextEncoder(tokenizer, ClipTextModel(config), skip_layers)

    with pytest.raises(ValueError, match=f"{tokenizer.vocab_size} ids, the model takes 99"):
        encoder(replace(config, vocab_size=99))
    with pytest.raises(ValueError, match=f"rows of {LENGTH} ids, the model takes 8"):
        encoder(replace(config, max_position_embeddings=8))
    with pytest.raises(ValueError, match="skip_layers is 2, expected 0 to 1"):
        encoder(config, skip_layers=2)


def test_import_stays_light() -> None:
    """Generating an image must not pay for the import of transformers or diffusers."""
    code = "import sys, conditioning; print(*{name.split('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"transformers", "diffusers", "datasets", "torchvision"} & set(run.stdout.split())
