"""The classification sets of torchvision.datasets, by their names. A class by index, see items.py."""

import inspect
from pathlib import Path
from typing import Any

from alexlab.engine.errors import UserError

ON_DISK = ("ImageNet", "FER2013")  # sets that torchvision does not download
# our names of splits, and the names that torchvision's sets use
NAMES = {"train": ("train", "trainval", "train-standard"), "val": ("val", "valid"), "test": ("test",)}


class TorchvisionSet:
    """One split of a set. The arguments are keys of conf/data/torchvision.yaml.

    Raises:
        KeyError: the set has no such split.
        UserError: torchvision has no such set, or the set is neither on this machine nor downloadable.
    """

    val_fraction = 0.1  # of the training images, if the set has no val images and data.val_fraction is null

    def __init__(self, name: str, root: str, split: str, download: bool = True, args: Any = None) -> None:
        from torchvision import datasets

        kind = getattr(datasets, name, None) if name in datasets.__all__ else None
        keys = inspect.signature(kind).parameters if kind is not None else {}
        by_train = kind is not None and ("train" in keys or issubclass(kind, datasets.MNIST))  # EMNIST passes it on
        if kind is None or not ("download" in keys or by_train or name in ON_DISK):
            raise UserError(f"data.name={name} is no classification set of torchvision.")
        if by_train:
            options: list[Any] = [{"train": split == "train"}] if split != "val" else []
        elif "split" in keys:
            options = [{"split": each} for each in NAMES[split]]
        else:
            options = [{}] if split == "train" else []
        downloads = [{}] if name in ON_DISK else [{"download": False}, {"download": True}][: 1 + download]
        self.set = self._open(kind, root, [{**(args or {}), **option} for option in options], downloads)
        if self.set is None:
            raise KeyError(split)
        if (classes := getattr(self.set, "classes", None)) is not None:
            self.classes = [", ".join(each) if isinstance(each, tuple) else each for each in classes]
        found = (getattr(self.set, key, None) for key in ("targets", "labels", "_labels"))
        self.targets = next((list(each) for each in found if each is not None), None)
        pairs = next((p for key in ("samples", "_samples") if (p := getattr(self.set, key, None))), None)
        if pairs is not None:
            self.targets = [target for _, target in pairs]
        self.paths = [path for path, _ in pairs] if pairs and isinstance(pairs[0][0], str | Path) else None

    def _open(self, kind: Any, root: str, options: list[dict[str, Any]], downloads: list[dict[str, bool]]) -> Any:
        """Return the set with the first options that the class knows, or None. Download only what is missing."""
        for option in options:
            for download in downloads:
                try:
                    return kind(root, **option, **download)
                except ValueError as error:  # the set has no such split
                    if "Unknown value" not in str(error):
                        raise
                    break
                except (OSError, RuntimeError) as error:
                    if download is downloads[-1]:
                        why = str(error).strip().splitlines()[-1]
                        failed = "the download failed" if download.get("download") else "nothing is downloaded"
                        raise UserError(
                            f"data.name={kind.__name__} is not complete in data.root={root}, and {failed} ({why}): "
                            "give the folder that has it with data.root=PATH."
                        ) from None
        return None

    def __len__(self) -> int:
        return len(self.set)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        # our decoder reads files faster
        return self.set[i] if self.paths is None else (self.paths[i], self.targets[i])  # type: ignore[index]
