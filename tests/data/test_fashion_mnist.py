"""The idx files, written as an ordinary folder of images."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import FashionMNIST
from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

from alexlab.data import class_names as names
from alexlab.data import fashion_mnist
from alexlab.data import folder as index
from alexlab.data.fashion_mnist import CLASSES, load, write_fashion_mnist
from alexlab.engine.errors import UserError

PER_CLASS = {"train": 20, "test": 3}


def idx(array: np.ndarray) -> bytes:
    """The format as its author describes it: magic, sizes, bytes."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Small sets: gzipped training files, plain test files; labels in turn."""
    folder = tmp_path / "idx"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, start in (("train", "train"), ("test", "t10k")):
        count = 10 * PER_CLASS[split]
        images, labels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10
        for name, array in ((f"{start}-images-idx3-ubyte", images), (f"{start}-labels-idx1-ubyte", labels)):
            if split == "train":
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / name).write_bytes(idx(array))
    return folder


def test_each_image_is_in_the_folder_of_its_class(files: Path, tmp_path: Path) -> None:
    root = tmp_path / "data" / "clothes"
    write_fashion_mnist(root, str(files))
    assert {p.name for p in root.iterdir()} == {"train", "val", "test"}
    found = {split: index.scan(root / split) for split in ("train", "val", "test")}
    assert {split: len(i) for split, i in found.items()} == {"train": 180, "val": 20, "test": 30}
    assert found["train"].classes == CLASSES
    plain = read_sn3_pascalvincent_tensor(str(files / "t10k-images-idx3-ubyte")).numpy()
    for i in range(30):
        path = Path(found["test"].path(i))
        number = int(path.stem)
        assert number % 10 == found["test"].targets[i]
        assert np.array_equal(np.asarray(Image.open(path)), plain[number])
    numbers = {split: {int(Path(i.path(n)).stem) for n in range(len(i))} for split, i in found.items()}
    assert numbers["train"] | numbers["val"] == set(range(200))
    assert not numbers["train"] & numbers["val"]


def test_class_names_are_the_datasets_own() -> None:
    """torchvision's list, in the order of the labels."""
    assert names.readable(CLASSES, "fashion_mnist") == FashionMNIST.classes
    assert tuple(sorted(CLASSES)) == CLASSES


def test_an_existing_folder_is_used_as_it_is(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine/train/a").mkdir(parents=True)
    write_fashion_mnist(tmp_path / "mine", "/none")
    assert "mine has images already, so data.idx=/none is not used" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["train"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with pytest.raises(UserError, match=r"other contains files, but no train/: choose another data\.root"):
        write_fashion_mnist(tmp_path / "other", str(files))


def test_wrong_files_are_refused(files: Path, tmp_path: Path) -> None:
    def refused(folder: object) -> None:
        with pytest.raises(UserError, match=rf"data\.idx={folder}: Fashion-MNIST's four idx files cannot be read \("):
            write_fashion_mnist(tmp_path / "root", str(folder))

    refused("/none")
    for name in ("t10k-labels-idx1-ubyte", "train-images-idx3-ubyte.gz"):
        whole = (files / name).read_bytes()
        for damaged in (whole[:5], whole[:-1], whole[:10] + b"\xff" * 8 + whole[18:-1]):
            (files / name).write_bytes(damaged)
            refused(files)
        (files / name).write_bytes(whole)
    assert not (tmp_path / "root").exists()


def test_a_failed_download_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's download, from a port of this machine where nothing listens."""
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "none")
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(UserError, match=r"idx files cannot be downloaded \(.*data\.idx=FOLDER"):
        write_fashion_mnist(tmp_path / "root", "auto")


@pytest.mark.skipif(not fashion_mnist.DEBIAN.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_debians_files_have_equally_many_images_of_each_class() -> None:
    """60,000 and 10,000 images, as many of each class (Xiao et al. 2017)."""
    for part, count in zip(load("auto", Path("/none")), (60_000, 10_000), strict=True):
        assert part.data.shape == (count, 28, 28)
        assert np.bincount(part.targets).tolist() == [count // 10] * 10
