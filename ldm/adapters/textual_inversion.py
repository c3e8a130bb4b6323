"""Textual inversion (Gal et al. 2023): one new token whose embedding is all that is learnt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from conditioning import ClipTextConfig, ClipTextEncoder, ClipTokenizer
from ldm.adapters.adapter import Adapter
from ldm.interop.tensors import save_tensors

EMBEDS_FILE = "learned_embeds.safetensors"


class TextualInversion(Adapter):
    """A token that the tokenizer does not know, with the trainable row [1, D] of the embedding table (equation 2).

    Args:
        encoder: gets the token, a row for it in its table, and a hook that puts the trainable row there; `eject` takes
            all three away.
        token: one word.
        initializer: a text whose tokens' mean embedding the row starts from.

    Raises:
        ValueError: the tokenizer knows the token, or finds none in the initializer.
    """

    def __init__(self, encoder: ClipTextEncoder, token: str, initializer: str) -> None:
        super().__init__()
        ids = encoder.tokenizer.ids(initializer)
        if not ids:
            raise ValueError(f"the initializer {initializer!r} has no tokens")
        self._encoder = [encoder]  # in a list, so that its weights are not this module's
        self.token, self._tokenizer = token, encoder.tokenizer.with_token(token)
        (self.token_id,) = self._tokenizer.ids(token)
        weight = cast(nn.Parameter, self._table.weight)
        self._original = encoder.tokenizer, weight, encoder.model.config
        self._hook: RemovableHandle | None = None
        self.embedding = nn.Parameter(self._table.weight.detach()[ids].mean(0, keepdim=True).clone())
        encoder.requires_grad_(False)
        self.inject()

    def inject(self) -> None:
        self.eject()
        _, weight, config = self._original
        missing = max(0, self.token_id + 1 - len(weight))
        rows = torch.cat([weight.detach(), weight.new_zeros(missing, weight.shape[1])])
        rows[self.token_id] = self.embedding.detach()[0]
        self._put(self._tokenizer, nn.Parameter(rows, requires_grad=False), replace(config, vocab_size=len(rows)))
        self._hook = self._table.register_forward_hook(self._learnt)

    def eject(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
        self._put(*self._original)

    @contextmanager
    def merged(self) -> Iterator[None]:
        self.inject()  # writes the present row into the table
        yield

    def save(self, folder: Path) -> Path:
        """Writes `learned_embeds.safetensors`, which diffusers' `load_textual_inversion` reads."""
        return save_tensors({self.token: self.embedding}, folder / EMBEDS_FILE)

    @property
    def _table(self) -> nn.Embedding:
        return self._encoder[0].model.text_model.embeddings.token_embedding

    def _put(self, tokenizer: ClipTokenizer, weight: nn.Parameter, config: ClipTextConfig) -> None:
        encoder, table = self._encoder[0], self._table
        encoder.tokenizer, encoder.model.config = tokenizer, config
        table.weight, table.num_embeddings = weight, len(weight)

    def _learnt(self, table: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.where((inputs[0] == self.token_id)[..., None], self.embedding.to(output.dtype), output)
