from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ldm.training.ema import Ema


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Linear(4, 2))


def walk(module: nn.Module, steps: int, seed: int = 1) -> list[dict[str, Tensor]]:
    """Gives the weights new random values and yields copies, one a step."""
    generator = torch.Generator().manual_seed(seed)
    path = []
    for _ in range(steps):
        path.append({n: torch.randn(p.shape, generator=generator) for n, p in module.named_parameters()})
    return path


def put(module: nn.Module, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name])


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95, 0.9999])
def test_the_average_is_the_recursion_in_closed_form(decay: float) -> None:
    """avg_n = prod d_i * w_0 + sum_k (1 - d_k) * prod_{i > k} d_i * w_k, in float64."""
    module = network()
    start = {n: p.detach().double() for n, p in module.named_parameters()}
    ema, path = Ema(module, decay), walk(module, 60)
    for weights in path:
        put(module, weights)
        ema.update()
    decays = torch.tensor([min(decay, (1 + n) / (10 + n)) for n in range(60)], dtype=torch.float64)
    later = torch.flip(torch.cumprod(torch.flip(decays, [0]), 0), [0])
    factors = (1 - decays) * torch.cat([later[1:], torch.ones(1, dtype=torch.float64)])
    for name, average in ema.average.items():
        expected = later[0] * start[name] + sum(f * w[name] for f, w in zip(factors, path, strict=True))
        torch.testing.assert_close(average.double(), expected, atol=5e-6, rtol=1e-5)


def test_equal_weights_stay_equal() -> None:
    module = network()
    ema = Ema(module, 0.99)
    for _ in range(20):
        ema.update()
    assert all(torch.equal(ema.average[n], p) for n, p in module.named_parameters())


def test_applied_shows_the_average_and_restores_bit_for_bit() -> None:
    module = network()
    ema = Ema(module, 0.9)
    put(module, walk(module, 1)[0])
    ema.update()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    average = {n: a.clone() for n, a in ema.average.items()}
    with ema.applied():
        assert all(torch.equal(p, average[n]) for n, p in module.named_parameters())
        assert any(not torch.equal(p, before[n]) for n, p in module.named_parameters())
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    assert all(torch.equal(a, average[n]) for n, a in ema.average.items())


def test_applied_restores_after_an_error_and_keeps_the_parameters_themselves() -> None:
    module = network()
    ema = Ema(module, 0.9)
    put(module, walk(module, 1)[0])
    parameters, before = list(module.parameters()), [p.detach().clone() for p in module.parameters()]
    with pytest.raises(RuntimeError), ema.applied():
        raise RuntimeError
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_a_restored_average_continues_the_old_one() -> None:
    path = walk(network(), 12)
    whole, module = Ema(first := network(), 0.99), network()
    for weights in path[:6]:
        put(first, weights)
        whole.update()
    resumed = Ema(module, 0.99)
    resumed.load_state_dict({n: a.clone() for n, a in whole.state_dict().items()}, whole.updates)
    for weights in path[6:]:
        for ema, owner in ((whole, first), (resumed, module)):
            put(owner, weights)
            ema.update()
    assert resumed.updates == whole.updates == 12
    assert all(torch.equal(resumed.average[n], a) for n, a in whole.average.items())


def test_the_average_has_no_gradient_and_a_memory_of_its_own() -> None:
    module = network()
    ema = Ema(module, 0.9)
    assert all(not a.requires_grad for a in ema.average.values())
    put(module, walk(module, 1)[0])
    assert all(not torch.equal(ema.average[n], p) for n, p in module.named_parameters())
