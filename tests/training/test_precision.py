"""One loss scale behind two optimisers, on the CPU with torch's scaler, against training without a scale."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.training.launch import usable_precision
from ldm.training.precision import LossScaling


def scaling(scale: float | None) -> LossScaling:
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    accelerator: Any = SimpleNamespace(scaler=scaler)
    return LossScaling(accelerator)


class Pair:
    """Two small networks with an optimiser each, trained on the same numbers whatever the scale."""

    def __init__(self, scale: float | None) -> None:
        torch.manual_seed(0)
        self.nets = [nn.Linear(3, 2), nn.Linear(3, 1)]
        self.optimizers = [torch.optim.AdamW(net.parameters(), lr=0.1, fused=True) for net in self.nets]
        self.scaling = scaling(scale)

    def step(self, number: int, poison: float = 1.0) -> list[Tensor]:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(number)) * poison
        for net in self.nets:
            loss = net(x).square().sum()
            (loss if self.scaling.scaler is None else self.scaling.scaler.scale(loss)).backward()
        norms = [self.scaling.clip(o, n.parameters(), 1.0) for o, n in zip(self.optimizers, self.nets, strict=True)]
        if bool(torch.stack(norms).isfinite().all()):
            self.scaling.step(*self.optimizers)
        else:
            self.scaling.skip()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return norms

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for net in self.nets for parameter in net.parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_scale_that_is_a_power_of_two_changes_no_bit() -> None:
    plain, scaled = Pair(None), Pair(2.0**12)
    for number in range(5):
        assert equal(plain.step(number), scaled.step(number))
    assert equal(plain.weights(), scaled.weights())
    assert scaled.scaling.scaler is not None and scaled.scaling.scaler.get_scale() == 2.0**13


def test_an_overflow_leaves_the_weights_and_halves_the_scale() -> None:
    pair = Pair(2.0**12)
    before = pair.weights()
    pair.step(0, poison=float("inf"))
    assert equal(pair.weights(), before)
    assert pair.scaling.scaler is not None and pair.scaling.scaler.get_scale() == 2.0**11
    pair.step(1)
    assert not equal(pair.weights(), before)


def test_the_guard_may_wait_until_the_scale_is_one() -> None:
    assert scaling(None).halvings == 0
    assert scaling(2.0**16).halvings == 16
    assert scaling(0.5).halvings == 0


def test_the_scale_is_part_of_the_state() -> None:
    pair, resumed = Pair(2.0**12), Pair(2.0**16)
    for number in range(2):
        pair.step(number)
    resumed.scaling.load_state_dict(pair.scaling.state_dict())
    for one, other in ((pair.nets, resumed.nets), (pair.optimizers, resumed.optimizers)):
        for source, target in zip(one, other, strict=True):
            target.load_state_dict(copy.deepcopy(source.state_dict()))
    for number in range(2, 6):
        pair.step(number)
        resumed.step(number)
    assert equal(pair.weights(), resumed.weights())
    assert pair.scaling.state_dict() == resumed.scaling.state_dict()


def test_only_a_scale_is_kept_in_a_state() -> None:
    assert scaling(None).parts() == {}
    kept = scaling(2.0**12)
    assert kept.parts() == {"loss_scale": kept}


@pytest.mark.parametrize(
    ("asked", "features", "used"),
    [
        ("bf16", {"avx512_bf16": True}, "bf16"),
        ("bf16", {"amx_bf16": True}, "bf16"),
        ("bf16", {"avx512_f": True, "avx512_bf16": False}, "no"),
        ("bf16", {}, "no"),
        ("fp16", {"avx512_bf16": True, "amx_fp16": True}, "no"),
        ("no", {"avx512_bf16": True}, "no"),
    ],
)
def test_a_cpu_computes_in_bf16_only_where_it_multiplies_it(
    asked: str, features: dict[str, bool], used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert usable_precision(asked, on_gpu=False) == used
    assert usable_precision(asked, on_gpu=True) == asked
