"""Weights & Biases: online with a key, offline without; its state tells how the run really ended."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning.loggers
import wandb
from pytorch_lightning.utilities import rank_zero_only

from alexlab.engine import secrecy, sweeps
from alexlab.engine.errors import UserError
from alexlab.engine.run_dir import shown
from alexlab.loggers import wandb_artifacts as artifacts
from alexlab.loggers.wandb_key import key_at_hand

log = logging.getLogger("alexlab")

# that W&B's client takes from WANDB_MODE; its `shared` is for several processes that write one run
MODES = {name: name for name in ("online", "offline", "disabled")} | {"dryrun": "offline", "run": "online"}


def require_key(asked: str = "logger.wandb.mode=online") -> None:
    """Raises UserError where no API key is at hand."""
    if not key_at_hand():
        raise UserError(
            f"{asked} needs an API key: run `wandb login` or set WANDB_API_KEY, or take "
            f"{asked.partition('=')[0]}=offline (upload later with `wandb sync`)."
        )


def check_environment(mode: str) -> None:
    """Take an empty WANDB_MODE, with which W&B's client ends in a traceback, out of the environment.

    Args:
        mode: logger.wandb.mode.

    Raises:
        UserError: WANDB_MODE has none of W&B's modes that fit a run, or it or `mode` asks for a key that is not there.
    """
    asked = os.environ.get("WANDB_MODE")
    if asked == "":
        del os.environ["WANDB_MODE"]
    if asked and asked not in MODES:
        raise UserError(f"WANDB_MODE={asked}: must be online, offline or disabled, or not be set.")
    if mode == "online":
        require_key()
    elif mode == "auto" and MODES.get(asked or "") == "online":
        require_key(f"WANDB_MODE={asked}")


def _rank() -> int:
    return getattr(rank_zero_only, "rank", 0)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _gave_up(folder: Path) -> bool:
    """Whether W&B's own process has stopped uploading, which it says in a file alone that it is sure to write."""
    told = folder / "logs/debug-internal.log"
    return told.is_file() and "filestream: fatal error" in told.read_text(errors="replace")


Status = Literal["finished", "failed", "preempted"]
FINISH = 15.0  # seconds that the server gets to take the last numbers,
ANSWER = 5.0  # to answer about an artifact that it is still to be asked about when the run ends,
SLOWEST = 1e6  # and, beside FINISH, for a checkpoint: bytes a second
ID = ".wandb-id"  # the file in a run's directory that says which of W&B's it is


class WandbLogger(pytorch_lightning.loggers.WandbLogger):
    """A run in `save_dir`, W&B's own files included.

    Args:
        save_dir: the run directory.
        mode: "auto" (online where a key is at hand, else offline), "online", "offline" or "disabled".
        log_model: upload the best checkpoint when the run ends.
        log_code: upload the commit and what differs from it; W&B's own upload of code is off then, as it would be the
            same again, secrets included.
        init_timeout: seconds that the server gets to answer before the run goes on offline.

    Raises:
        UserError: online without a key, or, when it starts, with one that W&B refuses, or settings that it does.
    """

    def __init__(
        self,
        save_dir: str,
        mode: str = "auto",
        project: str = "alexlab",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: "list[str] | tuple[str, ...]" = (),
        notes: str | None = None,
        log_model: bool = False,
        log_code: bool = True,
        init_timeout: float = 8,
    ) -> None:
        if mode not in ("auto", "online", "offline", "disabled"):
            raise UserError(f"logger.wandb.mode={mode}: must be auto, online, offline or disabled.")
        self._must_be_online = mode == "online"
        reason = "as asked"
        if mode == "auto":
            asked = os.environ.get("WANDB_MODE")
            has_key = key_at_hand()
            mode = MODES.get(asked, asked) if asked else ("online" if has_key else "offline")
            without = "an API key is there" if has_key else "no API key: `wandb login` keeps one"
            reason = f"WANDB_MODE={asked}" if asked else without
        if mode == "online":
            require_key()
        self.upload_best, self.upload_code = log_model, log_code
        self._sending: list[tuple[threading.Thread, threading.Event, float | None]] = []
        settings: dict[str, Any] = {
            "entity": entity,
            "group": group,
            "job_type": "train",
            "tags": list(tags),
            "notes": notes,
            # not `offline=True`: after an earlier run in the process that went online
            "mode": mode,
        }
        quiet = wandb.Settings(
            init_timeout=init_timeout, finish_timeout=FINISH, finish_timeout_raises=False, silent=True, console="off",
            x_disable_stats=False, save_code=False if log_code else None,
        )  # fmt: skip
        Path(save_dir).mkdir(parents=True, exist_ok=True)
        self._known_by = Path(save_dir) / ID
        if self._known_by.is_file():  # a run that goes on
            settings["version"] = self._known_by.read_text().strip()
        super().__init__(name=name, save_dir=save_dir, project=project, settings=quiet, **settings)
        self._wandb_init.pop("anonymous", None)  # W&B warns of it even where it is None
        if sweeps.agent() is not None:  # which has said where the run belongs, and made it already
            for key in ("project", "entity", "id"):
                self._wandb_init.pop(key, None)
            if not self._known_by.is_file():
                self._wandb_init["resume"] = None
        self._reason = reason
        self._finished = False
        self.axes_of_rates: Callable[[], dict[str, float]] | None = None  # for rows that have the step alone
        self._tests = True  # whether there are images to test with
        self.where: str | None = None  # what shows the run: an address, or a command

    def start(self) -> None:
        """Open the run, offline where the server does not answer."""
        if _rank() != 0:
            return
        # W&B's reports on itself: a server that hangs would hold the process up for 22 s when it ends
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        mode = self._wandb_init["mode"]
        try:
            run = self.experiment
        except wandb.errors.UsageError as error:
            raise UserError(f"W&B does not take the settings of logger.wandb: {_first_line(error)}") from error
        except (wandb.errors.Error, OSError, TimeoutError) as error:
            refused = isinstance(error, wandb.errors.AuthenticationError)
            what = f"{'W&B refuses the API key' if refused else 'the server did not answer'} ({_first_line(error)})"
            if refused and self._must_be_online:
                raise UserError(f"{what}: run `wandb login` again, or take logger.wandb.mode=offline.") from error
            log.warning("W&B: %s: the run goes on offline.", what)
            mode, self._reason = "offline", "no answer"
            self._wandb_init["mode"] = mode
            self._experiment = None
            run = self.experiment
        self._known_by.unlink(missing_ok=True)
        self._known_by.write_text(f"{run.id}\n")
        folder = shown(Path(run.dir).parent)
        where = f" upload later with `wandb sync {folder}`" if mode == "offline" else f" {run.url}"
        if mode != "disabled":
            self.where = run.url if mode == "online" else f"wandb leet {Path(folder).parent}"
        log.info("W&B: %s (%s).%s", mode, self._reason, where if mode != "disabled" else "")
        for pattern in ("train/*", "val/*", "test/*", "perf/*", "lr*"):
            run.define_metric(pattern, step_metric="trainer/global_step", step_sync=True)

    def log_config(self, config: dict[str, Any]) -> None:
        """The resolved config, once, nested as it is."""
        if _rank() == 0:
            self.start()
            self.experiment.config.update(config)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Without test/ they were measured on val once more: in a column beside other runs they would pass for more."""
        told = {key: value for key, value in metrics.items() if self._tests or not key.startswith("test/")}
        if self.axes_of_rates is not None and any(key.startswith("lr") for key in told):
            told = {**self.axes_of_rates(), **told}
        if told.keys() - {"epoch"} or told.keys() == metrics.keys():
            super().log_metrics(told, step)

    def log_summary(self, values: dict[str, Any]) -> None:
        if not self._tests and "test" in values:
            values = {**values, "test": {}}
        if _rank() == 0 and self._experiment is not None:  # it may not have started
            self.experiment.summary.update(secrecy.hidden(values))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: `log_config` has logged the config already."""

    def finish(self, status: Status, ended_by: int | None = None) -> None:
        """Close the run so that W&B shows how it ended; a second call does nothing.

        Args:
            ended_by: the signal of a run that is preempted. SIGTERM is how W&B's agent stops a run that its server
                wants ended: marked as preempting, it would be given out again.
        """
        if _rank() != 0 or self._finished or self._experiment is None:
            return
        self._sent()
        self._finished = True
        if status == "preempted" and not (sweeps.agent() is not None and ended_by == signal.SIGTERM):
            self.experiment.mark_preempting()
        run = self.experiment
        run.finish(exit_code=0 if status == "finished" else 1)
        folder = Path(run.dir).parent
        timed_out = getattr(run, "_finish_timed_out", False)
        if timed_out or _gave_up(folder):
            within = f" within {FINISH:g} s" if timed_out else ""
            log.warning(
                "W&B: the server did not take all numbers%s: upload them with `wandb sync %s`.", within, shown(folder)
            )
        self._experiment = None

    def log_dataset(self, data: dict[str, Any], described: dict[str, Any], classes: list[str]) -> None:
        """What the run is trained on, as the artifact that it uses: a fingerprint, and no image; see `artifacts`."""
        self._tests = "test" in described["images"]
        if _rank() == 0 and self._experiment is not None:
            self._send(artifacts.dataset(data, described, classes), used=True)

    def log_code(self, run_dir: Path) -> None:
        """The run's code.json and code.patch as the artifact `alexlab-code`, where `log_code` asks for it."""
        found = artifacts.code(run_dir) if _rank() == 0 and self._experiment is not None and self.upload_code else None
        if found is not None:
            self._send(*found)

    def log_checkpoint(self, path: Path, metadata: dict[str, Any]) -> None:
        """Upload a checkpoint as the run's artifact `model-<id>:best`, where `log_model` asks for it."""
        if _rank() == 0 and self._experiment is not None and self.upload_best and path.is_file():
            # W&B cuts an upload off that is not done FINISH seconds after the run's end, and the run with it
            within = FINISH + path.stat().st_size / SLOWEST
            self._send(artifacts.checkpoint(self.experiment.id, path, metadata), ["best", "latest"], within=within)

    def _send(
        self,
        artifact: wandb.Artifact,
        aliases: "list[str] | None" = None,
        used: bool = False,
        within: float | None = None,
    ) -> None:
        """Beside the run: W&B asks its server about an artifact first, and for one that hangs it waits for long.

        Args:
            used: as what the run came from. `use_artifact` refuses that offline, and waits for the upload else.
            within: seconds for the upload, which the run's end waits for; None leaves it to W&B.
        """
        mode = self._wandb_init["mode"]
        if mode == "disabled":
            return
        run, name, given = self.experiment, artifact.name, threading.Event()

        def send() -> None:
            try:
                sent = run._log_artifact(artifact, aliases=aliases, is_user_created=used, use_after_commit=used)
                given.set()
                if sent._save_handle is not None:  # online; not `wait`, which fetches the artifact after that
                    told = sent._save_handle.wait_or(timeout=within).response.log_artifact_response
                    if told.error_message:
                        raise wandb.errors.CommError(told.error_message)
            except TimeoutError:
                pass  # what is not there then, `finish` tells
            except Exception as error:  # of many kinds; the run is well without it
                if not self._finished:
                    log.warning("W&B: the artifact %s was not taken (%s).", name, _first_line(error))
            finally:
                given.set()

        thread = threading.Thread(target=send, name=f"W&B {name}", daemon=True)
        self._sending.append((thread, given, within))
        thread.start()

    def _sent(self) -> None:
        """Wait until W&B's own process has all of those, and for the upload of a checkpoint; but not for long."""
        start = time.monotonic()
        for thread, given, within in self._sending:
            if not given.wait(max(0.0, start + ANSWER - time.monotonic())):
                log.warning("W&B: the server does not answer: %s is not uploaded.", thread.name.removeprefix("W&B "))
            elif within is not None:
                thread.join(max(0.0, start + within - time.monotonic()))
