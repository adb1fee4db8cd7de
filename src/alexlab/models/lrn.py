"""Local response normalization over neighbouring maps, in few passes over memory."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class LocalResponseNorm(nn.Module):
    """Normalize maps by their neighbours, as in section 3.3 of Krizhevsky et al. (2012).

    The formula is b = a / (k + alpha * sum of a^2 over `size` neighbouring maps) ** beta.

    Args:
        size, alpha, beta, k: see the formula; the defaults are the paper's.
        divide: divide alpha by size, as torch.nn.LocalResponseNorm and Caffe do; the paper's formula does not.
        groups: number of equal parts of the maps within which neighbours are counted; the released code had half of the
            maps on each of two GPUs.
    """

    def __init__(
        self,
        size: int = 5,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 2.0,
        divide: bool = False,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k, self.divide, self.groups = size, alpha, beta, k, divide, groups

    def forward(self, a: Tensor) -> Tensor:
        """Normalize maps (B, C, H, W); the result has the same shape and type.

        float16 is computed in float32: squares of values from 256 on would overflow. bfloat16 has float32's range.
        """
        alpha = self.alpha / self.size if self.divide else self.alpha
        wide = a.float() if a.dtype == torch.float16 else a
        if torch.compiler.is_compiling():  # the compiler fuses the expression and its gradient
            parts = [self._summed(part * part) for part in wide.chunk(self.groups, dim=1)]
            scale = self.k + alpha * (torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])
            return (wide * _to_minus(scale, self.beta)).to(a.dtype)
        return _Normalize.apply(wide, self.size, alpha, self.beta, self.k, self.groups).to(a.dtype)

    def _summed(self, squares: Tensor) -> Tensor:
        maps = squares.shape[1]
        padded = F.pad(squares, (0, 0, 0, 0, self.size // 2, (self.size - 1) // 2))
        return sum(padded[:, shift : shift + maps] for shift in range(self.size))  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return (
            f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}, divide={self.divide}, groups={self.groups}"
        )


class _Normalize(torch.autograd.Function):
    """The normalization with an explicit gradient: autograd would store and read each term of the sum.

    With s the scale and f = s^-beta: b = a f, and da = g f - 2 alpha beta a * (sum over the neighbours of g a f / s).
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, size: int, alpha: float, beta: float, k: float, groups: int) -> Tensor:
        scale = _sum_of_neighbours(a * a, size // 2, (size - 1) // 2, groups).mul_(alpha).add_(k)
        factor = _to_minus(scale, beta)
        ctx.save_for_backward(a, scale, factor)
        ctx.settings = (size, alpha, beta, groups)
        return a * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, scale, factor = ctx.saved_tensors
        size, alpha, beta, groups = ctx.settings
        direct = grad * factor
        # if map i counts map j as a neighbour after it, map j counts map i as one before it
        through = _sum_of_neighbours((direct * a).div_(scale), (size - 1) // 2, size // 2, groups)
        return direct.addcmul_(a, through, value=-2 * alpha * beta), None, None, None, None, None


def _sum_of_neighbours(x: Tensor, before: int, after: int, groups: int) -> Tensor:
    """Add to each map (B, C, H, W) the `before` maps before it and the `after` maps after it, within the same group."""
    total = x.clone()
    for t, part in zip(total.chunk(groups, dim=1), x.chunk(groups, dim=1), strict=True):
        maps = part.shape[1]
        for shift in range(1, min(after, maps - 1) + 1):
            t[:, : maps - shift].add_(part[:, shift:])
        for shift in range(1, min(before, maps - 1) + 1):
            t[:, shift:].add_(part[:, : maps - shift])
    return total


def _to_minus(scale: Tensor, beta: float) -> Tensor:
    """Return scale ** -beta; the paper's beta takes two square roots, which cost far less than a power."""
    if beta == 0.75:
        root = torch.rsqrt(scale)
        return root * torch.sqrt(root)
    return scale.pow(-beta)
