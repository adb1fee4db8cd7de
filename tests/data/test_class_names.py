"""Readable names of classes."""

from pathlib import Path

import pytest

from alexlab.data import class_names as names
from alexlab.engine.errors import UserError


def test_the_thousand_synsets_of_imagenet() -> None:
    found = names.read("imagenet")
    assert len(found) == len(set(found.values())) == 1000
    assert list(found) == sorted(found)
    # the first, the last, and Imagenette's ten (its page on GitHub lists them)
    assert found["n01440764"] == "tench"
    assert found["n15075141"] == "toilet tissue"
    imagenette = "n02102040 n02979186 n03000684 n03028079 n03394916 n03417042 n03425413 n03445777 n03888257"
    names_there = (
        "english springer/cassette player/chain saw/church/french horn/garbage truck/gas pump/golf ball/parachute"
    )
    ours = [found[key].lower().replace("chainsaw", "chain saw") for key in imagenette.split()]
    assert ours == names_there.split("/")


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.class_names=/none is not a file: give one, or imagenet"):
        names.read("/none")
    (tmp_path / "x.tsv").write_text("a\tb\n\nonly\n")
    with pytest.raises(UserError, match=r"x\.tsv, line 3: 'only' must be a folder, a tab and a name"):
        names.read(str(tmp_path / "x.tsv"))
    (tmp_path / "latin.tsv").write_bytes("katze\tKätzchen\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"data\.class_names=.*latin.tsv is not UTF-8 text: save it in that encoding"):
        names.read(str(tmp_path / "latin.tsv"))
    with pytest.raises(
        UserError, match=r"data\.class_names=imagenet names none of the class folders \(cat, dog, ...\)"
    ):
        names.readable(["cat", "dog"], "imagenet")


def test_a_byte_order_mark_is_not_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_bytes(b"\xef\xbb\xbfcat\tthe Cat\n")
    assert names.readable(["cat", "dog"], str(tmp_path / "x.tsv")) == ["the Cat", "dog"]


def test_names_are_printable_once_and_for_all(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("cat\tThe Cat\n")
    folders = ["caf\udce9", "cat", "cat\nfish"]
    assert names.readable(folders, None) == [r"caf\xe9", "cat", r"cat\nfish"]
    assert names.readable(folders, str(tmp_path / "x.tsv")) == [r"caf\xe9", "The Cat", r"cat\nfish"]
