"""Folds: stratified, by group, of any index; test images are in none; fingerprints that runs can be compared by."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import photo
from test_prepare import config_of

from alexlab.commands.prepare import prepare
from alexlab.data.datamodule import ImageFolders
from alexlab.data.dataset import ImageDataset
from alexlab.data.fast import prepared
from alexlab.data.fingerprint import changed_splits, identities
from alexlab.data.folder import ImageIndex
from alexlab.data.index import Selection
from alexlab.data.sampler import EvalBatchSampler
from alexlab.data.splits import cross_validation, distribute, fold_of_images, split
from alexlab.data.transforms import SampleTransform
from alexlab.engine.errors import UserError

PLAIN = SampleTransform(32)


@dataclass(frozen=True)
class Table(ImageIndex):
    """An index with the columns of a table."""

    weights: Any = None
    groups: Any = None
    folds: Any = None


def table(targets: Any, root: Path = Path("/images"), **columns: Any) -> Table:
    targets = np.asarray(targets)
    count = targets.shape[1] if targets.ndim == 2 else targets.max() + 1
    names = [f"{i:05d}.jpg".encode() for i in range(len(targets))]
    ends = np.cumsum([len(name) for name in names])
    return Table(root, b"".join(names), ends, targets, tuple("abcdefghijklmnopqrst"[:count]), **columns)


def folds_of(root: Path, folds: int, seed: int = 0, test_fraction: float = 0.0) -> list[ImageFolders]:
    settings: dict[str, Any] = {"folds": folds, "seed": seed, "test_fraction": test_fraction, "num_workers": 0}
    return [
        ImageFolders(str(root), 2, train_transform=PLAIN, eval_transform=PLAIN, fold=fold, **settings).read()
        for fold in range(folds)
    ]


def paths_of(index: Any) -> list[str]:
    return [index.path(i) for i in range(len(index))]


# -- by class


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [  # of scikit-learn 1.9.1: the images of each class in the folds of StratifiedKFold
        ([7, 12, 5, 30], [[2, 2, 1, 6], [2, 2, 1, 6], [1, 3, 1, 6], [1, 3, 1, 6], [1, 2, 1, 6]]),
        ([3, 3, 4], [[1, 1, 2], [1, 1, 1], [1, 1, 1]]),
        ([10, 11, 13, 21, 40], [[3, 3, 3, 5, 10], [3, 2, 4, 5, 10], [2, 3, 3, 6, 10], [2, 3, 3, 5, 10]]),
    ],
)
def test_each_fold_has_as_many_images_of_a_class_as_scikit_learns(sizes: list[int], expected: list[list[int]]) -> None:
    targets = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    folds = fold_of_images(table(targets), len(expected), seed=3)
    assert [np.bincount(targets[folds == k], minlength=len(sizes)).tolist() for k in range(len(expected))] == expected
    assert np.array_equal(folds, fold_of_images(table(targets), len(expected), seed=3))
    assert not np.array_equal(folds, fold_of_images(table(targets), len(expected), seed=4))


# -- by group


@pytest.mark.parametrize(
    ("images", "groups", "classes", "count", "expected"),
    [  # of scikit-learn 1.9.1's StratifiedGroupKFold, shuffled with random_state=0: the mean over these ten sets
        (200, 30, 3, 5, 0.0205), (1000, 60, 10, 5, 0.0182), (2000, 400, 20, 10, 0.0060), (300, 12, 2, 3, 0.0255),
    ],
)  # fmt: skip
def test_groups_stay_together_and_classes_are_as_balanced_as_scikit_learns(
    images: int, groups: int, classes: int, count: int, expected: float
) -> None:
    """By the deviation between folds of the fraction of a class, averaged over the classes."""
    deviations = []
    for seed in range(10):
        rng = np.random.Generator(np.random.PCG64(seed))
        column = rng.integers(0, groups, images)
        targets = (rng.random(images) ** 2 * classes).astype(int)
        folds = fold_of_images(table(targets, groups=column.astype(str)), count, 0)
        assert len({*zip(column.tolist(), folds.tolist(), strict=True)}) == len(set(column.tolist()))
        per_fold = np.array([np.bincount(targets[folds == k], minlength=classes) for k in range(count)])
        deviations.append((per_fold / per_fold.sum(0)).std(0).mean())
        assert np.abs(per_fold.sum(1) - images / count).max() < 0.06 * images
    assert np.mean(deviations) < expected


def test_labels_of_which_an_image_has_several_are_balanced() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((600, 8)) < [0.02, 0.05, 0.1, 0.1, 0.2, 0.3, 0.5, 0.7]).astype(np.uint8)
    folds = fold_of_images(table(labels), 5, 0)
    per_fold = np.array([labels[folds == k].sum(0, dtype=int) for k in range(5)])
    assert np.abs(per_fold - labels.sum(0, dtype=int) / 5).max() <= 2
    assert np.bincount(folds).tolist() == [120] * 5, "images without a label too"
    random = rng.integers(0, 5, 600)
    by_chance = np.array([labels[random == k].sum(0, dtype=int) for k in range(5)])
    assert np.abs(by_chance - labels.sum(0, dtype=int) / 5).max() > 5, "which chance alone would not reach"


def test_parts_of_any_size_hold_whole_groups() -> None:
    rng = np.random.default_rng(0)
    groups, targets = rng.integers(0, 100, 1000), rng.integers(0, 4, 1000)
    parts = distribute(table(targets, groups=groups), [0.7, 0.2, 0.1], 0)
    assert np.abs(np.bincount(parts) / 1000 - [0.7, 0.2, 0.1]).max() < 0.01
    assert len({*zip(groups.tolist(), parts.tolist(), strict=True)}) == 100
    index = Selection([table(targets, groups=groups)], np.arange(1000))
    by_fraction = split(index, {"val": 0.2}, 0)
    assert not {*by_fraction["train"].groups} & {*by_fraction["val"].groups}
    assert abs(len(by_fraction["val"]) - 200) < 10


def test_a_column_of_folds_decides() -> None:
    column = np.array([2, 0, 1, 1, 0, 2, 2, 0])
    index = table([0, 0, 0, 0, 1, 1, 1, 1], folds=column, groups=np.zeros(8))
    for fold in range(3):
        splits = cross_validation({"train": index}, 3, fold, seed=0)
        assert splits["val"].rows.tolist() == np.flatnonzero(column == fold).tolist()
        assert splits["train"].rows.tolist() == np.flatnonzero(column != fold).tolist()
    for folds in (2, 4):
        with pytest.raises(
            UserError, match=rf"data.folds={folds}` needs each fold from 0 to {folds - 1}, .* has 0, 1, 2"
        ):
            cross_validation({"train": index}, folds, 0, seed=0)


@pytest.mark.parametrize(
    ("index", "folds", "message"),
    [
        (table([0, 0, 0, 1, 1]), 3, "`data.folds=3` is more than the 2 images of b, the smallest class: choose fewer"),
        (table([0, 0, 0, 2, 2, 2]), 4, "is more than the 3 images of a, the smallest class"),
        (table([0, 0, 1, 1], groups=np.array(["x", "x", "y", "y"])), 3, "is more than the 2 groups of images"),
        (table(np.ones((3, 2), np.uint8)), 4, "is more than the 3 images: "),
    ],
)
def test_more_folds_than_images_or_groups_are_refused(index: Table, folds: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        cross_validation({"train": index}, folds, 0, seed=0)
    assert message in str(caught.value)


# -- of folders


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes in train/ and val/, and a test/."""
    root = tmp_path_factory.mktemp("folds")
    for split_, count in {"train": 7, "val": 3, "test": 2}.items():
        for label in ("cat", "dog", "fox"):
            for i in range(count):
                photo(root / split_ / label / f"{i}.jpg", seed=i)
    (root / "train/cat/notes.txt").touch()
    return root


def test_train_and_val_are_pooled_and_test_images_are_in_no_fold(images: Path) -> None:
    folds = folds_of(images, 5)
    everything = {str(path) for split_ in ("train", "val") for path in (images / split_).glob("*/*.jpg")}
    for data in folds:
        train, val, test = (paths_of(data.splits[name]) for name in ("train", "val", "test"))
        assert {*train} | {*val} == everything
        assert not {*train} & {*val}
        assert len(train) == 24
        assert {*test} == {str(path) for path in (images / "test").glob("*/*.jpg")}
        assert Counter(Path(path).parent.name for path in val) == {"cat": 2, "dog": 2, "fox": 2}
        targets = data.splits["val"].targets.tolist()
        assert [data.classes[target] for target in targets] == [Path(path).parent.name for path in val]
        assert data.class_counts == [8, 8, 8]
        assert data.notes() == [f"{images}/train: files without the suffix of an image are ignored: 1 .txt"]
    validated = [path for data in folds for path in paths_of(data.splits["val"])]
    assert sorted(validated) == sorted(everything), "each image is validated in one fold"


def test_of_class_folders_alone_the_test_is_held_out_first(images: Path) -> None:
    folds = folds_of(images / "train", 3, test_fraction=0.3)
    (test,) = {tuple(paths_of(data.splits["test"])) for data in folds}
    assert Counter(Path(path).parent.name for path in test) == {"cat": 2, "dog": 2, "fox": 2}
    assert [len(data.splits["val"]) for data in folds] == [5, 5, 5]
    validated = {path for data in folds for path in paths_of(data.splits["val"])}
    assert len(validated) == 15
    assert not validated & {*test}
    with pytest.raises(UserError, match=r"`data.test_fraction=0.3`: the images have a test split already: remove"):
        folds_of(images, 3, test_fraction=0.3)
    with pytest.raises(UserError, match=r"data.folds=8` is more than the 7 images of cat, the smallest class"):
        folds_of(images / "train", 8)


def test_folds_have_one_fingerprint_together_and_one_each(images: Path, tmp_path: Path) -> None:
    described = [data.describe() for data in folds_of(images, 3)]
    values = identities(described)
    assert values[0] == values[1] == values[2]
    assert changed_splits(described[0], described[1]) == ["train", "val"]
    assert changed_splits(described[0], folds_of(images, 3)[0].describe()) == []
    assert changed_splits(described[0], folds_of(images, 3, seed=1)[0].describe()) == ["train", "val"]
    assert identities([folds_of(images, 3, seed=1)[0].describe(), folds_of(images, 2)[0].describe()]) == values[:2]
    whole = ImageFolders(str(images), 2, 0, PLAIN, PLAIN).read().describe()
    assert identities([whole]) != values[:1]
    assert "fingerprint_of_folds" not in whole
    moved = tmp_path / "moved"
    moved.symlink_to(images)
    assert changed_splits(described[0], folds_of(moved, 3)[0].describe()) == []
    photo(extra := images / "val/cat/more.jpg")
    try:
        changed = folds_of(images, 3)[0].describe()
    finally:
        extra.unlink()
    assert changed_splits(described[0], changed) == ["train", "val"]
    assert identities([changed]) != values[:1]


def test_columns_of_a_table_are_part_of_the_fingerprint() -> None:
    targets = np.arange(12) % 2
    fingerprints = {
        Selection([table(targets, **columns)], np.arange(12)).fingerprint
        for columns in (
            {}, {"groups": np.arange(12)}, {"groups": np.arange(12) // 2}, {"weights": np.ones(12)}, {"folds": targets},
        )
    }  # fmt: skip
    assert len(fingerprints) == 5


# -- of prepared images


def test_folds_of_pixels_are_copied_as_they_are_read(images: Path, tmp_path: Path) -> None:
    """Of several indexes; also for the device that crops and caches them."""
    prepare(config_of(images, tmp_path / "out", format="raw", short_side=40, square=True, shard_mb=0.03))  # type: ignore[arg-type]
    source: Mapping[str, Any] = prepared.read(tmp_path / "out")
    (data, *_) = folds_of(tmp_path / "out", 3)
    index: Any = data.splits["train"]
    assert index.raw_size == (40, 40)
    everything = [source[name].picture(i).pixels()[0] for name in ("train", "val") for i in range(len(source[name]))]
    order = np.random.default_rng(0).permutation(len(index))
    for rows in (order, order[:1], np.flatnonzero(index.rows < len(source["train"])), order[:0]):
        keys = [(int(i), 0) for i in rows]
        dataset = ImageDataset(index, PLAIN, 0, raw_size=index.raw_size)
        images_ = dataset.allocate(keys)
        if len(images_):
            assert dataset.fill(keys, images_) == []
        expected = [everything[index.rows[i]] for i in rows]
        assert all(np.array_equal(a.permute(1, 2, 0), b) for a, b in zip(images_, expected, strict=True))
    on_device = ImageFolders(
        str(tmp_path / "out"), 4, 0, PLAIN, PLAIN, num_workers=0, crop_on="device", cache="device", folds=3, fold=0
    ).read()
    cached, plain = list(on_device.val_dataloader()), list(data.val_dataloader())
    assert sum(len(batch.targets) for batch in cached) == sum(len(batch.targets) for batch in plain) == 10
    assert [t for batch in cached for t in batch.targets.tolist()] == data.splits["val"].targets.tolist()
    assert len(list(EvalBatchSampler(len(index), 4))) == 5
