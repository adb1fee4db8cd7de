"""Images per second, the fraction of time spent waiting for data, and the images and seconds of the run so far."""

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


class Throughput(Callback):
    """Log the speed of training, and axes for curves.

    Per epoch: perf/images_per_second (all devices) and perf/data_wait (fraction of the time, 0 to 1, on this rank).
    Every `log_every_n_steps` optimizer steps: perf/images_per_second_step. With both, and with each validation:
    perf/images and perf/seconds, the images trained on so far and the training time. These include the earlier parts of
    a resumed run.

    The times are the host's, without a device synchronization. Over many steps they agree with the device's.

    Args:
        global_batch: images per batch, over all devices.
    """

    def __init__(self, global_batch: int) -> None:
        self.global_batch = global_batch
        self.total_images, self.total_seconds, self.total_waited = 0, 0.0, 0.0  # of finished epochs
        self.seconds_before = 0.0  # training time before the resume
        self.batches, self.waited = 0, 0.0  # of this epoch
        self.epoch_start = self.batch_end = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epoch_start = self.batch_end = self.window_start = time.perf_counter()
        self.batches, self.waited = 0, 0.0
        self.window_batches, self.logged_at = 0, trainer.global_step

    def so_far(self) -> dict[str, float]:
        """Return images, seconds and seconds of waiting of the whole run."""
        seconds = max(self.batch_end - self.epoch_start, 1e-9) if self.batches else 0.0
        return {
            "images": self.total_images + self.batches * self.global_batch,
            "seconds": self.total_seconds + seconds,
            "waited": self.total_waited + min(self.waited, seconds),
        }

    def axes(self, ahead: int = 0) -> dict[str, float]:
        """Return the axes for curves. `ahead` batches count although they have only begun."""
        so_far = self.so_far()
        return {"perf/images": so_far["images"] + ahead * self.global_batch, "perf/seconds": so_far["seconds"]}

    def state_dict(self) -> dict[str, float]:
        return self.so_far()

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._set_totals(state_dict)
        self.seconds_before = self.total_seconds

    def _set_totals(self, so_far: dict[str, float]) -> None:
        self.total_images = int(so_far["images"])
        self.total_seconds, self.total_waited = so_far["seconds"], so_far["waited"]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.waited += time.perf_counter() - self.batch_end

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches += 1
        self.window_batches += 1
        self.batch_end = time.perf_counter()
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step > self.logged_at and step % every == 0:
            speed = self.window_batches * self.global_batch / (self.batch_end - self.window_start)
            pl_module.log("perf/images_per_second_step", speed, prog_bar=True)
            self.window_start, self.window_batches, self.logged_at = self.batch_end, 0, step
            self._log_axes(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._log_axes(pl_module)

    def _log_axes(self, pl_module: pl.LightningModule) -> None:
        for name, value in self.axes().items():
            pl_module.log(name, value)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.batches:  # all batches of this epoch were done before the resume
            return
        seconds = max(self.batch_end - self.epoch_start, 1e-9)
        pl_module.log("perf/images_per_second", self.batches * self.global_batch / seconds)
        pl_module.log("perf/data_wait", min(1.0, self.waited / seconds))
        self._log_axes(pl_module)
        self._set_totals(self.so_far())
        self.batches = 0
