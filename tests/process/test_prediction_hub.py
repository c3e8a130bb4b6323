from __future__ import annotations

from itertools import product

import diffusers
import pytest
import torch
from torch.distributions import Normal

from ldm.process import PREDICTION_TYPES, PredictionType, from_x0_eps, to_x0_eps


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("process", ["preserving", "flow", "exploding"])
@pytest.mark.parametrize(("first", "second"), list(product(PREDICTION_TYPES, repeat=2)))
def test_every_type_converts_to_every_other_and_back(
    first: PredictionType, second: PredictionType, process: str
) -> None:
    part = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64).reshape(3, 1, 1)
    alpha, sigma = {
        "preserving": ((1.57 * part).cos(), (1.57 * part).sin()),
        "flow": (1 - part, part),
        "exploding": (torch.ones_like(part), 30 * part),
    }[process]
    raw, x_t = _draw(3, 2, 4), _draw(3, 2, 5)[..., :4]
    pair = to_x0_eps(raw, x_t, alpha, sigma, first)
    torch.testing.assert_close(alpha * pair.x0 + sigma * pair.eps, x_t)
    other = from_x0_eps(pair.x0, pair.eps, alpha, sigma, second)
    again = to_x0_eps(other, x_t, alpha, sigma, second)
    torch.testing.assert_close(from_x0_eps(again.x0, again.eps, alpha, sigma, first), raw)


def test_velocity_target_is_that_of_diffusers() -> None:
    scheduler = diffusers.DDPMScheduler()
    x0, eps, t = _draw(2, 3, 4, 4).float(), _draw(2, 3, 4, 5)[..., :4].float(), torch.tensor([10, 900])
    alpha_bar = scheduler.alphas_cumprod[t].reshape(2, 1, 1, 1)
    ours = from_x0_eps(x0, eps, alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), "v_prediction")
    torch.testing.assert_close(ours, scheduler.get_velocity(x0, eps, t))


def test_velocity_is_defined_at_zero_snr() -> None:
    raw, x_t = _draw(1, 4), _draw(1, 5)[..., :4]
    pair = to_x0_eps(raw, x_t, torch.tensor(0.0), torch.tensor(1.0), "v_prediction")
    torch.testing.assert_close(pair.x0, -raw)
    torch.testing.assert_close(pair.eps, x_t)


def test_the_flow_is_the_slope_of_the_straight_path() -> None:
    x0, eps = _draw(2, 5), _draw(2, 6)[..., :5]
    here, next_ = ((1 - t) * x0 + t * eps for t in (0.3, 0.31))
    velocity = from_x0_eps(x0, eps, torch.tensor(0.7), torch.tensor(0.3), "flow")
    torch.testing.assert_close(velocity, (next_ - here) / 0.01)
    for t in (0.0, 1.0):
        pair = to_x0_eps(velocity, (1 - t) * x0 + t * eps, torch.tensor(1 - t), torch.tensor(t), "flow")
        torch.testing.assert_close(pair.x0, x0)
        torch.testing.assert_close(pair.eps, eps)


@pytest.mark.parametrize(("alpha", "sigma"), [(0.8, 0.6), (0.3, 0.7), (1.0, 5.0)])
def test_the_score_of_a_mixture_is_that_of_its_posterior_mean(alpha: float, sigma: float) -> None:
    """The gradient of log p(x_t), by autograd, is the "score" of E[x0 | x_t] (Song & Ermon 2019; Tweedie's formula)."""
    weights, means, std = torch.tensor([0.3, 0.7]).double(), torch.tensor([-1.0, 0.5]).double(), 0.2
    x_t = (3 * _draw(50)).requires_grad_()
    variance = alpha**2 * std**2 + sigma**2
    each = Normal(alpha * means, variance**0.5).log_prob(x_t[:, None]) + weights.log()
    (expected,) = torch.autograd.grad(each.logsumexp(1).sum(), x_t)
    x_t = x_t.detach()
    of_each = means + alpha * std**2 / variance * (x_t[:, None] - alpha * means)
    x0 = (each.detach().softmax(1) * of_each).sum(1)
    a, s = torch.tensor([alpha, sigma], dtype=torch.float64)
    eps = to_x0_eps(x0, x_t, a, s, "sample").eps
    torch.testing.assert_close(from_x0_eps(x0, eps, a, s, "score"), expected)
    torch.testing.assert_close(-eps / s, expected)
    torch.testing.assert_close(to_x0_eps(expected, x_t, a, s, "score").x0, x0)


def test_unknown_types_are_refused() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="'noise'; accepted: epsilon, v_prediction, sample"):
        to_x0_eps(one, one, one, one, "noise")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'noise'; accepted: epsilon, v_prediction, sample"):
        from_x0_eps(one, one, one, one, "noise")  # type: ignore[arg-type]
