"""Images and labels in files of NumPy: a folder of .npy files, or one .npz file. A class by index, see items.py."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alexlab.engine.errors import UserError


class Arrays:
    """One split: the arrays `train_images` and `train_labels`, and the same for val and test.

    With `images` and `labels` instead, all images are training images. Files .npy are mapped, not read into memory.

    Raises:
        KeyError: this split has no images.
        UserError: an array is missing, damaged, or of another type or length.
    """

    def __init__(self, root: str, split: str, classes: Sequence[Any] | None = None) -> None:
        path, self.classes = Path(root), classes
        try:
            is_npz = path.is_file()
            files: Any = np.load(path, allow_pickle=False) if is_npz else {f.stem: f for f in path.glob("*.npy")}
            prefix = "" if split == "train" and "images" in files else f"{split}_"
            if split != "train" and f"{prefix}images" not in files:
                raise KeyError(split)
            arrays = [files[f"{prefix}{name}"] for name in ("images", "labels")]
            if not is_npz:
                arrays = [np.load(file, mmap_mode="c", allow_pickle=False) for file in arrays]
        except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:  # damaged, or pickled
            raise UserError(f"data.root={path} cannot be read as plain arrays, .npy or .npz ({error}).") from None
        except KeyError as error:
            if error.args == (split,):
                raise
            raise UserError(f"data.root={path} has no array {error}, but {', '.join(files) or 'none'}.") from None
        self.images, self.targets = arrays
        if self.images.dtype != np.uint8 or self.images.ndim not in (3, 4):
            kind = f"{self.images.dtype} {self.images.shape}"
            raise UserError(f"{path}: {prefix}images must be uint8 (N, H, W) or (N, H, W, C), and are {kind}.")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, Any]:
        return self.images[i], self.targets[i]
