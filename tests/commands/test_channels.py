"""Grey and RGBA images, and rectangles, from the files to the exported network."""

import csv
import json
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from conftest import ROOT, command, composed, photo, run_example, summary_of
from PIL import Image
from torchvision.transforms.v2 import functional as tv

import alexlab
from alexlab.commands import build
from alexlab.data.decode import Picture
from alexlab.data.transforms import SampleTransform
from alexlab.engine import validation
from alexlab.engine.devices import Devices
from alexlab.engine.errors import UserError
from alexlab.engine.schema import TrainConfig
from alexlab.engine.signals import SignalRecorder

NET = ("model=alexnet_half", "model.net.dropout=0")
SHORT = ("trainer.max_epochs=1", "trainer.limit_train_batches=2", "callbacks.figures=false", "test=false")
FIGURES = {"confusion_matrix", "curves", "filters", "neighbours", "per_class", "top5", "train_images"}


class Kind(NamedTuple):
    mode: str
    words: list[str]
    shape: tuple[int, int, int]
    endings: tuple[str, str]


KINDS = {
    "grey": Kind("L", ["model.in_channels=1", "data.image_size=[64,96]"], (1, 64, 96), ("png", "jpg")),
    "rgba": Kind("RGBA", ["model.in_channels=4", "data.image_size=64"], (4, 64, 64), ("png", "webp")),
}


def draw(path: Path, mode: str, place: int, seed: int) -> None:
    """A random picture in which the left, middle or right third is bright, or opaque: nothing else tells the class."""
    photo(path, (90, 70), seed=seed)
    band = np.zeros((70, 90), np.uint8)
    band[:, 30 * place : 30 * place + 30] = 255
    with Image.open(path) as opened:
        image = opened.convert(mode)
    if mode == "L":
        image = Image.fromarray((np.asarray(image) // 4 + band // 2).astype(np.uint8))
    else:
        image.putalpha(Image.fromarray(band))
    image.save(path)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def root(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(kind.mode)
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        for place, label in enumerate("abc"):
            for i in range(count):
                path = folder / split / label / f"{i}.{kind.endings[i % 2]}"
                draw(path, kind.mode, place, 100 * count + 20 * place + i)
    return folder


def train(root: Path, run_dir: Path, *words: str, net: tuple[str, ...] = NET) -> subprocess.CompletedProcess:
    """train.py with a small network; later words win."""
    return command(
        "train.py", *net, "data=folder", f"data.root={root}", "data.batch_size=6", "data.num_workers=0",
        "optimizer=adamw", "optimizer.lr=1e-3", "augment.flip=0", "trainer=cpu", "logger=csv",
        "trainer.max_epochs=6", "trainer.precision=32-true", f"hydra.run.dir={run_dir}", *words,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(kind: Kind, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs") / "train/runs/one"
    done = train(root, folder, *kind.words, "logger=wandb", "logger.wandb.mode=offline")
    assert done.returncode == 0, done.stderr
    assert "could not be logged" not in done.stdout + done.stderr
    return folder


def of_run(run_dir: Path, verb: str, *words: str) -> str:
    done = command(verb, f"run={run_dir}", f"paths.logs={run_dir.parents[2]}", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_learned_and_drawn(run_dir: Path) -> None:
    summary = summary_of(run_dir)
    assert summary["best"]["val/acc1"] == 1
    assert summary["test"]["test/acc1"] == 1
    assert {path.stem for path in (run_dir / "figures").iterdir()} >= FIGURES
    assert len(list(run_dir.glob("wandb/offline-*/files/media/table/test/mistakes*.json"))) == 1
    assert len(list(run_dir.glob("wandb/offline-*/files/media/images/images/train*.png"))) == 1


def test_eval_gives_the_runs_own_numbers(run_dir: Path) -> None:
    of_run(run_dir, "eval.py")
    result = json.loads((run_dir / "eval.json").read_text())
    assert {f"test/{key}": result[key] for key in ("loss", "acc1", "acc5")} == summary_of(run_dir)["test"]


def test_ten_crops_are_torchvisions(kind: Kind, root: Path, run_dir: Path) -> None:
    _, height, width = kind.shape
    of_run(run_dir, "eval.py", "crops=10")
    result = json.loads((run_dir / "eval-10crops.json").read_text())
    net, transform, classes = alexlab.load(run_dir)
    covered = SampleTransform((round(height / 0.875), round(width / 0.875)), crop_ratio=1.0, channels=kind.shape[0])
    losses = []
    for path in sorted((root / "test").rglob("*.*")):
        with Image.open(path) as opened:
            crops = tv.ten_crop(covered(Picture(opened)), [height, width])
        with torch.no_grad():
            mean = net(transform.normalize(torch.stack(crops))).softmax(1).mean(0)
        losses.append(-float(mean[classes.index(path.parent.name)].log()))
    assert result["loss_10crops"] == pytest.approx(sum(losses) / len(losses), rel=1e-3)


def test_predictions_figures_and_more_epochs(kind: Kind, root: Path, run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    of_run(run_dir, "predict", f"images={root / 'test'}", f"out={out}", "topk=1")
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [Path(row["path"]).parent.name for row in rows]
    net, transform, _ = alexlab.load(run_dir)
    for row in rows[::3]:
        with torch.no_grad():
            probability = float(net(transform(row["path"])[None]).softmax(1).max())
        assert float(row["probability"]) == pytest.approx(probability, abs=1e-4)
    of_run(run_dir, "figures", "among=5")
    if kind.mode == "RGBA":
        return  # more epochs are the same
    done = train(root, tmp_path / "next", f"init_from={run_dir}", *kind.words,
                 "trainer.max_epochs=1", "optimizer.lr=1e-6", "callbacks.figures=false")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert summary_of(tmp_path / "next")["best"]["val/acc1"] == 1
    done = command("train.py", f"resume={tmp_path / 'next'}", "trainer.max_epochs=2")
    assert done.returncode == 0, done.stderr
    assert summary_of(tmp_path / "next")["steps"] == 12


def test_the_documents_example_gives_the_runs_logits(kind: Kind, root: Path, run_dir: Path, tmp_path: Path) -> None:
    format = "onnx" if kind.mode == "L" else "torch_export"
    out = tmp_path / ("model.onnx" if format == "onnx" else "model.pt2")
    assert "12 of 12 top-1 classes are the same" in of_run(run_dir, "export", f"format={format}", f"out={out}")
    wide = tmp_path / "wide.png"
    draw(wide, kind.mode, 2, 7)
    with Image.open(wide) as image:
        image.resize((311, 90)).save(wide)
    paths = [*sorted(map(str, (root / "test").rglob("*.png"))), str(wide)]
    net, transform, classes = alexlab.load(run_dir)
    ran = run_example(format, paths, tmp_path)
    for path, (name, _, logits) in zip(paths, ran, strict=True):
        with torch.no_grad():
            expected = net(transform(path)[None]).numpy()
        np.testing.assert_allclose(
            logits, expected, rtol=0, atol=0.02
        )  # a few pixels are rounded otherwise by 1 of 255
        assert name == classes[int(expected.argmax())]
    about, (channels, height, width) = ran[0][1], kind.shape
    assert (about["mode"], about["height"], about["width"]) == (kind.mode, height, width)
    assert about["covered"] == [round(width / 0.875), round(height / 0.875)]
    assert about["image_size"] == (64 if height == width else [height, width])
    assert f"uint8 (B, {channels}, {height}, {width}) of 0 to 255, {kind.mode}" in about["input"]
    if format == "onnx":
        session = onnxruntime.InferenceSession(str(out))
        assert session.get_inputs()[0].shape == ["batch", *kind.shape]


def test_runs_of_several_shapes_are_compared(tmp_path: Path) -> None:
    """A setting may be a number in one run, and a list in another."""
    for name, size in (("square", 64), ("wide", [64, 80])):
        config = Path(shutil.copytree(ROOT / "tests/fixtures/runs/finished", tmp_path / name), "config.yaml")
        plain = yaml.safe_load(config.read_text())
        plain["data"]["image_size"] = size
        config.write_text(yaml.safe_dump(plain))
    done = command("compare", f"runs={tmp_path}", "format=json")
    assert done.returncode == 0, done.stderr
    settings = [group["settings"] for group in json.loads(done.stdout)["groups"]]
    assert sorted(map(str, settings)) == ["{'data.image_size': 64}", "{'data.image_size': [64, 80]}"]
    done = command("compare", f"runs={tmp_path}")
    assert "data.image_size=[64, 80]" in done.stdout


@pytest.fixture(scope="module")
def prepared(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("prepared")
    for format in ("jpeg", "raw"):
        words = [f"format={format}", "square=true", "short_side=80"]
        done = command("prepare", f"data.root={shapes}", f"out={folder / format}", *words)
        assert done.returncode == 0, done.stderr
    return {format: folder / format for format in ("jpeg", "raw")}


@pytest.mark.parametrize(
    ("data", "words", "message"),
    [
        ("files", ["model.in_channels=2", "model.mean=[0,0]", "model.std=[1,1]"],
         "`model.in_channels=2` must be 1 or 3 or 4 for the images of FOLDER."),
        ("raw", ["model.in_channels=1"], "`model.in_channels=1` must be 3 for the images of FOLDER."),
        ("jpeg", ["model.in_channels=4"], "`model.in_channels=4` must be 1 or 3 for the images of FOLDER."),
        ("files", ["model.in_channels=1", "augment=paper"], "`augment.pca=0.1` is noise of RGB"),
        ("files", ["model.in_channels=1", "augment=strong"], "`augment.policy=trivial` changes colours of RGB"),
        ("files", ["data.image_size=[32,96]"], "at least 64 pixels, and these have 32 x 96: set data.image_size=64"),
        ("files", ["model.in_channels=1", "model.net.in_channels=3"],
         "Can it take this `data.image_size` (or that of augment.sizes), and `model.in_channels=1`?"),
        ("files", ["data.image_size=[64,96]", "model=torchvision", "model.name=vit_b_32"],
         "fails on an image of 64 x 96 pixels"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_the_run_exists(
    data: str, words: list[str], message: str, shapes: Path, prepared: dict[str, Path]
) -> None:
    folder = prepared.get(data, shapes)
    net = () if "model=torchvision" in words else NET
    words = [*net, f"data={'folder' if data == 'files' else 'prepared'}", f"data.root={folder}", *words]

    def start() -> None:
        config = validation.validate(TrainConfig, composed(*words, "data.batch_size=6", "trainer=cpu"))
        build.build(config, Devices("cpu", 1, 1), SignalRecorder())

    with pytest.raises(UserError) as error:
        start()
    assert message.replace("FOLDER", str(folder)) in str(error.value)


def test_prepared_images_train_as_grey_and_as_rectangles(prepared: dict[str, Path], tmp_path: Path) -> None:
    losses = []
    device = ["data.crop_on=device", "data.image_size=[64,72]"]
    for i, words in enumerate((device, [*device, "data.cache=device"])):
        done = train(prepared["raw"], tmp_path / f"{i}", "data=prepared", *SHORT, *words)
        assert done.returncode == 0, done.stderr
        losses.append(summary_of(tmp_path / f"{i}")["last"]["val/loss"])
    assert losses[0] == losses[1]
    words = ["data=prepared", "data.image_size=64", "model.in_channels=1", *SHORT]
    done = train(prepared["jpeg"], tmp_path / "grey", *words)
    assert done.returncode == 0, done.stderr
