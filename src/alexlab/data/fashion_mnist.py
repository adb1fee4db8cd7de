"""Fashion-MNIST's four idx files -> an ImageNet-style folder of PNG files.

70,000 images of clothes, 28 x 28 grey pixels, by Xiao, Rasul and Vollgraf (2017), https://arxiv.org/abs/1708.07747.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from alexlab.data.folder import new_folder
from alexlab.engine.errors import UserError

if TYPE_CHECKING:
    from torchvision.datasets import FashionMNIST

# in the order of the labels; the digits keep this order when folders are sorted
KINDS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
CLASSES = tuple(f"{label}_{kind}" for label, kind in enumerate(KINDS))
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
VAL_PER_CLASS = 500  # the last of the 6,000 training images of each class, because the dataset has no val split


def write_fashion_mnist(root: Path, idx: str) -> None:
    """Write `root/{train,val,test}/<class>/NNNNN.png`. If `root/train` exists, nothing is written.

    Args:
        idx: the folder of the idx files, plain or gzipped; or "auto": Debian's files, else a download.

    Raises:
        UserError: the files are missing or damaged.
    """
    if (root / "train").is_dir():
        if idx != "auto":
            print(f"note: {root} has images already, so data.idx={idx} is not used.", flush=True)
        return
    if root.exists() and any(root.iterdir()):
        raise UserError(f"{root} contains files, but no train/: choose another data.root for Fashion-MNIST's images.")
    sets = load(idx, root.parent)
    print(f"writing Fashion-MNIST's images to {root} ...", flush=True)
    with new_folder(root, "train") as output:
        for target, name in enumerate(CLASSES):
            train, test = (np.flatnonzero(np.asarray(part.targets) == target) for part in sets)
            first = len(train) - min(VAL_PER_CLASS, len(train) // 10)
            for split, numbers in (("train", train[:first]), ("val", train[first:]), ("test", test)):
                (output / split / name).mkdir(parents=True)
                for i in numbers:
                    image, _ = sets[split == "test"][i]
                    image.save(output / split / name / f"{i:05d}.png", compress_level=1)


def load(idx: str, downloads: Path) -> "tuple[FashionMNIST, FashionMNIST]":
    """Read train and test, or let torchvision download them to `downloads` and check the hashes."""
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.utils import extract_archive

    download = idx == "auto" and not DEBIAN.is_dir()
    with tempfile.TemporaryDirectory() as temporary:
        plain = Path(temporary, "FashionMNIST/raw")  # where torchvision looks for unpacked files
        plain.mkdir(parents=True)
        try:
            for file in () if download else (DEBIAN if idx == "auto" else Path(idx).expanduser()).glob("*-ubyte*"):
                if file.suffix == ".gz":
                    extract_archive(str(file), str(plain))
                else:
                    (plain / file.name).symlink_to(file.resolve())
            root = str(downloads) if download else temporary
            return FashionMNIST(root, train=True, download=download), FashionMNIST(root, train=False)
        except Exception as error:  # of torchvision (assertions too), gzip and zlib
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise UserError(
                f"data.idx={idx}: Fashion-MNIST's four idx files cannot be {'downloaded' if download else 'read'} "
                f"({reason}): install Debian's dataset-fashion-mnist, or give their folder with data.idx=FOLDER."
            ) from None
