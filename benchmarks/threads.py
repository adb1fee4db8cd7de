"""How many images per second one process can decode despite Python's lock, on more cores than this machine has.

python benchmarks/threads.py [--milliseconds 0.9] [--seconds 3] [--threads 1 4 8 16 24]

Decoding is replaced by a sleep that lasts as long as decoding a photograph, and needs no core. Everything else is the
real loader on tiny images, for which a second core is enough.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import options
from PIL import Image

from alexlab.data import decode
from alexlab.data.dataset import ImageDataset
from alexlab.data.folder import scan
from alexlab.data.loader import Loader
from alexlab.data.sampler import TrainBatchSampler
from alexlab.data.transforms import SampleTransform


def main() -> None:
    args = options(__doc__, milliseconds=0.9, seconds=3.0, threads=[1, 4, 8, 16, 24])
    pixels = np.zeros((16, 16, 3), np.uint8)

    class Sleeping:
        @staticmethod
        def decode_jpeg(*_: Any, **__: Any) -> np.ndarray:
            time.sleep(args.milliseconds / 1000)
            return pixels

    decode.simplejpeg = Sleeping
    with tempfile.TemporaryDirectory() as folder:
        for i in range(50):
            path = Path(folder, "class", f"{i}.jpg")
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(path)
        index = scan(Path(folder))
        index = index.subset(np.tile(np.arange(50), 400))
        data = ImageDataset(index, SampleTransform(16, "random_resized", flip=0.5), seed=0)
        for threads in args.threads:
            loader, done = Loader(data, TrainBatchSampler(len(index), 256, seed=0), threads), 0
            start = time.perf_counter()
            while time.perf_counter() - start < args.seconds:
                for images, *_ in loader:
                    done += len(images)
                    if time.perf_counter() - start >= args.seconds:
                        break
            rate = done / (time.perf_counter() - start)
            fraction = rate / threads * args.milliseconds / 1000
            print(f"{threads:3d} threads: {rate:6.0f} images/s, each decoding {fraction:.0%} of the time")


if __name__ == "__main__":
    main()
