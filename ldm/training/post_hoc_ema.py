"""Averages of the weights chosen after training, from snapshots taken during it (Karras et al. 2024, section 3.2).

A snapshot is the moving average of a run at some step, so it is a known combination of the weights of all steps before
it: sum over k of profile[k] w_k. Any other average is approximated by the combination of snapshots whose own profile
is nearest to the wished one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.interop.tensors import ModelError
from ldm.pretrained import Model, read_model
from ldm.tasks.text_to_image import ConditionedUNet
from ldm.training.ema import warmed_decay
from ldm.training.run_dir import DamagedState, RunDir, read_state_entry

POOR_FIT = 0.2
"""Relative error of a profile from which on the snapshots are too few for it."""


class Average(NamedTuple):
    """The model, how far its profile is from the wished one, relative to that, and how many snapshots it is made of."""

    model: Model
    error: float
    snapshots: int


class Snapshot(NamedTuple):
    """Where the averaged weights of a run stand, after how many updates under which decay they were taken."""

    folder: Path
    updates: int
    decay: float


def exponential_profile(updates: int, decay: float) -> Tensor:
    """Weight of the initial weights and of those after each update in our moving average: float64 [updates + 1].

    avg_n = d_n avg_{n-1} + (1 - d_n) w_n with the warmed-up d_n of `Ema`; the entries add up to 1.
    """
    kept = torch.tensor([warmed_decay(decay, done) for done in range(updates)], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    return torch.cat([kept.flip(0).cumprod(0).flip(0), one]) * torch.cat([one, 1 - kept])


def power_profile(updates: int, sigma_rel: float) -> Tensor:
    """The profile p(k) ~ k^gamma whose standard deviation is `sigma_rel` of the training: float64 [updates + 1].

    (Karras et al. 2024, equation 1.) Its mean lies at (gamma + 1) / (gamma + 2) of the training; it adds up to 1.

    Raises:
        ValueError: `sigma_rel` lies outside (0, 0.28].
    """
    steps = torch.arange(updates + 1, dtype=torch.float64) / max(updates, 1)
    profile = steps ** power_of(sigma_rel)
    return profile / profile.sum()


def power_of(sigma_rel: float) -> float:
    """gamma with sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^(-1/2) (Karras et al. 2024, section 3.1).

    Raises:
        ValueError: `sigma_rel` lies outside (0, 0.28].
    """
    if not 0 < sigma_rel <= 0.28:
        raise ValueError(f"a relative width of {sigma_rel:g} lies outside (0, 0.28]; 0.05 to 0.2 are usual")
    low, high = 0.0, 2 / sigma_rel
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        width = math.sqrt(middle + 1) / ((middle + 2) * math.sqrt(middle + 3))
        low, high = (middle, high) if width > sigma_rel else (low, middle)
    return low


def combination(responses: Tensor, profile: Tensor) -> tuple[Tensor, float]:
    """The coefficients [J], adding up to 1, with which `responses` [J, N] come nearest to `profile` [N].

    Least squares under the constraint, by its Lagrange equations. Returns the relative error of the profile too.
    """
    count = len(responses)
    system = torch.ones(count + 1, count + 1, dtype=torch.float64)
    system[count, count] = 0
    products = responses @ responses.T
    scale = products.diagonal().mean()
    system[:count, :count] = products / scale
    wanted = torch.cat([responses @ profile / scale, torch.ones(1, dtype=torch.float64)])
    found = torch.linalg.lstsq(system, wanted[:, None], driver="gelsd").solution[:count, 0]
    return found, float((found @ responses - profile).norm() / profile.norm())


def coefficients(snapshots: Sequence[Snapshot], profile: Tensor) -> tuple[list[float], float]:
    """How much of each snapshot makes the average of `profile` [N + 1], and the relative error of that.

    The snapshots reach N updates at most.
    """
    responses = torch.zeros(len(snapshots), len(profile), dtype=torch.float64)
    for row, snapshot in zip(responses, snapshots, strict=True):
        row[: snapshot.updates + 1] = exponential_profile(snapshot.updates, snapshot.decay)
    parts, error = combination(responses, profile)
    return parts.tolist(), error


def weighted_sum(parts: Iterable[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """The sum of weights by name, each times its factor, in float64 and one after the other; returned in float32."""
    total: dict[str, Tensor] = {}
    for factor, weights in parts:
        for name, value in weights.items():
            total[name] = factor * value.double() + total.get(name, 0.0)
    return {name: value.float() for name, value in total.items()}


def read_snapshots(run: RunDir) -> list[Snapshot]:
    """The snapshots of a run, oldest first.

    Raises:
        ModelError: there is none, one is damaged, or the decay was changed between them.
    """
    found: list[Snapshot] = []
    for folder in run.snapshots():
        progress = _entry(folder, "progress")
        found.append(Snapshot(folder, progress["ema_updates"], progress["ema_decay"]))
    if not found:
        raise ModelError(f"{run.averages} has no snapshots; they are written with training.ema_snapshots true")
    if len({snapshot.decay for snapshot in found}) > 1:
        raise ModelError(f"{run.averages} has snapshots of several values of training.ema_decay; they do not combine")
    return found


def average_of_run(folder: Path, sigma_rel: float | None = None, decay: float | None = None) -> Average:
    """The model in `export/` of a run of `train_ldm.py` under another average: a power profile or an exponential one.

    Raises:
        ModelError: the run has no finished model, or no snapshots that can be combined.
        ValueError: `sigma_rel` or `decay` is out of range.
    """
    run = RunDir(folder)
    if not (run.export / "unet").is_dir():
        raise ModelError(f"{folder} is no run folder of train_ldm.py with a finished model in export/")
    snapshots = read_snapshots(run)
    updates, own = snapshots[-1].updates, snapshots[-1].decay
    if decay is not None and not own <= decay < 1:
        raise ValueError(f"a decay of {decay:g} lies outside [{own:g}, 1): snapshots average over at least their own")
    profile = exponential_profile(updates, decay) if decay is not None else power_profile(updates, sigma_rel or 0.0)
    parts, error = coefficients(snapshots, profile)
    weights = weighted_sum(
        (part, _entry(snapshot.folder, "ema")) for part, snapshot in zip(parts, snapshots, strict=True)
    )
    model = read_model(run.export)
    _load(ConditionedUNet(model.unet, model.text_encoder), weights, folder)
    wished = {"decay": decay} if decay is not None else {"sigma_rel": sigma_rel}
    settings = {**model.settings, "average": {**wished, "error": error, "snapshots": len(snapshots)}}
    return Average(dataclasses.replace(model, settings=settings), error, len(snapshots))


def _entry(folder: Path, name: str) -> Any:
    try:
        return read_state_entry(folder, name)
    except DamagedState as error:
        raise ModelError(f"{error}; remove this snapshot to do without it") from error


@torch.no_grad()
def _load(network: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    parameters = dict(network.named_parameters())
    if parameters.keys() != weights.keys():
        raise ModelError(f"{folder}: the snapshots are not of the network in export/")
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
