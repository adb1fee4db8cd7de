"""Split images into train, val and test: by fractions, or into the folds of a cross-validation.

Each part has about the same fraction of every class. If the index has `groups`, such as the patient of each image, all
images of a group are in the same part.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alexlab.data.index import Selection
from alexlab.engine.errors import UserError, counted


def class_counts(index: Any) -> np.ndarray:
    """Return the number of images of each class (with each label), int64 (num_classes,)."""
    if index.targets.ndim == 2:
        return index.targets.sum(0, dtype=np.int64)
    return np.bincount(index.targets, minlength=len(index.classes))


# -- by fractions


def split(index: Any, fractions: dict[str, float], seed: int) -> dict[str, Any]:
    """Split an index at random by (seed, class), each class in the same proportions.

    Args:
        fractions: of the images that each split except train gets, such as {"val": 0.1, "test": 0.1}; above 0.

    Raises:
        UserError: a class has too few images for each split to get one.
    """
    names = ["train", *fractions]
    if index.targets.ndim == 2 or index.groups is not None:
        parts = distribute(index, [1 - sum(fractions.values()), *fractions.values()], seed)
        return {name: index.subset(np.flatnonzero(parts == number)) for number, name in enumerate(names)}
    members_of: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for target, label in enumerate(index.classes):
        members = np.flatnonzero(index.targets == target)
        if not len(members):  # a number that no label has
            continue
        np.random.Generator(np.random.PCG64([seed, target])).shuffle(members)
        taken = 0
        for name, fraction in fractions.items():
            size = max(1, round(len(members) * fraction))
            members_of[name].append(np.sort(members[taken : taken + size]))
            taken += size
        if taken >= len(members):
            raise UserError(
                f"{index.root / label} contains {counted(len(members), 'image')}, and at least {taken + 1} are needed "
                f"for each of {', '.join(names)} to get one: add images, or lower data.val_fraction and test_fraction."
            )
        members_of["train"].append(np.sort(members[taken:]))
    return {name: index.subset(np.concatenate(members)) for name, members in members_of.items()}


def hold_out(splits: Mapping[str, Any], fractions: Mapping[str, float | None], seed: int) -> dict[str, Any]:
    """Return splits in which these fractions of the training images are val and test; None and 0 are none."""
    wanted = {name: fraction for name, fraction in fractions.items() if fraction}
    for name in wanted.keys() & splits.keys():
        raise UserError(
            f"`data.{name}_fraction={wanted[name]}`: the images have a {name} split already: remove the key."
        )
    return {**splits, **split(splits["train"], wanted, seed)} if wanted else dict(splits)


def distribute(index: Any, fractions: Sequence[float], seed: int) -> np.ndarray:
    """Distribute the groups of an index (or the images of one that has lists of labels) over parts of these sizes.

    The largest groups come first, and each goes to the part that has the least of the classes in it, in the manner of
    scikit-learn's StratifiedGroupKFold.

    Returns:
        The part of each image, int64 (N,).
    """
    groups = index.groups
    members = np.arange(len(index)) if groups is None else np.unique(groups, return_inverse=True)[1]
    counts = np.zeros((members.max() + 1, len(index.classes) + 1))  # the last column counts images
    np.add.at(counts[:, -1], members, 1)
    if index.targets.ndim == 2:
        np.add.at(counts[:, :-1], members, index.targets)
    else:
        np.add.at(counts, (members, index.targets), 1)
    counts /= np.maximum(counts.sum(0), 1)
    sizes, filled = np.array(fractions), np.zeros((len(fractions), counts.shape[1]))
    part_of = np.empty(len(counts), np.int64)
    order = np.random.Generator(np.random.PCG64([seed, 0, len(sizes)])).permutation(len(counts))
    for group in order[np.argsort(-counts[order].sum(1), kind="stable")].tolist():
        # how much the sum of squares grows; rounded, so that all processors decide alike
        growth = (2 * filled * counts[group] + counts[group] ** 2).sum(1) / sizes
        part = np.lexsort((filled[:, -1] / sizes, growth.round(9)))[0]
        part_of[group] = part
        filled[part] += counts[group]
    return part_of[members]


# -- by folds


def cross_validation(
    splits: Mapping[str, Any], folds: int, fold: int, seed: int, test_fraction: float = 0.0
) -> dict[str, Any]:
    """Return splits in which val is one fold of the images of train and val, and train is the rest.

    Args:
        splits: train, and optionally val and test. Test stays as it is.
        folds: number of folds, at least 2.
        fold: number of the fold to validate on, from 0.
        test_fraction: of the images to hold out first, if `splits` has no test; 0 for none.

    Raises:
        UserError: too few images or groups; or the index has folds, and these are not 0 to folds - 1.
    """
    parts = [splits[name] for name in ("train", "val") if name in splits]
    pooled = {**splits, "train": Selection(parts, np.arange(sum(map(len, parts))))}
    kept = hold_out(pooled, {"test": test_fraction}, seed)
    pool = kept["train"]
    is_val = fold_of_images(pool, folds, seed) == fold
    return {**kept, "train": pool.subset(np.flatnonzero(~is_val)), "val": pool.subset(np.flatnonzero(is_val))}


def fold_of_images(index: Any, folds: int, seed: int) -> np.ndarray:
    """Return the fold of each image, int64 (N,): the column of the index, or by (seed, group) or (seed, class).

    Raises:
        UserError: see `cross_validation`.
    """
    fold_column, groups = index.folds, index.groups
    if fold_column is not None:
        present = np.unique(fold_column).tolist()
        if present != list(range(folds)):
            raise UserError(
                f"`data.folds={folds}` needs each fold from 0 to {folds - 1}, and the table has "
                f"{', '.join(map(str, present[:12]))}: change data.folds, or the column of the folds."
            )
        return fold_column
    counts = np.where((counts := class_counts(index)) > 0, counts, len(index) + 1)
    few, what = int(counts.min()), f"images of {index.classes[counts.argmin()]}, the smallest class"
    if groups is not None:
        few, what = len(np.unique(groups)), "groups of images"
    elif index.targets.ndim == 2:
        few, what = len(index), "images"
    if folds > few:
        raise UserError(f"`data.folds={folds}` is more than the {few} {what}: choose fewer folds, or add images.")
    if groups is not None or index.targets.ndim == 2:
        return distribute(index, [1 / folds] * folds, seed)
    order = np.random.Generator(np.random.PCG64([seed, 0, folds])).permutation(len(index))
    order = order[np.argsort(index.targets[order], kind="stable")]  # class by class
    dealt = np.empty(len(index), np.int64)
    dealt[order] = np.arange(len(index)) % folds
    return dealt
