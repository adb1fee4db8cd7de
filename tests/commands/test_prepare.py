"""`prepare`: what it writes, that it continues after a kill, and that training from it is like training."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import TINY, command, photo, summary_of
from PIL import Image, ImageOps
from torchvision.transforms import v2

from alexlab.commands.prepare import prepare
from alexlab.data.datamodule import ImageFolders
from alexlab.data.dataset import ImageDataset
from alexlab.data.fast import prepared
from alexlab.data.transforms import SampleTransform
from alexlab.engine.errors import RunFailedError, UserError
from alexlab.engine.schema import DataConfig


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, train and val: upright, wide, small and large JPEGs, a PNG and a rotated JPEG."""
    root = tmp_path_factory.mktemp("photos")
    exif = Image.Exif()
    exif[0x0112] = 6
    for split in ("train", "val"):
        for k, label in enumerate(("cat", "dog")):
            for i, size in enumerate([(200, 150), (120, 260), (90, 70), (700, 500)]):
                photo(root / split / label / f"{i}.jpg", size, seed=10 * k + i, quality=95)
            photo(root / split / label / "4.png", (160, 130), seed=50 + k)
            photo(root / split / label / "5.jpg", (210, 140), seed=60 + k, exif=exif, quality=95)
    return root


def config_of(root: Path, out: Path | None, data: dict[str, Any] | None = None, **settings: Any) -> SimpleNamespace:
    """Return conf/prepare.yaml, with images of a short side of 100."""
    images = {"name": "folder", "root": str(root), "batch_size": 1, "image_size": 64, **(data or {})}
    defaults = {"format": "jpeg", "short_side": 100, "square": False, "quality": 90, "shard_mb": 512}
    defaults |= {"seed": 0, "out": out and str(out), "stats": False, "num_workers": 2}
    return SimpleNamespace(data=DataConfig.model_validate(images), **(defaults | settings))


@pytest.fixture(scope="module")
def jpegs(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("jpegs") / "out"
    prepare(config_of(photos, out))
    return out


@pytest.fixture(scope="module")
def raw(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("raw") / "out"
    prepare(config_of(photos, out, format="raw"))
    return out


def names(index: prepared.PreparedIndex) -> list[str]:
    return [index.path(i).rpartition(":")[2] for i in range(len(index))]


def pixels(index: prepared.PreparedIndex, i: int) -> np.ndarray:
    return index.picture(i).pixels()[0]


def upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image).convert("RGB")


# -- what is written


def test_jpegs_are_resized_and_small_ones_copied(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(config_of(photos, tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "train: 12 of 12 images in 1 shard\nval: 12 of 12 images in 1 shard\n" in printed
    assert re.search(r"\d MB, .* images/s", printed)
    splits = prepared.read(tmp_path / "out")
    assert set(splits) == {"train", "val"}
    train = splits["train"]
    files = ("0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.png", "5.jpg")
    assert names(train) == [f"{label}/{file}" for label in ("cat", "dog") for file in files]
    assert train.classes == ("cat", "dog")
    assert train.targets.tolist() == [0] * 6 + [1] * 6
    for i, size in enumerate([(133, 100), (100, 216), (90, 70), (140, 100), (123, 100), (100, 150)]):
        assert train.picture(i).size == size
        with Image.open(photos / "train" / names(train)[i]) as source:
            resized = v2.functional.resize(upright(source), [min(size)])
        assert np.abs(pixels(train, i).astype(float) - np.asarray(resized)).mean() < 4, "JPEG's own loss"
    at, length = int(train.arrays["offsets"][2]), int(train.arrays["sizes"][2])
    assert train.files[0].read_bytes()[at : at + length] == (photos / "train/cat/2.jpg").read_bytes()
    assert train.arrays["source_widths"].tolist()[:6] == [200, 120, 90, 700, 160, 140]
    assert train.arrays["source_heights"].tolist()[:6] == [150, 260, 70, 500, 130, 210]


@pytest.mark.parametrize("square", [False, True])
def test_raw_pixels_equal_torchvisions(photos: Path, tmp_path: Path, square: bool) -> None:
    prepare(config_of(photos, tmp_path / "out", format="raw", square=square))
    train = prepared.read(tmp_path / "out")["train"]
    assert train.raw_size == ((100, 100) if square else None)
    for i, name in enumerate(names(train)):
        with Image.open(photos / "train" / name) as source:
            small = name.endswith("2.jpg") and not square
            expected = upright(source) if small else v2.functional.resize(upright(source), [100])
            expected = v2.functional.center_crop(expected, [100, 100]) if square else expected
        assert pixels(train, i).shape == np.asarray(expected).shape
        # decoded at half its size; and rotated after it was resized, which rounds in the other direction
        largest = {"3.jpg": 2.0, "5.jpg": 0.2}.get(name[-5:], 0.05)
        assert np.abs(pixels(train, i).astype(float) - np.asarray(expected)).mean() < largest


def test_broken_files_are_skipped_counted_and_listed(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "in")
    content = (tmp_path / "in/train/cat/0.jpg").read_bytes()
    (tmp_path / "in/train/cat/0.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "in/val/dog/2.jpg").write_bytes(b"none")
    done = command("prepare", f"data.root={tmp_path / 'in'}", f"out={tmp_path / 'out'}", "num_workers=3")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "2 images could not be read (prepared.json lists all). The copy can be used without them" in done.stderr
    for name in ("train/cat/0.jpg", "val/dog/2.jpg"):
        assert f"{tmp_path / 'in' / name} cannot be read as an image (" in done.stderr
    assert "train: 11 of 12 images" in done.stdout
    splits = prepared.read(tmp_path / "out")
    assert len(splits["train"]) == len(splits["val"]) == 11
    assert "cat/0.jpg" not in names(splits["train"])
    assert len(prepared.about(tmp_path / "out")["broken"]) == 2
    for path in (tmp_path / "in/val/cat").iterdir():
        path.write_bytes(b"none")
    with pytest.raises(RunFailedError, match="8 images could not be read"):
        prepare(config_of(tmp_path / "in", tmp_path / "less"))
    for path in (tmp_path / "in/val/dog").iterdir():
        path.write_bytes(b"none")
    with pytest.raises(UserError, match=r"no image of val could be read, such as .*val/cat/0.jpg cannot be read"):
        prepare(config_of(tmp_path / "in", tmp_path / "nothing"))


# -- using it


def test_training_evaluation_and_export_use_it_like_a_folder(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "names.tsv").write_text("cat\tHouse cat\n")
    prepare(config_of(photos, out, {"class_names": str(tmp_path / "names.tsv")}))
    words = [*TINY, "data=prepared", f"data.root={out}", "data.batch_size=4", "trainer.max_epochs=1"]
    done = command("train.py", *words, "callbacks.figures=true", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert summary_of(tmp_path / "run")["dataset"]["images"] == {"train": 12, "val": 12}
    assert len(list((tmp_path / "run/figures").glob("*.png"))) >= 7
    logs = f"paths.logs={tmp_path}"
    done = command("eval.py", f"run={tmp_path / 'run'}", logs)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run/eval.json").read_text())
    assert result["acc1"] == summary_of(tmp_path / "run")["test"]["test/acc1"]
    assert "House cat" in result["per_class_acc1"]
    done = command("export", f"run={tmp_path / 'run'}", "format=torch_export", logs)
    assert done.returncode == 0, done.stderr


def test_a_folder_is_split_as_in_training(photos: Path, tmp_path: Path) -> None:
    prepare(config_of(photos / "train", tmp_path / "out", {"val_fraction": 0.3}, seed=4))
    transform = SampleTransform(64)
    trained = ImageFolders(str(photos / "train"), 1, 4, transform, transform, val_fraction=0.3).read()
    for split, index in prepared.read(tmp_path / "out").items():
        folder = trained.splits[split]
        assert [str(photos / "train" / name) for name in names(index)] == [folder.path(i) for i in range(len(folder))]
    again = ImageFolders(str(tmp_path / "out"), 1, 4, transform, transform, val_fraction=0.3)
    with pytest.raises(UserError, match=r"val_fraction=0.3`: the images have a val split already: remove the key"):
        again.read()
    more = ImageFolders(str(tmp_path / "out"), 1, 4, transform, transform, test_fraction=0.3).read()
    assert more.images == {"train": 6, "val": 4, "test": 2}


def test_replaced_source_images_change_the_fingerprint(photos: Path, tmp_path: Path, raw: Path, jpegs: Path) -> None:
    """Even if the pixels have the same number of bytes; and preparing again is another job."""
    root = Path(shutil.copytree(photos, tmp_path / "in"))
    photo(root / "train/cat/0.jpg", (200, 150), seed=99)
    prepare(config_of(root, tmp_path / "raw", format="raw"))
    before, after = prepared.read(raw), prepared.read(tmp_path / "raw")
    assert before["train"].names_fingerprint == after["train"].names_fingerprint
    assert before["train"].fingerprint != after["train"].fingerprint
    assert before["val"].fingerprint == after["val"].fingerprint
    with pytest.raises(UserError, match=r"from different images or in a different way \(source\)"):
        prepare(config_of(root, jpegs))


def test_a_preparation_of_an_older_version_is_recognised_by_its_names(
    photos: Path, jpegs: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(jpegs, tmp_path / "out"))
    about = json.loads((out / "prepared.json").read_text())
    about["source"]["fingerprint"] = about["source"].pop("names_fingerprint")
    (out / "prepared.json").write_text(json.dumps(about))
    prepare(config_of(photos, out))
    root = Path(shutil.copytree(photos, tmp_path / "in"))
    (root / "train/cat/0.jpg").rename(root / "train/cat/9.jpg")
    with pytest.raises(UserError, match=r"from different images or in a different way \(source\)"):
        prepare(config_of(root, out))


# -- continuing, and checking

KILLED = """
import os, signal
from alexlab.commands import prepare
write, done = prepare.write_shard, []

def write_and_die(*args):
    done.append(0)
    if len(done) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*args)

prepare.write_shard = write_and_die
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".npz"}


def test_a_killed_preparation_continues_where_it_was(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"shard_mb": 0.000001, "num_workers": 1}  # one image per shard
    out, whole = tmp_path / "out", tmp_path / "whole"
    (tmp_path / "killed.py").write_text(KILLED)
    words = [f"data.root={photos}", f"out={out}", "short_side=100", "shard_mb=0.000001", "num_workers=1"]
    done = command("prepare", *words, before=tmp_path / "killed.py")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not prepared.is_prepared(out)
    with pytest.raises(UserError, match="contains no train/ folder"):
        ImageFolders(str(out), 1, 0, SampleTransform(8), SampleTransform(8)).read()
    prepare(config_of(photos, out, **settings))
    assert "train: continuing after 5 of 12 images" in capsys.readouterr().out
    prepare(config_of(photos, whole, **settings))
    assert contents(out) == contents(whole)
    for ours, theirs in zip(prepared.read(out).values(), prepared.read(whole).values(), strict=True):
        assert ours.fingerprint == theirs.fingerprint
        assert all(np.array_equal(ours.arrays[key], theirs.arrays[key]) for key in ours.arrays)


def test_a_complete_preparation_is_checked_when_it_is_run_again(
    photos: Path, jpegs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(jpegs, tmp_path / "out"))
    prepare(config_of(photos, out))
    assert capsys.readouterr().out == f"{out} is complete, and the checksums are right: train 12, val 12 images.\n"
    shard = out / "train-00000.shard"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RunFailedError, match=f"{shard} has changed since it was written: remove {out} and prepare it"):
        prepare(config_of(photos, out))
    size = len(content)
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{shard} has {size - 1:,} bytes instead of {size:,}: copy it again"):
        prepared.read(out)
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard} has 0 bytes instead of"):
        prepared.read(out)
    (out / "prepared.json").write_text('{"version": 99}')
    with pytest.raises(UserError, match=r"was prepared in format 99, and this program reads format 1: prepare it"):
        prepared.read(out)
    (out / "prepared.json").write_text("{")
    with pytest.raises(UserError, match=r"prepared.json cannot be read .*: run alexlab prepare again, from scratch"):
        prepared.read(out)


def test_wrong_folders_are_refused(photos: Path, jpegs: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").touch()
    cases = (
        (
            config_of(photos, jpegs, quality=80),
            "was prepared from different images or in a different way (recipe): remove it",
        ),
        (config_of(photos / "train", jpegs, {"val_fraction": 0.5}), "different images or in a different way (source)"),
        (config_of(photos, photos / "out"), f"is within data.root={photos}, where nothing is written: choose another"),
        (config_of(jpegs, tmp_path / "two"), "is a prepared set: give the folder of the images that it was made"),
        (config_of(photos, full), f"out={full} exists and is not a preparation: choose a new folder."),
        (config_of(tmp_path / "none", tmp_path / "x"), "none does not exist: give the folder of the images with data"),
    )
    for config, message in cases:
        with pytest.raises(UserError, match=re.escape(message)):
            prepare(config)


# -- damaged, or somebody else's


def test_an_image_of_a_shard_that_was_cut_is_reported(jpegs: Path, tmp_path: Path) -> None:
    """While a training uses it: its file is open, and shorter than it was."""
    train = prepared.read(Path(shutil.copytree(jpegs, tmp_path / "out")))["train"]
    os.truncate(train.files[0], 100)
    data = ImageDataset(train, SampleTransform(32), 0)
    message = r"train-00000.shard:dog/5.jpg cannot be read as an image \(its shard is shorter"
    with pytest.raises(UserError, match=message):
        data.fill([(11, 0)], data.allocate([(11, 0)]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about, arrays: arrays.update(targets=arrays["targets"][:9]), r"train.npz lists 9 images instead of 12"),
        (lambda about, arrays: arrays.update(ends=np.array([{}] * 12)), r"is not what `alexlab prepare` writes \("),
        (lambda about, arrays: about.pop("splits"), r"is not what `alexlab prepare` writes \('splits'\)"),
    ],
)
def test_a_prepared_folder_that_does_not_fit_itself_is_refused(
    change: Any, message: str, raw: Path, tmp_path: Path
) -> None:
    """Such as one whose arrays are cut, or hold Python objects."""
    out = Path(shutil.copytree(raw, tmp_path / "out"))
    about = json.loads((out / "prepared.json").read_text())
    with np.load(out / "train.npz") as held:
        arrays = dict(held)
    change(about, arrays)
    np.savez_compressed(out / "train.npz", **arrays)
    (out / "prepared.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=message):
        prepared.read(out)


# -- mean and std


def test_stats_are_mean_and_std_of_the_training_images(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each image counts alike, whatever its size; nothing is written."""
    random = np.random.default_rng(0)
    images = [random.integers(0, 40 * k + 50, (60, 50 + 20 * k, 3), dtype=np.uint8) for k in range(4)]
    for k, image in enumerate(images):
        for split in ("train", "val"):
            (tmp_path / split / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image // (1 + (split == "val"))).save(tmp_path / split / "ab"[k % 2] / f"{k}.png")
    (tmp_path / "train/a/broken.png").write_bytes(b"")
    prepare(config_of(tmp_path, None, stats=True))
    scaled = [image.reshape(-1, 3) / 255 for image in images]
    mean = np.mean([each.mean(0) for each in scaled], axis=0)
    std = np.sqrt(np.mean([(each**2).mean(0) for each in scaled], axis=0) - mean**2)
    words = [f"'model.{key}=[{','.join(f'{x:.4f}' for x in each)}]'" for key, each in (("mean", mean), ("std", std))]
    assert capfd.readouterr().out == f"mean and std of 4 training images: {' '.join(words)}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train", "val"]


def test_stats_of_arrays_have_a_number_for_each_channel(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 40, 40, 5), dtype=np.uint8)
    for split in ("train", "val"):
        np.save(tmp_path / f"{split}_images.npy", pixels)
        np.save(tmp_path / f"{split}_labels.npy", np.arange(6) % 2)
    prepare(config_of(tmp_path, None, {"_target_": "alexlab.data.arrays.Arrays"}, stats=True))
    expected = ",".join(f"{x:.4f}" for x in pixels.reshape(-1, 5).mean(0) / 255)
    assert f"'model.mean=[{expected}]'" in capfd.readouterr().out


def test_images_of_one_colour_have_no_std(tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / "train" / label).mkdir(parents=True)
        (tmp_path / "val" / label).mkdir(parents=True)
        for split in ("train", "val"):
            Image.new("RGB", (50, 50), (9, 9, 9)).save(tmp_path / split / label / "1.png")
    with pytest.raises(
        UserError,
        match=r"^model.std=\[0.0000,0.0000,0.0000\] must be above 0: all pixels of the training images have the same",
    ):
        prepare(config_of(tmp_path, None, stats=True))


def test_a_preparation_needs_a_folder(photos: Path) -> None:
    with pytest.raises(UserError, match=r"^`out` is missing: give a new folder with out=PATH.$"):
        prepare(config_of(photos, None))


def test_a_folder_that_is_not_prepared_is_no_prepared_data(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            photo(tmp_path / f"in/{split}/{name}/0.jpg")
    done = command("train.py", *TINY, "data=prepared", f"data.root={tmp_path / 'in'}", "data.batch_size=2")
    where = f"data.root={tmp_path / 'in'}"
    rule = f"give what alexlab prepare {where} out=PATH has written, or use data=folder."
    assert (done.returncode, done.stderr) == (2, f"error: `{where}` has no prepared.json: {rule}\n")
