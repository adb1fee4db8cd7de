"""From folders to arrays, and the answers to folders that are wrong."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexlab.data import decode
from alexlab.data.folder import EXTENSIONS, find_splits, new_folder, scan
from alexlab.data.splits import split
from alexlab.engine.errors import UserError


def make(root: Path, **classes: int) -> Path:
    for label, count in classes.items():
        (root / label).mkdir(parents=True)
        for i in range(count):
            (root / label / f"{i}.jpg").touch()
    return root


def test_classes_and_paths_are_sorted(tmp_path: Path) -> None:
    make(tmp_path, dog=2, cat=1)
    (tmp_path / "cat" / "deep").mkdir()
    (tmp_path / "cat" / "deep" / "B.JPEG").touch()
    (tmp_path / "cat" / ".hidden.jpg").touch()
    (tmp_path / "cat" / "notes.txt").touch()
    index = scan(tmp_path)
    assert index.classes == ("cat", "dog")
    assert [index.path(i) for i in range(len(index))] == [
        str(tmp_path / name) for name in ("cat/0.jpg", "cat/deep/B.JPEG", "dog/0.jpg", "dog/1.jpg")
    ]
    assert index.targets.tolist() == [0, 0, 1, 1]
    assert index.ignored == {".txt": 1, "hidden": 1}
    last = index.subset(np.array([3, 1]))
    assert [last.path(i) for i in (0, 1)] == [str(tmp_path / "dog/1.jpg"), str(tmp_path / "cat/deep/B.JPEG")]


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no class folders: it must contain one folder of images per class"):
        scan(tmp_path)
    make(tmp_path, cat=1, dog=0)
    with pytest.raises(UserError, match="dog is a class without images: add images"):
        scan(tmp_path)
    with pytest.raises(UserError, match="contains class folders but no image"):
        scan(make(tmp_path / "empty", dog=0), ("cat", "dog"))
    with pytest.raises(UserError, match="nowhere does not exist: give the folder"):
        scan(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file cannot be read as a folder .Not a directory.: give another data.root"):
        scan(tmp_path / "file")


def test_val_may_lack_a_class_but_not_have_a_new_one(tmp_path: Path) -> None:
    assert scan(make(tmp_path / "a", dog=2), ("cat", "dog")).targets.tolist() == [1, 1]
    with pytest.raises(UserError, match="classes that the training images do not: bird"):
        scan(make(tmp_path / "b", bird=1, cat=1), ("cat", "dog"))


def test_links_are_followed_and_no_folder_is_read_twice(tmp_path: Path) -> None:
    make(tmp_path / "real", more=2, other=2)
    make(tmp_path / "data", cat=1)
    (tmp_path / "data/dog").symlink_to(tmp_path / "real/more")
    (tmp_path / "data/cat/linked").symlink_to(tmp_path / "real/other")
    (tmp_path / "data/cat/one.JPG").symlink_to(tmp_path / "real/more/0.jpg")
    index = scan(tmp_path / "data")
    names = [index.path(i).removeprefix(f"{tmp_path}/data/") for i in range(len(index))]
    assert names == ["cat/0.jpg", "cat/linked/0.jpg", "cat/linked/1.jpg", "cat/one.JPG", "dog/0.jpg", "dog/1.jpg"]
    for place, other in (("real/other/back", "data/cat"), ("data/zebra", "real/more")):
        (tmp_path / place).symlink_to(tmp_path / other)
        with pytest.raises(UserError, match=r"^/.*/(back|zebra) and /.*/(cat|dog) are the same folder, because one is"):
            scan(tmp_path / "data")
        (tmp_path / place).unlink()


@pytest.mark.parametrize("name", ["train/fox", "val"])
def test_a_link_to_a_folder_that_is_gone_is_an_error(name: str, tmp_path: Path) -> None:
    make(tmp_path / "train", cat=1, dog=1)
    (tmp_path / name).symlink_to(tmp_path / "not mounted")
    with pytest.raises(UserError, match=f"{name} is a link to nothing: mount the disk"):
        find_splits(tmp_path)


def test_a_link_to_the_root_is_named_as_a_circle(tmp_path: Path) -> None:
    make(tmp_path / "train", cat=1, dog=1)
    make(tmp_path / "val", cat=1, dog=1)
    (tmp_path / "train/cat/round").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"are the same folder, because one is a link"):
        find_splits(tmp_path)


def test_a_split_is_stratified_disjoint_and_by_seed(tmp_path: Path) -> None:
    index = scan(make(tmp_path, a=20, b=40))
    parts = split(index, {"val": 0.2, "test": 0.1}, seed=3)
    assert {name: Counter(part.targets.tolist()) for name, part in parts.items()} == {
        "train": {0: 14, 1: 28},
        "val": {0: 4, 1: 8},
        "test": {0: 2, 1: 4},
    }
    paths = [part.path(i) for part in parts.values() for i in range(len(part))]
    assert len(set(paths)) == 60
    again, another = split(index, {"val": 0.2, "test": 0.1}, 3), split(index, {"val": 0.2, "test": 0.1}, 4)
    assert again["val"].names == parts["val"].names != another["val"].names
    with pytest.raises(UserError, match="contains 1 image, and at least 2 are needed"):
        split(scan(make(tmp_path / "few", a=1, b=9)), {"val": 0.1}, 0)


def test_a_folder_that_is_neither_split_nor_to_be_split(tmp_path: Path) -> None:
    make(tmp_path / "a/train", cat=1)
    for near in (tmp_path / "a/train", tmp_path):
        with pytest.raises(UserError, match=rf"no train/ folder: .* Did you mean data.root={tmp_path}/a\?"):
            find_splits(near)
    make(tmp_path / "b", cat=1)
    with pytest.raises(UserError, match=r"contains no train/ folder: .* data.val_fraction=0.1\.$"):
        find_splits(tmp_path / "b")
    make(tmp_path / "c/val", cat=1)
    with pytest.raises(UserError, match=r"contains no train/ folder: "):
        find_splits(tmp_path / "c", divided=True)


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val", "test"),
        ("Train", "Val", "TEST"),
        ("train", "valid", "test"),
        ("training", "Validation", "Testing"),
        ("train", "validate", "test"),
    ],
)
def test_splits_are_found_by_their_usual_names(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        make(tmp_path / name, cat=2, dog=1)
    splits = find_splits(tmp_path)
    assert {split: (index.root.name, len(index)) for split, index in splits.items()} == {
        split: (name, 3) for split, name in zip(("train", "val", "test"), names, strict=True)
    }
    make(tmp_path / "VALIDATION", cat=1)
    with pytest.raises(UserError, match=r"contains \w+ and \w+, which are both val: remove one"):
        find_splits(tmp_path)


def test_names_with_a_split_in_them_are_no_classes(tmp_path: Path) -> None:
    """Classes whose names contain such a word have images, not folders."""
    for name in ("seg_train", "seg_test"):
        make(tmp_path / "a" / name, cat=1, dog=1)
    make(tmp_path / "a/train_labels")
    with pytest.raises(UserError, match=r"named like splits and not like classes \(seg_test, seg_train\): rename them"):
        find_splits(tmp_path / "a", divided=True)
    for name in ("train", "validation_set", "train2", "testset"):
        make(tmp_path / "c" / name, cat=1, dog=1)
    with pytest.raises(UserError, match=r"\(testset, train2, validation_set\)"):
        find_splits(tmp_path / "c")
    make(tmp_path / "b", test_tube=2, beaker=2)
    assert find_splits(tmp_path / "b", divided=True)["train"].classes == ("beaker", "test_tube")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    classes = find_splits(make(tmp_path / "a", bus=2, car=1, train=2), divided=True)["train"].classes
    assert classes == ("bus", "car", "train")
    make(tmp_path / "c", cat=1, dog=1, test=2)
    with pytest.raises(UserError, match=r"c contains no train/ folder"):
        find_splits(tmp_path / "c", divided=True)
    make(tmp_path / "b", train=2, test1=2, sample=1)  # unsorted images, as of dogs and cats
    with pytest.raises(UserError, match=r"b/train contains no class folders"):
        find_splits(tmp_path / "b", divided=True)


@pytest.mark.parametrize("where", ["cat", "data/data"])
def test_splits_within_a_class_are_not_mixed(where: str, tmp_path: Path) -> None:
    make(tmp_path / where, train=2, Validation=1)
    make(tmp_path, dog=1)
    match = f"{where} contains folders of several splits, which would be mixed: give data.root={tmp_path / where}"
    with pytest.raises(UserError, match=match):
        find_splits(tmp_path, divided=True)


def test_splits_two_folders_deeper_are_suggested(tmp_path: Path) -> None:
    make(tmp_path / "data/data/train", cat=1, dog=1)
    with pytest.raises(UserError, match=f"Did you mean data.root={tmp_path / 'data/data'}"):
        find_splits(tmp_path)


def test_test_images_without_labels_are_refused_with_what_to_do(tmp_path: Path) -> None:
    make(tmp_path / "train", cat=1, dog=1)
    make(tmp_path, test=2)
    with pytest.raises(UserError, match=r"If the images have no labels, move test/ elsewhere"):
        find_splits(tmp_path)


def test_what_systems_leave_in_folders_is_skipped_and_counted(tmp_path: Path) -> None:
    root = make(tmp_path, cat=2, dog=1)
    for junk in ("__MACOSX/cat", "cat/@eaDir/0.jpg", "dog/deeper/@tmp", ".ipynb_checkpoints", "cat/.git", "FOUND.000"):
        make(root / junk, x=3)
    (root / "dog/._0.jpg").touch()
    (root / ".DS_Store").touch()
    index = scan(root)
    assert (index.classes, len(index)) == (("cat", "dog"), 3)
    assert index.ignored == {
        "__MACOSX/": 1, "@eaDir/": 1, "@tmp/": 1, ".ipynb_checkpoints/": 1, ".git/": 1, "FOUND.000/": 1, "hidden": 1,
    }  # fmt: skip
    assert scan(make(tmp_path / "letters", **{"@": 1, "a": 1})).classes == ("@", "a")


def test_suffixes_are_those_of_what_is_decoded() -> None:
    Image.init()
    formats = (*decode.FORMATS, "MPO", "DIB")  # cameras' JPEGs, and BMPs
    assert {suffix for suffix, name in Image.EXTENSION.items() if name in formats} - {".pfm"} == set(EXTENSIONS)


def test_a_class_without_images_says_what_is_in_it(tmp_path: Path) -> None:
    make(tmp_path, cat=1, dog=0)
    (tmp_path / "dog/1.HEIC").touch()
    with pytest.raises(UserError, match=r"or remove the folder. \S+/dog: files without the .* are ignored: 1 .heic$"):
        scan(tmp_path)


def test_a_class_in_two_unicode_forms_is_refused(tmp_path: Path) -> None:
    names = {"cafe\u0301": 1, "dog": 1}  # e and an accent
    make(tmp_path, **names)
    with pytest.raises(UserError, match=r"exists twice, because its name is stored in two Unicode forms"):
        scan(tmp_path, ("caf\u00e9", "dog"))


def test_a_new_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    def write(*names: str) -> None:
        with new_folder(tmp_path / "new", "last") as folder:
            for name in names:
                (folder / name).write_text(name)
                if name == "stop":
                    raise KeyboardInterrupt
            if (tmp_path / "new").exists():  # another process was faster
                (tmp_path / "new/first").write_text("theirs")

    with pytest.raises(KeyboardInterrupt):
        write("first", "stop")
    assert list(tmp_path.iterdir()) == []
    write("first", "last")
    write("first", "last")
    assert (tmp_path / "new/first").read_text() == "theirs"
    (tmp_path / "new/last").unlink()
    with pytest.raises(OSError, match="not empty"):
        write("first", "last")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
