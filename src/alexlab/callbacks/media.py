"""Training images as the net sees them; of the test the confusion matrix, accuracy by class, most confident mistakes.

As pictures in the run's `figures/`, and in W&B where it logs.
"""

import logging
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
from alexlab.engine.files import atomic_write, make_folder
from alexlab.tasks.classification import ImageClassifier

if TYPE_CHECKING:
    from alexlab.loggers.wandb_logger import WandbLogger

log = logging.getLogger("alexlab")

GRID = 16  # training images shown
MISTAKES = 16  # shown: the most confident ones of all ranks
MOST_CLASSES = 50  # drawn in the confusion matrix: those confused most
MOST_ROWS = 2000  # classes in W&B's table of them, the worst first


class Mistake(NamedTuple):
    """
    Attributes:
        confidence: of the prediction, 0 to 1.
        image: uint8 (3, H, W).
        best: up to five classes with their probabilities, the most probable first.
        loss: cross-entropy, in nats.
    """

    confidence: float
    image: torch.Tensor
    truth: int
    best: list[tuple[int, float]]
    loss: float

    @property
    def predicted(self) -> int:
        return self.best[0][0]


class Media(Callback):
    """Makes pictures, once each and bounded in number.

    Args:
        folder: where they are written, by rank 0; the others take part with their share of the images.
        logger: rank 0's, or None.
        weights: the name of the checkpoint that is tested; None is what training keeps as the best.
    """

    def __init__(self, folder: Path, logger: "WandbLogger | None" = None, weights: str | None = None) -> None:
        self.folder = folder
        self.logger = logger
        self.weights = weights
        self.mistakes: list[Mistake] = []
        self.some: list[Mistake] = []  # right or wrong, each `apart` images after the one before
        self.apart, self.tested = 1, 0
        self.written: list[Path] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step or batch_idx or not trainer.is_global_zero or not len(batch[1]):
            return
        model: ImageClassifier = pl_module
        seen, targets = (part[:GRID] for part in model.augmented(batch[0], batch[1], batch_idx))
        pixels = ((seen - model.augment.shift) / model.augment.scale).clamp(0, 255).byte().cpu()
        grid = figures.tiles(list(pixels.permute(0, 2, 3, 1).numpy()), captions_of(targets, model.class_names))
        self._write("train_images", grid)
        if self.logger is not None:
            import wandb

            self.logger.experiment.log({"images/train": wandb.Image(grid, caption="as the net sees them")})

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if outputs is None:  # an empty share
            return
        logits, targets = outputs["logits"], batch[1]
        confidence, predicted = logits.softmax(1).max(1)
        wrong = (predicted != targets).nonzero().flatten()

        def kept(i: int) -> Mistake:
            shares, classes = logits[i].softmax(0).topk(min(5, logits.shape[1]))
            best = list(zip(classes.tolist(), shares.tolist(), strict=True))
            loss = float(F.cross_entropy(logits[i], targets[i]))
            return Mistake(best[0][1], batch[0][i].cpu(), int(targets[i]), best, loss)

        self.mistakes += map(kept, wrong[confidence[wrong].argsort(descending=True)][:MISTAKES].tolist())
        for i in range(len(targets)):
            if (self.tested + i) % self.apart == 0:
                self.some.append(kept(i))
                if len(self.some) == 2 * MISTAKES:  # how many there will be is not known
                    self.some, self.apart = self.some[::2], 2 * self.apart
        self.tested += len(targets)
        self.mistakes = most_confident(self.mistakes)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.world_size > 1:
            gathered: list[list[Mistake]] = [[]] * trainer.world_size
            dist.all_gather_object(gathered, self.mistakes)
            self.mistakes = most_confident([mistake for share in gathered for mistake in share])

    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        from alexlab.analysis import plots  # Matplotlib takes half a second, which the start need not wait for

        names, matrix = pl_module.class_names, pl_module.confusion_matrix.numpy()
        rows = most_confused(matrix, MOST_CLASSES)
        counts = matrix.sum(1)
        part = matrix[np.ix_(rows, rows)]
        best = (self.folder.parent / "checkpoints/best.ckpt").is_file()
        split = trainer.datamodule.tested_split  # type: ignore[attr-defined]
        of = f"{split}, {self.weights or ('best.ckpt' if best else 'last weights')}"
        shown = [names[row] for row in rows]
        self._write("confusion_matrix", figures.confusion(part, shown, counts[rows], len(names), of))
        (self.folder / "mistakes.png").unlink(missing_ok=True)  # of a test before; `_write` has seen the folder
        shares = [hits / count if count else None for hits, count in zip(matrix.diagonal(), counts, strict=True)]
        if counts.any():
            self._write("per_class", plots.per_class(shares, names, of))
        if self.mistakes:
            images = [mistake.image.permute(1, 2, 0).numpy() for mistake in self.mistakes]
            captions = [(f"{m.confidence:.0%} {names[m.predicted]}", f"is {names[m.truth]}") for m in self.mistakes]
            self._write("mistakes", figures.tiles(images, captions))
        if self.logger is not None:
            try:
                self._log_end(self.logger.experiment, split, names, matrix, rows, shares)
            except Exception as error:  # whatever W&B's client raises; the run itself is well
                log.warning("W&B did not take the confusion matrix and the mistakes: %s", str(error)[:200])

    def _write(self, name: str, picture: Image.Image) -> None:
        self.written.append(make_folder(self.folder.parent, self.folder.name) / f"{name}.png")
        with atomic_write(self.written[-1]) as file:
            picture.save(file, "PNG")

    def _log_end(
        self,
        run: Any,
        split: str,
        names: list[str],
        matrix: np.ndarray,
        rows: list[int],
        shares: list[float | None],
    ) -> None:
        """Under the name of the split: what is val's must not stand beside others' tests."""
        import wandb

        tables = {}
        some = spread(self.some, MISTAKES)
        for key, shown in {f"{split}/mistakes": self.mistakes, f"{split}/predictions": some}.items():
            table = tables[key] = wandb.Table(columns=["image", "truth", "prediction", "confidence", "top5", "loss"])
            for m in shown:
                top5 = ", ".join(f"{names[k]} {share:.1%}" for k, share in m.best)
                picture = wandb.Image(m.image.permute(1, 2, 0).numpy())
                confidence, loss = round(m.confidence, 4), round(m.loss, 4)
                table.add_data(picture, names[m.truth], names[m.predicted], confidence, top5, loss)
        per_class = wandb.Table(columns=["class", "images", "acc1"])
        rows_of = zip(names, shares, matrix.sum(1), strict=True)
        for name, share, count in sorted(rows_of, key=lambda row: (row[1] is None, row[1]))[:MOST_ROWS]:
            per_class.add_data(name, int(count), share)
        counts = [
            [names[a], names[p], int(matrix[a, p])] for a in rows for p in rows
        ]  # the columns that wandb.plot.confusion_matrix draws from
        drawn = wandb.plot_table(
            "wandb/confusion_matrix/v1",
            wandb.Table(columns=["Actual", "Predicted", "nPredictions"], data=counts),
            {"Actual": "Actual", "Predicted": "Predicted", "nPredictions": "nPredictions"},
            {"title": "confusion matrix"},
        )
        run.log({**tables, f"{split}/per_class": per_class, f"{split}/confusion_matrix": drawn})


def captions_of(targets: torch.Tensor, names: list[str]) -> list[tuple[str, ...]]:
    """Of each image its class, or with mixed targets (B, C) its two classes and their shares in percent."""
    if targets.ndim == 1:
        return [(names[target],) for target in targets.tolist()]
    shares, classes = targets.topk(2)
    return [
        tuple(f"{share:.0%} {names[k]}" if share else "" for k, share in zip(which, much, strict=True))
        for which, much in zip(classes.tolist(), shares.tolist(), strict=True)
    ]


def spread(items: list[Any], most: int) -> list[Any]:
    """At most so many, from all over a list."""
    return [items[len(items) * k // most] for k in range(most)] if len(items) > most else items


def most_confident(mistakes: list[Mistake]) -> list[Mistake]:
    return sorted(mistakes, key=lambda mistake: -mistake.confidence)[:MISTAKES]


def most_confused(matrix: np.ndarray, most: int) -> list[int]:
    """The classes with the most mistakes in their row and column, at most `most`, in their own order."""
    wrong = matrix.sum(0) + matrix.sum(1) - 2 * np.diag(matrix)
    return sorted(np.argsort(-wrong, kind="stable")[:most].tolist())
