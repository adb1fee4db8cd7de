"""How much memory a loader's processes gain in an epoch: ours, and torchvision's ImageFolder in a DataLoader.

python benchmarks/growth.py [--images 200000] [--workers 2]

The images are links to one small JPEG. The script prints the memory (PSS: shared pages are divided among the processes)
of the loading process and of its workers, after the first batches and at the end of the epoch.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import options, run

FEW = 50  # batches, after which all buffers exist


def ours(root: Path, workers: int) -> Iterator[Any]:
    from alexlab.data.dataset import ImageDataset
    from alexlab.data.folder import scan
    from alexlab.data.loader import Loader
    from alexlab.data.sampler import TrainBatchSampler
    from alexlab.data.transforms import SampleTransform
    from alexlab.engine.memory import keep_memory

    keep_memory()
    index = scan(root)
    data = ImageDataset(index, SampleTransform(32, "random_resized", flip=0.5), seed=0)
    yield from Loader(data, TrainBatchSampler(len(index), 256, seed=0), workers)


def image_folder(root: Path, workers: int) -> Iterator[Any]:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    data = ImageFolder(str(root), v2.Compose([v2.RandomResizedCrop(32, antialias=True), v2.PILToTensor()]))
    yield from DataLoader(data, 256, shuffle=True, num_workers=workers, multiprocessing_context="fork")


CANDIDATES = {"ours": ours, "image_folder": image_folder}


def private() -> list[float]:
    """Return the PSS in MB of this process and of each child process."""
    import psutil

    me = psutil.Process()
    return [round(each.memory_full_info().pss / 1e6, 1) for each in (me, *me.children())]


def child(name: str, root: Path, workers: int) -> None:
    import torch

    torch.set_num_threads(1)
    early: list[float] = []
    late: list[float] = []
    total = sum(1 for _ in root.glob("*/*")) // 256
    few = min(FEW, total // 2)
    for n, _ in enumerate(CANDIDATES[name](root, workers)):
        if n == few:
            early = private()
        if n == total - min(10, few):  # the workers still run
            late = private()
    print(json.dumps([few, early, late]))


def main() -> None:
    args = options(__doc__, images=200_000, workers=2, child="", root=Path())
    if args.child:
        child(args.child, args.root, args.workers)
        return
    import numpy as np
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        one = Path(folder, "one.jpg")
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(one)
        root = Path(folder, "images")
        for k in range(100):
            (root / f"{k:03d}").mkdir(parents=True)
        for i in range(args.images):
            (root / f"{i % 100:03d}" / f"{i:08d}.jpg").symlink_to(one)
        print(f"{args.images:,} images, {args.workers} workers: MB of the process, and of each worker")
        for name in CANDIDATES:
            words = [__file__, f"--child={name}", f"--root={root}", f"--workers={args.workers}"]
            few, early, late = json.loads(run(words).splitlines()[-1])
            grown = sum(late) - sum(early)
            print(f"{name:14s} {early} after {few} batches, {late} at the end: {grown:+.1f} MB")


if __name__ == "__main__":
    main()
