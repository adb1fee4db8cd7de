"""Ends a trial of an Optuna sweep that looks bad beside those before it."""

import logging
import math

import optuna
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from sqlalchemy.exc import SQLAlchemyError

from alexlab.engine.sweeps import PRUNED, Trial

log = logging.getLogger("alexlab")
UNREACHED = (optuna.exceptions.StorageInternalError, SQLAlchemyError)


class Pruning(Callback):
    """Reports `monitor` to the trial after each validation, and ends the run on all ranks where the pruner says so.

    The first rank alone asks the study. In the last epoch there is nothing left to save, and a trial is not pruned.
    Where the study's storage does not answer, as a file that another process has locked, that is told, and the trial
    goes on; where it does not at the beginning, unpruned to its end.

    Args:
        place: where the trial is.
        pruner: Optuna's.

    Attributes:
        pruned: whether this run was ended so.
    """

    def __init__(self, place: Trial, pruner: optuna.pruners.BasePruner, monitor: str) -> None:
        self.place, self.pruner, self.monitor = place, pruner, monitor
        self.trial: optuna.trial.Trial | None = None
        self.pruned = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            try:
                study = optuna.load_study(
                    self.place.study,
                    self.place.storage,  # type: ignore[arg-type]
                    sampler=optuna.samplers.RandomSampler(),  # draws nothing: the trial has its values
                    pruner=self.pruner,
                )
                self.trial = optuna.trial.Trial(study, self.place.id)
            except UNREACHED as error:
                log.warning("the study %s could not be asked, and this trial goes on unpruned: %s",
                            self.place.study, _line(error))  # fmt: skip

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or self.pruned:
            return
        bad = False
        if self.trial is not None:
            try:
                bad = self._looks_bad(trainer)
            except UNREACHED as error:
                log.warning("the study %s could not be asked whether to prune, and the trial goes on: %s",
                            self.place.study, _line(error))  # fmt: skip
        if trainer.strategy.broadcast(bad):
            self.pruned = True
            trainer.should_stop = True

    def _looks_bad(self, trainer: pl.Trainer) -> bool:
        assert self.trial is not None
        value, epoch = float(trainer.callback_metrics[self.monitor]), trainer.current_epoch
        if not math.isfinite(value):  # for on_nan to judge
            return False
        self.trial.report(value, epoch)
        last = trainer.max_epochs is not None and epoch + 1 == trainer.max_epochs
        if last or not self.trial.should_prune():
            return False
        self.trial.set_user_attr(PRUNED, True)
        log.info("pruned after epoch %d: %s %.4f is too bad beside other trials of the study %s.",
                 epoch + 1, self.monitor, value, self.place.study)  # fmt: skip
        return True


def _line(error: Exception) -> str:
    return str(error.__cause__ or error).splitlines()[0]
