"""Fashion-MNIST's four idx files -> an ImageNet-style folder of PNG files, which all else reads like any other.

70,000 pictures of clothes, 28 x 28 grey pixels, by Xiao, Rasul and Vollgraf (2017), https://arxiv.org/abs/1708.07747.
"""

import gzip
import shutil
import tempfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from alexlab.engine.errors import UserError

# in the order of the labels; the digit keeps the folders in it
CLASSES = (
    "0_t-shirt", "1_trouser", "2_pullover", "3_dress", "4_coat", "5_sandal", "6_shirt", "7_sneaker", "8_bag", "9_boot",
)  # fmt: skip
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of its package dataset-fashion-mnist
FILES = {"train": "train", "test": "t10k"}
VAL_PER_CLASS = 500  # of the 6,000 training images of each class, the last ones: the set has no val split


def write_fashion_mnist(root: Path, idx: str) -> None:
    """Write `root/{train,val,test}/<class>/NNNNN.png`, unless `root/train` is there: then it is read as it is.

    Args:
        idx: the folder of the idx files, as they are or gzipped; or "auto": Debian's, else a download.

    Raises:
        UserError: no such files, or other ones.
    """
    if (root / "train").is_dir():
        if idx != "auto":
            print(f"note: {root} has its images already, and data.idx={idx} is not looked at.", flush=True)
        return
    if root.exists() and any(root.iterdir()):
        raise UserError(f"{root} holds files, but no train/: choose another data.root for Fashion-MNIST's images.")
    folder = find(root.parent) if idx == "auto" else Path(idx).expanduser()
    images = {split: read_idx(folder, f"{start}-images-idx3-ubyte", (28, 28)) for split, start in FILES.items()}
    targets = {split: read_idx(folder, f"{start}-labels-idx1-ubyte", ()) for split, start in FILES.items()}
    for split, found in targets.items():
        if len(found) != len(images[split]) or found.max(initial=0) >= len(CLASSES):
            raise UserError(
                f"{folder}: {len(images[split])} {split} images, and {len(found)} labels up to {found.max(initial=0)}: "
                "one label of 0 to 9 an image makes Fashion-MNIST."
            )
    print(f"writing Fashion-MNIST's images to {root} ...", flush=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))  # so that a kill leaves nothing half done
    try:
        beside.chmod(0o755)
        for target, name in enumerate(CLASSES):
            of_class = {split: np.flatnonzero(targets[split] == target) for split in FILES}
            train = of_class["train"]
            held_out = min(VAL_PER_CLASS, len(train) // 10)
            parts = {"train": train[: len(train) - held_out], "val": train[len(train) - held_out :]}
            for split, numbers in (parts | {"test": of_class["test"]}).items():
                to = beside / split / name
                to.mkdir(parents=True)
                for i in numbers:
                    pixels = images["test" if split == "test" else "train"][i]
                    Image.fromarray(pixels).save(to / f"{i:05d}.png", compress_level=1)
        try:
            if root.is_dir():
                root.rmdir()
            beside.rename(root)
        except OSError:
            if not (root / "train").is_dir():  # else another process was faster, and its bytes are the same
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def find(downloads: Path) -> Path:
    """The folder of the idx files: Debian's, or torchvision's download (whose hashes it checks) under `downloads`.

    Raises:
        UserError: neither is to be had.
    """
    if DEBIAN.is_dir():
        return DEBIAN
    from torchvision.datasets import FashionMNIST

    try:
        set_ = FashionMNIST(str(downloads), download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"Fashion-MNIST is not at hand, and its download failed ({str(error).strip().splitlines()[-1]}): install "
            "Debian's package dataset-fashion-mnist, or say where its four idx files are with data.idx=FOLDER."
        ) from None
    return Path(set_.raw_folder)


def read_idx(folder: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 (N, *shape) of the idx file `folder/name`, or `name.gz` (format: http://yann.lecun.com/exdb/mnist).

    Raises:
        UserError: no such file, or not one of that shape.
    """
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise UserError(f"{folder} holds no {name} or {name}.gz: data.idx must be the folder of Fashion-MNIST's files.")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be unpacked ({error}): fetch it again.") from None
    rank = 1 + len(shape)
    sizes = np.frombuffer(raw, ">u4", count=1 + rank) if len(raw) >= 4 + 4 * rank else np.zeros(1 + rank, ">u4")
    # the magic number: two zeros, 8 for unsigned bytes, and the number of sizes that follow
    whole = sizes[0] == 0x0800 + rank and tuple(sizes[2:]) == shape and len(raw) == 4 + 4 * rank + np.prod(sizes[1:])
    if not whole:
        raise UserError(f"{path} is not an idx file of bytes of shape (N{''.join(f', {n}' for n in shape)}).")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(-1, *shape)
