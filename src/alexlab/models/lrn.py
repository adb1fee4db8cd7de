"""Local response normalization over neighbouring maps, in few passes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LocalResponseNorm(nn.Module):
    """b = a / (k + alpha * sum of a^2 over `size` neighbouring maps) ** beta  (Krizhevsky et al. 2012, section 3.3).

    Args:
        divide: divide alpha by size, as torch.nn.LocalResponseNorm and Caffe do; the paper's formula does not.
    """

    def __init__(
        self, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0, divide: bool = False
    ) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k, self.divide = size, alpha, beta, k, divide

    def forward(self, a: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape and type."""
        squares = F.pad(a * a, (0, 0, 0, 0, (self.size - 1) // 2, self.size // 2))
        maps = a.shape[1]
        total = squares[:, :maps]
        for shift in range(1, self.size):
            total = total + squares[:, shift : shift + maps]
        scale = total * (self.alpha / self.size if self.divide else self.alpha) + self.k
        if self.beta == 0.75:  # two square roots cost far less than a power
            root = torch.rsqrt(scale)
            return a * (root * torch.sqrt(root))
        return a * scale.pow(-self.beta)

    def extra_repr(self) -> str:
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}, divide={self.divide}"
