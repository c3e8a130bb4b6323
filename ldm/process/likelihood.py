"""Exact likelihoods by the probability-flow ODE (Song et al. 2021b, appendix D.2).

In y = x/alpha and s = sigma/alpha the ODE of every process x_t = alpha·x0 + sigma·eps is dy/ds = eps(x, t). Along it
d log p(y)/ds = -tr(d eps/d y), whose integral is eq. 39; the trace is estimated by v·(d eps/d y)v (eq. 40). What is
followed is z = x/sqrt(alpha² + sigma²) over log s, which keeps its size: dz/dlog s = w·eps - w²·z for
w = sigma/sqrt(alpha² + sigma²).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from ldm.process.bound import gaussian_log_density
from ldm.process.prediction import Prediction, check_choice
from ldm.process.schedule import Schedule

Probe = Literal["rademacher", "gaussian"]
PROBES: tuple[Probe, ...] = get_args(Probe)

State = tuple[Tensor, Tensor]
"""z [B, ...] and the trace integrated so far [B]."""

INSIDE = 1e-6
"""How far the path stops from the last log-SNR, so that alpha > 0 also at zero terminal SNR."""


def draw_probe(like: Tensor, kind: Probe, generator: torch.Generator) -> Tensor:
    """v with E[v vᵀ] = I, like `like`: signs, or N(0, I) (Hutchinson 1990). Raises ValueError for another kind."""
    check_choice("kind", kind, PROBES)
    match kind:
        case "rademacher":
            return (torch.randint(2, like.shape, generator=generator) * 2 - 1).to(like)
        case "gaussian":
            return torch.randn(like.shape, generator=generator).to(like)


def ode_log_likelihood(
    denoise: Callable[[Tensor, Tensor], Prediction], x0: Tensor, schedule: Schedule, num_steps: int, probe: Tensor
) -> Tensor:
    """log p(x0) in nats [B] of the samples that the deterministic flow of a denoiser draws, for x0 [B, ...].

    x0 counts as y at the schedule's lowest noise level (s = 0.01 for DDPM's table), and the flow ends in
    N(0, prior_std²·I). It is followed in `num_steps` steps of the classical Runge-Kutta method, even in log(s), with
    four calls each of the denoiser, which must be differentiable in x. `probe`, from `draw_probe`, is like x0; the
    mean over several has less of the trace's random error. Raises ValueError for num_steps < 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; accepted: at least 1")
    first, last = schedule.log_snr(schedule.timestep(torch.tensor([0.0, 1.0])), torch.float64)
    grid = torch.linspace(-float(first) / 2, -(float(last) + INSIDE) / 2, num_steps + 1, dtype=torch.float64)

    def at(log_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = schedule.timestep_of_log_snr(-2 * log_s)
        return t, schedule.alpha(t, t.dtype).to(x0), schedule.sigma(t, t.dtype).to(x0)

    def slope(log_s: Tensor, state: State) -> State:
        z, _ = state
        t, alpha, sigma = at(log_s)
        norm = torch.hypot(alpha, sigma)
        with torch.enable_grad():
            x = (norm * z).detach().requires_grad_()
            eps = denoise(x, t.to(x0).expand(len(x0))).eps
            (pulled,) = torch.autograd.grad(eps, x, probe)
        w = sigma / norm
        return w * eps.detach() - w.square() * z, (sigma * pulled * probe).flatten(1).sum(1)

    _, alpha, sigma = at(grid[0])
    state: State = x0 * alpha / torch.hypot(alpha, sigma), x0.new_zeros(len(x0))
    for start, end in itertools.pairwise(grid):
        state = _runge_kutta_step(slope, start, end - start, state)
    z, trace = state
    _, alpha, sigma = at(grid[-1])
    log_variance = alpha.new_tensor(2 * math.log(schedule.prior_std))
    end_density = gaussian_log_density(torch.hypot(alpha, sigma) * z, alpha.new_zeros(()), log_variance) + alpha.log()
    return end_density.flatten(1).sum(1) + trace


def bits_per_dim(log_likelihood: Tensor, dimensions: int, *, levels: int | None) -> Tensor:
    """-log2 p / dimensions [B] from a log density in nats [B].

    With `levels`, a bound on the bits of integers y in [0, levels) that were spread evenly over their cells,
    x0 = 2·(y + u)/levels - 1 with u ~ U[0, 1) (Theis et al. 2016, section 3.1); None for continuous data.
    """
    cell = 0.0 if levels is None else math.log2(levels / 2)
    return cell - log_likelihood / (dimensions * math.log(2))


def _runge_kutta_step(slope: Callable[[Tensor, State], State], time: Tensor, stride: Tensor, state: State) -> State:
    k1 = slope(time, state)
    k2 = slope(time + stride / 2, _moved(state, k1, stride / 2))
    k3 = slope(time + stride / 2, _moved(state, k2, stride / 2))
    k4 = slope(time + stride, _moved(state, k3, stride))
    mean = tuple((a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(k1, k2, k3, k4, strict=True))
    return _moved(state, (mean[0], mean[1]), stride)


def _moved(state: State, slope: State, stride: Tensor) -> State:
    return state[0] + stride.to(state[0]) * slope[0], state[1] + stride.to(state[1]) * slope[1]
