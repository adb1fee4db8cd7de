"""What identifies the images of a split without decoding them.

A fingerprint is "sizes:" and 16 hex digits of the names of the files, their classes and their sizes in bytes. Older
runs have 16 hex digits of names and classes only. New runs have this names fingerprint too, for comparisons with older
runs. This module does not import torch.
"""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

SAMPLE = 10_000  # files of a large folder whose sizes are read: reading all sizes takes longer than reading the names


def names_digest(names: bytes, arrays: "Sequence[np.ndarray]", texts: Sequence[str]) -> Any:
    """Hash the joined names of the images of a split, arrays with a number per image, and texts about all of them."""
    digest = hashlib.sha256(names)
    for array in arrays:
        digest.update(array.tobytes())
    digest.update("\0".join(texts).encode(errors="surrogateescape"))
    return digest


def of_sizes(digest: Any, sizes: "np.ndarray", source: str = "") -> str:
    """Return the fingerprint of what `names_digest` hashed, of the sizes in bytes, and of `source`, the fingerprint of
    the images that these were made from. All are added to `digest`."""
    digest.update(sizes.astype("int64").tobytes())
    digest.update(source.encode())
    return f"sizes:{digest.hexdigest()[:16]}"


def sample(digest: bytes, count: int, most: int | None = None) -> "np.ndarray":
    """Choose the images whose sizes are read, int64, ascending: all of up to `most` (None: SAMPLE) images, else about
    as many of them. The choice depends on the number of images and the first 16 bytes of a hash of the names."""
    import numpy as np  # 0.1 s, which tables of runs do not need

    most = SAMPLE if most is None else most
    if count <= most:
        return np.arange(count)
    numbers = np.random.PCG64(int.from_bytes(digest[:16], "big")).random_raw(most)  # the same in every NumPy
    return np.unique(numbers % count).astype(np.int64)


def identities(datasets: Sequence[Any]) -> list[Any]:
    """Return a value per dataset that is equal for equal images: the fingerprint, or None if it is unknown.

    The folds of one cross-validation have the same images, which are split differently: for these, the value is that of
    the images that the folds share.

    If only the names of an older dataset are known, it gets the fingerprint of the newer datasets with the same names,
    provided that these all have the same images. `datasets` are from summary.json, which anybody may have written.
    """
    known = [dataset if isinstance(dataset, dict) else {} for dataset in datasets]
    fingerprints = [dataset.get("fingerprint_of_folds", dataset.get("fingerprint")) for dataset in known]
    newer: dict[str, list[Any]] = {}
    for dataset, fingerprint in zip(known, fingerprints, strict=True):
        names = dataset.get("names_fingerprint")
        if names is not None and fingerprint not in (same := newer.setdefault(repr(names), [])):
            same.append(fingerprint)
    for number, dataset in enumerate(known):
        same = newer.get(repr(fingerprints[number]), [])
        if "names_fingerprint" not in dataset and len(same) == 1:
            fingerprints[number] = same[0]
    return fingerprints


def changed_splits(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the splits in which two datasets (of `ImageFolders.describe`) have different images, or which one lacks.
    If the older one has no sizes, names are compared."""
    before, after = then["fingerprint"], now["fingerprint"]
    if not all(fingerprint.startswith("sizes:") for fingerprint in (*before.values(), *after.values())):
        before, after = (dataset.get("names_fingerprint", dataset["fingerprint"]) for dataset in (then, now))
    return [split for split in dict.fromkeys([*after, *before]) if before.get(split) != after.get(split)]
