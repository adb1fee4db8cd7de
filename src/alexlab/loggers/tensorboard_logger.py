"""TensorBoard: event files in the run directory, with the config in HPARAMS, figures, and the status as a text."""

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning.loggers
from PIL import Image

from alexlab.engine.config import flat
from alexlab.engine.errors import UserError
from alexlab.engine.run_dir import shown


class TensorBoardLogger(pytorch_lightning.loggers.TensorBoardLogger):
    """Lightning's logger, with config and figures.

    Args:
        save_dir: the run directory.
        purge_step: of a resumed run, the steps of its checkpoint; TensorBoard forgets what was logged after it.
    """

    def __init__(self, save_dir: str, purge_step: int | None = None) -> None:
        try:
            super().__init__(save_dir, name="", version="tensorboard", default_hp_metric=False, purge_step=purge_step)
        except ModuleNotFoundError:
            raise UserError("logger=tensorboard needs the extra: pip install 'alexlab[tensorboard]'.") from None
        self.view = shlex.join(["tensorboard", "--logdir", shown(Path(self.log_dir))])

    def log_config(self, config: dict[str, Any]) -> None:
        """Log the config as hyperparameters, next to the metric `monitor`."""
        from torch.utils.tensorboard.summary import hparams

        self.hparams = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in flat(config).items()}
        experiment, start, self.success = hparams(self.hparams, {config["monitor"]: 0.0})
        for summary in (experiment, start):
            self.experiment.file_writer.add_summary(summary)

    def log_image(self, key: str, images: list[Image.Image], step: int | None = None) -> None:
        for image in images:
            self.experiment.add_image(key, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def finalize(self, status: str) -> None:
        """Log the status. HPARAMS gets success only, because it ignores a later status, such as that of a resume."""
        self.experiment.add_text("status", status)
        if status == "success":
            self.experiment.file_writer.add_summary(self.success)
        super().finalize(status)
