"""Figures of a run: training images as the network sees them, and the test's confusion matrix, accuracy per class and
most confident mistakes. All figures are written to `figures/` of the run, and logged."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from pytorch_lightning.callbacks import Callback

from alexlab.analysis import drawing as figures
from alexlab.engine.files import make_folder
from alexlab.engine.ranks import Ranks
from alexlab.tasks.base import BaseTask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from alexlab.loggers.wandb_logger import WandbLogger

GRID = 16  # training images
MISTAKES = 16  # shown, of all ranks together
MOST_CLASSES = 50  # in the confusion matrix: the classes that are confused most
MOST_ROWS = 2000  # classes in W&B's table, the worst first


class Mistake(NamedTuple):
    """The network's wrong prediction for a test image."""

    confidence: float  #: probability of the predicted class, 0 to 1
    image: torch.Tensor  #: uint8 (C, H, W)
    truth: int  #: number of the image's class
    top5: list[tuple[int, float]]  #: up to five (class, probability), the most probable first
    loss: float  #: cross-entropy, in nats


@dataclass(eq=False)
class Media(Callback):
    """Draw the figures, each of them once."""

    folder: Path  # where rank 0 writes the figures, of the images of all ranks
    logger: "WandbLogger | None" = None  # the W&B logger of rank 0, for tables
    weights: str | None = None  # the name of the checkpoint that is tested; None is the best one of training
    kind: str = "png"  # of the files: png, svg or pdf
    ranks: Ranks = field(default_factory=Ranks)
    mistakes: list[Mistake] = field(default_factory=list, init=False)
    written: list[Path] = field(default_factory=list, init=False)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step or batch_idx or not trainer.is_global_zero or not len(batch[1]):
            return
        with figures.optional("The training images"):
            self._draw_batch(trainer, pl_module, batch, batch_idx)

    def _draw_batch(self, trainer: pl.Trainer, model: BaseTask, batch: Any, batch_idx: int) -> None:
        seen, targets = (part[:GRID] for part in model.augmented(batch[0], batch[1], batch_idx))
        pixels = list(as_pixels(seen, model).permute(0, 2, 3, 1).numpy())
        grid = figures.tiles(
            pixels, "train, the first batch as the network sees it", captions_of(targets, model.class_names)
        )
        self._write("train_images", grid)
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("images/train", [grid], step=trainer.global_step)

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: Any, logits: Any, batch: Any, *_: Any) -> None:
        if logits is None or not pl_module.one_class_per_image:  # None: a batch without images
            return
        targets = batch[1]
        confidence, predicted = logits.softmax(1).max(1)
        wrong = (predicted != targets).nonzero().flatten()
        for i in wrong[confidence[wrong].argsort(descending=True)][:MISTAKES].tolist():
            probabilities, classes = logits[i].softmax(0).topk(min(5, logits.shape[1]))
            top5 = list(zip(classes.tolist(), probabilities.tolist(), strict=True))
            loss = float(F.cross_entropy(logits[i], targets[i]))
            image = as_pixels(batch[0][i][None], pl_module)[0]
            self.mistakes.append(Mistake(top5[0][1], image, int(targets[i]), top5, loss))
        self.mistakes = most_confident(self.mistakes)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Send the most confident mistakes of all ranks to rank 0, and no image that it does not draw."""
        ranks = self.ranks
        if ranks.size == 1:
            return
        confidences: list[list[float]] = [[]] * ranks.size
        dist.all_gather_object(confidences, [mistake.confidence for mistake in self.mistakes], group=ranks.gloo)
        best = sorted(((value, -rank) for rank, values in enumerate(confidences) for value in values), reverse=True)
        counts = Counter(-rank for _, rank in best[:MISTAKES])
        self.mistakes = self.mistakes[: counts[ranks.rank]]
        if ranks.rank > 0 and self.mistakes:
            dist.send_object_list([self.mistakes], dst=0, group=ranks.gloo)
        for rank in sorted(counts.keys() - {0}) if ranks.rank == 0 else ():
            box: list[Any] = [None]
            dist.recv_object_list(box, src=rank, group=ranks.gloo)
            self.mistakes += box[0]
        self.mistakes = most_confident(self.mistakes)

    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and pl_module.one_class_per_image:
            with figures.optional("The figures of the test"):
                self._draw_test(trainer, pl_module)

    def _draw_test(self, trainer: pl.Trainer, pl_module: Any) -> None:
        from alexlab.analysis import plots  # imports Matplotlib, which takes half a second

        names, matrix = pl_module.class_names, pl_module.confusion_matrix.numpy()
        rows, counts = most_confused(matrix, MOST_CLASSES), matrix.sum(1)
        part = matrix[np.ix_(rows, rows)]
        best = (self.folder.parent / "checkpoints/best.ckpt").is_file()
        split = trainer.datamodule.test_split  # type: ignore[attr-defined]
        of = f"{split}, {self.weights or ('best.ckpt' if best else 'last weights')}"
        acc1 = [hits / count if count else None for hits, count in zip(matrix.diagonal(), counts, strict=True)]
        if self.logger is not None:
            with figures.optional("W&B's tables of the test"):
                self._log_end(self.logger.experiment, split, names, matrix, rows, acc1)
        shown = [names[row] for row in rows]
        self._write("confusion_matrix", plots.confusion(part, shown, counts[rows], len(names), of))
        (self.folder / f"mistakes.{self.kind}").unlink(missing_ok=True)  # of an earlier test
        if counts.any():
            self._write("per_class", plots.per_class(acc1, names, of))
        if self.mistakes:
            images = [mistake.image.permute(1, 2, 0).numpy() for mistake in self.mistakes]
            captions = [(f"{m.confidence:.0%} {names[m.top5[0][0]]}", f"is {names[m.truth]}") for m in self.mistakes]
            self._write("mistakes", figures.tiles(images, f"{of}: the most confident mistakes", captions))

    def _write(self, name: str, picture: "Image.Image | Figure") -> None:
        folder = make_folder(self.folder.parent, self.folder.name)
        self.written.append(figures.save(picture, folder / f"{name}.{self.kind}"))

    def _log_end(
        self, run: Any, split: str, names: list[str], matrix: np.ndarray, rows: list[int], acc1: list[float | None]
    ) -> None:
        """Log the test under the name of the split: results on val must not be compared with those on test."""
        import wandb

        mistakes = wandb.Table(columns=["image", "truth", "prediction", "confidence", "top5", "loss"])
        for m in self.mistakes:
            top5 = ", ".join(f"{names[k]} {probability:.1%}" for k, probability in m.top5)
            picture = wandb.Image(figures.as_rgb(m.image.permute(1, 2, 0).numpy()))
            confidence, loss = round(m.confidence, 4), round(m.loss, 4)
            mistakes.add_data(picture, names[m.truth], names[m.top5[0][0]], confidence, top5, loss)
        per_class = wandb.Table(columns=["class", "images", "acc1"])
        classes = zip(names, acc1, matrix.sum(1), strict=True)
        for name, accuracy, count in sorted(classes, key=lambda row: (row[1] is None, row[1]))[:MOST_ROWS]:
            per_class.add_data(name, int(count), accuracy)
        # as wandb.plot.confusion_matrix makes it, which needs every single prediction
        counts = [[names[a], names[p], int(matrix[a, p])] for a in rows for p in rows]
        columns: Any = ["Actual", "Predicted", "nPredictions"]
        table, fields = wandb.Table(columns=columns, data=counts), dict(zip(columns, columns, strict=True))
        drawn = wandb.plot_table("wandb/confusion_matrix/v1", table, fields, {"title": "confusion matrix"})
        tables = {"mistakes": mistakes, "per_class": per_class, "confusion_matrix": drawn}
        run.log({f"{split}/{name}": value for name, value in tables.items()})


def as_pixels(images: torch.Tensor, task: Any) -> torch.Tensor:
    """Return images of a batch, or as the network sees them, as uint8 (B, 3, H, W) on the CPU."""
    if images.is_floating_point():
        images = ((images - task.augment.shift) / task.augment.scale).clamp(0, 255).byte()
    return images.cpu()


def captions_of(targets: torch.Tensor, names: list[str]) -> list[tuple[str, ...]]:
    """Caption images with their class, or, if targets (B, C) are mixed, with their two classes and percentages."""
    if targets.ndim == 1:
        return [(names[target],) for target in targets.tolist()]
    fractions, classes = targets.topk(2)
    return [
        tuple(f"{part:.0%} {names[k]}" if part else "" for k, part in zip(of_classes, parts, strict=True))
        for of_classes, parts in zip(classes.tolist(), fractions.tolist(), strict=True)
    ]


def most_confident(mistakes: list[Mistake]) -> list[Mistake]:
    return sorted(mistakes, key=lambda mistake: -mistake.confidence)[:MISTAKES]


def most_confused(matrix: np.ndarray, most: int) -> list[int]:
    """Choose at most `most` classes, those with most mistakes in their row and column, in the order of the classes."""
    wrong = matrix.sum(0) + matrix.sum(1) - 2 * np.diag(matrix)
    return sorted(np.argsort(-wrong, kind="stable")[:most].tolist())
