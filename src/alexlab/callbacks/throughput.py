"""Images per second, the fraction of time spent waiting for data, and the images and seconds of the run so far."""

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


class Throughput(Callback):
    """Log the speed of training, and axes for curves.

    Per epoch: perf/images_per_second (all devices) and perf/data_wait (fraction of the time, 0 to 1, on this rank).
    Every `log_every_n_steps` optimizer steps: perf/images_per_second_step. With both, and with each validation:
    perf/images and perf/seconds, the images trained on so far and the training time, parts before a resume included.

    The times are the host's, without a device synchronization. Over many steps they agree with the device's.

    Args:
        global_batch: images per batch, over all devices.
    """

    def __init__(self, global_batch: int) -> None:
        self.global_batch = global_batch
        self.total_images, self.total_seconds, self.total_waited = 0, 0.0, 0.0  # of the whole run
        self.seconds_before = 0.0  # training time before the resume

    def axes(self, ahead: int = 0) -> dict[str, float]:
        """Return the axes for curves. `ahead` batches count although they have only begun."""
        return {"perf/images": self.total_images + ahead * self.global_batch, "perf/seconds": self.total_seconds}

    def state_dict(self) -> dict[str, float]:
        return {"images": self.total_images, "seconds": self.total_seconds, "waited": self.total_waited}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.total_images = int(state_dict["images"])
        self.total_seconds, self.total_waited = state_dict["seconds"], state_dict["waited"]
        self.seconds_before = self.total_seconds

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give W&B the axes for Lightning's rows of learning rates: it draws a curve over values of the same row."""
        for logger in trainer.loggers:
            if hasattr(logger, "learning_rate_axes"):
                # count the images of the step that begins, as the step's rows of metrics do
                logger.learning_rate_axes = lambda: {"epoch": trainer.current_epoch, **self.axes(ahead=1)}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.batch_end, self.logged_at = time.perf_counter(), trainer.global_step
        self.epoch_start = self.logged = self.state_dict()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.total_waited += time.perf_counter() - self.batch_end

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        self.total_images += self.global_batch
        self.total_seconds += now - self.batch_end
        self.batch_end = now
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step > self.logged_at and step % every == 0:
            images, seconds = self.total_images - self.logged["images"], self.total_seconds - self.logged["seconds"]
            pl_module.log("perf/images_per_second_step", images / seconds, prog_bar=True)
            self.logged, self.logged_at = self.state_dict(), step
            pl_module.log_dict(self.axes())

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            pl_module.log_dict(self.axes())

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        images, seconds, waited = (value - self.epoch_start[key] for key, value in self.state_dict().items())
        if images:  # otherwise all batches of this epoch were done before the resume
            pl_module.log("perf/images_per_second", images / seconds)
            pl_module.log("perf/data_wait", waited / seconds)
            pl_module.log_dict(self.axes())
