"""The input pipeline beside torchvision's reference loader, DALI's CPU pipeline and decoding alone, in turn.

python benchmarks/input.py FOLDER [--rounds 5] [--threads 2] [--batch 256] [--seconds 5] [--only NAME ...]

FOLDER holds class folders, or train/ with them. 224-pixel random resized crops of 8 to 100 % of the area, and flips,
in batches, from a warm page cache, each image twenty times a pass, as that of a few hundred would be a short one. Each
candidate of each round is a process of its own that first passes over the images. What is not installed is left out,
and said.
"""

import argparse
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SIDE, TIMES = 224, 20
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def repeated(index: Any) -> Any:
    import numpy as np

    return index.subset(np.tile(np.arange(len(index)), TIMES))


def ours(root: Path, threads: int, batch: int, policy: str = "none") -> Iterator[int]:
    """The batches of a training, on the CPU, uint8."""
    from alexlab.data.dataset import ImageDataset
    from alexlab.data.index import scan
    from alexlab.data.loader import Loader
    from alexlab.data.sampler import TrainBatches
    from alexlab.data.transforms import SampleTransform
    from alexlab.memory import keep_memory

    keep_memory()  # as a training on a CPU does; on a GPU torch keeps pinned batches
    index = repeated(scan(root))
    transform = SampleTransform(SIDE, "random_resized", flip=0.5, policy=policy)
    batches = TrainBatches(len(index), min(batch, len(index)), seed=0)
    loader = Loader(ImageDataset(index, transform, seed=0), batches, threads)
    for epoch in itertools.count():
        batches.set_epoch(epoch)
        yield from (len(images) for images, _, _ in loader)


def ours_strong(root: Path, threads: int, batch: int) -> Iterator[int]:
    """The same with TrivialAugment, which augment=strong adds to the loader's work."""
    return ours(root, threads, batch, "trivial")


def decode_only(root: Path, threads: int, batch: int) -> Iterator[int]:
    """Files read and decoded whole by the same decoder, and thrown away."""
    import simplejpeg

    from alexlab.data.index import scan
    from alexlab.memory import keep_memory

    keep_memory()
    index = scan(root)

    def read(i: int) -> None:
        simplejpeg.decode_jpeg(Path(index.path(i)).read_bytes(), "RGB")

    with ThreadPoolExecutor(threads) as pool:
        while True:
            for start in range(0, len(index), batch):
                part = range(start, min(start + batch, len(index)))
                list(pool.map(read, part))
                yield len(part)


def torchvision_reference(root: Path, threads: int, batch: int) -> Iterator[int]:
    """ImageFolder with Pillow and the transforms of torchvision's references/classification, in worker processes."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    steps = [
        v2.RandomResizedCrop(SIDE, antialias=True), v2.RandomHorizontalFlip(0.5), v2.PILToTensor(),
        v2.ToDtype(torch.float, scale=True), v2.Normalize(MEAN, STD), v2.ToPureTensor(),
    ]  # fmt: skip
    data = ImageFolder(str(root), v2.Compose(steps))
    data.samples *= TIMES
    loader: DataLoader[Any] = DataLoader(
        data, min(batch, len(data)), shuffle=True, num_workers=threads, drop_last=True, persistent_workers=True
    )
    while True:
        yield from (len(images) for images, _ in loader)


def dali_cpu(root: Path, threads: int, batch: int) -> Iterator[int]:
    """DALI's CPU pipeline: of each JPEG the region alone is decoded; uint8."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=None)
    def pipeline() -> tuple[Any, Any]:
        files, labels = fn.readers.file(file_root=str(root), random_shuffle=True, name="reader")
        images = fn.decoders.image_random_crop(
            files, device="cpu", output_type=types.RGB, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
        )
        images = fn.resize(images, size=[SIDE, SIDE], interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip()), labels

    built = pipeline()
    built.build()
    while True:
        images, _ = built.run()
        yield len(images)


CANDIDATES: dict[str, tuple[Callable[[Path, int, int], Iterator[int]], str]] = {
    "torchvision_reference": (torchvision_reference, "torchvision"),
    "dali_cpu": (dali_cpu, "nvidia.dali"),
    "decode_only": (decode_only, "simplejpeg"),
    "ours": (ours, "alexlab"),
    "ours_strong": (ours_strong, "alexlab"),
}


def child(name: str, root: Path, threads: int, batch: int, seconds: float) -> None:
    counts = CANDIDATES[name][0](root, threads, batch)
    images = sum(1 for path in root.rglob("*") if path.is_file())
    seen = 0
    while seen < max(images, 6 * batch):  # what is slow the first time; more than is begun ahead
        seen += next(counts)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        done += next(counts)
    print(json.dumps(done / (time.perf_counter() - start)))


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--child", choices=CANDIDATES)
    a = parser.parse_args()
    root = a.folder / "train" if (a.folder / "train").is_dir() else a.folder
    if a.child:
        child(a.child, root, a.threads, a.batch, a.seconds)
        return
    names = [name for name in a.only if installed(CANDIDATES[name][1])]
    for name in a.only:
        if name not in names:
            print(f"{name}: {CANDIDATES[name][1]} is not installed")
    rates: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(a.rounds):
        for name in names:
            words = ["--threads", a.threads, "--batch", a.batch, "--seconds", a.seconds, "--child", name]
            done = subprocess.run(
                [sys.executable, __file__, str(a.folder), *map(str, words)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
            rates[name].append(float(done.stdout.splitlines()[-1]))
    print(f"{root}: {a.threads} threads, batch {a.batch}, {a.rounds} rounds of {a.seconds:g} s")
    middle = {name: statistics.median(each) for name, each in rates.items()}
    for name, each in rates.items():
        shares = "".join(f", {middle[name] / middle[other]:5.2f} x {other}" for other in names[:3] if other != name)
        print(f"{name:22s} {middle[name]:8.0f} images/s ({min(each):.0f} to {max(each):.0f}){shares}")


if __name__ == "__main__":
    main()
