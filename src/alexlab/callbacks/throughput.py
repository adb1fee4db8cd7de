"""Images a second, the share of a step spent waiting for data, and what a run has done so far."""

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


class Throughput(Callback):
    """Logs perf/images_per_second (all devices) and perf/data_wait (0 to 1, this rank's) of each epoch, and
    perf/images_per_second_step of the last `log_every_n_steps` optimizer steps. Beside these and each validation stand
    perf/images and perf/seconds, the images trained on so far and the time for them, resumes included: axes for curves.

    Host clocks alone, without a device sync: over a window of steps they agree with the device's.
    """

    def __init__(self, global_batch: int) -> None:
        self.global_batch = global_batch
        self.total_images, self.total_seconds, self.total_waited = 0, 0.0, 0.0  # of whole epochs
        self.seconds_before = 0.0  # of training, of a run that goes on
        self.steps, self.waited, self.epoch_start, self.ended = 0, 0.0, 0.0, 0.0  # of the one that goes on

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.ended = time.perf_counter()
        self.epoch_start, self.waited, self.steps = self.ended, 0.0, 0
        self.window_start, self.window_steps, self.logged_at = self.ended, 0, trainer.global_step

    def so_far(self) -> dict[str, float]:
        seconds = max(self.ended - self.epoch_start, 1e-9) if self.steps else 0.0
        return {
            "images": self.total_images + self.steps * self.global_batch,
            "seconds": self.total_seconds + seconds,
            "waited": self.total_waited + min(self.waited, seconds),
        }

    def axes(self, ahead: int = 0) -> dict[str, float]:
        """
        Args:
            ahead: steps that are counted already, though they have only begun.
        """
        so_far = self.so_far()
        return {"perf/images": so_far["images"] + ahead * self.global_batch, "perf/seconds": so_far["seconds"]}

    def state_dict(self) -> dict[str, float]:
        return self.so_far()

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._keep(state_dict)
        self.seconds_before = self.total_seconds

    def _keep(self, state_dict: dict[str, float]) -> None:
        self.total_images = int(state_dict["images"])
        self.total_seconds, self.total_waited = state_dict["seconds"], state_dict["waited"]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.waited += time.perf_counter() - self.ended

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps += 1
        self.window_steps += 1
        self.ended = time.perf_counter()
        done, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if done > self.logged_at and done % every == 0:
            rate = self.window_steps * self.global_batch / (self.ended - self.window_start)
            pl_module.log("perf/images_per_second_step", rate, prog_bar=True)
            self.window_start, self.window_steps, self.logged_at = self.ended, 0, done
            self._log_axes(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._log_axes(pl_module)

    def _log_axes(self, pl_module: pl.LightningModule) -> None:
        for name, value in self.axes().items():
            pl_module.log(name, value)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.steps:  # all were done before the run went on
            return
        seconds = max(self.ended - self.epoch_start, 1e-9)
        pl_module.log("perf/images_per_second", self.steps * self.global_batch / seconds)
        pl_module.log("perf/data_wait", min(1.0, self.waited / seconds))
        self._log_axes(pl_module)
        so_far = self.so_far()
        self._keep(so_far)
        self.steps = 0
