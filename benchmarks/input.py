"""The input pipeline, torchvision's reference loader, DALI's CPU pipeline, litdata, FFCV and decoding alone, in turn.

python benchmarks/input.py FOLDER [--rounds 5] [--threads 2] [--batch 256] [--seconds 5] [--warm 1000] [--only NAME ...]

FOLDER contains class folders, or train/ with class folders. Each candidate makes batches of 224-pixel random resized
crops (8 to 100 % of the area) with flips, from a warm page cache. Each image comes twenty times per pass, because a
pass over a few hundred images would be short. The candidates take turns, each in a new process, which reads --warm
images before its clock starts. Candidates that are not installed are skipped, and their names are printed.
"""

import importlib.util
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from common import in_turn, options, run

SIDE, TIMES = 224, 20
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Repeated:
    """An index whose images are repeated TIMES times."""

    def __init__(self, index: Any) -> None:
        import numpy as np

        self.index, self.count = index, len(index.targets)
        self.targets = np.tile(index.targets, TIMES)

    def ahead(self, numbers: Any) -> None:
        self.index.ahead(numbers % self.count)

    def path(self, i: int) -> str:
        return self.index.path(i % self.count)

    def picture(self, i: int) -> Any:
        return self.index.picture(i % self.count)

    def copy(self, numbers: Any, out: Any) -> None:
        self.index.copy(numbers % self.count, out)


def ours(
    root: Path, threads: int, batch: int, policy: str = "none", prepared: bool = False, whole: bool = False
) -> Iterator[int]:
    """Training batches of our loader, on the CPU, uint8, from a folder or from what `alexlab prepare` wrote."""
    from alexlab.data.dataset import ImageDataset
    from alexlab.data.fast import prepared as preparations
    from alexlab.data.folder import scan
    from alexlab.data.loader import Loader
    from alexlab.data.sampler import TrainBatchSampler
    from alexlab.data.transforms import SampleTransform
    from alexlab.engine.memory import keep_memory

    keep_memory()  # as a training on a CPU does; on a GPU torch keeps pinned batches
    images: Any = preparations.read(root)["train"] if prepared else scan(root)
    index: Any = Repeated(images)
    transform = SampleTransform(SIDE, "random_resized", flip=0.5, policy=policy)
    batches = TrainBatchSampler(len(index.targets), min(batch, len(index.targets)), seed=0)
    raw_size = images.raw_size if whole else None
    loader = Loader(ImageDataset(index, transform, seed=0, raw_size=raw_size), batches, threads)
    for epoch in itertools.count():
        batches.set_epoch(epoch)
        yield from (len(images) for images, *_ in loader)


def by_index(root: Path, threads: int, batch: int, kind: str) -> Iterator[int]:
    """Training batches of a class by index: a table of the folder's files, or the squares of 256 pixels as an array."""
    import numpy as np

    from alexlab.data.datamodule import ImageFolders
    from alexlab.data.folder import scan
    from alexlab.data.items import ItemData
    from alexlab.data.table import Table
    from alexlab.data.transforms import SampleTransform
    from alexlab.engine.memory import keep_memory

    keep_memory()
    train, plain = SampleTransform(SIDE, "random_resized", flip=0.5), SampleTransform(SIDE)
    settings: Any = {"seed": 0, "train_transform": train, "eval_transform": plain, "num_workers": threads}
    with tempfile.TemporaryDirectory() as folder:
        if kind == "table":
            index = scan(root)
            rows = [f"{index.name(i).decode()},{index.classes[index.targets[i]]}" for i in range(len(index))] * TIMES
            Path(folder, "t.csv").write_text("\n".join(["path,label", *rows]))
            make: Callable[[], Any] = partial(Table, str(Path(folder, "t.csv")), str(root))
            data: ImageFolders = ItemData(
                make, False, "table", root=str(root), batch_size=batch, val_fraction=0.01, **settings
            )
        else:
            images = ImageFolders(str(root), 1, 0, plain, plain).read().splits["train"]
            pixels = np.stack([images.picture(i).pixels()[0] for i in range(len(images))])
            items = [(pixels[i % len(pixels)], i % 2) for i in range(TIMES * len(pixels))]
            data = ItemData(lambda: items, False, "array", root=".", batch_size=batch, val_fraction=0.01, **settings)
        loader: Any = data.read().train_dataloader()
        for epoch in itertools.count():
            loader.batch_sampler.set_epoch(epoch)
            yield from (len(images) for images, *_ in loader)


def memory_copy(root: Path, threads: int, batch: int) -> Iterator[int]:
    """Bytes of squares of 256 pixels, copied from random places in 400 MB of memory into reused batches."""
    import numpy as np

    size = 256 * 256 * 3
    source = np.ones((2048, size), np.uint8)
    batches = [np.zeros((batch, size), np.uint8) for _ in range(4)]
    order = itertools.cycle(np.random.default_rng(0).permutation(len(source)).tolist())

    def copy(into: Any, rows: range, numbers: list[int]) -> None:
        for row, i in zip(rows, numbers, strict=True):
            into[row] = source[i]

    with ThreadPoolExecutor(threads) as pool:
        for into in itertools.cycle(batches):
            parts = [range(k * batch // threads, (k + 1) * batch // threads) for k in range(threads)]
            list(pool.map(copy, [into] * threads, parts, [list(itertools.islice(order, len(p))) for p in parts]))
            yield batch


def decode_only(root: Path, threads: int, batch: int) -> Iterator[int]:
    """Whole files, read and decoded by our decoder, without anything else."""
    import simplejpeg

    from alexlab.data.folder import scan
    from alexlab.engine.memory import keep_memory

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


def reference_folder(root: Path) -> Any:
    """ImageFolder with Pillow and the transforms of torchvision's references/classification."""
    import torch
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    crop, flip = v2.RandomResizedCrop(SIDE, antialias=True), v2.RandomHorizontalFlip(0.5)
    normalize = [v2.PILToTensor(), v2.ToDtype(torch.float, scale=True), v2.Normalize(MEAN, STD), v2.ToPureTensor()]
    return ImageFolder(str(root), v2.Compose([crop, flip, *normalize]))


def torchvision_reference(root: Path, threads: int, batch: int) -> Iterator[int]:
    """torchvision's reference loader, in worker processes."""
    from torch.utils.data import DataLoader

    data = reference_folder(root)
    data.samples *= TIMES
    loader: DataLoader[Any] = DataLoader(
        data, min(batch, len(data)), shuffle=True, num_workers=threads, drop_last=True, persistent_workers=True
    )
    while True:
        yield from (len(images) for images, _ in loader)


def dali_cpu(root: Path, threads: int, batch: int) -> Iterator[int]:
    """DALI's CPU pipeline, which decodes only the cropped region of each JPEG; uint8."""
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


def litdata_streaming(root: Path, threads: int, batch: int) -> Iterator[int]:
    """litdata's chunks of the folder's JPEGs in litdata's loader, with torchvision's transforms in uint8."""
    import litdata
    from torchvision.datasets import ImageFolder

    with tempfile.TemporaryDirectory() as folder:
        samples = ImageFolder(str(root)).samples * 5
        litdata.optimize(_file_and_target, samples, folder, chunk_bytes="64MB", num_workers=threads, verbose=False)
        images = litdata.StreamingDataset(folder, shuffle=True, drop_last=True, transform=_decoded)
        loader = litdata.StreamingDataLoader(images, batch_size=batch, num_workers=threads, persistent_workers=True)
        while True:
            yield from (len(images) for images, _ in loader)


def _file_and_target(sample: tuple[str, int]) -> tuple[bytes, int]:
    return Path(sample[0]).read_bytes(), sample[1]


def _decoded(sample: tuple[bytes, int]) -> tuple[Any, int]:
    import torch
    from torchvision.io import decode_jpeg
    from torchvision.transforms import v2

    steps = v2.Compose([v2.RandomResizedCrop(SIDE, antialias=True), v2.RandomHorizontalFlip(0.5)])
    return steps(decode_jpeg(torch.frombuffer(bytearray(sample[0]), dtype=torch.uint8))), sample[1]


def ffcv(root: Path, threads: int, batch: int, form: str, **more: Any) -> Iterator[int]:
    """FFCV's file of the folder's images, as JPEGs or as pixels."""
    import numpy as np
    from ffcv import transforms
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    data = ImageFolder(str(root))
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "images.beton"))
        fields = {"image": RGBImageField(write_mode=form, jpeg_quality=90, **more), "label": IntField()}
        DatasetWriter(path, fields, num_workers=threads).from_indexed_dataset(data)
        crop = RandomResizedCropRGBImageDecoder((SIDE, SIDE))
        flip, whole = transforms.RandomHorizontalFlip(), [transforms.ToTensor(), transforms.ToTorchImage()]
        pipelines = {"image": [crop, flip, *whole], "label": [IntDecoder(), transforms.ToTensor()]}
        order, indices = OrderOption.RANDOM, np.tile(np.arange(len(data)), TIMES)
        loader = Loader(
            path, batch, threads, order=order, os_cache=True, drop_last=True, indices=indices, pipelines=pipelines
        )
        while True:
            yield from (len(images) for images, _ in loader)


# (function that yields the number of images of each batch, the package that it needs, how the images are prepared)
CANDIDATES: dict[str, tuple[Callable[[Path, int, int], Iterator[int]], str, str | None]] = {
    "torchvision_reference": (torchvision_reference, "torchvision", None),
    "dali_cpu": (dali_cpu, "nvidia.dali", None),
    "decode_only": (decode_only, "simplejpeg", None),
    "ours": (ours, "alexlab", None),
    "table": (partial(by_index, kind="table"), "alexlab", None),
    "ours_strong": (partial(ours, policy="trivial"), "alexlab", None),  # the policy of augment=strong
    "litdata": (litdata_streaming, "litdata", None),
    "ffcv_jpeg": (partial(ffcv, form="jpg"), "ffcv", None),
    "prepared_jpeg": (partial(ours, prepared=True), "alexlab", "format=jpeg"),
    "array": (partial(by_index, kind="array"), "alexlab", "format=raw square=true"),
    "ffcv_raw": (partial(ffcv, form="raw", max_resolution=341), "ffcv", None),  # 4:3 gets a short side of 256
    "prepared_raw": (partial(ours, prepared=True), "alexlab", "format=raw"),
    "memory_copy": (memory_copy, "numpy", None),
    # squares of 256 pixels, copied into batches; the device would crop them
    "prepared_whole": (partial(ours, prepared=True, whole=True), "alexlab", "format=raw square=true"),
}


def child(name: str, root: Path, args: Any) -> None:
    counts = CANDIDATES[name][0](root, args.threads, args.batch)
    seen = 0
    while seen < max(args.warm, 6 * args.batch):  # warm up, with more images than a loader begins ahead
        seen += next(counts)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < args.seconds:
        done += next(counts)
    print(done / (time.perf_counter() - start))


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def main() -> None:
    names = list(CANDIDATES)
    args = options(__doc__, "folder", rounds=5, threads=2, batch=256, seconds=5.0, warm=1000, only=names, child="")
    if args.child:
        child(args.child, args.folder, args)
        return
    root = args.folder / "train" if (args.folder / "train").is_dir() else args.folder
    names = [name for name in args.only if installed(CANDIDATES[name][1])]
    for name in args.only:
        if name not in names:
            print(f"{name}: {CANDIDATES[name][1]} is not installed")
    same = [f"--{key}={getattr(args, key)}" for key in ("threads", "batch", "seconds", "warm")]
    split = [] if (args.folder / "val").is_dir() else ["data.val_fraction=0.1"]
    with tempfile.TemporaryDirectory() as folder:
        roots: dict[str | None, Path] = {None: root}
        for how in {CANDIDATES[name][2] for name in names} - {None}:
            roots[how] = Path(folder, str(how).replace(" ", "-"))
            overrides = [f"data.root={args.folder.resolve()}", f"out={roots[how]}", *str(how).split(), *split]
            run(["-m", "alexlab", "prepare", *overrides])

        def measure(name: str) -> float:
            words = [__file__, str(roots[CANDIDATES[name][2]]), *same, f"--child={name}"]
            return float(run(words).splitlines()[-1])

        rates = in_turn(args.rounds, {name: partial(measure, name) for name in names})
    print(f"{root}: {args.threads} threads, batch {args.batch}, {args.rounds} rounds of {args.seconds:g} s")
    medians = {name: statistics.median(each) for name, each in rates.items()}
    for name, each in rates.items():
        ratios = "".join(f", {medians[name] / medians[base]:5.2f} x {base}" for base in names[:3] if base != name)
        print(f"{name:22s} {medians[name]:8.0f} images/s ({min(each):.0f} to {max(each):.0f}){ratios}")


if __name__ == "__main__":
    main()
