"""Small archives like ImageNet's: the images are read in place, and prepared without being unpacked."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import photo
from PIL import Image
from torchvision.datasets import imagenet

from alexlab.commands.prepare import Recipe, write_split
from alexlab.data.datamodule import ImageFolders
from alexlab.data.fast import archives, prepared
from alexlab.data.transforms import SampleTransform
from alexlab.engine.errors import UserError

WNIDS = ("n01440764", "n01443537", "n02084071")
VAL = [2, 0, 1, 1]  # the devkit's numbers count from 1, and not in the order of the identities


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    sio = pytest.importorskip("scipy.io")
    folder = tmp_path / "archives"
    folder.mkdir()
    with tarfile.open(folder / archives.TRAIN, "w") as outer:
        for k, wnid in reversed(list(enumerate(WNIDS))):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for i in (10, 2):
                    add(tar, f"{wnid}_{i}.JPEG", photo(tmp_path / "x.jpg", (90 + i, 80), seed=10 * k + i).read_bytes())
            add(outer, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(folder / archives.VAL, "w") as tar:
        for i in (3, 0, 2, 1):
            content = photo(tmp_path / "x.jpg", (100, 70 + i), seed=100 + i).read_bytes()
            add(tar, f"ILSVRC2012_val_{i + 1:08d}.JPEG", content)
    synsets = np.array(
        [(k + 1, WNIDS[(k + 1) % 3], "a, b", "gloss", 0) for k in range(3)] + [(4, "n00001740", "entity", "all", 3)],
        dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")],
    )
    sio.savemat(tmp_path / "meta.mat", {"synsets": synsets})
    with tarfile.open(folder / archives.DEVKIT, "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", (tmp_path / "meta.mat").read_bytes())
        truth = "".join(f"{(k - 1) % 3 + 1}\n" for k in VAL).encode()
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth)
    known = hashlib.md5((folder / archives.DEVKIT).read_bytes()).hexdigest()
    monkeypatch.setitem(imagenet.ARCHIVE_META, "devkit", (archives.DEVKIT, known))
    return folder


def test_images_are_read_in_place(root: Path) -> None:
    before = sorted(path.name for path in root.iterdir())
    splits = archives.read(root)
    train, val = splits["train"], splits["val"]
    assert train.classes == val.classes == WNIDS
    assert [train.name(i).decode() for i in range(6)] == [f"{w}/{w}_{i}.JPEG" for w in WNIDS for i in (10, 2)]
    assert train.targets.tolist() == [0, 0, 1, 1, 2, 2]
    assert [train.picture(i).size for i in range(6)] == [(100, 80), (92, 80)] * 3
    expected = sorted((WNIDS[k], f"ILSVRC2012_val_{i + 1:08d}.JPEG", (100, 70 + i)) for i, k in enumerate(VAL))
    found = [(*val.name(i).decode().split("/"), val.picture(i).size) for i in range(4)]
    assert found == expected
    assert [WNIDS[k] for k in val.targets] == [wnid for wnid, *_ in expected]
    assert sorted(path.name for path in root.iterdir()) == before, "nothing is written into their folder"


def test_the_pixels_equal_those_of_the_tar_member(root: Path) -> None:
    train = archives.read(root)["train"]
    with (
        tarfile.open(root / archives.TRAIN) as outer,
        tarfile.open(fileobj=outer.extractfile(f"{WNIDS[1]}.tar")) as inner,
        Image.open(inner.extractfile(f"{WNIDS[1]}_2.JPEG")) as image,  # type: ignore[arg-type]
    ):
        assert np.array_equal(train.picture(3).pixels()[0], np.asarray(image))


def test_archives_are_trained_on_and_prepared_without_being_unpacked(root: Path, tmp_path: Path) -> None:
    plain = SampleTransform(32)
    data = ImageFolders(str(root), 2, 0, plain, plain, class_names="imagenet").read()
    assert data.images == {"train": 6, "val": 4}
    assert data.readable_classes[:2] == ["tench", "goldfish"]
    assert [len(batch.targets) for batch in data.train_dataloader()] == [2, 2, 2]
    (tmp_path / "out/.parts").mkdir(parents=True)
    part, broken = write_split(tmp_path / "out", "train", data.splits["train"], Recipe("jpeg", 64, 90, False), 10**6, 2)
    assert (part["images"], broken) == (6, {})
    with np.load(tmp_path / "out/train.npz") as arrays:
        assert set(arrays.files) == {*prepared.ARRAYS, prepared.CRCS, "names"}
        assert arrays["source_widths"].tolist() == [100, 92] * 3
    with pytest.raises(UserError, match=r"val_fraction=0.1`: the images have a val split already: remove the key"):
        ImageFolders(str(root), 2, 0, plain, plain, val_fraction=0.1).read()


def test_missing_and_damaged_archives_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (root / archives.VAL).read_bytes()
    with tarfile.open(root / archives.VAL, "w") as tar:
        add(tar, "ILSVRC2012_val_00000001.JPEG", b"x")
    with pytest.raises(UserError, match=r"the devkit lists 4 validation images of 3 classes, but the tars contain 1"):
        archives.read(root)
    (root / archives.VAL).write_bytes(b"no archive" * 100)
    with pytest.raises(UserError, match=r"an archive cannot be read \(.*\): download it again"):
        archives.read(root)
    (root / archives.VAL).write_bytes(whole)
    monkeypatch.setitem(imagenet.ARCHIVE_META, "devkit", (archives.DEVKIT, "0" * 32))
    with pytest.raises(UserError, match=r"cannot be read as ImageNet's devkit \(.*\): download it again"):
        archives.read(root)
    (root / archives.DEVKIT).unlink()
    with pytest.raises(UserError, match=rf"contains {archives.TRAIN} but no {archives.DEVKIT}: all three"):
        archives.read(root)
