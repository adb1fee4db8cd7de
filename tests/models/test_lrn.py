"""Local response normalization against the paper's formula and torch's."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from alexlab.models.lrn import LocalResponseNorm


@pytest.mark.parametrize("maps", [3, 16])
def test_lrn_equals_the_formula_of_the_paper(maps: int) -> None:
    a = np.random.default_rng(0).normal(0, 50, (2, maps, 3, 3))
    expected = np.empty_like(a)
    for i in range(maps):
        near = a[:, max(0, i - 2) : min(maps - 1, i + 2) + 1]
        expected[:, i] = a[:, i] / (2 + 1e-4 * (near**2).sum(1)) ** 0.75
    np.testing.assert_allclose(LocalResponseNorm()(torch.from_numpy(a)).numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("size", [2, 4, 5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_lrn_equals_that_of_torch(layout: torch.memory_format, size: int) -> None:
    torch.manual_seed(0)
    x = (torch.randn(2, 24, 9, 9) * 30).contiguous(memory_format=layout).requires_grad_()
    y = x.detach().clone().requires_grad_()
    ours, torchs = LocalResponseNorm(size, 1e-4, divide=True), nn.LocalResponseNorm(size, 1e-4, 0.75, 2)
    weights = torch.randn(2, 24, 9, 9)
    (ours(x) * weights).sum().backward()
    (torchs(y) * weights).sum().backward()
    torch.testing.assert_close(ours(x), torchs(y), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)


def test_neighbours_are_counted_within_each_group() -> None:
    """The released code had half of the maps on each of two GPUs."""
    x = torch.randn(2, 12, 3, 3) * 30
    halves = [nn.LocalResponseNorm(5, 1e-4, 0.75, 2)(half) for half in x.chunk(2, dim=1)]
    ours = LocalResponseNorm(divide=True, groups=2)
    torch.testing.assert_close(ours(x), torch.cat(halves, 1), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours(x), LocalResponseNorm(divide=True)(x), rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"size": 4}, {"groups": 3, "beta": 0.5}, {"size": 9}])
def test_the_gradient_equals_the_numerical_gradient(settings: dict) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LocalResponseNorm(alpha=0.3, **settings), (x,))


@pytest.mark.parametrize("settings", [{}, {"groups": 2, "divide": True}])
def test_the_compiled_form_gives_the_same_values(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    x = (torch.randn(2, 8, 4, 4) * 30).requires_grad_()
    y = x.detach().clone().requires_grad_()
    norm = LocalResponseNorm(**settings)
    eager = norm(x)
    eager.square().sum().backward()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    fused = norm(y)
    fused.square().sum().backward()
    torch.testing.assert_close(eager, fused, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow_on_large_activations(dtype: torch.dtype) -> None:
    """300 squared is more than float16 holds, and inputs of 0-255 give activations of thousands."""
    large = torch.tensor([10.0, 300, 10, 20_000, 10]).view(1, 5, 1, 1)
    x, y = large.to(dtype).requires_grad_(), large.clone().requires_grad_()
    LocalResponseNorm()(x).sum().backward()
    LocalResponseNorm()(y).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(LocalResponseNorm()(x).float(), LocalResponseNorm()(y), rtol=0.02, atol=1e-4)
    assert x.grad.isfinite().all()
    torch.testing.assert_close(x.grad.float(), y.grad, rtol=0.05, atol=2e-3)


def test_another_beta_than_the_papers() -> None:
    x = torch.randn(1, 8, 2, 2)
    torch.testing.assert_close(
        LocalResponseNorm(beta=0.5, divide=True)(x), nn.LocalResponseNorm(5, 1e-4, 0.5, 2)(x), rtol=1e-5, atol=1e-6
    )
    assert math.isclose(LocalResponseNorm().beta, 0.75)
