"""The drawn shapes: small, fast to write, the same bytes for the same seed."""

import hashlib
from pathlib import Path

import pytest
from PIL import Image

from alexlab.data.demo import IMAGES_PER_CLASS, SHAPES, write_demo
from alexlab.engine.errors import UserError

FEW = {"train": 2, "val": 1, "test": 1}


def digest(root: Path) -> str:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(p.relative_to(root)).encode() + p.read_bytes() for p in files)).hexdigest()


def test_same_bytes_for_the_same_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_demo(tmp_path / name, seed=seed, per_class=FEW)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
    before = [p.stat().st_mtime_ns for p in sorted((tmp_path / "a").rglob("*"))]
    write_demo(tmp_path / "a", seed=0, per_class=FEW)  # exists already
    assert [p.stat().st_mtime_ns for p in sorted((tmp_path / "a").rglob("*"))] == before


def test_the_folder_is_imagenet_style_and_at_most_20_mb(tmp_path: Path) -> None:
    tenth = {split: count // 10 for split, count in IMAGES_PER_CLASS.items()}
    write_demo(tmp_path / "demo", per_class=tenth)
    images = sorted((tmp_path / "demo").rglob("*.jpg"))
    assert {p.relative_to(tmp_path / "demo").parts[0] for p in images} == {"train", "val", "test"}
    assert {p.parent.name for p in images} == set(SHAPES)
    assert len(SHAPES) == 10
    assert sum(p.stat().st_size for p in images) <= 2_000_000
    assert len({p.read_bytes() for p in images}) == len(images), "no image comes twice, least of all in two splits"
    with Image.open(images[0]) as image:
        assert (image.format, image.mode) == ("JPEG", "RGB")
    assert not [p for p in tmp_path.iterdir() if p.name != "demo"], "no temporary folder remains"


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.jpg").touch()
    with pytest.raises(UserError, match=r"contains files that are not the demo's.*data=folder data.root=PATH"):
        write_demo(tmp_path / "mine")
    write_demo(tmp_path / "other", seed=1, per_class=FEW)
    with pytest.raises(UserError, match=r"contains demo images of .*'seed': 1.* instead of .*'seed': 0"):
        write_demo(tmp_path / "other", seed=0, per_class=FEW)
