"""Losses, metrics and tasks of conf/, built by commands/build.py and used by the commands."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import config_of, summary_of, tiny_train
from torchmetrics import MetricCollection
from torchmetrics.functional.classification import multiclass_auroc, multiclass_f1_score

from alexlab.commands import build
from alexlab.commands.plan import make_plan
from alexlab.engine.devices import Devices
from alexlab.engine.errors import UserError
from alexlab.tasks.augment import BatchAugment
from alexlab.tasks.base import RunInfo, adopt
from alexlab.tasks.classification import ImageClassifier
from alexlab.tasks.load import load_task
from alexlab.tasks.metrics import build_metrics

CPU = Devices("cpu", local=1, nodes=1)
NET = ["model=torchvision", "model.name=shufflenet_v2_x0_5", "data=folder", "data.image_size=64", "data.batch_size=2"]


def task_of(shapes: Path, *words: str) -> Any:
    config = config_of(*NET, f"data.root={shapes}", *words)
    data = build.build_data(config, CPU).read()
    return build.build_task(config, data, "cpu", make_plan(config, 1, data.images), trusted=None)


# -- losses


def folder_of(counts: dict[str, int], root: Path) -> Path:
    from conftest import photo

    for name, count in counts.items():
        for number in range(count):
            photo(root / "train" / name / f"{number}.jpg", seed=number)
        photo(root / "val" / name / "0.jpg")
    return root


def test_automatic_class_weights_are_scikit_learns_balanced(tmp_path: Path) -> None:
    """compute_class_weight("balanced", ...) of 6, 2 and 1 images."""
    task = task_of(folder_of({"a": 6, "b": 2, "c": 1}, tmp_path), "loss.class_weights=auto")
    assert task.criterion.weights.tolist() == pytest.approx([0.5, 1.5, 3.0])


def test_class_weights_of_a_list_and_of_a_file(tmp_path: Path) -> None:
    root = folder_of({"a": 2, "b": 1}, tmp_path)
    assert task_of(root, "loss.class_weights=[1,2.5]").criterion.weights.tolist() == [1.0, 2.5]
    (tmp_path / "weights.csv").write_text("b, 3\na, 0.5\n")
    task = task_of(root, "loss=focal", f"loss.class_weights={tmp_path}/weights.csv")
    assert task.criterion.weights.tolist() == [0.5, 3.0]
    (tmp_path / "weights.csv").write_text("b, 3\n")
    with pytest.raises(UserError, match=r"a file with a line `class, weight` for each class \(KeyError: 'a'\)"):
        task_of(root, f"loss.class_weights={tmp_path}/weights.csv")


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (
            "loss.class_weights=[1,2]",
            r"`loss.class_weights=\[1, 2\]` must have one number of at least 0 for each of the",
        ),
        ("loss.class_weights=[1,-2]", "must have one number of at least 0"),
        ("loss.class_weights=[x,y]", "must be auto, a list of numbers, or a file"),
        ("loss.class_weights=missing.csv", "must be auto, a list of numbers, or a file .*FileNotFoundError"),
        ("loss=focal label_smoothing=0.1", "would have no effect, because alexlab.tasks.losses.Focal does not"),
        ("loss.label_smoothing=0.2 label_smoothing=0.1", "or loss.label_smoothing has another value"),
        ("loss._target_=torch.nn.MSELoss", "loss: torch.nn.MSELoss refuses labels, int64"),
        ("loss._target_=torch.nn.Identity", "loss: torch.nn.Identity refuses labels"),
        ("loss._target_=torch.nn.NLLLoss +loss.reduction=none", "must return one finite number"),
        ("loss._target_=timm.loss.LabelSmoothingCrossEntropy augment.mixup=0.2", "refuses the soft targets of aug"),
        ("task=multilabel", "has one class per image, and task=multilabel needs a list of them"),
        ("task._target_=torch.nn.Identity", "builds a Identity, which is no LightningModule"),
        ("monitor=val/f1", "is not a metric of the validation: choose one of val/loss, val/acc1, val/acc5"),
        ("metrics.x={_target_: torch.nn.ReLU}", "which is no metric"),
        ("metrics.x={_target_: torchmetrics.classification.BinaryF1Score}", "metrics.x: BinaryF1Score refuses prob"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(words: str, answer: str, shapes: Path) -> None:
    split = shlex.split(words.replace("{", "'{").replace("}", "}'"))
    more = [f"+{word}" if word.startswith("metrics.x") else word for word in split]
    with pytest.raises(UserError, match=answer):
        task_of(shapes, *more)


def test_label_smoothing_goes_to_the_loss(shapes: Path) -> None:
    assert task_of(shapes, "label_smoothing=0.1").criterion.label_smoothing == 0.1
    assert task_of(shapes, "loss.label_smoothing=0.2").criterion.label_smoothing == 0.2


def test_eval_needs_no_training_images_for_class_weights(shapes: Path) -> None:
    config = config_of(*NET, f"data.root={shapes / 'val'}", "loss.class_weights=auto")
    data = build.build_data(config, CPU)
    data.read_for_evaluation(tuple(sorted(path.name for path in (shapes / "val").iterdir())))  # type: ignore[union-attr]
    task: Any = build.build_task(config, data, "cpu", trusted=None)
    assert task.criterion.weights is None


# -- what cannot train


def test_a_metric_that_cannot_vary_is_no_monitor(tmp_path: Path) -> None:
    root = folder_of({"a": 2, "b": 1, "c": 1}, tmp_path)
    with pytest.raises(
        UserError, match=r"^`monitor=val/acc5` is 1 with 3 classes, whatever is learned: use val/acc1.$"
    ):
        task_of(root, "monitor=val/acc5")


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        UserError, match=r"^`compile=true` needs a compiler \(\w+\+\+\), which this machine lacks: install"
    ):
        build.check_compiler("cpu")


def test_weights_of_a_loss_are_tested_as_they_were_trained(tmp_path: Path) -> None:
    task = ImageClassifier(torch.nn.Linear(2, 2), BatchAugment([0.5] * 3, [0.5] * 3, 2), torch.nn.PReLU())
    state = {key: value + 1 for key, value in task.state_dict().items()}
    load_task(task, {"state_dict": state}, tmp_path / "best.ckpt")
    assert task.criterion.weight.item() == 1.25
    with pytest.raises(UserError, match=r"best.ckpt lacks weights of the task: criterion.weight"):
        load_task(
            task,
            {"state_dict": {"net.weight": state["net.weight"], "net.bias": state["net.bias"]}},
            tmp_path / "best.ckpt",
        )


def test_a_lightning_module_with_names_of_the_run_is_refused() -> None:
    class Mine(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.augment, self.best = torch.nn.Linear(2, 2), torch.nn.Identity(), 0.0

    with pytest.raises(UserError, match=r"Mine has augment, best, which a run sets itself: give them another name"):
        adopt(Mine(), BatchAugment([0.5] * 3, [0.5] * 3, 2), RunInfo())
    with pytest.raises(UserError, match=r"LightningModule keeps no network as `self.net`"):
        adopt(pl.LightningModule(), BatchAugment([0.5] * 3, [0.5] * 3, 2), RunInfo())


# -- metrics

AUROC = {"_target_": "torchmetrics.classification.MulticlassAUROC"}


def built(images: int, lines: list[str], **entry: Any) -> MetricCollection:
    return build_metrics({"auroc": {**AUROC, **entry}}, (), {"num_classes": 1000}, images, lines.append)


def test_scores_are_counted_in_bins_above_a_gigabyte() -> None:
    """ImageNet's 1.28 million times 1,000 scores are 5.1 GB; its 50,000 validation images 0.2 GB."""
    lines: list[str] = []
    assert built(50_000, lines)["auroc"].thresholds is None
    assert lines == []
    assert len(built(1_281_167, lines)["auroc"].thresholds) == 200
    assert "the scores of 1,281,167 images would take 5.1 GB, so they are counted in 200 bins" in lines[0]
    assert len(built(1_281_167, [], thresholds=50)["auroc"].thresholds) == 50


@pytest.mark.parametrize(("words", "mode"), [("", "max"), ("monitor_mode=min", "min"), ("monitor=val/loss", "min")])
def test_what_is_better_comes_from_the_metric(words: str, mode: str, shapes: Path) -> None:
    assert task_of(shapes, "metrics=detailed", "monitor=val/f1", *words.split()).run.mode == mode


def test_a_metric_that_does_not_say_what_is_better_needs_monitor_mode(shapes: Path) -> None:
    words = ["+metrics.count={_target_: torchmetrics.classification.MulticlassStatScores, average: micro}"]
    config = config_of(*NET, f"data.root={shapes}", *words, "monitor=val/count")
    with pytest.raises(UserError, match=r"MulticlassStatScores does not say whether more is better: add monitor_mode"):
        build.mode_of_monitor(config, build_metrics(config.metrics.model_dump(), (), {"num_classes": 10}, 1, print))


def test_detailed_metrics_are_torchmetrics_of_all_images(shapes: Path, tmp_path: Path) -> None:
    """Of two ranks, whose last batches differ in size, against the functions on the whole split."""
    words = ["metrics=detailed", "monitor=val/f1", "trainer=ddp_cpu", "trainer.precision=32-true"]
    done = tiny_train(shapes, tmp_path / "run", *words)
    assert done.returncode == 0, done.stderr
    import alexlab

    summary = summary_of(tmp_path / "run")
    net, transform, classes = alexlab.load(tmp_path / "run")
    paths = sorted((shapes / "val").glob("*/*.jpg"))
    names = sorted({path.parent.name for path in paths})
    with torch.no_grad():
        logits = net(torch.stack([transform(path) for path in paths])).float()
    labels = torch.tensor([names.index(path.parent.name) for path in paths])
    best = summary["best"]
    assert best["val/f1"] == pytest.approx(float(multiclass_f1_score(logits, labels, len(classes))), abs=1e-4)
    assert best["val/auroc"] == pytest.approx(float(multiclass_auroc(logits, labels, len(classes))), abs=1e-4)
    assert summary["modes"]["f1"] == "max"
    assert summary["modes"]["calibration_error"] == "min"
    assert summary["per_class"]["recall"].keys() == set(names)
    recall = np.nanmean(list(summary["per_class"]["recall"].values()))
    assert summary["test"]["test/recall"] == pytest.approx(recall, abs=1e-6)
    done = tiny_train(shapes, tmp_path / "untested", "metrics=detailed", "test=false")
    assert done.returncode == 0, done.stderr
    assert "per_class" not in summary_of(tmp_path / "untested"), "those of the last epoch may not be the best one's"


# -- distillation


def test_a_distilled_network_learns_from_the_teacher_alone(shapes: Path, tmp_path: Path) -> None:
    """With weight=1 and its own teacher's weights there is nothing to learn: the loss of the teacher is 0."""
    teacher = tmp_path / "teacher"
    assert tiny_train(shapes, teacher).returncode == 0
    words = ["task=distillation", f"task.teacher={teacher}", "task.weight=1", f"init_from={teacher}", "augment=none"]
    words += ["trainer.limit_train_batches=1", "optimizer.lr=1e-9", "scheduler.warmup=0"]
    done = tiny_train(shapes, tmp_path / "run", *words)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "run/summary.json").read_text())
    assert saved["last"]["train/loss"] < 0.3, "BatchNorm of the student uses the batch's statistics"
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(key.startswith("net.") for key in state), "the teacher's weights are in no checkpoint"


def test_a_teacher_with_other_classes_or_another_normalization_is_refused(shapes: Path, tmp_path: Path) -> None:
    other = folder_of({"a": 8, "b": 8}, tmp_path / "two")
    assert tiny_train(other, tmp_path / "two-classes").returncode == 0
    words = ["task=distillation", f"task.teacher={tmp_path}/two-classes/checkpoints/best.ckpt"]
    with pytest.raises(UserError, match="have different classes"):
        task_of(shapes, *words)
    with pytest.raises(UserError, match=r"another normalization of the inputs: add model\.mean="):
        task_of(other, *words, "model.mean=[0.5,0.5,0.5]", "model.std=[0.5,0.5,0.5]")
