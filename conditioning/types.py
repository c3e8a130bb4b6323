"""The value that passes from an encoder to the denoiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditioning:
    """One row of condition for each example of a batch.

    Attributes:
        context: [B, L, D], the sequence that cross-attention reads.
        context_mask: [B, L] bool, True where attention may look; None means everywhere.
        pooled: [B, P], one vector for each example, or None.

    Raises:
        ValueError: a shape or dtype that does not fit this description.
    """

    context: Tensor
    context_mask: Tensor | None = None
    pooled: Tensor | None = None

    def __post_init__(self) -> None:
        if self.context.ndim != 3:
            raise ValueError(f"context has shape {tuple(self.context.shape)}, expected [B, L, D]")
        mask, pooled = self.context_mask, self.pooled
        if mask is not None and (mask.shape != self.context.shape[:2] or mask.dtype != torch.bool):
            expected = f"torch.bool {tuple(self.context.shape[:2])}"
            raise ValueError(f"context_mask is {mask.dtype} {tuple(mask.shape)}, expected {expected}")
        if pooled is not None and (pooled.ndim != 2 or len(pooled) != len(self)):
            raise ValueError(f"pooled has shape {tuple(pooled.shape)}, expected [{len(self)}, P]")

    def __len__(self) -> int:
        return self.context.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Move all tensors to `device`; cast the floating ones to `dtype`, never the mask."""
        return Conditioning(
            self.context.to(device=device, dtype=dtype),
            None if self.context_mask is None else self.context_mask.to(device=device),
            None if self.pooled is None else self.pooled.to(device=device, dtype=dtype),
        )

    def index(self, rows: Tensor) -> Conditioning:
        """Rows `rows` ([N] long, or [B] bool) in that order."""
        return self._map(lambda field: field[rows.to(field.device)])

    def repeat_interleave(self, repeats: int) -> Conditioning:
        """Each row `repeats` times, copies adjacent: [a, b] -> [a, a, b, b] for 2."""
        return self._map(lambda field: field.repeat_interleave(repeats, dim=0))

    def joined(self) -> Conditioning:
        """All rows as one: contexts [B, L, D] one after the other as [1, B·L, D], the pooled vector of the first."""
        return Conditioning(
            self.context.flatten(0, 1)[None],
            None if self.context_mask is None else self.context_mask.flatten()[None],
            None if self.pooled is None else self.pooled[:1],
        )

    def padded(self, length: int, filler: Conditioning) -> Conditioning:
        """The same rows with copies of the one row `filler` behind them until they have `length` positions.

        Raises:
            ValueError: `filler` has several rows or other fields, or the missing positions are no multiple of its.
        """
        copies, rest = divmod(length - self.context.shape[1], filler.context.shape[1])
        if len(filler) != 1 or copies < 0 or rest:
            raise ValueError(
                f"{self.context.shape[1]} positions cannot become {length} with {len(filler)} rows of "
                f"{filler.context.shape[1]} positions"
            )
        parts = [self, *[filler.repeat_interleave(len(self))] * copies]
        masks = [part.context_mask for part in parts if part.context_mask is not None]
        return Conditioning(
            torch.cat([part.context for part in parts], dim=1), torch.cat(masks, dim=1) if masks else None, self.pooled
        )

    def where(self, mask: Tensor, other: Conditioning) -> Conditioning:
        """Row i of this conditioning where `mask` [B] (bool) is True, else row i of `other`.

        `other` has B rows, or one row that stands for all.

        Raises:
            ValueError: another mask shape or dtype, another number of rows, or fields that only one side has.
        """
        if mask.shape != (len(self),) or mask.dtype != torch.bool:
            raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}, expected torch.bool ({len(self)},)")
        if len(other) not in (1, len(self)):
            raise ValueError(f"other has {len(other)} rows, expected 1 or {len(self)}")
        _require_same_fields([self, other])
        return Conditioning(
            _select(mask, self.context, other.context),
            _pair(self.context_mask, other.context_mask, mask),
            _pair(self.pooled, other.pooled, mask),
        )

    @classmethod
    def cat(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """All rows of `parts`, in order.

        Raises:
            ValueError: no parts, or parts that differ in their fields or in the sizes of a row.
        """
        if not parts:
            raise ValueError("cat needs at least one Conditioning, got none")
        _require_same_fields(parts)
        masks = [part.context_mask for part in parts if part.context_mask is not None]
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return cls(
            torch.cat([part.context for part in parts]),
            torch.cat(masks) if masks else None,
            torch.cat(pooled) if pooled else None,
        )

    def _map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(
            function(self.context),
            None if self.context_mask is None else function(self.context_mask),
            None if self.pooled is None else function(self.pooled),
        )


def _select(mask: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    rows = mask.to(chosen.device).reshape(-1, *[1] * (chosen.ndim - 1))
    return torch.where(rows, chosen, other)


def _pair(chosen: Tensor | None, other: Tensor | None, mask: Tensor) -> Tensor | None:
    return None if chosen is None or other is None else _select(mask, chosen, other)


def _row_shapes(part: Conditioning) -> dict[str, tuple[int, ...] | None]:
    fields = {"context": part.context, "context_mask": part.context_mask, "pooled": part.pooled}
    return {name: None if field is None else tuple(field.shape[1:]) for name, field in fields.items()}


def _require_same_fields(parts: Sequence[Conditioning]) -> None:
    first = _row_shapes(parts[0])
    for part in parts[1:]:
        if _row_shapes(part) != first:
            raise ValueError(f"rows of shapes {_row_shapes(part)} cannot join rows of shapes {first}")
