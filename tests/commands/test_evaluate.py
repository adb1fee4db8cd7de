"""Evaluation of a run: its own numbers, other folders, and what it refuses."""

import csv
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, command, summary_of, tiny_train
from omegaconf import OmegaConf
from PIL import Image, ImageOps
from resuming import Harness
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import ten_crop

import alexlab
from alexlab.commands.evaluate import Crops, Prediction, Predictions
from alexlab.data.decode import Picture
from alexlab.data.transforms import SampleTransform
from alexlab.engine.errors import UserError
from alexlab.engine.run_dir import find_run


@pytest.fixture(scope="module")
def data(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(shapes, tmp_path_factory.mktemp("evaluate") / "data"))


@pytest.fixture(scope="module")
def run_dir(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs") / "train/runs/one"
    assert tiny_train(data, folder).returncode == 0
    return folder


def evaluated(run_dir: Path, *words: str):  # type: ignore[no-untyped-def]
    return command("eval.py", f"paths.logs={run_dir.parents[2]}", *words)


def result_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "eval.json").read_text())


def with_config(run_dir: Path, copy: Path, **values: Any) -> Path:
    """Copy a run, and change values of its config: `data__batch_size=4`."""
    shutil.copytree(run_dir, copy)
    config = OmegaConf.load(copy / "config.yaml")
    for key, value in values.items():
        assert OmegaConf.select(config, key.replace("__", "."), default="missing") != "missing"
        OmegaConf.update(config, key.replace("__", "."), value)
    OmegaConf.save(config, copy / "config.yaml")
    return copy


def test_a_run_is_found_by_name_and_as_the_latest(run_dir: Path) -> None:
    for named in ("one", "latest"):
        done = evaluated(run_dir, f"run={named}")
        assert done.returncode == 0, done.stderr
        assert "one (finished)" in done.stdout
        assert done.stderr == ""
        result = result_of(run_dir)
        assert {f"test/{key}": result[key] for key in ("loss", "acc1", "acc5")} == summary_of(run_dir)["test"]
        assert (result["images"], len(result["per_class_acc1"])) == (10, 10)


def test_the_report_has_a_table_of_classes_and_the_temperature_is_fitted_on_val(
    run_dir: Path, data: Path, tmp_path: Path
) -> None:
    done = evaluated(run_dir, "run=one")
    assert done.returncode == 0, done.stderr
    result = result_of(run_dir)
    assert re.search(r"with a temperature: 0\.\d+ \(temperature [\d.]+, fitted on val\)\nwritten to ", done.stdout)
    classes = result["classes"]
    assert [each["support"] for each in classes.values()] == [1] * 10
    assert {name: each["recall"] for name, each in classes.items()} == result["per_class_acc1"]
    assert result["calibration"]["fitted_on"] == "val"
    assert not result["calibration"]["optimistic"]
    page = (run_dir / "report.html").read_text()
    captions = re.findall("<figcaption>(.*?)</figcaption>", page)
    wanted = "curves|confusion matrix|per class|mistakes|precision recall|roc|reliability|grad cam"
    assert captions == wanted.split("|")

    # another folder: the temperature of the run
    kept = json.loads((run_dir / "temperature.json").read_text())
    best = hashlib.sha256((run_dir / "checkpoints/best.ckpt").read_bytes()).hexdigest()
    assert kept[best]["images"] == len(list((data / "val").rglob("*.*")))
    assert kept[best]["temperature"] == result["calibration"]["temperature"]
    done = evaluated(run_dir, "run=one", f"data.root={data}")
    assert f"(temperature {kept[best]['temperature']:.3f}, fitted on val)" in done.stdout
    only_val = tmp_path / "only"
    shutil.copytree(data / "val", only_val / "val")
    done = evaluated(run_dir, "run=one", f"data.root={only_val}")
    assert "fitted on val, so optimistic)" in done.stdout, "the images of the fit, under whatever name"
    wrong = evaluated(run_dir, "run=one", f"data.root={only_val}", "split=test")
    assert (wrong.returncode, "has no test images. Use split=val" in wrong.stderr) == (2, True)
    wrong = evaluated(run_dir, "run=one", f"data.root={data}", "split=val")
    assert wrong.returncode == 2
    assert "has no val images to test, only test: remove split, or give another folder with data.root=" in wrong.stderr

    # val: optimistic, as the page says
    done = evaluated(run_dir, "run=one", "split=val", "crops=2")
    assert "fitted on val, so optimistic)" in done.stdout
    assert "so optimistic" in (run_dir / "report-val-2crops.html").read_text()
    assert json.loads((run_dir / "temperature.json").read_text()) == kept, "that of single crops is kept"

    # other weights have another temperature, which nobody has fitted
    copy = Path(shutil.copytree(run_dir, tmp_path / "logs/train/runs/copy"))
    for wrong in ({"0" * 64: kept[best]}, {best: {"temperature": 0.0}}, {best: 5}, [1]):
        (copy / "temperature.json").write_text(json.dumps(wrong))
        done = evaluated(copy, "run=copy", f"data.root={data}")
        assert done.returncode == 0, done.stderr
        assert "temperature" not in done.stdout
    assert json.loads((copy / "eval.json").read_text())["calibration"] is None
    assert "report.html" not in evaluated(copy, "run=copy", "report=false").stdout
    (copy / "metrics.csv").write_bytes(b"\xff\xfe\x00")
    done = evaluated(copy, "run=copy")
    assert done.returncode == 0, done.stderr
    assert "no curves: " in (copy / "report.html").read_text()


def test_the_latest_is_the_newest_with_that_checkpoint(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir.parents[1], tmp_path / "train")
    failed = tmp_path / "train/runs/two"
    failed.mkdir()
    shutil.copy(run_dir / "config.yaml", failed)
    (failed / "summary.json").write_text(json.dumps({"status": "failed", "error": "ValueError: x"}))
    assert find_run("latest", tmp_path) == tmp_path / "train/runs/one"
    shutil.rmtree(tmp_path / "train/runs/one")
    with pytest.raises(UserError, match=r"no run has a best\.ckpt yet\. The newest, .*two: ValueError: x"):
        find_run("latest", tmp_path)


def test_a_folder_of_images_alone(run_dir: Path, data: Path, tmp_path: Path) -> None:
    done = evaluated(run_dir, f"run={run_dir}", f"data.root={data / 'val'}")
    assert done.returncode == 0, done.stderr
    assert result_of(run_dir)["images"] == 21
    shutil.copytree(data / "val", tmp_path / "part/test")
    shutil.rmtree(tmp_path / "part/test/ring")
    done = evaluated(run_dir, f"run={run_dir}", f"data.root={tmp_path / 'part'}")
    assert done.returncode == 0, done.stderr
    assert "note: test contains no image of ring" in done.stdout
    result = result_of(run_dir)
    assert (result["images"], result["per_class_acc1"]["ring"]) == (19, None)
    circles = evaluated(run_dir, f"run={run_dir}", f"data.root={data / 'val'}")
    assert circles.returncode == 0
    assert result["per_class_acc1"]["circle"] == result_of(run_dir)["per_class_acc1"]["circle"], (
        "by name, not by number"
    )


def test_changed_images_are_reported(run_dir: Path, data: Path) -> None:
    extra = data / "test/ring/more.jpg"
    shutil.copy(data / "test/ring/0000.jpg", extra)
    try:
        done = evaluated(run_dir, f"run={run_dir}")
    finally:
        extra.unlink()
    assert done.returncode == 0
    assert "note: the files of test in" in done.stdout
    assert "are not those of the training any more" in done.stdout


def test_classes_without_an_image_have_no_accuracy(run_dir: Path, tmp_path: Path) -> None:
    copy = with_config(run_dir, tmp_path / "run", trainer__limit_test_batches=1, data__batch_size=4)
    done = command("eval.py", f"run={copy}", f"paths.logs={tmp_path}")
    assert done.returncode == 0, done.stderr
    accuracies = result_of(copy)["per_class_acc1"].values()
    assert sum(accuracy is not None for accuracy in accuracies) == 4, "a part of the test images mixes the classes"


def rows_of_csv(run_dir: Path, name: str = "eval.csv") -> dict[str, dict[str, str]]:
    with (run_dir / name).open(newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def test_the_prediction_of_each_image_is_kept_by_path(run_dir: Path, data: Path, tmp_path: Path) -> None:
    """Also of broken images between the others, and with the interval that SciPy calculates."""
    images = Path(shutil.copytree(data, tmp_path / "data"))
    broken = next(images.glob("test/*/*.*"))
    broken.write_bytes(b"broken")
    words = [f"data.root={images}", "data.on_error=skip"]
    done = command("eval.py", f"run={run_dir}", f"paths.logs={tmp_path}", *words)
    assert done.returncode == 0, done.stderr
    rows, result = rows_of_csv(run_dir), result_of(run_dir)
    files = [path for path in images.glob("test/*/*.*") if path != broken]
    assert sorted(rows) == sorted(str(path.relative_to(images)) for path in files)
    assert all(row["class"] == Path(path).parent.name for path, row in rows.items())
    net, transform, classes = alexlab.load(run_dir)
    logits = {path: net(transform(images / path)[None])[0] for path in rows}
    assert {path: row["predicted"] for path, row in rows.items()} == {
        path: classes[int(each.argmax())] for path, each in logits.items()
    }
    for path, row in rows.items():
        assert float(row["probability"]) == pytest.approx(logits[path].softmax(0).max().item(), abs=0.02), "bf16"
    hits = sum(row["class"] == row["predicted"] for row in rows.values())
    assert result["acc1"] == pytest.approx(hits / len(rows))
    interval = stats.binomtest(hits, len(rows)).proportion_ci(0.95, "wilson")
    assert result["acc1_interval"] == pytest.approx([interval.low, interval.high], abs=1e-9)
    assert re.search(rf"acc1 +{hits / len(rows):.4f} +\(95 %: {interval.low:.4f} to {interval.high:.4f}\)", done.stdout)


def test_two_runs_are_compared_on_the_same_images(run_dir: Path, data: Path, tmp_path: Path) -> None:
    """By the images on which one alone is right. The numbers are those of the files that each run's own test writes."""
    other = tmp_path / "other"
    assert tiny_train(data, other, "seed=5", "optimizer.lr=0.05").returncode == 0
    for each in (run_dir, other):
        assert command("eval.py", f"run={each}", f"paths.logs={tmp_path}").returncode == 0
    a, b = (
        {path: row["class"] == row["predicted"] for path, row in rows_of_csv(run).items()} for run in (run_dir, other)
    )
    only = [sum(x[path] and not y[path] for path in x) for x, y in ((a, b), (b, a))]
    p = stats.binomtest(only[0], sum(only)).pvalue if sum(only) else 1
    done = command("eval.py", f"run={run_dir}", f"against={other}", f"paths.logs={tmp_path}")
    assert done.returncode == 0, done.stderr
    about = {"run": str(other), "acc1": sum(b.values()) / len(b), "only_this": only[0], "only_other": only[1]}
    result = result_of(run_dir)["against"]
    assert result.pop("p") == pytest.approx(p)
    assert result == about
    about_noise = f"only the other one on {only[1]}: p={p:.2g} (McNemar), within noise"
    assert f"against {other}: acc1 {about['acc1']:.4f}; only this run is right on " in done.stdout
    assert f"{about_noise}.\n" in done.stdout
    assert about_noise in (run_dir / "report.html").read_text()
    shutil.copytree(data, tmp_path / "fewer")
    next(tmp_path.glob("fewer/test/*/*.*")).unlink()
    plain = OmegaConf.load(other / "config.yaml")
    plain.data.root = str(tmp_path / "fewer")
    OmegaConf.save(plain, other / "config.yaml")
    done = command("eval.py", f"run={run_dir}", f"against={other}", f"paths.logs={tmp_path}")
    assert done.returncode == 2
    assert f"`against={other}`: {run_dir} was tested on 10 images and {other} on 9, which are not the sa" in done.stderr
    assert "acc1 " in done.stdout, "the run's own numbers are not lost"
    assert "against" not in result_of(run_dir)
    assert "McNemar" not in (run_dir / "report.html").read_text()
    done = command("eval.py", f"run={run_dir}", "against=nope", f"paths.logs={tmp_path}")
    assert "`against=nope` is not a run's directory" in done.stderr

    # the same names, and another picture
    shutil.copytree(data, tmp_path / "changed")
    with next(tmp_path.glob("changed/test/*/*.*")).open("ab") as file:
        file.write(b"more")
    plain.data.root = str(tmp_path / "changed")
    OmegaConf.save(plain, other / "config.yaml")
    done = command("eval.py", f"run={run_dir}", f"against={other}", f"paths.logs={tmp_path}")
    assert f"`against={other}`: {run_dir} was tested on 10 images and {other} on 10, which are not the s" in done.stderr


def test_an_image_that_a_table_lists_twice_counts_twice() -> None:
    """As in the accuracy of the test."""
    predictions = Predictions()
    predictions.rows = [
        ("a.jpg", Prediction(0, 0, 0.9)),
        ("a.jpg", Prediction(0, 0, 0.9)),
        ("b.jpg", Prediction(1, 0, 0.6)),
    ]
    assert predictions.hits == 2
    assert predictions.right(["cat", "dog"]) == {
        ("a.jpg", "cat", 1): True,
        ("a.jpg", "cat", 2): True,
        ("b.jpg", "dog", 1): False,
    }


def test_a_run_of_two_ranks_is_evaluated_by_one_process(data: Path, tmp_path: Path) -> None:
    """In the same batches, so that the same numbers come out bit for bit."""
    done = tiny_train(data, tmp_path / "run", "trainer.devices=2", "trainer.max_epochs=2")
    assert done.returncode == 0, done.stderr
    done = command("eval.py", f"run={tmp_path / 'run'}", f"paths.logs={tmp_path}")
    assert done.returncode == 0, done.stderr
    result = result_of(tmp_path / "run")
    assert result["images"] == 10
    assert {f"test/{key}": result[key] for key in ("loss", "acc1", "acc5")} == summary_of(tmp_path / "run")["test"]
    assert len(rows_of_csv(tmp_path / "run")) == 10
    assert all(row["class"] == Path(path).parent.name for path, row in rows_of_csv(tmp_path / "run").items())


def test_a_split_by_fraction_is_found_in_a_moved_folder(shapes: Path, tmp_path: Path) -> None:
    """If the run's own images have changed, the test is refused; in another folder, all images are tested then."""
    root, run_dir = Path(shutil.copytree(shapes / "train", tmp_path / "all")), tmp_path / "run"
    assert tiny_train(root, run_dir, "data.val_fraction=0.25").returncode == 0
    wanted = ["eval.py", f"run={run_dir}", f"paths.logs={tmp_path}", "report=false"]
    assert command(*wanted).returncode == 0
    before = result_of(run_dir)
    assert before["images"] == 10
    moved = Path(shutil.copytree(root, tmp_path / "moved"))
    done = command(*wanted, f"data.root={moved}")
    assert done.returncode == 0, done.stderr
    assert result_of(run_dir) == {**before, "root": str(moved)}
    for folder in (root, moved):
        shutil.copy(folder / "ring/0000.jpg", folder / "ring/more.jpg")
    done = command(*wanted)
    assert done.returncode == 2
    assert "splits them differently and training images would be tested" in done.stderr
    done = command(*wanted, f"data.root={moved}")
    assert done.returncode == 0, done.stderr
    assert "has different images: all of them are tested, so they must not include training images" in done.stdout
    assert result_of(run_dir)["images"] == 41


def test_a_sweeps_job_from_another_machine_without_a_test_is_tested_whole(run_dir: Path, tmp_path: Path) -> None:
    """The folder of logs of the other machine is not created."""
    changed = {"trainer__limit_test_batches": 0, "paths__logs": str(tmp_path / "other")}
    folder = with_config(run_dir, tmp_path / "train/multiruns/sweep/0", **changed)
    done = command("eval.py", "run=sweep/0", f"paths.logs={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert result_of(folder)["images"] == 10
    assert not (tmp_path / "other").exists()


def test_ten_crops_are_the_papers(run_dir: Path, data: Path) -> None:
    """Against torchvision's ten crops of the 73 pixel square, of which the net sees 64."""
    done = evaluated(run_dir, "run=one", "crops=10", "trainer.precision=32-true")
    assert done.returncode == 0, done.stderr
    assert "10 images of test, best.ckpt, ten crops each" in done.stdout
    crops10 = run_dir / "eval-10crops.json"
    result = json.loads(crops10.read_text())
    net, transform, classes = alexlab.load(run_dir)
    square = SampleTransform(73, crop_ratio=1.0)
    losses, hits = [], []
    for path in sorted((data / "test").glob("*/*.jpg")):
        with Image.open(path) as opened:
            crops = v2.functional.ten_crop(square(Picture(opened)), [64, 64])
        with torch.no_grad():
            mean = net(transform.normalize(torch.stack(crops))).softmax(1).mean(0)
        target = classes.index(path.parent.name)
        losses.append(-float(mean[target].log()))
        hits.append(int(mean.argmax()) == target)
    assert not {"acc1", "loss", "acc5"} & set(result), "they have other names"
    assert "acc1_10crops" in done.stdout
    assert (result["crops"], result["acc1_10crops"]) == (10, pytest.approx(sum(hits) / 10))
    assert result["loss_10crops"] == pytest.approx(sum(losses) / 10, rel=1e-4)


class Confident(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[0.0, 300.0]]).expand(len(images), 2)


def test_ten_crops_of_a_confident_and_wrong_network_give_a_finite_loss() -> None:
    logits = Crops(Confident(), lambda images: ten_crop(images, [4, 4]))(torch.zeros(3, 3, 6, 6))
    torch.testing.assert_close(logits, torch.tensor([[-300.0, 0.0]]).expand(3, 2))


def test_ten_crops_need_pixels_around_the_center(run_dir: Path, tmp_path: Path) -> None:
    folder = with_config(run_dir, tmp_path / "train/runs/whole", augment__crop_ratio=1)
    done = evaluated(folder, "run=whole", "crops=10")
    assert done.returncode == 2
    assert "`crops=10` needs pixels around the 64 that the network sees" in done.stderr
    assert "the run's augment.crop_ratio=1 leaves none: use crops=1 or 2" in done.stderr


def test_two_crops_are_the_image_and_its_mirror_image(run_dir: Path, data: Path) -> None:
    done = evaluated(run_dir, "run=one", "crops=2", "split=val", "trainer.precision=32-true")
    assert done.returncode == 0, done.stderr
    assert "21 images of val, best.ckpt, each and its mirror image" in done.stdout
    result = json.loads((run_dir / "eval-val-2crops.json").read_text())
    net, transform, classes = alexlab.load(run_dir)
    losses = []
    for path in sorted((data / "val").glob("*/*.jpg")):
        with Image.open(path) as opened:
            mirrored = ImageOps.mirror(opened)
            views = torch.stack([transform(opened), transform(mirrored)])
        with torch.no_grad():
            losses.append(-float(net(views).softmax(1).mean(0)[classes.index(path.parent.name)].log()))
    assert (result["split"], result["crops"]) == ("val", 2)
    assert result["loss_2crops"] == pytest.approx(sum(losses) / len(losses), rel=1e-3)


def test_a_split_that_the_images_do_not_have_is_refused(run_dir: Path, data: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(data, tmp_path / "images"))
    shutil.rmtree(other / "test")
    done = evaluated(run_dir, "run=one", f"data.root={other}", "split=test")
    assert done.returncode == 2
    assert f"`split=test`: {other} has no test images. Use split=val." in done.stderr


def test_a_run_from_elsewhere_writes_nowhere_else(run_dir: Path, data: Path, tmp_path: Path) -> None:
    """Neither drawn images where its config says, nor through links that its directory has."""
    run_dir, precious = Path(shutil.copytree(run_dir, tmp_path / "run")), tmp_path / "precious"
    precious.write_text("mine")
    for name in ("eval.json.tmp", ".predictions.csv.tmp"):
        (run_dir / name).symlink_to(precious)
    assert command("eval.py", f"run={run_dir}").returncode == 0
    assert command("predict", f"run={run_dir}", f"images={data}/val").returncode == 0
    own = (run_dir / "config.yaml").read_text()
    config = OmegaConf.load(run_dir / "config.yaml")
    config.data.demo_seed, config.data.root = 0, str(tmp_path / "elsewhere")
    OmegaConf.save(config, run_dir / "config.yaml")
    assert command("eval.py", f"run={run_dir}").returncode == 2
    assert not (tmp_path / "elsewhere").exists()
    config.data.root = f"{ROOT}/data/{os.path.relpath(tmp_path / 'elsewhere', ROOT / 'data')}"
    OmegaConf.save(config, run_dir / "config.yaml")
    assert command("eval.py", f"run={run_dir}").returncode == 2
    assert not (tmp_path / "elsewhere").exists(), "below data/ by its spelling alone"
    (run_dir / "config.yaml").write_text(own)
    (run_dir / "train.log").unlink()
    (run_dir / "train.log").symlink_to(precious)
    done = command("train.py", f"resume={run_dir}", "trainer.max_epochs=2")
    assert done.returncode == 2
    assert "train.log: that is a link, through which nothing is written" in done.stderr
    assert precious.read_text() == "mine"


def test_ignored_files_are_reported(run_dir: Path, data: Path, tmp_path: Path) -> None:
    other = shutil.copytree(data / "val", tmp_path / "other")
    (next(other.iterdir()) / "x.heic").touch()
    done = evaluated(run_dir, "run=one", f"data.root={other}")
    assert done.returncode == 0, done.stderr
    assert f"note: {other}: files without the suffix of an image are ignored: 1 .heic" in done.stdout


@pytest.mark.parametrize(("split", "on_nan"), [("train", "stop"), ("train", "skip"), ("val", "stop")])
def test_a_split_that_is_broken_as_a_whole(split: str, on_nan: str, harness: Harness, tmp_path: Path) -> None:
    harness.root = Path(shutil.copytree(harness.root, tmp_path / "data"))
    for path in (harness.root / split).rglob("*.jpg"):
        path.write_bytes(b"none")
    with pytest.raises(UserError, match=f"No image of {split} could be read: data.on_error=skip skipped all of them"):
        harness.train("run", "data.on_error=skip", f"on_nan={on_nan}")
