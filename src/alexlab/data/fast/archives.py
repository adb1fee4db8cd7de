"""ImageNet's official archives, read in place: the images of a tar of tars are whole files at known offsets.

A folder with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz is a dataset without
being unpacked. torchvision's parser reads the classes of the validation images from the devkit.
"""

import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from alexlab.data.fast.prepared import ARRAYS, PreparedIndex
from alexlab.data.folder import reported
from alexlab.engine.errors import UserError

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"

Member = tuple[str, str, int, int]  # class, name, offset and size in bytes


def is_archives(root: Path) -> bool:
    return (root / TRAIN).is_file()


def read(root: Path) -> dict[str, PreparedIndex]:
    """Find the images of train and val. Raises UserError if an archive is missing or damaged."""
    for name in (VAL, DEVKIT):
        if not (root / name).is_file():
            raise UserError(f"{root} contains {TRAIN} but no {name}: all three of ImageNet's archives are needed.")
    wnids = val_classes(root)
    try:
        with tarfile.open(root / TRAIN, "r:") as tar:
            train = sorted(reported(_nested_members(tar), f"reading {root / TRAIN}", "images"))
        with tarfile.open(root / VAL, "r:") as tar:
            val = sorted(_members(tar, "", 0))
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{root}: an archive cannot be read ({error}): download it again.") from None
    classes = tuple(sorted({wnid for wnid, *_ in train}))
    if len(val) != len(wnids) or not set(wnids) <= set(classes):
        raise UserError(
            f"{root}: the devkit lists {len(wnids):,} validation images of {len(set(wnids)):,} classes, but the tars "
            f"contain {len(val):,}, and training images of {len(classes):,} classes: download them again."
        )
    labelled = sorted((wnid, *member[1:]) for wnid, member in zip(wnids, val, strict=True))
    return {"train": _index(root / TRAIN, train, classes), "val": _index(root / VAL, labelled, classes)}


def val_classes(root: Path) -> list[str]:
    """Return the WordNet ID of each validation image, sorted by the image's name."""
    from torchvision.datasets import imagenet

    with tempfile.TemporaryDirectory() as folder:  # torchvision writes into the folder of the archive
        Path(folder, DEVKIT).symlink_to((root / DEVKIT).resolve())
        try:
            imagenet.parse_devkit_archive(folder)
            return list(imagenet.load_meta_file(folder)[1])
        except Exception as error:  # of torchvision, tarfile or SciPy
            message = f"{root / DEVKIT} cannot be read as ImageNet's devkit ({error}): download it again."
            raise UserError(message) from None


def _members(tar: tarfile.TarFile, wnid: str, start: int) -> Iterator[Member]:
    """Yield the files of a tar that is at offset `start` of the archive."""
    for member in tar:
        if member.isfile():
            yield wnid, os.path.basename(member.name), start + member.offset_data, member.size  # noqa: PTH119


def _nested_members(outer: tarfile.TarFile) -> Iterator[Member]:
    for archive in outer:
        if archive.isfile() and archive.name.endswith(".tar"):
            with tarfile.open(fileobj=outer.extractfile(archive), mode="r:") as inner:
                yield from _members(inner, Path(archive.name).stem, archive.offset_data)


def _index(path: Path, members: list[Member], classes: tuple[str, ...]) -> PreparedIndex:
    number = {wnid: target for target, wnid in enumerate(classes)}
    names = [os.fsencode(f"{wnid}/{name}") for wnid, name, _, _ in members]
    unknown = np.zeros(len(members), np.int64)  # sizes in pixels, and the number of the only file
    arrays = dict.fromkeys(ARRAYS, unknown) | {
        "targets": np.array([number[wnid] for wnid, *_ in members], np.int64),
        "offsets": np.array([offset for *_, offset, _ in members], np.int64),
        "sizes": np.array([size for *_, size in members], np.int64),
        "ends": np.cumsum([len(name) for name in names], dtype=np.int64),
    }
    return PreparedIndex(path.parent, "jpeg", (path,), classes, b"".join(names), arrays, "archive")
