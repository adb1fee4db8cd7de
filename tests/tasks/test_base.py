"""What all tasks share: random numbers by step, metrics and the best values, broken images, checkpoint contents."""

import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassF1Score
from torchmetrics.functional.classification import multiclass_f1_score

from alexlab.data.dataset import Batch
from alexlab.engine.errors import UserError
from alexlab.tasks.augment import BatchAugment
from alexlab.tasks.base import RunInfo, reseed
from alexlab.tasks.classification import ImageClassifier
from alexlab.tasks.optimizers import OptimizerSettings

CPU = torch.device("cpu")
SGD, CONSTANT = {"_target_": "torch.optim.SGD", "lr": 0.1}, {"name": "constant", "unit": "epoch", "warmup": 0}
SETTINGS = OptimizerSettings(SGD, CONSTANT, images_per_step=4, steps=4, steps_per_epoch=2)


def task_of(metrics: MetricCollection | None = None, **run: Any) -> ImageClassifier:
    augment = BatchAugment([0.5] * 3, [0.5] * 3, 4)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    return ImageClassifier(net, augment, metrics=metrics, optimizer=SETTINGS, run=RunInfo(list("abcd"), **run))


def batches_of(count: int, size: int = 4, skipped: dict[str, str] | None = None) -> list[Batch]:
    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    generator = torch.Generator().manual_seed(3)
    return [Batch(draw(256, size, 3, 8, 8).byte(), draw(4, size), skipped or {}) for _ in range(count)]


def fit(
    task: ImageClassifier, val: list[Batch] | None, train: list[Batch] | None = None, epochs: int = 1, **settings: Any
) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings |= {"log_every_n_steps": 1, "num_sanity_val_steps": 0, **quiet}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=epochs, **settings)
    train = train or batches_of(2)
    loaders = [torch.utils.data.DataLoader(part, batch_size=None) for part in (train, val) if part]  # type: ignore[arg-type]
    trainer.fit(task, *loaders)
    return trainer


# -- random numbers


def model_at(epoch: int, rank: int = 0) -> Any:
    augment = BatchAugment([0.5] * 3, [0.5] * 3, 4, mixup=0.2)
    model: Any = ImageClassifier(nn.Identity(), augment, run=RunInfo(list("abcd"), seed=9))
    model._trainer = type("T", (), {"current_epoch": epoch, "global_rank": rank, "world_size": 2})()
    return model


def test_the_random_numbers_of_a_step_do_not_depend_on_earlier_ones() -> None:
    images, targets = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), torch.arange(4)

    def draw(epoch: int, batch: int, rank: int = 0) -> tuple[Tensor, Tensor]:
        torch.rand(int(torch.randint(1, 50, ())))  # numbers of earlier steps
        augmented, _ = model_at(epoch, rank).augmented(images, targets, batch)
        return augmented, torch.rand(3)  # as dropout draws next

    first, again = draw(1, 2), draw(1, 2)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    for other in (draw(1, 3), draw(2, 2), draw(1, 2, rank=1)):
        assert not torch.equal(first[1], other[1])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_reseed_equals_torch_manual_seed(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    reseed(5, torch.device(device, 0))
    first = torch.rand(4, device=device)
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(4, device=device))


# -- metrics


def test_a_users_metric_is_logged_beside_loss_and_accuracy() -> None:
    val = batches_of(3)
    task = task_of(MetricCollection({"f1": MulticlassF1Score(4)}), monitor="val/f1")
    metrics = fit(task, val, epochs=3).callback_metrics
    assert {"train/f1", "val/f1", "val/f1_best", "train/loss", "val/acc1"} <= metrics.keys()
    logits = torch.cat([task(batch.images) for batch in val])
    expected = multiclass_f1_score(logits, torch.cat([batch.targets for batch in val]), 4)
    assert metrics["val/f1"] == pytest.approx(float(expected))
    assert task.best["val/f1"] == pytest.approx(float(metrics["val/f1_best"]))
    assert task.best["val/f1"] >= metrics["val/f1"]


def test_bf16_true_rounds_weights_but_no_sums() -> None:
    """300 images are no number of bfloat16."""
    task = task_of()
    fit(task, batches_of(75), precision="bf16-true")
    assert task.net[1].weight.dtype == torch.bfloat16  # type: ignore[union-attr, index]
    assert task.sums["val"].past.dtype == torch.float64
    assert (task.sums["val"].past + task.sums["val"].window)[3] == 300


def test_the_best_epoch_keeps_all_its_metrics() -> None:
    task = task_of(monitor="val/loss")
    seen = []

    class Watch(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            seen.append((float(trainer.callback_metrics["val/loss"]), pl_module.improved))

    fit(task, batches_of(2), epochs=4, callbacks=[Watch()])
    losses = [loss for loss, _ in seen]
    assert task.best["val/loss"] == pytest.approx(min(losses))
    assert task.best_epoch == losses.index(min(losses)) + 1
    assert [improved for _, improved in seen] == [loss < min([math.inf, *losses[:n]]) for n, loss in enumerate(losses)]
    checkpoint: dict[str, Any] = {}
    task.on_save_checkpoint(checkpoint)
    assert checkpoint["alexlab"] == {"best": task.best, "best_epoch": task.best_epoch}


def test_one_number_per_class_is_logged_as_the_mean() -> None:
    val = batches_of(3)
    task = task_of(MetricCollection({"f1": MulticlassF1Score(4, average="none")}))
    logged = fit(task, val).callback_metrics["val/f1"]
    logits = torch.cat([task(batch.images) for batch in val])
    expected = multiclass_f1_score(logits, torch.cat([batch.targets for batch in val]), 4, average="none")
    assert task.per_class["f1"] == pytest.approx(expected.tolist())
    assert float(logged) == pytest.approx(sum(expected.tolist()) / 4)


def test_a_metric_must_give_one_number_or_one_per_class() -> None:
    task = task_of(MetricCollection({"confusion": MulticlassConfusionMatrix(4)}))
    with pytest.raises(
        UserError, match=r"The metric confusion gives a tensor of shape \(4, 4\), and must give one num"
    ):
        fit(task, batches_of(1))


def test_a_nan_loss_of_a_validation_is_an_error() -> None:
    task = task_of()
    val = batches_of(1)
    task.criterion.register_forward_hook(lambda module, _, loss: loss if module.training else loss * math.nan)
    with pytest.raises(UserError, match=r"^val/loss became nan in epoch 1: lower optimizer.lr, clip with"):
        fit(task, val)


def test_batches_with_a_nan_loss_can_be_ignored() -> None:
    """As on_nan=skip does. An epoch of nothing else has no metrics of training."""
    task = task_of()
    task.ignores_nonfinite_loss = True
    task.criterion.register_forward_hook(lambda module, _, loss: loss * math.nan if module.training else loss)
    assert "train/loss" not in fit(task, val=None).callback_metrics
    assert task.nonfinite_losses == 2


# -- broken images


def test_more_broken_images_than_allowed_are_an_error() -> None:
    task = task_of(max_bad=1)
    task.note_skipped({"a.jpg": "a.jpg is empty"})
    task.note_skipped({"a.jpg": "a.jpg is empty"})
    with pytest.raises(UserError, match=r"2 images are broken, more than data.max_bad=1: a.jpg is empty, b.jpg is cut"):
        task.note_skipped({"b.jpg": "b.jpg is cut"})


def test_a_validation_of_broken_images_only_is_an_error() -> None:
    broken = batches_of(1, size=0, skipped={"a.jpg": "a.jpg is empty"})
    with pytest.raises(UserError, match=r"No image of val could be read: .* skipped all of them, such as a.jpg is em"):
        fit(task_of(), broken)


def test_a_training_batch_without_images_changes_no_weight() -> None:
    task = task_of()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    with pytest.raises(UserError, match="No image of train could be read"):
        fit(task, batches_of(1), train=batches_of(1, size=0))
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
