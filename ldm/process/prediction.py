"""What the network's raw output means; every type converts through the pair (x0, eps).

All formulas are read off x_t = alpha·x0 + sigma·eps (Ho et al. 2020, eq. 4) and v = alpha·eps - sigma·x0
(Salimans & Ho 2022, appendix D).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]
PREDICTION_TYPES: tuple[PredictionType, ...] = get_args(PredictionType)


class Prediction(NamedTuple):
    """Estimates of clean data and noise, each of the shape of x_t, with x_t = alpha·x0 + sigma·eps."""

    x0: Tensor
    eps: Tensor


def to_x0_eps(raw: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: PredictionType) -> Prediction:
    """The pair (x0, eps) that a raw network output stands for.

    `raw` and `x_t` have one shape, `alpha` and `sigma` broadcast to it. "epsilon" needs alpha > 0 and
    "sample" sigma > 0. Raises ValueError for an unknown type.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    match prediction_type:
        case "epsilon":
            return Prediction(x0=(x_t - sigma * raw) / alpha, eps=raw)
        case "v_prediction":
            return Prediction(x0=alpha * x_t - sigma * raw, eps=sigma * x_t + alpha * raw)
        case "sample":
            return Prediction(x0=raw, eps=(x_t - alpha * raw) / sigma)


def from_x0_eps(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: PredictionType) -> Tensor:
    """The raw output (the training target) that stands for (x0, eps): the inverse of `to_x0_eps`.

    `x0` and `eps` have one shape, `alpha` and `sigma` broadcast to it. Raises ValueError for an unknown type.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    match prediction_type:
        case "epsilon":
            return eps
        case "v_prediction":
            return alpha * eps - sigma * x0
        case "sample":
            return x0


def check_choice(name: str, value: object, accepted: tuple[str, ...]) -> None:
    """Raise ValueError naming setting, value and the accepted ones, unless it is one of them."""
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(accepted)}")
