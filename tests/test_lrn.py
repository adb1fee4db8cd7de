"""Local response normalization against the paper's formula and torch's."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from alexlab.models.lrn import LocalResponseNorm


@pytest.mark.parametrize("maps", [3, 16])
def test_lrn_is_the_papers_formula(maps: int) -> None:
    a = np.random.default_rng(0).normal(0, 50, (2, maps, 3, 3))
    expected = np.empty_like(a)
    for i in range(maps):
        near = a[:, max(0, i - 2) : min(maps - 1, i + 2) + 1]
        expected[:, i] = a[:, i] / (2 + 1e-4 * (near**2).sum(1)) ** 0.75
    np.testing.assert_allclose(LocalResponseNorm()(torch.from_numpy(a)).numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_lrn_equals_torchs(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = (torch.randn(2, 24, 9, 9) * 30).contiguous(memory_format=layout).requires_grad_()
    y = x.detach().clone().requires_grad_()
    ours, torchs = LocalResponseNorm(alpha=1e-4, divide=True), nn.LocalResponseNorm(5, 1e-4, 0.75, 2)
    weights = torch.randn(2, 24, 9, 9)
    (ours(x) * weights).sum().backward()
    (torchs(y) * weights).sum().backward()
    torch.testing.assert_close(ours(x), torchs(y), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)


def test_lrn_beta_other_than_the_papers() -> None:
    x = torch.randn(1, 8, 2, 2)
    torch.testing.assert_close(
        LocalResponseNorm(beta=0.5, divide=True)(x), nn.LocalResponseNorm(5, 1e-4, 0.5, 2)(x), rtol=1e-5, atol=1e-6
    )
    assert math.isclose(LocalResponseNorm().beta, 0.75)
