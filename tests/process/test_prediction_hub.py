from __future__ import annotations

from itertools import product

import diffusers
import pytest
import torch

from ldm.process import PREDICTION_TYPES, PredictionType, from_x0_eps, to_x0_eps


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize(("first", "second"), list(product(PREDICTION_TYPES, repeat=2)))
def test_every_type_converts_to_every_other_and_back(first: PredictionType, second: PredictionType) -> None:
    angle = torch.tensor([0.1, 0.8, 1.5], dtype=torch.float64).reshape(3, 1, 1)
    alpha, sigma = angle.cos(), angle.sin()
    raw, x_t = _draw(3, 2, 4), _draw(3, 2, 5)[..., :4]
    pair = to_x0_eps(raw, x_t, alpha, sigma, first)
    torch.testing.assert_close(alpha * pair.x0 + sigma * pair.eps, x_t)
    other = from_x0_eps(*pair, alpha, sigma, second)
    again = to_x0_eps(other, x_t, alpha, sigma, second)
    torch.testing.assert_close(from_x0_eps(*again, alpha, sigma, first), raw)


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


def test_unknown_types_are_refused() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="'noise'; accepted: epsilon, v_prediction, sample"):
        to_x0_eps(one, one, one, one, "noise")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'noise'; accepted: epsilon, v_prediction, sample"):
        from_x0_eps(one, one, one, one, "noise")  # type: ignore[arg-type]
