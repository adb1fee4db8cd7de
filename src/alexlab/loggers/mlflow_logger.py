"""MLflow: a server, or an SQLite file in the folder of the runs. A resumed run continues its run in MLflow."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytorch_lightning.loggers
from PIL import Image

from alexlab.engine.config import flat, look_up
from alexlab.engine.errors import UserError

ID_FILE = ".mlflow-id"  # in the run directory: the id of the run in MLflow
# MLflow waits 120 s for a server and tries eight times, while the run stands still. It also sends telemetry.
DEFAULTS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
DEFAULTS |= {"MLFLOW_LOGGING_LEVEL": "CRITICAL", "MLFLOW_DISABLE_TELEMETRY": "true"}


class MlflowLogger(pytorch_lightning.loggers.MLFlowLogger):
    """Lightning's logger, with config, figures and the status of the run.

    Args:
        save_dir: the run directory.
        logs: the folder of the runs, where mlflow.db is without a `tracking_uri`.
        settings: the keys of `MlflowConfig`.
    """

    def __init__(
        self, save_dir: str, logs: str, run_name: str, tracking_uri: str | None = None, **settings: Any
    ) -> None:
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        uri = look_up(tracking_uri) or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{logs}/mlflow.db"
        if uri.startswith("sqlite:///"):
            self.view = shlex.join(["mlflow", "ui", "--backend-store-uri", uri])
            file = Path(uri.removeprefix("sqlite:///")).resolve()
            file.parent.mkdir(parents=True, exist_ok=True)
            settings["artifact_location"] = file.with_name("mlartifacts").as_uri()  # not in the current folder
        self.id_file = Path(save_dir, ID_FILE)
        run_id = self.id_file.read_text().strip() if self.id_file.is_file() else None
        try:
            super().__init__(run_name=run_name, tracking_uri=uri, run_id=run_id, **settings)
        except ModuleNotFoundError as error:
            raise UserError(f"logger=mlflow needs the extra: pip install 'alexlab[mlflow]' ({error}).") from None

    def log_config(self, config: dict[str, Any]) -> None:
        """Open the run; log the config as parameters, of which MLflow keeps the first values, and as config.yaml."""
        client, run_id = self.experiment, self.run_id
        self.id_file.unlink(missing_ok=True)  # it may be a link
        self.id_file.write_text(f"{run_id}\n")
        client.update_run(run_id, status="RUNNING")
        logged = client.get_run(run_id).data.params
        params = {re.sub(r"[^\w/. -]", "_", key): value for key, value in flat(config).items()}
        super().log_hyperparams({key: value for key, value in params.items() if key not in logged})
        client.log_dict(run_id, config, "config.yaml")

    def log_image(self, key: str, images: list[Image.Image], step: int | None = None) -> None:
        """Log images as artifacts, KEY.png."""
        for image in images:
            self.experiment.log_image(self.run_id, image, artifact_file=f"{key}.png")

    def finalize(self, status: str = "success") -> None:
        """Close the run as FINISHED, FAILED, or, after a signal, KILLED."""
        super().finalize("KILLED" if status == "preempted" else status)
