"""Tar files in the format of WebDataset, which are read in place. A class by index, see items.py."""

import glob
import json
import tarfile
from pathlib import Path

from alexlab.data.folder import EXTENSIONS, SPELLINGS, SPLIT_WORD
from alexlab.engine.errors import UserError


class WebDataset:
    """The images of all tars in `root`, a folder or a glob.

    The class of the image KEY.jpg is in KEY.cls or KEY.json ({"label": ...}), or is the image's folder. The name of a
    tar begins with the split; otherwise the tar has training images.

    Raises:
        UserError: no tar exists, one is damaged, or an image has no class.
    """

    def __init__(self, root: str) -> None:
        paths = sorted(glob.glob(str(Path(root, "*.tar")) if Path(root).is_dir() else root))  # noqa: PTH207
        if not paths:
            raise UserError(f"`data.root={root}` contains no tar file: give a folder of them, or a glob in quotes.")
        self.places: list[tuple[str, int, int]] = []  # a tar, offset and size in bytes
        self.names: list[str] = []
        self.targets: list[str] = []
        self.splits: list[str] = []
        for path in paths:
            found = SPLIT_WORD.search(Path(path).name.lower())
            split = SPELLINGS.get(found[1], "val") if found else "train"
            images, classes = self._members(path)
            for key, (name, offset, size) in images.items():
                label = classes.get(key) or Path(name).parent.name
                if not label:
                    raise UserError(f"{path}: {name} has no class: add {Path(name).stem}.cls, or a folder per class.")
                self.places.append((path, offset, size))
                self.names.append(f"{Path(path).name}/{name}")
                self.targets.append(label)
                self.splits.append(split)

    def _members(self, path: str) -> tuple[dict[str, tuple[str, int, int]], dict[str, str]]:
        """Return name, offset and size of each image of a tar, and the classes, by their keys."""
        images, classes = {}, {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    key, _, suffix = name.partition(".")
                    if f".{suffix.lower()}" in EXTENSIONS:
                        images[f"{folder}/{key}"] = (member.name, member.offset_data, member.size)
                    elif suffix in ("cls", "json") and (file := tar.extractfile(member)) is not None:
                        text = file.read().decode()
                        classes[f"{folder}/{key}"] = str(
                            json.loads(text)["label"] if suffix == "json" else text.strip()
                        )
        except (tarfile.TarError, OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{path} cannot be read as a tar of images and classes ({error}).") from None
        return images, classes

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int) -> tuple[bytes, str]:
        path, offset, size = self.places[i]
        with open(path, "rb", buffering=0) as file:  # open tars may be more than a process is allowed to have
            file.seek(offset)
            return file.read(size), self.targets[i]

    def name(self, i: int) -> str:
        return self.names[i]
