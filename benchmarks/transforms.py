"""What it costs to seed transforms of one's own by image: our loader with and without them, in turn.

python benchmarks/transforms.py FOLDER [--threads 2] [--batch 64] [--batches 4] [--rounds 9]

FOLDER contains class folders. Each candidate makes batches of 224-pixel random resized crops. The script prints median
images/s and CPU time per image, and the medians of each round's ratio to, and difference from, the candidate before.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from common import about, in_turn, options
from torch import Tensor
from torchvision.transforms import v2

from alexlab.data.dataset import ImageDataset
from alexlab.data.folder import scan
from alexlab.data.loader import Loader
from alexlab.data.sampler import TrainBatchSampler
from alexlab.data.transforms import SampleTransform
from alexlab.data.user_transforms import UserTransforms


class Unseeded(UserTransforms):
    """Calls the transforms without isolating or checking anything."""

    def __call__(self, image: Tensor, size: tuple[int, ...], seed: int) -> Tensor:
        for transform in self.transforms:
            image = transform(image)
        return image


def torchs(image: Tensor) -> Tensor:
    return image.add(torch.randint(0, 2, image.shape, dtype=torch.uint8))


def numpys(image: Tensor) -> Tensor:
    return image.add(torch.from_numpy(np.random.randint(0, 2, image.shape, np.uint8)))


RECIPE = [v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4, 0.4), v2.RandomErasing(0.25)]
# (transforms, how they are called), each after what it is compared with
CANDIDATES: dict[str, tuple[Sequence[Callable[[Tensor], Tensor]], type[UserTransforms] | None]] = {
    "none": ([], None),
    "v2, unseeded": (RECIPE, Unseeded),
    "v2": (RECIPE, UserTransforms),
    "torch's numbers, unseeded": ([torchs], Unseeded),
    "torch's numbers": ([torchs], UserTransforms),
    "NumPy's numbers, unseeded": ([numpys], Unseeded),
    "NumPy's numbers": ([numpys], UserTransforms),
}


def main() -> None:
    args = options(__doc__, "folder", threads=2, batch=64, batches=4, rounds=9)
    index: Any = scan(args.folder)

    def rate(name: str) -> Callable[[], tuple[float, float]]:
        transforms, kind = CANDIDATES[name]
        transform = SampleTransform(224, "random_resized", user=kind(transforms) if kind else None)
        batches = TrainBatchSampler(len(index), args.batch, 0)
        loader = Loader(ImageDataset(index, transform, 0), batches, args.threads)

        def measure() -> tuple[float, float]:
            start, busy, seen = time.perf_counter(), time.process_time(), 0
            while seen < args.batches * args.batch:
                seen += sum(len(batch.images) for batch in loader)
            return seen / (time.perf_counter() - start), 1e6 * (time.process_time() - busy) / seen

        return measure

    rates = in_turn(args.rounds, {name: rate(name) for name in CANDIDATES}, warm_up=True)
    before = rates["none"]
    for name, each in rates.items():
        speed, busy = (statistics.median(values) for values in zip(*each, strict=True))
        ratio = statistics.median(a / b for (a, _), (b, _) in zip(each, before, strict=True))
        more = statistics.median(a - b for (_, a), (_, b) in zip(each, before, strict=True))
        print(f"{name:27s} {speed:6.0f} images/s ({ratio:4.2f} x the line before), {busy:6.0f} us of CPU ({more:+.0f})")
        before = each
    print(about("torch", "torchvision", threads=args.threads, batch=args.batch, images=len(index)))


if __name__ == "__main__":
    main()
