"""How much memory a loader's processes gain in an epoch: ours, and torchvision's ImageFolder in a DataLoader.

python benchmarks/growth.py [--images 200000] [--workers 2]

The images are links to one small JPEG. The script prints the memory (PSS: shared pages are divided among the processes)
of the loading process and of its workers, after the first batches and at the end of the epoch.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    batches = CANDIDATES[name](root, workers)
    total = sum(1 for _ in root.glob("*/*")) // 256
    for n, _ in enumerate(batches):
        if n == FEW:
            early = private()
        if n == total - 10:  # the workers still run
            late = private()
    print(json.dumps([early, late]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--child", choices=CANDIDATES)
    parser.add_argument("--root", type=Path)
    args = parser.parse_args()
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
            command = [sys.executable, __file__, "--child", name, "--root", str(root), "--workers", str(args.workers)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            early, late = json.loads(done.stdout.splitlines()[-1])
            grown = sum(late) - sum(early)
            print(f"{name:14s} {early} after {FEW} batches, {late} at the end: {grown:+.1f} MB")


if __name__ == "__main__":
    main()
