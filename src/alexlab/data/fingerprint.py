"""What identifies the images of a split without decoding them.

A fingerprint is "sizes:" and 16 hex digits of the names of the files, their classes and their sizes in bytes. Runs from
before sizes were part of it have 16 hex digits of names and classes alone, and new runs have that names fingerprint
too: with an old run, the names are compared. Light: imports no torch.
"""

from typing import Any

import numpy as np

SAMPLE = 10_000  # files of a large folder whose sizes are read: all of them take longer than reading the names


def sample(digest: bytes, count: int) -> np.ndarray:
    """Choose the images whose sizes are read: all if there are few, else about SAMPLE of them.

    Args:
        digest: at least 16 bytes of a hash of the names, which alone decides about the choice.

    Returns:
        int64, ascending.
    """
    if count <= SAMPLE:
        return np.arange(count)
    numbers = np.random.PCG64(int.from_bytes(digest[:16], "big")).random_raw(SAMPLE)  # the same in every NumPy
    return np.unique(numbers % count).astype(np.int64)


def changed_splits(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the splits in which two datasets have different images, or which only one of them has.

    Args:
        then, now: as `ImageFolders.describe` returns, of runs of any age.
    """
    splits = [*now["fingerprint"], *(split for split in then["fingerprint"] if split not in now["fingerprint"])]
    return [split for split in splits if _differ(then, now, split)]


def _differ(then: dict[str, Any], now: dict[str, Any], split: str) -> bool:
    ours, theirs = (dataset["fingerprint"].get(split) for dataset in (now, then))
    if ours is None or theirs is None:
        return True
    if has_sizes(ours) == has_sizes(theirs):
        return bool(ours != theirs)
    return names_fingerprint(then, split) != names_fingerprint(now, split)


def has_sizes(fingerprint: str) -> bool:
    """Whether a fingerprint covers sizes, or is that of an older run."""
    return fingerprint.startswith("sizes:")


def names_fingerprint(dataset: dict[str, Any], split: str) -> str | None:
    """Return the fingerprint of names alone from what `ImageFolders.describe` returns or an older run has saved."""
    fingerprint: str = dataset["fingerprint"][split]
    return dataset.get("names_fingerprint", {}).get(split) if has_sizes(fingerprint) else fingerprint
