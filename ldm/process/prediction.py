"""What the network's raw output means; every type converts through the pair (x0, eps).

All formulas are read off x_t = alpha·x0 + sigma·eps (Ho et al. 2020, eq. 4) and the type's own: v = alpha·eps -
sigma·x0 (Salimans & Ho 2022, appendix D); flow = eps - x0, the velocity of a rectified flow (Lipman et al. 2023; Liu
et al. 2022); score = -eps/sigma, the gradient of log q(x_t | x0) (Song & Ermon 2019, section 4.2). None needs the
process to be variance preserving.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow", "score"]
PREDICTION_TYPES: tuple[PredictionType, ...] = get_args(PredictionType)


class Prediction(NamedTuple):
    """Estimates of clean data and noise, each of the shape of x_t, with x_t = alpha·x0 + sigma·eps.

    `variance` is the raw output of a network that learnt the reverse step's variance, of the same shape, for
    `ldm.process.interpolated_log_variance`; None for a fixed one.
    """

    x0: Tensor
    eps: Tensor
    variance: Tensor | None = None


def to_x0_eps(raw: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: PredictionType) -> Prediction:
    """The pair (x0, eps) that a raw network output stands for.

    `raw` and `x_t` have one shape, `alpha` and `sigma` broadcast to it. "epsilon" and "score" need alpha > 0,
    "sample" sigma > 0. Raises ValueError for an unknown type.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    match prediction_type:
        case "epsilon":
            return Prediction(x0=(x_t - sigma * raw) / alpha, eps=raw)
        case "v_prediction":
            norm = alpha.square() + sigma.square()
            a, s = alpha / norm, sigma / norm
            return Prediction(x0=a * x_t - s * raw, eps=s * x_t + a * raw)
        case "sample":
            return Prediction(x0=raw, eps=(x_t - alpha * raw) / sigma)
        case "flow":
            norm = alpha + sigma
            return Prediction(x0=(x_t - sigma * raw) / norm, eps=(x_t + alpha * raw) / norm)
        case "score":
            return Prediction(x0=(x_t + sigma.square() * raw) / alpha, eps=-sigma * raw)


def from_x0_eps(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: PredictionType) -> Tensor:
    """The raw output (the training target) that stands for (x0, eps): the inverse of `to_x0_eps`.

    `x0` and `eps` have one shape, `alpha` and `sigma` broadcast to it. "score" needs sigma > 0. Raises ValueError
    for an unknown type.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    match prediction_type:
        case "epsilon":
            return eps
        case "v_prediction":
            return alpha * eps - sigma * x0
        case "sample":
            return x0
        case "flow":
            return eps - x0
        case "score":
            return -eps / sigma


def split_variance(raw: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The prediction [B, C, ...] in a raw output, and what a learned variance adds to it, for x [B, C, ...].

    A network that learns its variance has 2C output channels, the prediction first (Nichol & Dhariwal 2021); with C
    there is no variance. Raises ValueError for another number.
    """
    channels = x.shape[1]
    if raw.shape[1] not in (channels, 2 * channels):
        raise ValueError(f"raw output has {raw.shape[1]} channels; accepted: {channels} or {2 * channels}")
    return raw[:, :channels], raw[:, channels:] if raw.shape[1] == 2 * channels else None


def check_choice(name: str, value: object, accepted: tuple[str, ...]) -> None:
    """Raise ValueError naming setting, value and the accepted ones, unless it is one of them."""
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(accepted)}")
