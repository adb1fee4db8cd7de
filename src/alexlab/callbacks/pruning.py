"""Stop a trial of an Optuna study if it looks bad compared with the trials before."""

import logging
import math
from dataclasses import dataclass, field

import optuna
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from sqlalchemy.exc import SQLAlchemyError

log = logging.getLogger("alexlab")
STORAGE_ERRORS = (optuna.exceptions.StorageInternalError, SQLAlchemyError)  # of a database that does not answer


@dataclass(eq=False)
class Pruning(Callback):
    """Report `monitor` to the trial after each validation, and stop the run on all ranks if the pruner says so.

    The last epoch is not pruned, because nothing would be saved. If the study's storage does not answer, a warning is
    logged and the trial continues.
    """

    trial: optuna.trial.Trial | None  # None if it cannot be pruned, and on all ranks but 0
    monitor: str  # the metric that the study optimizes
    pruned: bool = field(default=False, init=False)  # whether the run was stopped

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or self.pruned:
            return
        if trainer.strategy.broadcast(self.trial is not None and self._should_prune(trainer, self.trial)):
            self.pruned = True
            trainer.should_stop = True

    def _should_prune(self, trainer: pl.Trainer, trial: optuna.trial.Trial) -> bool:
        value, epoch = float(trainer.callback_metrics[self.monitor]), trainer.current_epoch
        if not math.isfinite(value):  # the NaN guard decides what happens
            return False
        try:
            trial.report(value, epoch)
            if epoch + 1 == trainer.max_epochs or not trial.should_prune():
                return False
            trial.set_user_attr("pruned", True)
        except optuna.exceptions.UpdateFinishedTrialError:
            log.warning("the study has ended this trial, whose run continues without it")
            self.trial = None
            return False
        except STORAGE_ERRORS as error:
            why = str(error.__cause__ or error).splitlines()[0]
            log.warning(
                "the storage of the study %s does not answer, so the trial continues: %s", trial.study.study_name, why
            )
            return False
        what = f"{self.monitor} {value:.4f} is bad compared with other trials of the study {trial.study.study_name}."
        log.info("pruned after epoch %d: %s", epoch + 1, what)
        return True
