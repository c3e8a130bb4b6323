"""How much the error at each noise level counts, as a function of the signal-to-noise ratio."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from ldm.process.prediction import PREDICTION_TYPES, PredictionType, check_choice

Weighting = Literal["none", "p2", "debiased", "snr_truncated"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)


def min_snr_weight(snr: Tensor, gamma: float) -> Tensor:
    """Min-SNR-gamma on the squared error of eps: min(snr, gamma) / snr (Hang et al. 2023, section 3.4)."""
    return (gamma / snr).clamp(max=1)


def p2_weight(snr: Tensor, gamma: float = 1.0, k: float = 1.0) -> Tensor:
    """P2 on the squared error of eps: 1 / (k + snr)^gamma (Choi et al. 2022, eq. 8, over L_simple)."""
    return (k + snr) ** -gamma


def debiased_weight(snr: Tensor) -> Tensor:
    """Debiased estimation on the squared error of eps: 1 / sqrt(snr) (Yu et al. 2023, section 3)."""
    return snr.rsqrt()


def snr_truncated_weight(snr: Tensor) -> Tensor:
    """max(snr, 1) on the squared error of x0, so max(1, 1/snr) on that of eps (Salimans & Ho 2022, section 4)."""
    return (1 / snr).clamp(min=1)


def per_target(weight: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: PredictionType) -> Tensor:
    """The weight on the squared error of a raw output that equals `weight` on that of eps.

    x_t is known, so an error e in eps is one of (sigma/alpha)·e in x0, ((alpha² + sigma²)/alpha)·e in v,
    ((alpha + sigma)/alpha)·e in the flow and e/sigma in the score. The arguments broadcast. Raises ValueError for an
    unknown type.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    match prediction_type:
        case "epsilon":
            return weight
        case "v_prediction":
            return weight * (alpha / (alpha.square() + sigma.square())).square()
        case "sample":
            return weight * (alpha / sigma).square()
        case "flow":
            return weight * (alpha / (alpha + sigma)).square()
        case "score":
            return weight * sigma.square()
