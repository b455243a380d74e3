"""cpu_adam.AdamW against torch's own AdamW, and against itself cut in every way."""

from __future__ import annotations

import pytest
import torch

from megatron.engine import cpu_adam

STEPS, NUMEL = 5, 1237
HYPER = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def _values(seed: int) -> torch.Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed))


def _trained(kind: type[torch.optim.Optimizer], bounds: list[int], **how) -> dict[str, torch.Tensor]:
    """Weights and states after some steps, of one tensor that is cut at `bounds` and put together again."""
    cuts = list(zip([0, *bounds], [*bounds, NUMEL], strict=True))
    params = [torch.nn.Parameter(_values(0)[start:stop].clone()) for start, stop in cuts]
    optimizer = kind(params, **HYPER, **how)
    for step in range(1, STEPS + 1):
        for param, (start, stop) in zip(params, cuts, strict=True):
            param.grad = 0.01 * _values(step)[start:stop]
        optimizer.step()
    assert all(optimizer.state[param]["step"] == STEPS for param in params)
    states = {key: torch.cat([optimizer.state[param][key] for param in params]) for key in ("exp_avg", "exp_avg_sq")}
    return {"weights": torch.cat([param.detach() for param in params]), **states}


def test_is_torchs_adamw():
    found, expected = _trained(cpu_adam.AdamW, [5, 700]), _trained(torch.optim.AdamW, [5, 700], fused=False)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=2e-6, atol=1e-9)
    # a fault that the comparison must see: the decay goes into the gradient, as in Adam
    coupled = _trained(torch.optim.Adam, [5, 700], fused=False)
    assert not torch.allclose(coupled["weights"], expected["weights"], rtol=2e-6, atol=1e-9)


CUTS = ([1], [63], [64], [64, 65, 128], [7, 500, 501, 1000], [1200, 1236])


@pytest.mark.parametrize("bounds", CUTS, ids=str)
def test_an_element_is_stepped_the_same_wherever_its_tensor_is_cut(bounds):
    whole, cut = _trained(cpu_adam.AdamW, []), _trained(cpu_adam.AdamW, bounds)
    assert all(torch.equal(cut[name], whole[name]) for name in whole)


def test_without_filling_up_the_ends_are_rounded_otherwise(monkeypatch):
    """A fault that the test above must see."""
    monkeypatch.setattr(cpu_adam, "UNIT", 1)
    whole = _trained(cpu_adam.AdamW, [])
    changed = [_trained(cpu_adam.AdamW, bounds) for bounds in CUTS]
    assert any(not torch.equal(cut[name], whole[name]) for cut in changed for name in whole)


def test_the_steps_of_an_empty_tensor_are_counted_too():
    empty, other = torch.nn.Parameter(torch.ones(0)), torch.nn.Parameter(torch.ones(3))
    for kind in (cpu_adam.AdamW, torch.optim.AdamW):
        optimizer = kind([empty, other], **HYPER)
        for _ in range(2):
            empty.grad, other.grad = torch.ones(0), torch.ones(3)
            optimizer.step()
        assert optimizer.state[empty]["step"] == optimizer.state[other]["step"] == 2


def test_a_parameter_without_a_gradient_is_left_alone_and_matrices_are_taken():
    still, matrix = torch.nn.Parameter(torch.ones(70)), torch.nn.Parameter(torch.ones(9, 11))
    optimizer = cpu_adam.AdamW([still, matrix], **HYPER)
    matrix.grad = torch.ones(11, 9).T  # not contiguous
    assert optimizer.step(lambda: 2.5) == 2.5
    assert torch.equal(still, torch.ones(70)) and still not in optimizer.state
    assert (matrix < 1).all() and (matrix == matrix[0, 0]).all()
    assert optimizer.state[matrix]["exp_avg"].shape == matrix.shape
