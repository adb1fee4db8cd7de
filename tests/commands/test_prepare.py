"""prepare.py: what it writes, that it goes on after a kill, and that training from it is like training."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, clean_env, command, photo, summary_of
from PIL import Image
from torchvision.transforms import v2

from alexlab.data.datamodule import ImageFolders
from alexlab.data.dataset import ImageDataset
from alexlab.data.fast import npz, prepared
from alexlab.data.loader import Loader
from alexlab.data.sampler import TrainBatches
from alexlab.data.transforms import SampleTransform
from alexlab.engine.errors import UserError


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, train and val; upright, wide, small and large ones, a PNG and a turned JPEG."""
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


def prepared_from(root: Path, out: Path, *words: str) -> subprocess.CompletedProcess:
    return command("prepare.py", f"data.root={root}", f"out={out}", "short_side=100", *words)


def names(index: prepared.PreparedIndex) -> list[str]:
    return [index.path(i).rpartition(":")[2] for i in range(len(index))]


def pixels(index: prepared.PreparedIndex, i: int) -> np.ndarray:
    return index.picture(i).pixels()[0]


def test_jpegs_are_scaled_down_and_small_ones_stay_as_they_are(photos: Path, tmp_path: Path) -> None:
    done = prepared_from(photos, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "train: 12 of 12 images in 1 shards\nval: 12 of 12 images in 1 shards\n" in done.stdout
    assert re.search(r"MB became .* MB \(0\.\d\d\), .* images/s", done.stdout)
    splits = prepared.read(tmp_path / "out")
    assert set(splits) == {"train", "val"}
    train = splits["train"]
    assert names(train) == [f"{label}/{i}" for label in ("cat", "dog") for i in
                            ("0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.png", "5.jpg")]  # fmt: skip
    assert train.classes == ("cat", "dog")
    assert train.targets.tolist() == [0] * 6 + [1] * 6
    sizes = [(133, 100), (100, 216), (90, 70), (140, 100), (123, 100), (100, 150)]
    for i, size in enumerate(sizes):
        assert train.picture(i).size == size
        with Image.open(photos / "train" / names(train)[i]) as source:
            shown = v2.functional.resize(_upright(source), [min(size)])
        assert np.abs(pixels(train, i).astype(float) - np.asarray(shown)).mean() < 4, "JPEG's own loss"
    small = photos / "train/cat/2.jpg"
    at, length = int(train.arrays["offsets"][2]), int(train.arrays["sizes"][2])
    assert train.files[0].read_bytes()[at : at + length] == small.read_bytes()
    assert train.arrays["source_widths"].tolist()[:6] == [200, 120, 90, 700, 160, 140]
    assert train.arrays["source_heights"].tolist()[:6] == [150, 260, 70, 500, 130, 210]


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.exif_transpose(image).convert("RGB")


@pytest.mark.parametrize("square", [False, True])
def test_raw_pixels_are_torchvisions(photos: Path, tmp_path: Path, square: bool) -> None:
    done = prepared_from(photos, tmp_path / "out", "format=raw", f"square={square}")
    assert done.returncode == 0, done.stderr
    train = prepared.read(tmp_path / "out")["train"]
    for i, name in enumerate(names(train)):
        with Image.open(photos / "train" / name) as source:
            small = name.endswith("2.jpg") and not square
            expected = _upright(source) if small else v2.functional.resize(_upright(source), [100])
            expected = v2.functional.center_crop(expected, [100, 100]) if square else expected
        assert pixels(train, i).shape == np.asarray(expected).shape
        # decoded at half its scale, and turned after it was scaled, which rounds the other way round
        most = {"3.jpg": 2.0, "5.jpg": 0.2}.get(name[-5:], 0.05)
        assert np.abs(pixels(train, i).astype(float) - np.asarray(expected)).mean() < most


@pytest.mark.parametrize("form", ["jpeg", "raw"])
def test_training_and_all_else_takes_it_for_a_folder(photos: Path, tmp_path: Path, form: str) -> None:
    out = tmp_path / "out"
    (tmp_path / "names.tsv").write_text("cat\tHouse cat\n")
    done = prepared_from(photos, out, f"format={form}", f"data.class_names={tmp_path / 'names.tsv'}")
    assert done.returncode == 0, done.stderr
    words = [*TINY, "data=prepared", f"data.root={out}", "data.batch_size=4", "trainer.max_epochs=1",
             "data.num_workers=2", "callbacks.figures=true", f"hydra.run.dir={tmp_path / 'run'}"]  # fmt: skip
    done = command("train.py", *words)
    assert done.returncode == 0, done.stderr
    assert summary_of(tmp_path / "run")["dataset"]["images"] == {"train": 12, "val": 12}
    assert len(list((tmp_path / "run/figures").glob("*.png"))) >= 7
    logs = f"paths.logs={tmp_path}"
    done = command("eval.py", f"run={tmp_path / 'run'}", logs)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run/eval.json").read_text())
    assert found["acc1"] == summary_of(tmp_path / "run")["test"]["test/acc1"]
    assert "House cat" in found["per_class_acc1"]
    done = command("export.py", f"run={tmp_path / 'run'}", "format=torch_export", logs)
    assert done.returncode == 0, done.stderr


def test_batches_are_those_of_the_folder_in_any_number_of_threads(photos: Path, tmp_path: Path) -> None:
    """The order and the crops are the folder's, as names and classes are."""
    assert prepared_from(photos, tmp_path / "out", "format=raw").returncode == 0
    train = prepared.read(tmp_path / "out")["train"]
    data = ImageDataset(train, SampleTransform(64, "random_resized", flip=0.5), seed=1)
    whole = list(Loader(data, TrainBatches(12, 5, 1)))
    for workers in (1, 2, 5):
        for one, other in zip(whole, Loader(data, TrainBatches(12, 5, 1), workers), strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.targets, other.targets)


def test_a_folder_is_split_as_in_training(photos: Path, tmp_path: Path) -> None:
    done = prepared_from(photos / "train", tmp_path / "out", "data.val_fraction=0.3", "seed=4")
    assert done.returncode == 0, done.stderr
    plain = SampleTransform(64)
    trained = ImageFolders(str(photos / "train"), 1, 4, plain, plain, val_fraction=0.3).read()
    for split, index in prepared.read(tmp_path / "out").items():
        folder = trained.splits[split]
        assert [str(photos / "train" / name) for name in names(index)] == [folder.path(i) for i in range(len(folder))]
    again = ImageFolders(str(tmp_path / "out"), 1, 4, plain, plain, val_fraction=0.3)
    with pytest.raises(UserError, match=r"val_fraction=0.3, .* were split when they were prepared: leave them out"):
        again.read()


def test_broken_files_are_left_out_counted_and_listed(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "in")
    raw = (tmp_path / "in/train/cat/0.jpg").read_bytes()
    (tmp_path / "in/train/cat/0.jpg").write_bytes(raw[: len(raw) // 2])
    (tmp_path / "in/val/dog/2.jpg").write_bytes(b"none")
    done = prepared_from(tmp_path / "in", tmp_path / "out", "num_workers=3")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "2 images could not be read, and are left out:\n" in done.stderr
    for name in ("train/cat/0.jpg", "val/dog/2.jpg"):
        assert f"{tmp_path / 'in' / name} cannot be read as an image (" in done.stderr
    assert "train: 11 of 12 images" in done.stdout
    splits = prepared.read(tmp_path / "out")
    assert len(splits["train"]) == len(splits["val"]) == 11
    assert "cat/0.jpg" not in names(splits["train"])
    assert len(prepared.about(tmp_path / "out")["broken"]) == 2
    for path in (tmp_path / "in/val/cat").iterdir():
        path.write_bytes(b"none")
    done = prepared_from(tmp_path / "in", tmp_path / "less")
    assert "  without an image there: cat\n" in done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".npz"}


def test_a_killed_preparation_goes_on_where_it_was(photos: Path, tmp_path: Path) -> None:
    words = ["shard_mb=0.000001", "num_workers=1"]  # an image a shard
    assert prepared_from(photos, tmp_path / "whole", *words).returncode == 0
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, "prepare.py", f"data.root={photos}", f"out={out}", "short_side=100", *words],
        cwd=ROOT, env=clean_env(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.wait(120) == -signal.SIGKILL
    assert not prepared.is_prepared(out)
    with pytest.raises(UserError, match="holds no train/ folder"):
        ImageFolders(str(out), 1, 0, SampleTransform(8), SampleTransform(8)).read()
    done = prepared_from(photos, out, *words)
    assert done.returncode == 0, done.stderr
    assert "train: going on after 5 of 12 images" in done.stdout
    assert contents(out) == contents(tmp_path / "whole")
    for ours, theirs in zip(prepared.read(out).values(), prepared.read(tmp_path / "whole").values(), strict=True):
        assert ours.fingerprint() == theirs.fingerprint()
        assert all(np.array_equal(ours.arrays[key], theirs.arrays[key]) for key in ours.arrays)


KILLED = """
import os, runpy, signal, sys
sys.path.insert(0, os.getcwd())
from alexlab.commands import prepare
write, done = prepare.write_shard, []

def write_and_end(*words):
    done.append(0)
    if len(done) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*words)

prepare.write_shard = write_and_end
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_whole_preparation_is_checked_when_it_is_asked_for_again(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert prepared_from(photos, out).returncode == 0
    done = prepared_from(photos, out)
    assert (done.returncode, done.stdout) == (
        0,
        f"{out} is whole, and its checksums are right: train 12, val 12 images.\n",
    )
    shard = out / "train-00000.shard"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    done = prepared_from(photos, out)
    assert done.returncode == 1
    assert f"{shard} is not as it was written: remove {out} and prepare it anew." in done.stderr
    shard.write_bytes(raw[:-1])
    with pytest.raises(UserError, match=rf"{shard} has {len(raw) - 1:,} bytes instead of {len(raw):,}: copy it again"):
        prepared.read(out)
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard} is missing: copy it again"):
        prepared.read(out)
    (out / "prepared.json").write_text('{"version": 99}')
    with pytest.raises(UserError, match=r"was prepared in form 99, and this is for form 1: prepare it anew"):
        prepared.read(out)
    (out / "prepared.json").write_text("{")
    with pytest.raises(UserError, match=r"prepared.json cannot be read .*: prepare the images anew with prepare.py"):
        prepared.read(out)


def test_mistakes(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert prepared_from(photos, out).returncode == 0
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").touch()
    for root, to, words, told in (
        (
            photos,
            out,
            ["quality=80"],
            "was prepared from other images or in another way (recipe): remove it, or choose",
        ),
        (photos / "train", out, ["data.val_fraction=0.5"], "from other images or in another way (source)"),
        (photos, photos / "out", [], f"lies within data.root={photos}, which is left as it is: choose another place."),
        (out, tmp_path / "two", [], "is a prepared folder already: give the images that it was made from."),
        (photos, full, [], f"out={full} exists and is not a preparation: choose a new folder."),
        (photos, tmp_path / "x", ["format=png"], "format=png: must be one of jpeg, raw"),
        (
            tmp_path / "none",
            tmp_path / "x",
            [],
            "none does not exist: give the folder of the images with data.root=PATH",
        ),
    ):
        done = prepared_from(root, to, *words)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
        assert told in done.stderr
    done = command("prepare.py", f"data.root={photos}")
    assert "out is missing: give a new folder with out=PATH." in done.stderr


def test_an_image_of_a_shard_that_was_cut_is_named(photos: Path, tmp_path: Path) -> None:
    """While a training runs: its file is open, and shorter than it was."""
    assert prepared_from(photos, tmp_path / "out").returncode == 0
    train = prepared.read(tmp_path / "out")["train"]
    os.truncate(train.files[0], 100)
    data = ImageDataset(train, SampleTransform(32), 0)
    with pytest.raises(
        UserError, match=r"train-00000.shard:dog/5.jpg cannot be read as an image \(its shard is shorter"
    ):
        data.fill([(11, 0)], data.room([(11, 0)]))


@pytest.fixture(scope="module")
def raw(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("raw") / "out"
    assert prepared_from(photos, out, "format=raw").returncode == 0
    return out


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda about, arrays: arrays.update(targets=arrays["targets"] + 9), r"targets of train are not from 0 to 1"),
        (lambda about, arrays: arrays.update(shards=arrays["shards"] - 1), r"shards of train are not from 0 to 0"),
        (lambda about, arrays: arrays.update(offsets=arrays["offsets"] - 1), r"images of train lie outside"),
        (lambda about, arrays: arrays.update(offsets=arrays["offsets"] + 10**6), r"images of train lie outside"),
        (lambda about, arrays: arrays.update(heights=arrays["heights"] + 1), r"other sizes than their pixels"),
        (lambda about, arrays: arrays.update(ends=arrays["ends"][::-1].copy()), r"names of train do not fit"),
        (lambda about, arrays: arrays.update(sizes=arrays["sizes"] / 1.0), r"sizes of train are not 12 whole numbers"),
        (lambda about, arrays: arrays.pop("targets"), r"is not what prepare.py writes \("),
        (lambda about, arrays: arrays.update(names=np.zeros(10**8, np.uint8)), r"would unpack to more than its images"),
        (
            lambda about, arrays: about.update(format="other"),
            r"is not what prepare.py writes \(its format is 'other'\)",
        ),
        (
            lambda about, arrays: about.update(classes=[1, 2]),
            r"is not what prepare.py writes \(its classes are no names",
        ),
        (lambda about, arrays: about.update(splits=[1]), r"is not what prepare.py writes \("),
        (
            lambda about, arrays: (
                about["splits"]["train"].update(images=10**9),
                arrays.update(names=np.zeros(2 * 10**8, np.uint8)),
            ),
            r"would unpack to more than its images",
        ),
        (lambda about, arrays: about.pop("splits"), r"is not what prepare.py writes \('splits'\)"),
        (
            lambda about, arrays: about["splits"]["train"]["shards"][0].update(file="../secret.bin"),
            r"train: ../secret.bin lies elsewhere",
        ),
    ],
)
def test_a_prepared_folder_of_somebody_else(change: Any, told: str, raw: Path, tmp_path: Path) -> None:
    """Whose arrays lead elsewhere: into other files, other memory, or none."""
    out = Path(shutil.copytree(raw, tmp_path / "out"))
    about = json.loads((out / "prepared.json").read_text())
    with np.load(out / "train.npz") as held:
        arrays = dict(held)
    change(about, arrays)
    np.savez_compressed(out / "train.npz", **arrays)
    (out / "prepared.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=told):
        prepared.read(out)


def test_arrays_that_claim_to_be_larger_than_they_are(tmp_path: Path) -> None:
    """NumPy would make room for them first."""
    path = tmp_path / "train.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (10**14,)})
    for name, raw in (("targets.npy", header.getvalue()), ("targets.npy", b"x"), ("x", b"")):
        with zipfile.ZipFile(path, "w") as packed:
            packed.writestr(name, raw)
        with pytest.raises(npz.BROKEN):
            npz.check(path, 10**6)
    np.savez(path, a=np.arange(5), b=np.zeros((2, 3)), c=np.float32(1), d=np.zeros(0))
    npz.check(path, 10**6)
    (tmp_path / "prepared.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"prepared.json cannot be read \(maximum recursion"):
        prepared.read(tmp_path)
    os.truncate(tmp_path / "prepared.json", 2**27)
    with pytest.raises(UserError, match=r"prepared.json cannot be read \(it has more than 67108864 bytes"):
        prepared.read(tmp_path)
