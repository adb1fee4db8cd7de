"""TensorBoard, MLflow and any other logger: what a run gives to each of them, and that none can stop the run."""

import functools
import logging
from typing import TYPE_CHECKING, Any

from alexlab.engine.config import flat
from alexlab.engine.errors import UserError

if TYPE_CHECKING:
    from alexlab.loggers.wandb_logger import Status

log = logging.getLogger("alexlab")

GUARDED = ("log_metrics", "log_hyperparams", "log_graph", "save", "after_save_checkpoint", "log_image", "finalize")


class Tracker:
    """One logger of a run besides metrics.csv and W&B.

    If one of its methods fails during the run, that is a warning, and the method is not called again.

    Args:
        key: the entry of the config's group `logger`.
        logger: of Lightning or your own, with up to two further methods: `log_config(config)` gets the config nested as
            it is, instead of `log_hyperparams`; `log_image(key, images, step)` gets figures.
    """

    def __init__(self, key: str, logger: Any) -> None:
        self.key, self.logger = key, logger
        self.is_started = False
        self.failed: set[str] = set()
        self.methods = {name: getattr(logger, name) for name in GUARDED if hasattr(logger, name)}
        for name in self.methods:
            setattr(logger, name, functools.partial(self._call, name))
        # Lightning finalizes after the training and again after the test, and knows of no signal; `finish` does it once
        logger.finalize = lambda status: None

    @property
    def view(self) -> str | None:
        """An address or a command that shows the run, from the logger's attribute `view`."""
        return getattr(self.logger, "view", None)

    def start(self, config: dict[str, Any]) -> None:
        """Log the config, which opens the logger's files or connection; UserError if that fails."""
        self.is_started = True
        try:
            if hasattr(self.logger, "log_config"):
                self.logger.log_config(config)
            else:
                self.methods["log_hyperparams"](flat(config))
        except UserError:
            raise
        except Exception as error:  # whatever its libraries raise
            raise UserError(f"logger.{self.key} does not start: {_reason(error)}.") from error

    def finish(self, status: "Status") -> None:
        """Close the logger, with Lightning's word for the status: success, failed, or preempted."""
        if self.is_started:
            self._call("finalize", "success" if status == "finished" else status)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> None:
        if name in self.failed:
            return
        try:
            self.methods[name](*args, **kwargs)
        except Exception as error:  # whatever its libraries raise; the run itself is fine
            self.failed.add(name)
            text = "logger.%s: %s failed and is not called again (%s). metrics.csv has all metrics."
            log.warning(text, self.key, name, _reason(error))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
