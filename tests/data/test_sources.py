"""Images from a class of one's own, a table, arrays, torchvision, Hugging Face and tar files."""

import io
import json
import math
import shutil
import struct
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import photo
from PIL import Image

from alexlab.commands.evaluate import split_by
from alexlab.data import decode, first_look, folder, splits
from alexlab.data.datamodule import ImageFolders
from alexlab.data.items import ItemData
from alexlab.data.sources import build_data
from alexlab.data.transforms import SampleTransform
from alexlab.engine.errors import UserError
from alexlab.engine.schema import DataConfig

COLOURS = {"cat": (250, 10, 10), "dog": (10, 250, 10), "fox": (10, 10, 250)}
SOURCES = "alexlab.data."


def facts(**more: Any) -> dict[str, Any]:
    transform = SampleTransform(16)
    return {"seed": 3, "train_transform": transform, "eval_transform": transform, "world_size": 1} | more


def data_of(target: str | None, **keys: Any) -> Any:
    plain = {"name": "x", "root": None, "batch_size": 4, "image_size": 16, "num_workers": 2, "_target_": target, **keys}
    return build_data(DataConfig.model_validate(plain), facts(), trusted=None)


def refusal(target: str, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        data_of(target, **keys).read()
    return str(caught.value)


def own(make: Any, by_split: bool = False, **keys: Any) -> ItemData:
    """Batches of a class of one's own, as `build_data` makes them."""
    settings: dict[str, Any] = {"root": "mypkg.Mine", "batch_size": 4, **facts(), **keys}
    return ItemData(make, by_split, "mypkg.Mine", **settings)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images of one colour for each of three classes."""
    root = tmp_path_factory.mktemp("IMAGES")
    for label, colour in COLOURS.items():
        (root / label).mkdir()
        for i in range(8):
            Image.new("RGB", (20, 18), colour).save(root / label / f"{i}.png")
    return root


def table(path: Path, rows: list[str], header: str = "path,label,split") -> str:
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def rows_of(split: Callable[[int], str] = lambda i: "train" if i < 5 else "val" if i < 7 else "test") -> list[str]:
    return [f"{label}/{i}.png,{label},{split(i)}" for i in range(8) for label in COLOURS]


def colours_fit(data: Any) -> bool:
    """Check in all batches of val that each image has the colour of its class."""
    seen = 0
    for images, targets, _, _ in data.val_dataloader():
        for image, target in zip(images, targets.tolist(), strict=True):
            seen += 1
            expected = torch.tensor(COLOURS[data.classes[target].partition(",")[0]])
            assert torch.equal(image[:, 8, 8].int(), expected.int())
    return seen > 0


# -- a class of one's own


class Mine:
    """Colours as arrays, PIL images, bytes and paths."""

    def __init__(self, kind: str, count: int = 24, **more: Any) -> None:
        self.kind, self.labels = kind, [list(COLOURS)[i % 3] for i in range(count)]
        self.targets, self.said = self.labels, None
        self.__dict__.update(more)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Any, str]:
        array = np.full((20, 18, 3), COLOURS[self.labels[i]], np.uint8)
        label = (self.said or self.targets)[i]
        if self.kind == "array":
            return array, label
        if self.kind == "pil":
            return Image.fromarray(array), label
        stream = io.BytesIO()
        Image.fromarray(array).save(stream, "PNG")
        return stream.getvalue(), label


@pytest.mark.parametrize("kind", ["array", "pil", "bytes"])
def test_an_image_is_an_array_bytes_or_of_pil(kind: str) -> None:
    data = own(lambda: Mine(kind), val_fraction=0.25, num_workers=2).read()
    assert data.classes == ("cat", "dog", "fox")
    assert data.images == {"train": 18, "val": 6}
    assert colours_fit(data)


def test_an_image_is_a_path_or_a_grey_array_of_three_equal_channels(tmp_path: Path) -> None:
    grey = np.arange(400, dtype=np.uint8).reshape(20, 20)
    for image, shape in ((grey, (20, 20, 3)), (photo(tmp_path / "a.jpg"), (70, 80, 3))):
        data = own(lambda image=image: [(image, k % 2) for k in range(20)], val_fraction=0.2).read()
        pixels, _ = data.splits["train"].picture(0).pixels()
        assert pixels.shape == shape
        assert image is not grey or np.array_equal(pixels, np.stack([grey] * 3, 2))


def test_splits_are_built_one_by_one_and_a_key_error_means_that_there_is_none() -> None:
    data = own(lambda split: Mine("array", {"train": 12, "val": 6}[split]), by_split=True)
    data.make = wrapped(data.make)
    assert data.read().images == {"train": 12, "val": 6}
    assert data.test_split == "val"


def wrapped(make: Any) -> Any:
    """Raise as `targets.build` does."""

    def build(**more: Any) -> Any:
        try:
            return make(**more)
        except Exception as error:
            raise UserError(f"cannot be built: {error}") from error

    return build


def test_another_key_error_in_the_constructor_is_an_error() -> None:
    def broken(split: str) -> Mine:
        raise KeyError("file_name")

    with pytest.raises(UserError, match="file_name"):
        own(wrapped(broken), by_split=True).read()


def test_an_error_for_one_split_names_the_rule() -> None:
    def of_folder(split: str) -> Mine:
        if split == "test":
            raise FileNotFoundError("/photos/test")
        return Mine("array", 12)

    with pytest.raises(
        UserError, match=r"split=test: .*/photos/test If such images do not exist, raise KeyError\(split\)"
    ):
        own(wrapped(of_folder), by_split=True).read()


def test_targets_must_be_the_labels_of_the_images() -> None:
    def read(targets: list[Any], said: list[Any]) -> Any:
        return own(lambda: Mine("array", targets=targets, said=said, classes=list(COLOURS)), val_fraction=0.25).read()

    names = list(COLOURS) * 8
    for targets in (["cat", "dog", "cat"] * 8, [2, 1, 0] * 8):
        with pytest.raises(UserError, match=r"has the label \w+, and its `targets` have \w+: give both in one"):
            read(targets, names)
    assert colours_fit(read([0, 1, 2] * 8, names)), "numbers instead of names"


def test_a_key_split_of_the_yaml_is_refused() -> None:
    with pytest.raises(UserError, match=r"`data.split=train` has no effect, because alexlab.*Arrays is built once for"):
        data_of(SOURCES + "arrays.Arrays", root="/x", split="train")


def test_splits_may_be_a_name_per_image() -> None:
    splits = ["train", "Valid", "test", "training"] * 6
    data = own(lambda: Mine("array", splits=splits)).read()
    assert data.images == {"train": 12, "val": 6, "test": 6}
    with pytest.raises(UserError, match=r"mypkg.Mine: the split other is none of train, training, val,"):
        own(lambda: Mine("array", splits=["other", *splits[1:]])).read()


def test_labels_and_classes_of_val_must_be_those_of_train() -> None:
    def refused(message: str, val: Any) -> None:
        train = Mine("array", classes=["cat", "dog", "fox"])
        with pytest.raises(UserError, match=message):
            own(lambda split: train if split == "train" else val, by_split=True).read()

    message = r"mypkg.Mine\(val\)\[0\]: the label zebra must be one of the classes cat, dog, fox"
    refused(message, [(np.zeros((9, 9, 3), np.uint8), "zebra")])
    other = Mine("array", classes=["dog", "cat", "fox"])  # of which the numbers mean something else
    refused(r"Mine\(val\) and the training images have different `classes`", other)


def test_labels_may_be_numbers_texts_of_numbers_and_rows_of_flags() -> None:
    image = np.zeros((9, 9, 3), np.uint8)

    def encoded(labels: list[Any], **keys: Any) -> Any:
        return own(lambda: [(image, label) for label in labels], val_fraction=0.5, **keys).read()

    assert encoded([10, 2] * 4).classes[-1] == "10"
    assert encoded(["10", "2"] * 4).classes == ("2", "10"), "as numbers, not as texts"
    assert encoded(["1", "01", "001"] * 4).classes == ("001", "01", "1"), "equal numbers, always in this order"
    flags = encoded([[1, 0, 1], [0, 1, 1]] * 4)
    assert flags.splits["train"].targets.dtype == np.uint8
    targets = next(iter(flags.train_dataloader())).targets
    assert targets.dtype == torch.float32
    assert {tuple(row) for row in targets.tolist()} <= {(1.0, 0.0, 1.0), (0.0, 1.0, 1.0)}
    with pytest.raises(UserError, match=r"data.num_classes=3, but mypkg.Mine contains 8 classes"):
        encoded([0, 7] * 4, num_classes=3)
    with pytest.raises(UserError, match=r"the label \[2 0\] must be 2 of 0 or 1"):
        encoded([[2, 0], [0, 1]] * 4)
    with pytest.raises(UserError, match=r"labels must be whole numbers or names, not float64"):
        encoded([0.5, 1.0] * 4)


def test_images_of_another_type_are_an_error_before_the_run() -> None:
    with pytest.raises(UserError, match=r"gives an image as array float32 \(9, 9, 3\): give the bytes of a file"):
        own(lambda: [(np.zeros((9, 9, 3), np.float32), k % 2) for k in range(8)], val_fraction=0.5).read()


def test_broken_images_are_skipped_by_name(tmp_path: Path) -> None:
    class Files(Mine):
        def __getitem__(self, i: int) -> tuple[Any, str]:
            return (str(tmp_path / "gone.jpg"), self.labels[i]) if i == 3 else super().__getitem__(i)

        def name(self, i: int) -> str:
            return f"photo {i}"

    data = own(lambda: Files("array"), val_fraction=0.25, on_error="skip", batch_size=18).read()
    (batch,) = data.train_dataloader()
    assert list(batch.skipped) == ["mypkg.Mine[photo 3]"]
    assert "gone.jpg: No such file" in batch.skipped["mypkg.Mine[photo 3]"]
    assert len(batch.targets) == 17


def test_threads_call_the_class_at_the_same_time() -> None:
    together = threading.Barrier(2, timeout=20)

    class Slow(Mine):
        def __getitem__(self, i: int) -> tuple[Any, str]:
            if threading.current_thread() is not threading.main_thread():
                together.wait()
            return super().__getitem__(i)

    data = own(lambda: Slow("array"), val_fraction=0.25, num_workers=2, batch_size=6).read()
    assert len(list(data.train_dataloader())) == 3


def test_the_fingerprint_sees_pixels_labels_and_names() -> None:
    def fingerprint(**more: Any) -> str:
        return own(lambda: Mine("array", **more), val_fraction=0.25).read().describe()["fingerprint"]["train"]

    assert fingerprint() == fingerprint()
    assert fingerprint().startswith("sizes:")
    others = [
        fingerprint(labels=["dog"] * 24, targets=Mine("array").labels),  # other pixels
        fingerprint(targets=["cat", "fox", "dog"] * 8),
        fingerprint(name=lambda i: f"{i}.png"),
    ]
    assert len({fingerprint(), *others}) == 4


def test_groups_stay_together() -> None:
    groups = [i // 4 for i in range(24)]
    data = own(lambda: Mine("array", groups=groups), val_fraction=0.34).read()
    train, val = (set(data.splits[split].groups.tolist()) for split in ("train", "val"))
    assert train | val == set(range(6))
    assert not train & val
    assert len(val) == 2


def test_fractions_that_do_not_fit_the_splits_are_errors() -> None:
    splits = ["train", "val"] * 12
    with pytest.raises(UserError, match=r"data.val_fraction=0.2`: the images have a val split already: remove"):
        own(lambda: Mine("array", splits=splits), val_fraction=0.2).read()
    with pytest.raises(UserError, match=r"mypkg.Mine has no val images: hold out some with data.val_fraction=0.1"):
        own(lambda: Mine("array")).read()
    assert own(lambda: Mine("array", splits=splits), test_fraction=0.25).read().images["test"] == 3


def test_a_folder_is_split_as_before(images: Path) -> None:
    """The val images of version 0.1, computed here as its code did."""
    index = folder.scan(images)
    parts = splits.split(index, {"val": 0.25}, seed=5)
    expected = []
    for target in range(3):
        members = np.flatnonzero(index.targets == target)
        np.random.Generator(np.random.PCG64([5, target])).shuffle(members)
        expected += [index.name(i) for i in sorted(members[:2])]
    assert [parts["val"].name(i) for i in range(6)] == expected


def test_a_subclass_of_the_folders_gets_all_arguments(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(ImageFolders):
        def __init__(self, part: int, **settings: Any) -> None:
            super().__init__(**settings)
            self.part = part

        def find_splits(self) -> dict[str, Any]:
            index = folder.scan(self.root)
            return {"train": index, "val": index.subset(np.arange(0, len(index), self.part))}

    monkeypatch.setattr("alexlab.data.items.Half", Half, raising=False)
    data = data_of(SOURCES + "items.Half", root=str(images), part=2).read()
    assert data.images == {"train": 24, "val": 12}
    assert (data.seed, data.batch_size) == (3, 4)


# -- a table


def test_a_table_has_paths_labels_and_splits(images: Path, tmp_path: Path) -> None:
    file = table(tmp_path / "labels.csv", rows_of())
    data = data_of(SOURCES + "table.Table", file=file, root=str(images)).read()
    assert data.images == {"train": 15, "val": 6, "test": 3}
    assert data.classes == ("cat", "dog", "fox")
    assert colours_fit(data)
    assert data.splits["val"].name(0) == b"cat/5.png"


@pytest.mark.parametrize("suffix", [".tsv", ".parquet"])
def test_a_table_may_be_tsv_or_parquet(suffix: str, images: Path, tmp_path: Path) -> None:
    import pandas as pd

    rows = [row.split(",") for row in rows_of()]
    frame, file = pd.DataFrame(rows, columns=["image", "kind", "split"]), tmp_path / f"t{suffix}"
    if suffix == ".tsv":
        frame.to_csv(file, sep="\t", index=False)
    else:
        pytest.importorskip("pyarrow")
        frame.to_parquet(file)
    columns = {"path": "image", "label": "kind"}
    data = data_of(SOURCES + "table.Table", file=str(file), root=str(images), columns=columns).read()
    assert data.images == {"train": 15, "val": 6, "test": 3}


@pytest.mark.parametrize("separator", [";", "\t", " , "])
def test_a_table_may_be_as_excel_writes_it(separator: str, images: Path, tmp_path: Path) -> None:
    """With semicolons, a mark of the byte order, Windows' line ends, empty rows at the end, and splits in any case."""
    rows = ["path,label,split", *rows_of(), ",,", ""]
    text = "\r\n".join(rows).replace(",train", ",Training").replace(",val", ",VALID").replace(",", separator)
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    data = data_of(SOURCES + "table.Table", file=str(tmp_path / "t.csv"), root=str(images)).read()
    assert data.images == {"train": 15, "val": 6, "test": 3}
    assert colours_fit(data)


def test_a_label_in_two_unicode_forms_is_one_class(images: Path, tmp_path: Path) -> None:
    labels = ["caf\u00e9", "cafe\u0301", "dog"]
    rows = [f"cat/{i}.png,{label},{split}" for split in ("train", "val") for i, label in enumerate(labels)]
    file = table(tmp_path / "t.csv", rows)
    data = data_of(SOURCES + "table.Table", file=file, root=str(images), batch_size=2).read()
    assert (data.classes, data.class_counts) == (("caf\u00e9", "dog"), [2, 1])


@pytest.mark.parametrize("multilabel", [False, True])
def test_one_file_in_two_splits_and_with_two_labels_is_reported(multilabel: bool, images: Path, tmp_path: Path) -> None:
    for kind in COLOURS:
        photo(tmp_path / f"{kind}.png", seed=ord(kind[0]))
    rows = ["cat.png,cat,train", "dog.png,dog,train", "cat.png,cat,val", "dog.png,cat,train"]
    keys: dict[str, Any] = {"file": table(tmp_path / "t.csv", rows), "root": str(tmp_path), "multilabel": multilabel}
    cat, dog = (tmp_path / f"{kind}.png" for kind in ("cat", "dog"))
    assert first_look.warnings_of(data_of(SOURCES + "table.Table", **keys).read().splits) == [
        f"1 picture is in two splits, with identical bytes, such as {cat} and {cat}.",
        f"1 picture is in two classes, with identical bytes, such as {dog} and {dog}.",
    ]


def test_several_labels_are_in_a_cell_or_in_columns(images: Path, tmp_path: Path) -> None:
    rows = [f"{label}/{i}.png,{label}|old dog,{'train' if i else 'val'}" for i in range(8) for label in COLOURS]
    rows[4] = "dog/1.png,,train"  # no label is allowed
    cells: dict[str, Any] = {"file": table(tmp_path / "tags.csv", rows), "root": str(images), "multilabel": True}
    data = data_of(SOURCES + "table.Table", separator="|", **cells).read()
    assert data.classes == ("cat", "dog", "fox", "old dog")
    index = data.splits["train"]
    assert index.targets.dtype == np.uint8
    assert index.targets[:3].tolist() == [[1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 1]]
    batch = next(iter(data.train_dataloader()))
    assert batch.targets.dtype == torch.float32
    assert batch.targets.shape == (4, 4)

    flags = [f"{label}/{i}.png,{i % 2},1.0,{'train' if i else 'val'}" for i in range(8) for label in COLOURS]
    cells["file"] = table(tmp_path / "flags.csv", flags, "path,odd,all,split")
    data = data_of(SOURCES + "table.Table", columns={"labels": ["all", "odd"]}, **cells).read()
    assert data.classes == ("all", "odd")
    assert data.splits["val"].targets.tolist() == [[1, 0]] * 3
    assert "add task=multilabel" in refusal(
        SOURCES + "table.Table", columns={"labels": ["all"]}, **{**cells, "multilabel": False}
    )


def test_without_multilabel_a_label_with_a_space_is_one_class(images: Path, tmp_path: Path) -> None:
    rows = [f"{label}/{i}.png,{'big cat' if label == 'cat' else label},train" for i in range(8) for label in COLOURS]
    file = table(tmp_path / "t.csv", rows, "path,label,other")
    data = data_of(SOURCES + "table.Table", file=file, root=str(images), val_fraction=0.25).read()
    assert data.classes == ("big cat", "dog", "fox")
    assert data.images == {"train": 18, "val": 6}


def test_columns_for_sampling_are_kept_by_splits_and_preparation(images: Path, tmp_path: Path) -> None:
    split = {0: "train", 1: "val", 2: "test"}
    rows = [f"{c}/{i}.png,{c},{split[i]},{'' if i == 2 else i},g{i},{i + 0.5}" for i in range(3) for c in COLOURS]
    file = table(tmp_path / "t.csv", rows, "path,label,split,fold,group,weight")
    data = data_of(SOURCES + "table.Table", file=file, root=str(images)).read()
    val, test = data.splits["val"], data.splits["test"]
    assert (val.folds.tolist(), val.groups.tolist(), val.weights.tolist()) == ([1] * 3, [1] * 3, [1.5] * 3)
    assert test.folds.tolist() == [-1] * 3, "test images are in no fold"
    assert val.subset(np.array([2, 0])).weights.tolist() == [1.5, 1.5]


BAD_TABLES = {
    "cat/1.png,cat,x": "t.csv, line 3 (cat/1.png) has the split `x`, which is none of train, training, val, valid,",
    ",cat,train": "t.csv, line 3 has no path.",
    "cat/1.png,,train": "t.csv, line 3 (cat/1.png) has no label.",
    "cat/1.png,zebra,val": "t.csv, line 3 (cat/1.png): the label zebra must be one of the classes cat.",
    "cat/1.png,cat,val,x": "Expected 3 fields in line 3, saw 4",
    "cat/1.png,cat": "t.csv, line 3 (cat/1.png) has the split ``, which is none of",
    "cat/99.png,cat,val": "t.csv, line 3 (cat/99.png) has a path that does not exist in data.root=",
    "cat,cat,val": "t.csv, line 3 (cat) has a path that does not exist in data.root=",
}


@pytest.mark.parametrize("row", BAD_TABLES)
def test_a_bad_row_is_named_with_its_line(row: str, images: Path, tmp_path: Path) -> None:
    file = table(tmp_path / "t.csv", ["cat/0.png,cat,train", row])
    assert BAD_TABLES[row] in refusal(SOURCES + "table.Table", file=file, root=str(images))


@pytest.mark.parametrize(
    ("column", "cell"), [("weight", "heavy"), ("weight", "-1"), ("weight", "nan"), ("fold", "first"), ("fold", "-1")]
)
def test_a_bad_number_is_named_with_its_line(column: str, cell: str, images: Path, tmp_path: Path) -> None:
    file = table(tmp_path / "t.csv", [f"cat/0.png,cat,train,{cell}"], f"path,label,split,{column}")
    message = f"line 2 (cat/0.png) has a {column} that is not a number from 0 on."
    assert message in refusal(SOURCES + "table.Table", file=file, root=str(images))


def test_a_fold_is_a_whole_number(images: Path, tmp_path: Path) -> None:
    file = table(tmp_path / "t.csv", ["cat/0.png,cat,0", "cat/1.png,cat,0.9"], "path,label,fold")
    message = refusal(SOURCES + "table.Table", file=file, root=str(images))
    assert message == f"{file}, line 3 (cat/1.png) has a fold that is not a whole number."


def test_a_table_that_cannot_be_read_is_an_error(images: Path, tmp_path: Path) -> None:
    root, target = str(images), SOURCES + "table.Table"
    assert f"`data.file={tmp_path}` is a folder: give the table, a CSV, TSV or Parquet file." in refusal(
        target, file=str(tmp_path), root=root
    )
    assert f"`data.file=gone.csv`: {Path('gone.csv').absolute()} does not exist: give the table with" in refusal(
        target, file="gone.csv", root=root
    )
    file = table(tmp_path / "t.csv", ["cat/0.png,cat"], "image,label")
    for column in ("split", "fold", "group", "weight"):
        named = {"path": "image", column: "patient"}
        assert refusal(target, file=file, root=root, columns=named).endswith(
            f"has no column patient, but image, label: correct `data.columns.{column}=patient`, or set it to null."
        )
    both = refusal(target, file=file, root=root, columns={"label": "klass"})
    assert "has no column path and no column klass, but image, label: name another with" in both
    assert refusal(target, file=file, root=root, img_size=96) == (
        f"`data.img_size=96`: there is no such key, and {target} does not take it. Did you mean `data.image_size`?"
    )
    assert "has no column path, but image, label: name another with data.columns.path=NAME" in refusal(
        target, file=file, root=root
    )
    assert "has no rows" in refusal(target, file=table(tmp_path / "t.csv", []), root=root)
    (tmp_path / "t.csv").write_bytes("path,label\n\xe9.png,cat\n".encode("latin1"))
    assert "cannot be read as a table" in refusal(target, file=file, root=root)
    (tmp_path / "t.parquet").write_bytes(b"no Parquet")
    assert "cannot be read as a table" in refusal(target, file=str(tmp_path / "t.parquet"), root=root)


def test_missing_images_may_be_skipped(images: Path, tmp_path: Path) -> None:
    file = table(tmp_path / "t.csv", [*rows_of(), "cat/99.png,cat,train"])
    data = data_of(SOURCES + "table.Table", file=file, root=str(images), on_error="skip", batch_size=16).read()
    (batch,) = data.train_dataloader()
    assert [Path(path).name for path in batch.skipped] == ["99.png]"]


# -- arrays


def test_arrays_are_mapped_files_of_a_folder(tmp_path: Path) -> None:
    for split, count in (("train", 12), ("val", 6)):
        colours = np.array(list(COLOURS.values()), np.uint8)[np.arange(count) % 3]
        np.save(tmp_path / f"{split}_images.npy", np.broadcast_to(colours[:, None, None], (count, 20, 20, 3)))
        np.save(tmp_path / f"{split}_labels.npy", np.arange(count)[:, None] % 3)
    data = data_of(SOURCES + "arrays.Arrays", root=str(tmp_path), classes=list(COLOURS)).read()
    assert data.images == {"train": 12, "val": 6}
    assert colours_fit(data)
    assert isinstance(data.splits["train"].dataset.images, np.memmap)


def test_one_npz_file_is_split_by_a_fraction(tmp_path: Path) -> None:
    file = tmp_path / "data.npz"
    np.savez(file, images=np.zeros((20, 9, 9), np.uint8), labels=np.array(["a", "b"] * 10))
    data = data_of(SOURCES + "arrays.Arrays", root=str(file), val_fraction=0.2).read()
    assert (data.images, data.classes) == ({"train": 16, "val": 4}, ("a", "b"))


def numbered(channels: tuple[int, ...]) -> np.ndarray:
    """Arrays (20, 16, 16, C) in which channel c of image n is 10 * n + c."""
    values = 10 * np.arange(20)[:, None] + np.arange(math.prod(channels))
    return np.broadcast_to(values.reshape(20, 1, 1, *channels), (20, 16, 16, *channels)).astype(np.uint8)


@pytest.mark.parametrize(
    ("channels", "wanted"),
    [((), 1), ((1,), 1), ((), 3), ((), 4), ((3,), 1), ((4,), 3), ((4,), 4), ((2,), 2), ((6,), 6)],
)
def test_arrays_have_any_number_of_channels(channels: tuple[int, ...], wanted: int, tmp_path: Path) -> None:
    array = numbered(channels)
    np.savez(tmp_path / "data.npz", images=array, labels=np.arange(20) % 2)
    data = data_of(SOURCES + "arrays.Arrays", root=str(tmp_path / "data.npz"), val_fraction=0.2)
    data.transforms = dict.fromkeys(data.transforms, SampleTransform(16, channels=wanted, crop_ratio=1.0))
    index = data.read().splits["val"]
    seen = torch.cat([images for images, _, _, _ in data.val_dataloader()])
    for image, name in zip(seen, map(index.name, range(len(index))), strict=True):
        pixels = array[int(name)]
        if array.shape[3:] != (wanted,) and wanted != array.ndim - 2:  # as Pillow converts it
            pixels = np.asarray(Image.fromarray(pixels).convert(decode.MODES[wanted]))
        expected = torch.tensor(pixels.reshape(16, 16, wanted)).permute(2, 0, 1)
        assert torch.equal(image, expected)


@pytest.mark.parametrize(("channels", "wanted", "rule"), [((6,), 3, "6"), ((2,), 1, "2"), ((), 2, "1 or 3 or 4")])
def test_other_numbers_of_channels_are_refused_before_the_run(
    channels: tuple[int, ...], wanted: int, rule: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "data.npz", images=numbered(channels), labels=np.arange(20) % 2)
    data = data_of(SOURCES + "arrays.Arrays", root=str(tmp_path / "data.npz"), val_fraction=0.2)
    data.transforms = dict.fromkeys(data.transforms, SampleTransform(16, channels=wanted))
    with pytest.raises(UserError, match=rf"`model.in_channels={wanted}` must be {rule} for the images of .*data.npz"):
        data.read()


def test_arrays_of_another_kind_are_errors(tmp_path: Path) -> None:
    target, root = SOURCES + "arrays.Arrays", str(tmp_path)
    assert "has no array 'train_images', but none" in refusal(target, root=root)
    np.save(tmp_path / "train_images.npy", np.zeros((4, 9, 9), np.float32))
    assert "has no array 'train_labels', but train_images" in refusal(target, root=root)
    np.save(tmp_path / "train_labels.npy", np.zeros(3, np.int64))
    assert "must be uint8 (N, H, W) or (N, H, W, C), and are float32 (4, 9, 9)" in refusal(target, root=root)
    np.save(tmp_path / "train_images.npy", np.zeros((4, 9, 9), np.uint8))
    assert "has 4 images and 3 targets" in refusal(target, root=root)
    np.save(tmp_path / "train_labels.npy", np.array([{}, 1, 2, 3], object), allow_pickle=True)
    assert "cannot be read as plain arrays, .npy or .npz (Array can't be memory-mapped: Python objects" in refusal(
        target, root=root
    )
    (tmp_path / "x.npz").write_bytes(b"PK damaged")
    assert "cannot be read as plain arrays" in refusal(target, root=f"{root}/x.npz")


# -- torchvision, Hugging Face, tar files


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST's four files with few images: row k of an image of label n is 10 * n."""
    root = tmp_path_factory.mktemp("tv")
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True)
    for start, count in (("train", 60), ("t10k", 20)):
        labels = np.arange(count, dtype=np.uint8) % 10
        pixels = np.broadcast_to(10 * labels[:, None, None], (count, 28, 28))
        (raw / f"{start}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, count, 28, 28) + pixels.tobytes())
        (raw / f"{start}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + labels.tobytes())
    return root


def test_a_set_of_torchvision_that_is_there_is_read_offline(mnist: Path) -> None:
    data = data_of(SOURCES + "torchvision_sets.TorchvisionSet", name="MNIST", root=str(mnist), download=False).read()
    assert data.images == {"train": 50, "val": 10, "test": 20}, "a tenth of the training images is val"
    assert split_by(data) == "data.val_fraction", "so an evaluation refuses other images"
    assert data.classes[:2] == ("0 - zero", "1 - one")
    for images, targets, _, _ in data.test_dataloader():
        assert torch.equal(images[:, 1, 8, 8], (10 * targets).to(torch.uint8))


def test_a_set_of_torchvision_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    target, keys = SOURCES + "torchvision_sets.TorchvisionSet", {"root": str(tmp_path), "download": False}
    text = refusal(target, name="CIFAR10", **keys)
    assert f"data.name=CIFAR10 is not complete in data.root={tmp_path}, and nothing is downloaded" in text
    assert not list(tmp_path.iterdir()), "nothing was written"
    assert f"data.name=ImageNet is not complete in data.root={tmp_path}" in refusal(target, name="ImageNet", **keys)
    for name in ("CIFAR11", "FakeData", "Cityscapes", "VisionDataset"):
        assert f"data.name={name} is no classification set" in refusal(target, name=name, **keys)


def test_sets_that_torchvision_does_not_download_are_read_from_the_disk(images: Path, tmp_path: Path) -> None:
    names = {f"n{k}": (label, "animal") for k, label in enumerate(COLOURS)}
    torch.save((names, []), tmp_path / "meta.bin")
    for split in ("train", "val"):
        for k, label in enumerate(COLOURS):
            shutil.copytree(images / label, tmp_path / split / f"n{k}")
    target = SOURCES + "torchvision_sets.TorchvisionSet"
    data = data_of(target, name="ImageNet", root=str(tmp_path)).read()
    assert data.images == {"train": 24, "val": 24}
    assert data.classes == ("cat, animal", "dog, animal", "fox, animal")
    assert colours_fit(data)


def test_a_set_of_pixels_in_a_table_is_read_and_its_hidden_labels_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    resources = {name: (f"{name}.csv", None) for name in ("train", "test", "fer", "icml")}  # without their checksums
    monkeypatch.setattr(datasets.FER2013, "_RESOURCES", resources)
    (tmp_path / "fer2013").mkdir()
    pixels = [" ".join([str(9 * k)] * 48**2) for k in range(20)]
    for split, head, cells in (
        ("train", "emotion,pixels", [f"{k % 2}," for k in range(20)]),
        ("test", "pixels", [""] * 20),
    ):
        rows = [cell + row for cell, row in zip(cells, pixels, strict=True)]
        (tmp_path / f"fer2013/{split}.csv").write_text("\n".join([head, *rows]))
    data = data_of(SOURCES + "torchvision_sets.TorchvisionSet", name="FER2013", root=str(tmp_path)).read()
    assert data.images == {"train": 18, "val": 2}
    index = data.splits["train"]
    assert [index.picture(i).pixels(channels=1)[0][0, 0, 0] for i in range(18)] == [
        9 * int(index.name(i)) for i in range(18)
    ]


def test_local_sets_of_hugging_face_are_read(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    target = SOURCES + "huggingface.HuggingFaceSet"
    data = data_of(target, path=str(images), download=False, val_fraction=0.25).read()  # an image folder
    assert (data.images, data.classes) == ({"train": 18, "val": 6}, ("cat", "dog", "fox"))
    assert colours_fit(data)
    parquet = tmp_path / "parquet"
    parquet.mkdir()
    whole = datasets.load_dataset(str(images), cache_dir=str(tmp_path / "cache"))["train"]
    for split in ("train", "test"):
        whole.to_parquet(str(parquet / f"{split}-00000-of-00001.parquet"))
    data = data_of(target, path=str(parquet), download=False).read()
    assert data.images == {"train": 21, "val": 3, "test": 24}
    assert colours_fit(data)
    columns = {"image": None, "label": "kind"}
    text = refusal(target, path=str(parquet), columns=columns, download=False)
    assert "has no column kind, but image, label: name one with data.columns.label=NAME" in text
    assert "cannot be loaded" in refusal(target, path=str(tmp_path / "empty"), download=False)
    hidden = whole.map(lambda row: {"label": -1})
    hidden.to_parquet(str(parquet / "test-00000-of-00001.parquet"))
    capsys.readouterr()
    assert data_of(target, path=str(parquet), download=False).read().images == {"train": 21, "val": 3}
    assert capsys.readouterr().out == f"note: {target} hides the labels of test images, which are not used.\n"


def test_tar_files_are_read_in_place(images: Path, tmp_path: Path) -> None:
    def write(name: str, numbers: range, label: str) -> None:
        with tarfile.open(tmp_path / name, "w") as tar:
            for i in numbers:
                for k, kind in enumerate(COLOURS):
                    content = (images / kind / f"{i}.png").read_bytes()
                    members = {"png": content, "json": json.dumps({"label": k}).encode(), "cls": str(k).encode()}
                    for suffix in ("png", label):
                        info = tarfile.TarInfo(f"{kind}-{i}.{suffix}")
                        info.size = len(members[suffix])
                        tar.addfile(info, io.BytesIO(members[suffix]))

    write("train-000.tar", range(4), "cls")
    write("train-001.tar", range(4, 6), "json")
    write("shapes-Validation-000.tar", range(6, 8), "cls")
    files = len(list(Path("/proc/self/fd").iterdir()))
    data = data_of(SOURCES + "webdataset.WebDataset", root=str(tmp_path)).read()
    assert len(list(Path("/proc/self/fd").iterdir())) == files, "no tar stays open: a process may open 1,024 files"
    assert (data.images, data.classes) == ({"train": 18, "val": 6}, ("0", "1", "2"))
    for pixels, targets, _, _ in data.val_dataloader():
        colours = torch.tensor(list(COLOURS.values()))[targets]
        assert torch.equal(pixels[:, :, 8, 8].int(), colours.int())
    assert data.splits["val"].path(0).endswith("[shapes-Validation-000.tar/cat-6.png]")
    (tmp_path / "val.tar").write_bytes(b"x" * 600)
    assert "val.tar cannot be read as a tar" in refusal(SOURCES + "webdataset.WebDataset", root=str(tmp_path))
    assert "contains no tar file" in refusal(SOURCES + "webdataset.WebDataset", root=str(images))
