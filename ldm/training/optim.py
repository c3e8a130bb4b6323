"""The optimisers, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import OptimizerConfig
from ldm.training.sharding import gathered, like

NEWTON_SCHULZ_STEPS = 5


def adamw(
    parameters: Iterable[nn.Parameter],
    config: OptimizerConfig,
    learning_rate: float,
    undecayed: Iterable[nn.Parameter] = (),
) -> torch.optim.AdamW:
    """AdamW in its fused form, which is several times faster than the default one on CPU and GPU alike.

    Frozen parameters are left out; `undecayed` are trained without weight decay.
    """
    optimizer = torch.optim.AdamW(
        [p for p in parameters if p.requires_grad],
        lr=learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )
    free = [p for p in undecayed if p.requires_grad]
    if free:
        optimizer.add_param_group({"params": free, "weight_decay": 0.0})
    return optimizer


def optimizer_of(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW or Muon over the module's trainable parameters, as `optimizer.type` says."""
    match config.type:
        case "adamw":
            return adamw(module.parameters(), config, config.learning_rate)
        case "muon":
            matrices = hidden_matrices(module)
            chosen = {id(p) for p in matrices}
            rest = [p for p in module.parameters() if p.requires_grad and id(p) not in chosen]
            return Muon(matrices, rest, config)


def hidden_matrices(module: nn.Module) -> list[nn.Parameter]:
    """Trainable weights of the linear and convolution layers, but for the first and last convolution of a network."""
    layers = [
        layer
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and name.rpartition(".")[2] not in ("conv_in", "conv_out")
    ]
    return [weight for layer in layers if isinstance(weight := layer.weight, nn.Parameter) and weight.requires_grad]


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the hidden matrices, AdamW for everything else, as one optimiser.

    A convolution's weight [O, I, k, k] is the matrix [O, I·k·k]. Its update is the orthogonal factor of the Nesterov
    momentum, times 0.2·sqrt(max(rows, columns)), which has the root mean square of an AdamW update, so that one
    learning rate and weight decay serve both (Liu et al. 2025, "Muon is Scalable for LLM Training", eq. 4). Directions
    with small gradients, such as a caption's rare words, are learnt as fast as those with large ones.

    Of sharded matrices the momentum is sharded; every process gathers one after the other and orthogonalises it.

    Args:
        matrices: parameters of two or more dimensions.
        rest: the parameters left to AdamW.
    """

    def __init__(self, matrices: list[nn.Parameter], rest: list[nn.Parameter], config: OptimizerConfig) -> None:
        super().__init__(
            rest,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
            fused=True,
        )
        self.add_param_group({"params": matrices, "momentum": config.muon_momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of all parameters; a matrix' gradient is None afterwards, so that AdamW passes it over."""
        for group in self.param_groups:
            if "momentum" in group:
                for p in group["params"]:
                    if p.grad is not None:
                        self._update(p, p.grad, group)
                        p.grad = None
        return super().step(closure)

    def _update(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())  # AdamW looks for it in every state that it loads
            state["momentum_buffer"] = torch.zeros_like(p)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = orthogonalized(gathered(gradient.lerp(momentum, group["momentum"])).flatten(1))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(like(update.view(p.shape), p), alpha=-group["lr"] * 0.2 * max(update.shape) ** 0.5)


def orthogonalized(matrix: Tensor) -> Tensor:
    """Nearly U·Vᵀ of a matrix U·S·Vᵀ [m, n]: its singular values are brought to between 0.68 and 1.14.

    Five steps of X <- a·X + (b·X·Xᵀ + c·(X·Xᵀ)²)·X, a quintic Newton-Schulz iteration whose coefficients are tuned for
    speed and not for convergence (Jordan et al. 2024).
    """
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def learning_rate(step: int, total: int, config: OptimizerConfig) -> float:
    """Linear warm-up to `learning_rate`, then constant, or a cosine or straight line down to 0 at step `total`."""
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    done = min(1.0, (step - config.lr_warmup_steps) / max(1, total - config.lr_warmup_steps))
    match config.lr_scheduler:
        case "constant":
            return config.learning_rate
        case "cosine":
            return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        case "linear":
            return config.learning_rate * (1 - done)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value
