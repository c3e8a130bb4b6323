"""Averages of the weights chosen after training, from snapshots taken during it (Karras et al. 2024, section 3).

A snapshot is the moving average of a run at some step, so it is a known combination of the weights of all steps before
it: sum over k of response[k] w_k. Any other average with a profile p over the steps is the combination of snapshots
whose own profile is nearest to p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.interop.tensors import ModelError
from ldm.pretrained import Model, read_model
from ldm.tasks.text_to_image import ConditionedUNet
from ldm.training.ema import warmed_decays
from ldm.training.run_dir import DamagedState, RunDir, read_state

POOR_FIT = 0.2
"""Relative error of a profile from which on the snapshots are too few for it."""


class Average(NamedTuple):
    """The model, how far its profile is from the wished one, relative to that, and how many snapshots it is made of."""

    model: Model
    error: float
    snapshots: int


class Snapshot(NamedTuple):
    """The averaged weights of a run after so many updates under a decay."""

    weights: dict[str, Tensor]
    updates: int
    decay: float


def exponential_profile(updates: int, decay: float) -> Tensor:
    """Weight of the initial weights and of those after each update in our moving average: float64 [updates + 1].

    avg_n = d_n avg_{n-1} + (1 - d_n) w_n with the warmed-up d_n of `Ema`; the entries add up to 1.
    """
    kept = warmed_decays(updates, decay)
    later = torch.cat([kept.flip(0).cumprod(0).flip(0), torch.ones(1, dtype=torch.float64)])
    return later * torch.cat([torch.ones(1, dtype=torch.float64), 1 - kept])


def power_profile(updates: int, sigma_rel: float) -> Tensor:
    """The profile p(k) ~ k^gamma of relative width `sigma_rel`: float64 [updates + 1] that adds up to 1.

    (Karras et al. 2024, equations 1 and 2.) Its width grows with training, 0.1 means a tenth of it.

    Raises:
        ValueError: `sigma_rel` lies outside (0, 0.28].
    """
    steps = torch.arange(updates + 1, dtype=torch.float64) / max(updates, 1)
    profile = steps ** power_of(sigma_rel)
    return profile / profile.sum()


def power_of(sigma_rel: float) -> float:
    """gamma with sigma_rel = (gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^(-1/2) (Karras et al. 2024, equation 3).

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
    system[:count, :count] = responses @ responses.T
    system[count, count] = 0
    scale = system[:count, :count].diagonal().mean()
    system[:count, :count] /= scale
    wanted = torch.cat([responses @ profile / scale, torch.ones(1, dtype=torch.float64)])
    found = torch.linalg.lstsq(system, wanted[:, None], driver="gelsd").solution[:count, 0]
    return found, float((found @ responses - profile).norm() / profile.norm())


def read_snapshots(run: RunDir) -> list[Snapshot]:
    """The snapshots of a run that are whole, oldest first; damaged ones are passed over.

    Raises:
        ModelError: there is none.
    """
    found: list[Snapshot] = []
    for folder in run.snapshots():
        try:
            state = read_state(folder)
            found.append(Snapshot(state["ema"], state["progress"]["ema_updates"], state["progress"]["ema_decay"]))
        except DamagedState:
            continue
    if not found:
        raise ModelError(f"{run.averages} has no snapshots; they are written with training.ema_snapshots true")
    return found


def average(snapshots: Sequence[Snapshot], profile: Tensor) -> tuple[dict[str, Tensor], float]:
    """The weights averaged under `profile` [N + 1], and its relative error; the snapshots reach N updates at most."""
    responses = torch.zeros(len(snapshots), len(profile), dtype=torch.float64)
    for row, snapshot in zip(responses, snapshots, strict=True):
        row[: snapshot.updates + 1] = exponential_profile(snapshot.updates, snapshot.decay)
    parts, error = combination(responses, profile)
    weights = {
        name: sum(part * snapshot.weights[name].double() for part, snapshot in zip(parts, snapshots, strict=True))
        for name in snapshots[0].weights
    }
    return {name: torch.as_tensor(value).float() for name, value in weights.items()}, error


def average_of_run(folder: Path, sigma_rel: float | None = None, decay: float | None = None) -> Average:
    """The model in `export/` of a run of `train_ldm.py` under another average: a power profile or an exponential one.

    Raises:
        ModelError: the run has no finished model, no snapshots, or snapshots of other weights than a U-Net's.
        ValueError: `sigma_rel` or `decay` is out of range.
    """
    run = RunDir(folder)
    if not (run.export / "unet").is_dir():
        raise ModelError(f"{folder} is no run folder of train_ldm.py with a finished model in export/")
    snapshots, model = read_snapshots(run), read_model(run.export)
    updates = snapshots[-1].updates
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(f"a decay of {decay:g} lies outside [0, 1)")
    profile = exponential_profile(updates, decay) if decay is not None else power_profile(updates, sigma_rel or 0.0)
    weights, error = average(snapshots, profile)
    _load(ConditionedUNet(model.unet, model.text_encoder), weights, folder)
    return Average(model, error, len(snapshots))


@torch.no_grad()
def _load(network: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    parameters = dict(network.named_parameters())
    if parameters.keys() != weights.keys():
        raise ModelError(f"{folder} averaged an adapter's weights; a new average can be made of a whole network's only")
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
