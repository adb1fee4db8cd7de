"""ImageNet's official archives, read where they lie: the images of a tar of tars are whole files at known places.

A folder with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz is a dataset without
being unpacked. The devkit, which has the classes of the validation images, is read by torchvision's parser.
"""

import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from alexlab.data.fast.prepared import ARRAYS, PreparedIndex
from alexlab.engine.errors import UserError

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
TELL = 10.0  # seconds between what a long reading tells

Found = tuple[str, str, int, int]  # class, name, offset and size in bytes


def is_archives(root: Path) -> bool:
    return (root / TRAIN).is_file()


def read(root: Path) -> dict[str, PreparedIndex]:
    """The images of train and val.

    Raises:
        UserError: an archive is missing, or not what it should be.
    """
    for name in (VAL, DEVKIT):
        if not (root / name).is_file():
            raise UserError(f"{root} holds {TRAIN} but no {name}: all three of ImageNet's archives are needed.")
    wnids = val_classes(root)
    try:
        train = sorted(_told(_members_of_members(root / TRAIN), "train"))
        val = sorted(_told(_members(root / VAL), "val"), key=lambda found: found[1])
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{root}: an archive cannot be read ({error}): fetch it again.") from None
    if len(val) != len(wnids):
        raise UserError(
            f"{root / VAL} holds {len(val):,} images, and the devkit tells of {len(wnids):,}: fetch it again."
        )
    labelled = [(wnid, name, offset, size) for wnid, (_, name, offset, size) in zip(wnids, val, strict=True)]
    classes = tuple(sorted({found[0] for found in train}))
    strange = set(wnids) - set(classes)
    if strange or not train:
        raise UserError(
            f"{root / TRAIN} lacks classes that the devkit tells of, such as {min(strange, default='all')}."
        )
    labelled.sort()
    return {"train": _index(root / TRAIN, train, classes), "val": _index(root / VAL, labelled, classes)}


def val_classes(root: Path) -> list[str]:
    """The WordNet identities of the validation images, in the order of their names.

    Raises:
        UserError: the devkit is not ImageNet's, or SciPy, with which torchvision reads it, is missing.
    """
    from torchvision.datasets import imagenet

    with tempfile.TemporaryDirectory() as folder:  # torchvision writes beside the archive
        Path(folder, DEVKIT).symlink_to((root / DEVKIT).resolve())
        try:
            imagenet.parse_devkit_archive(folder)
            return list(imagenet.load_meta_file(folder)[1])
        except ImportError as error:
            raise UserError(f"{DEVKIT} is read with SciPy: pip install scipy ({error}).") from None
        except Exception as error:  # of another archive, of tarfile, of SciPy
            raise UserError(f"{root / DEVKIT} cannot be read as ImageNet's devkit ({error}): fetch it again.") from None


def _members(path: Path) -> Iterator[Found]:
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.isfile():
                yield "", os.path.basename(member.name), member.offset_data, member.size  # noqa: PTH119


def _members_of_members(path: Path) -> Iterator[Found]:
    with tarfile.open(path, "r:") as outer:
        for archive in outer:
            if not archive.isfile() or not archive.name.endswith(".tar"):
                continue
            wnid = os.path.basename(archive.name).removesuffix(".tar")  # noqa: PTH119
            inside = outer.extractfile(archive)
            assert inside is not None
            with tarfile.open(fileobj=inside, mode="r:") as tar:
                for member in tar:
                    if member.isfile():
                        name = os.path.basename(member.name)  # noqa: PTH119
                        yield wnid, name, archive.offset_data + member.offset_data, member.size


def _told(found: Iterator[Found], split: str) -> Iterator[Found]:
    told = time.monotonic()
    for count, each in enumerate(found):
        yield each
        if time.monotonic() - told > TELL:
            told = time.monotonic()
            print(f"reading the archive of {split}: {count:,} images ...", file=sys.stderr, flush=True)


def _index(path: Path, found: list[Found], classes: tuple[str, ...]) -> PreparedIndex:
    number = {wnid: k for k, wnid in enumerate(classes)}
    names = [os.fsencode(f"{wnid}/{name}") for wnid, name, _, _ in found]
    unknown = np.zeros(len(found), np.int64)  # sizes in pixels, and the one archive's number
    arrays = dict.fromkeys(ARRAYS, unknown) | {
        "targets": np.array([number[wnid] for wnid, *_ in found], np.int64),
        "offsets": np.array([offset for *_, offset, _ in found], np.int64),
        "sizes": np.array([size for *_, size in found], np.int64),
        "ends": np.cumsum([len(name) for name in names], dtype=np.int64),
    }
    return PreparedIndex(path.parent, "jpeg", (path,), classes, b"".join(names), arrays, "archive")
