"""What people fork a template for, in files outside of the project: train, kill, resume, evaluate, export, compare."""

import csv
import json
from pathlib import Path

import pytest
import torch
from conftest import summary_of
from forks import EXTENDING, Fork, blocks_of

import alexlab

TABLE = ["data=table", "data.file=labels.csv", "data.root=IMAGES"]
FOLDER = ["data=folder", "data.root=IMAGES", "data.val_fraction=0.25"]
SECTIONS = blocks_of(EXTENDING)


@pytest.fixture
def fork(tmp_path: Path) -> Fork:
    return Fork(tmp_path)


def test_loss_metric_and_task_of_ones_own(fork: Fork) -> None:
    for name in ("Loss", "Metrics", "Task"):
        fork.write(SECTIONS[name])
    fork.circle("--config-dir", "MYCONF", "loss=poly", "metrics=mine", "task=penalized", "monitor=val/kappa", *FOLDER)
    best = summary_of(fork.folder / "killed")["best"]
    assert {"val/kappa", "val/margin", "val/acc1"} <= best.keys()


def test_network_schedule_optimizer_callback_logger_and_transform_of_ones_own(fork: Fork) -> None:
    """Each section has a file of its own name here, because several call theirs mypkg/parts.py."""
    words: list[str] = []
    for name in ("Optimizer", "Scheduler", "Logger", "Augmentation", "Callback", "Your package and `allow`"):
        module = name.split()[0].lower()
        blocks = [
            (kind, text.replace("mypkg/parts.py", f"mypkg/{module}.py").replace("mypkg.parts", f"mypkg.{module}"))
            for kind, text in SECTIONS[name]
        ]
        words += [word for word in fork.write(blocks)[0][3:] if word not in FOLDER]
    fork.circle("--config-dir", "MYCONF", *words, *FOLDER)
    lines = [json.loads(line) for line in (fork.folder / "killed/log.jsonl").read_text().splitlines()]
    assert lines[-1] == {"step": None, "status": "success"}
    assert "weights/norm" in (fork.folder / "killed/metrics.csv").read_text()


def test_a_table_needs_no_file(fork: Fork) -> None:
    fork.circle(*TABLE, "data.sampler=balanced")
    dataset = summary_of(fork.folder / "killed")["dataset"]
    assert (dataset["num_classes"], dataset["images"]) == (3, {"train": 36, "val": 12})


def test_a_class_by_index(fork: Fork) -> None:
    fork.write(SECTIONS["Data"])
    fork.circle("--config-dir", "MYCONF", "data=mine")
    dataset = summary_of(fork.folder / "killed")["dataset"]
    assert dataset["images"] == {"train": 36, "val": 12}, "every fourth of 16 images of three classes is a val image"


def test_several_labels_per_image(fork: Fork) -> None:
    words = ["task=multilabel", "data=table", "data.file=tags.csv", "data.root=IMAGES"]
    fork.circle(*words)
    best = summary_of(fork.folder / "killed")["best"]
    assert {"val/loss", "val/map", "val/f1"} == best.keys()
    predicted = fork.run("predict", f"run={fork.folder / 'killed'}", "images=IMAGES/cat", "topk=4")
    assert predicted.returncode == 0, predicted.stderr
    rows = (fork.folder / "killed/predictions.csv").read_text().splitlines()[1:5]
    probabilities = [float(row.rsplit(",", 1)[1]) for row in rows]
    assert abs(sum(probabilities) - 1) > 1e-3, "each of its own, and not one distribution over the classes"
    refused = fork.run("eval", f"run={fork.folder / 'killed'}", "crops=2")
    assert refused.returncode == 2
    assert "`crops=2` averages the probabilities of classes of which each image has one, and" in refused.stderr
    assert "MultiLabelClassifier has other targets: use crops=1." in refused.stderr


def test_folds_are_one_row_of_a_comparison(fork: Fork) -> None:
    words = ["sweep=folds", "data=folder", "data.root=IMAGES", "data.folds=3", "trainer.max_epochs=1"]
    done = fork.train("sweep", "-m", *words, f"hydra.sweep.dir={fork.folder / 'folds'}")
    assert done.returncode == 0, done.stderr
    compared = fork.run("compare", f"runs={fork.folder / 'folds'}", "format=json")
    (group,) = json.loads(compared.stdout)["groups"]
    assert group["n"] == 3
    values = [json.loads(path.read_text())["best"]["val/acc1"] for path in fork.folder.glob("folds/*/summary.json")]
    assert len(values) == 3
    assert group["metrics"]["val/acc1"]["mean"] == pytest.approx(sum(values) / 3)


def test_a_lightning_module_of_ones_own(fork: Fork) -> None:
    fork.write(SECTIONS["Any LightningModule"])
    words = ["--config-dir", "MYCONF", "task=plain", "monitor=val/loss", *FOLDER]
    fork.circle(*words, exact=False)
    summary = summary_of(fork.folder / "killed")
    assert (list(summary["best"]), summary["steps"]) == (["val/loss"], 6), "it logs this alone"
    printed = fork.train("again", *words, "dry_run=true").stdout
    assert "mypkg.module.Plain does not take loss, metrics, optimizer and scheduler" in printed


def test_class_weights_and_focal_loss(fork: Fork) -> None:
    """The best val/loss is the paper's formula, without weights, of the best weights' probabilities."""
    fork.circle("loss=focal", "loss.class_weights=auto", *TABLE, "trainer.precision=32-true")
    rows = [row for row in csv.DictReader((fork.folder / "labels.csv").open()) if row["split"] == "val"]
    net, transform, classes = alexlab.load(fork.folder / "killed")
    with torch.no_grad():
        images = torch.stack([transform(fork.folder / "IMAGES" / row["path"]) for row in rows])
        p = net(images).softmax(1)[range(len(rows)), [classes.index(row["label"]) for row in rows]]
    expected = float((-((1 - p) ** 2) * p.log()).mean())
    assert summary_of(fork.folder / "killed")["best"]["val/loss"] == pytest.approx(expected, abs=1e-5)


def test_distillation(fork: Fork) -> None:
    assert fork.train("teacher", *FOLDER).returncode == 0
    fork.circle("task=distillation", f"task.teacher={fork.folder / 'teacher'}", *FOLDER)
    saved = (fork.folder / "killed/config.yaml").read_text()
    assert f"teacher: {fork.folder}/teacher/checkpoints/best.ckpt" in saved, "not a name that another run may get"
