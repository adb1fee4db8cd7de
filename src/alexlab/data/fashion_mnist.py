"""Fashion-MNIST's four idx files -> an ImageNet-style folder of PNG files.

70,000 images of clothes, 28 x 28 grey pixels, by Xiao, Rasul and Vollgraf (2017), https://arxiv.org/abs/1708.07747.
"""

import gzip
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from alexlab.data.folder import new_folder
from alexlab.engine.errors import UserError

# in the order of the labels; the digits keep this order when folders are sorted
KINDS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
CLASSES = tuple(f"{label}_{kind}" for label, kind in enumerate(KINDS))
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
FILES = {"train": "train", "test": "t10k"}
VAL_PER_CLASS = 500  # the last of the 6,000 training images of each class, because the dataset has no val split


def write_fashion_mnist(root: Path, idx: str) -> None:
    """Write `root/{train,val,test}/<class>/NNNNN.png`. If `root/train` exists, nothing is written.

    Args:
        idx: the folder of the idx files, plain or gzipped; or "auto": Debian's files, else a download.

    Raises:
        UserError: the files are missing, or are not Fashion-MNIST's.
    """
    if (root / "train").is_dir():
        if idx != "auto":
            print(f"note: {root} has its images already, so data.idx={idx} is not used.", flush=True)
        return
    if root.exists() and any(root.iterdir()):
        raise UserError(f"{root} contains files, but no train/: choose another data.root for Fashion-MNIST's images.")
    folder = find(root.parent) if idx == "auto" else Path(idx).expanduser()
    images, targets = {}, {}
    for split, start in FILES.items():
        images[split], targets[split] = read_idx(folder, start)
    print(f"writing Fashion-MNIST's images to {root} ...", flush=True)
    with new_folder(root, "train") as output:
        for target, name in enumerate(CLASSES):
            train, test = (np.flatnonzero(targets[split] == target) for split in FILES)
            first = len(train) - min(VAL_PER_CLASS, len(train) // 10)
            for split, numbers in (("train", train[:first]), ("val", train[first:]), ("test", test)):
                (output / split / name).mkdir(parents=True)
                for i in numbers:
                    image = Image.fromarray(images["test" if split == "test" else "train"][i])
                    image.save(output / split / name / f"{i:05d}.png", compress_level=1)


def find(downloads: Path) -> Path:
    """Return the folder of the idx files: Debian's, or torchvision's download (it checks the hashes) in `downloads`."""
    if DEBIAN.is_dir():
        return DEBIAN
    from torchvision.datasets import FashionMNIST

    try:
        dataset = FashionMNIST(str(downloads), download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"Fashion-MNIST is not on this machine, and its download failed ({str(error).strip().splitlines()[-1]}): "
            "install Debian's package dataset-fashion-mnist, or give the folder of its four idx files with "
            "data.idx=FOLDER."
        ) from None
    return Path(dataset.raw_folder)


def read_idx(folder: Path, start: str) -> tuple[np.ndarray, np.ndarray]:
    """Read images uint8 (N, 28, 28) and labels uint8 (N,) from idx files (http://yann.lecun.com/exdb/mnist)."""
    found = []
    for name, header in ((f"{start}-images-idx3-ubyte", 16), (f"{start}-labels-idx1-ubyte", 8)):
        path = folder / name if (folder / name).is_file() else folder / f"{name}.gz"
        try:
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            found.append(np.frombuffer(content, np.uint8, offset=header))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise UserError(f"data.idx={folder}: {path} cannot be read as a file of Fashion-MNIST ({error}).") from None
    images, labels = found
    if len(images) != 28 * 28 * len(labels) or labels.max(initial=0) >= len(CLASSES):
        raise UserError(
            f"data.idx={folder}: the {start} files have {len(images):,} bytes of images and {len(labels):,} labels up "
            f"to {labels.max(initial=0)}: Fashion-MNIST has 28 x 28 bytes and a label from 0 to 9 per image."
        )
    return images.reshape(-1, 28, 28), labels
