"""Images in a bucket: ours from files and from the bucket, litdata and mosaicml-streaming, in turn.

python benchmarks/remote.py FOLDER [--rounds 3] [--threads 2] [--batch 128] [--rate 200] [--litdata PYTHON]
    [--mosaicml PYTHON]

FOLDER has train/ with class folders. Its images, with a short side of 256 pixels and repeated to 7,000, are written to
a server on this machine (SeaweedFS) in the form of each candidate. A candidate then reads two epochs in a new process,
with an empty cache: 224-pixel random resized crops with flips. `first` is the time until its first batch, after the
imports; `cold` are the images per second of the first epoch, and `warm` those of the second one. --rate limits the link
to so many Mbit/s, in a network namespace (needs root). The peers need a Python of an environment that has them.
"""

import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from common import ROOT, about, in_turn, options

sys.path.insert(0, str(ROOT / "tests"))
SIDE, IMAGES, SHARD_MB = 224, 7000, 32
BUCKET = "s3://tests"
TRIES = 3  # of a round: behind a slow link, mosaicml-streaming fails now and then
READY = -1  # what a candidate yields when it has imported its libraries


# -- the candidates: write(FOLDER, out), and batches(address, cache, threads, batch)


def prepare(folder: Path, out: Path) -> None:
    """Write the images as `alexlab prepare` does; repeat them by links."""
    files = sorted((folder / "train").glob("*/*.jpg"))
    linked = out.with_name("linked")
    for number, path in zip(range(IMAGES), itertools.cycle(files), strict=False):
        link = linked / "train" / path.parent.name / f"{number:05d}.jpg"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    words = [f"data.root={linked}", f"out={out}", f"shard_mb={SHARD_MB}", "data.val_fraction=0.01"]
    subprocess.run([sys.executable, "-m", "alexlab", "prepare", *words], check=True, capture_output=True)


def jpegs(prepared: Path) -> Iterator[tuple[bytes, int]]:
    """Yield the JPEGs of the prepared images and their targets: all candidates read the same bytes."""
    from alexlab.data.fast import prepared as preparations

    index = preparations.read(prepared)["train"]
    for i in range(len(index)):
        picture: Any = index.picture(i)
        yield bytes(picture.jpeg), int(index.targets[i])


def ours(address: str, cache: Path, threads: int, batch: int) -> Iterator[int]:
    from alexlab.data.fast.remote import PreparedImages
    from alexlab.data.transforms import SampleTransform
    from alexlab.engine.memory import keep_memory

    keep_memory()
    yield READY
    transforms: Any = {"train_transform": SampleTransform(SIDE, "random_resized", flip=0.5)}
    transforms["eval_transform"] = SampleTransform(SIDE)
    data = PreparedImages(address, batch, 0, **transforms, num_workers=threads, disk_cache=str(cache)).read()
    loader: Any = data.train_dataloader()
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        yield from (len(images) for images, *_ in loader)
        yield 0  # the end of an epoch


def write_litdata(source: Path, out: Path) -> None:
    import litdata

    files = sorted(str(path) for path in source.iterdir())
    litdata.optimize(_item, files, str(out), chunk_bytes=f"{SHARD_MB}MB", num_workers=1, verbose=False)


def _item(path: str) -> tuple[bytes, int]:
    return Path(path).read_bytes(), int(Path(path).stem.partition("-")[2])


def litdata(address: str, cache: Path, threads: int, batch: int) -> Iterator[int]:
    import litdata as library
    import torch  # noqa: F401
    from torchvision.transforms import v2  # noqa: F401

    yield READY
    library.streaming.downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # it has no option for a server here
    client = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
    images = library.StreamingDataset(
        library.streaming.resolver.Dir(path=str(cache), url=address), shuffle=True, drop_last=True, transform=_decoded,
        storage_options=client,
    )  # fmt: skip
    loader = library.StreamingDataLoader(images, batch_size=batch, num_workers=threads, persistent_workers=True)
    for _ in range(2):
        yield from (len(images) for images, _ in loader)
        yield 0


def write_mosaicml(source: Path, out: Path) -> None:
    from streaming import MDSWriter

    columns = {"image": "bytes", "label": "int"}
    with MDSWriter(out=str(out), columns=columns, size_limit=SHARD_MB << 20) as writer:
        for path in sorted(source.iterdir()):
            content, label = _item(str(path))
            writer.write({"image": content, "label": label})


def mosaicml(address: str, cache: Path, threads: int, batch: int) -> Iterator[int]:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader
    from torchvision.transforms import v2  # noqa: F401

    yield READY
    os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]

    class Images(StreamingDataset):
        def __getitem__(self, at: int) -> Any:
            item = super().__getitem__(at)
            return _decoded((item["image"], item["label"]))

    data: Any = Images(remote=address, local=str(cache), shuffle=True, batch_size=batch)
    loader: Any = DataLoader(data, batch, num_workers=threads, drop_last=True, persistent_workers=True)
    for _ in range(2):
        yield from (len(images) for images, _ in loader)
        yield 0


def _decoded(sample: tuple[bytes, int]) -> tuple[Any, int]:
    import torch
    from torchvision.io import decode_jpeg
    from torchvision.transforms import v2

    steps = v2.Compose([v2.RandomResizedCrop(SIDE, antialias=True), v2.RandomHorizontalFlip(0.5)])
    return steps(decode_jpeg(torch.frombuffer(bytearray(sample[0]), dtype=torch.uint8))), sample[1]


CANDIDATES = {"files": ours, "ours": ours, "litdata": litdata, "mosaicml": mosaicml}
WRITERS = {"litdata": write_litdata, "mosaicml": write_mosaicml}


# -- measuring


def measure_one(name: str, address: str, cache: str, threads: str, batch: str) -> None:
    """Read two epochs, and print what they took. Runs in a process of its own."""
    start = time.perf_counter()
    found: dict[str, float] = {}
    count, began = 0, start
    epochs = []
    for images in CANDIDATES[name](address, Path(cache), int(threads), int(batch)):
        now = time.perf_counter()
        if images == READY:
            start = began = now
            continue
        found.setdefault("first", now - start)
        count += images
        if images == 0:
            epochs.append(count / (now - began))
            count, began = 0, now
    print(json.dumps({**found, "cold": epochs[0], "warm": epochs[1]}))


@contextmanager
def link(rate: int) -> Iterator[tuple[str, list[str]]]:
    """Yield the address of a server, and the words that start it behind a link of so many Mbit/s."""
    if not rate:
        yield "127.0.0.1", []
        return
    space = "alexlab-remote"
    for words in (
        f"ip netns add {space}", "ip link add al-near type veth peer name al-far",
        f"ip link set al-far netns {space}", "ip addr add 10.79.0.1/24 dev al-near", "ip link set al-near up",
        f"ip -n {space} addr add 10.79.0.2/24 dev al-far", f"ip -n {space} link set al-far up",
        f"ip -n {space} link set lo up",
        f"ip netns exec {space} tc qdisc add dev al-far root tbf rate {rate}mbit burst 256kb latency 50ms",
    ):  # fmt: skip
        subprocess.run(words.split(), check=True)
    try:
        yield "10.79.0.2", ["ip", "netns", "exec", space]
    finally:
        subprocess.run(["ip", "netns", "del", space], check=False)


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        measure_one(*sys.argv[2:])
        return
    if sys.argv[1:2] == ["write"]:
        WRITERS[sys.argv[2]](Path(sys.argv[3]), Path(sys.argv[4]))
        return
    from s3_server import s3_server, variables

    from alexlab.engine.storage import Bucket

    args = options(__doc__, "folder", rounds=3, threads=2, batch=128, rate=0, litdata="", mosaicml="")
    pythons = {"files": sys.executable, "ours": sys.executable, "litdata": args.litdata, "mosaicml": args.mosaicml}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        host, before = stack.enter_context(link(args.rate))
        (folder / "server").mkdir()
        port = stack.enter_context(s3_server(folder / "server", host, before))
        os.environ.update(variables(port, host))
        prepare(args.folder, folder / "files")
        (folder / "jpegs").mkdir()
        for number, (content, target) in enumerate(jpegs(folder / "files")):
            (folder / f"jpegs/{number:05d}-{target}").write_bytes(content)
        measures = {}
        for name, python in pythons.items():
            if not python:
                print(f"{name}: skipped, no --{name} PYTHON")
                continue
            if name in WRITERS:
                words = [python, __file__, "write", name, folder / "jpegs", folder / name]
                subprocess.run(words, check=True, capture_output=True)
            address = str(folder / "files") if name == "files" else f"{BUCKET}/{name}"
            for path in sorted((folder / ("files" if name == "ours" else name)).rglob("*")) if name != "files" else ():
                if path.is_file():
                    Bucket(address).write(path.name, path)
            words = [python, __file__, "one", name, address]
            measures[name] = partial(measure, words, folder, [str(args.threads), str(args.batch)])
        results = in_turn(args.rounds, measures, warm_up=True)
    print(about("torch", "obstore", folder=args.folder.name, images=IMAGES, rate=args.rate, threads=args.threads))
    base = {key: statistics.median(each[key] for each in results["ours"]) for key in ("first", "cold", "warm")}
    for name, rounds in results.items():
        medians = {key: statistics.median(each[key] for each in rounds) for key in base}
        ratios = "  ".join(f"{key} {medians[key] / base[key]:.2f}" for key in ("cold", "warm"))
        print(
            f"{name:10} first {medians['first']:6.2f} s  cold {medians['cold']:7.0f} images/s  warm "
            f"{medians['warm']:7.0f} images/s   / ours: {ratios}"
        )


def measure(words: list[Any], folder: Path, settings: list[str]) -> dict[str, float]:
    for _ in range(TRIES):
        cache = folder / f"cache{random.randrange(1 << 40)}"
        cache.mkdir()
        done = subprocess.run([*words, str(cache), *settings], capture_output=True, text=True, check=False)
        subprocess.run(["rm", "-rf", str(cache)], check=True)
        if done.returncode == 0:
            return json.loads(done.stdout.strip().splitlines()[-1])
        print(f"{words[3]} failed, and is tried again: {done.stderr.strip().splitlines()[-1]}", flush=True)
    sys.exit(f"{' '.join(map(str, words))} failed:\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    main()
