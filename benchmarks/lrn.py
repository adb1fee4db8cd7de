"""Local response normalization: torch's and ours, forward and backward.

python benchmarks/lrn.py [--batch 32] [--rounds 9]

Both run in turn on AlexNet's two shapes at 224 pixels, on a GPU if one is available, else on the CPU. The script prints
medians, ratios and the largest differences in value and gradient, relative to the largest value.
"""

import statistics
import time
from collections.abc import Callable

import torch
from common import about, options
from torch import Tensor, nn

from alexlab.models.lrn import LocalResponseNorm

SHAPES = {"conv1": (96, 55, 55), "conv2": (256, 27, 27)}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def timed(norm: Callable[[Tensor], Tensor], maps: Tensor, grad: Tensor) -> tuple[float, Tensor, Tensor]:
    """Return the milliseconds of a forward and backward pass, the values and the gradient."""
    maps = maps.clone(memory_format=torch.preserve_format).requires_grad_()
    wait()
    start = time.perf_counter()
    values = norm(maps)
    values.backward(grad)
    wait()
    took = 1000 * (time.perf_counter() - start)
    assert maps.grad is not None
    return took, values.detach(), maps.grad


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    args = options(__doc__, batch=32, rounds=9)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    norms = {"torch": nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2), "ours": LocalResponseNorm()}
    for where, shape in SHAPES.items():
        for layout, memory_format in LAYOUTS.items():
            torch.manual_seed(0)
            maps, grad = (torch.randn(args.batch, *shape, device=device).relu() * 10 for _ in range(2))
            maps, grad = (each.contiguous(memory_format=memory_format) for each in (maps, grad))
            took: dict[str, list[float]] = {name: [] for name in norms}
            outputs = {}
            for _ in range(args.rounds + 1):  # the first one warms up
                for name, norm in norms.items():
                    milliseconds, *outputs[name] = timed(norm, maps, grad)
                    took[name].append(milliseconds)
            medians = {name: statistics.median(times[1:]) for name, times in took.items()}
            pairs = zip(outputs["ours"], outputs["torch"], strict=True)
            apart = [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
            print(
                f"{where} {layout:13} torch {medians['torch']:7.2f} ms, ours {medians['ours']:7.2f} ms: "
                f"x{medians['torch'] / medians['ours']:.2f}; apart by {apart[0]:.1e} (value), {apart[1]:.1e} (gradient)"
            )
    print(about("torch", device=device, threads=torch.get_num_threads(), batch=args.batch, rounds=args.rounds))


if __name__ == "__main__":
    main()
