"""Weights & Biases: online with an API key, offline without one. Training continues if W&B fails, hangs or refuses."""

import json
import logging
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any, Literal

import pytorch_lightning.loggers
import wandb
from pydantic import ValidationError

from alexlab.engine import provenance
from alexlab.engine.errors import UserError
from alexlab.engine.run_dir import shown
from alexlab.engine.schema import WandbConfig
from alexlab.engine.sweeps import agent
from alexlab.engine.text import is_text, printable
from alexlab.loggers.wandb_api import first_line, has_api_key

log = logging.getLogger("alexlab")

Status = Literal["finished", "failed", "preempted"]

# The values of WANDB_MODE that fit a run, as W&B reads them. `shared` is for several processes that write one run.
MODES = {"online": "online", "offline": "offline", "disabled": "disabled", "dryrun": "offline", "run": "online"}
ID_FILE = ".wandb-id"  # in the run directory: the id of the run in W&B, so that a resumed run is the same one
FINISH_TIMEOUT = 15.0  # seconds to upload the last metrics at the end, unless WANDB_FINISH_TIMEOUT is set
ARTIFACT_TIMEOUT = 5.0  # seconds that the end of the run waits for the upload of the dataset and the code
SLOWEST_UPLOAD = 1e6  # bytes per second: the checkpoint gets FINISH_TIMEOUT and (size / this) seconds
MAX_CLASSES = 10_000  # whose names the dataset artifact holds
CODE_ARTIFACT = "alexlab-code"


def choose_mode(mode: str) -> tuple[str, str]:
    """Return W&B's mode for `logger.wandb.mode`, and the reason in words. WANDB_MODE decides if it is "auto".

    Raises:
        UserError: WANDB_MODE is not a mode for a run, or the mode needs an API key and none was found.
    """
    variable, reason = os.environ.get("WANDB_MODE"), f"logger.wandb.mode={mode}"
    if not variable:
        os.environ.pop("WANDB_MODE", None)  # W&B fails on an empty one
    elif variable not in MODES:
        raise UserError(f"`WANDB_MODE={variable}` must be online, offline or disabled, or must not be set.")
    if mode == "auto":
        if not variable:
            known = has_api_key()
            return ("online", "found an API key") if known else ("offline", "no API key: `wandb login` stores one")
        mode, reason = variable, f"WANDB_MODE={variable}"
    if MODES[mode] == "online" and not has_api_key():
        raise UserError(
            f"`{reason}` needs an API key: run `wandb login` or set WANDB_API_KEY, or use "
            f"{reason.partition('=')[0]}=offline (and upload later with `wandb sync`)."
        )
    return MODES[mode], reason


class WandbLogger(pytorch_lightning.loggers.WandbLogger):
    """Log one run to W&B. Use it on rank 0 only.

    Lightning's logger never closes the run, so that a failed run looks finished in W&B, and the next job of a sweep
    logs into the run of the previous job. Here `start` opens the run and `finish` closes it with a status. Lightning's
    `log_image`, `log_table`, `log_text` and `watch` work as usual.

    Args:
        save_dir: run directory, where W&B's own files go too.
        settings: keys of `WandbConfig`.

    Raises:
        UserError: as `choose_mode`.
    """

    def __init__(self, save_dir: str, **settings: Any) -> None:
        config = WandbConfig(**settings)
        self.mode, self.reason = choose_mode(config.mode)
        super().__init__(project=config.project, save_dir=save_dir)
        self.config = config
        self.finish_timeout = float(os.environ.get("WANDB_FINISH_TIMEOUT") or FINISH_TIMEOUT)
        self.id_file = Path(save_dir) / ID_FILE
        run_id = self.id_file.read_text().strip() if self.id_file.is_file() else None
        timeouts: Any = {"init_timeout": config.init_timeout, "finish_timeout": self.finish_timeout}
        save_code = False if config.log_code else None  # ours would be uploaded twice; None is the user's own setting
        self.init_args: dict[str, Any] = {"dir": save_dir, "job_type": "train", "mode": self.mode}
        self.init_args["settings"] = wandb.Settings(
            **timeouts, finish_timeout_raises=True, silent=True, console="off", save_code=save_code
        )
        self.init_args |= {key: getattr(config, key) for key in ("name", "group", "tags", "notes")}
        if agent() is None:  # the agent has created the run, in the sweep's project
            self.init_args |= {"project": config.project, "entity": config.entity, "id": run_id, "resume": "allow"}
        else:
            # W&B would read the sweep's parameters from this file, and then ignore the remaining keys of these groups
            os.environ.pop("WANDB_SWEEP_PARAM_PATH", None)
            self.init_args |= {"resume": "allow"} if run_id is not None else {}
        self.run: Any = None
        self.is_broken = self.is_closing = False
        self.uploads: list[tuple[threading.Thread, float]] = []  # (thread, seconds that `finish` waits for it)
        self.has_test_images = True
        self.learning_rate_axes: Callable[[], dict[str, float]] | None = None  # set by the callback that logs them
        self.view: str | None = None  # the address of the run, or the command that shows an offline run

    @property
    def experiment(self) -> Any:
        """The run in W&B, as `wandb.init` returns it; opened when it is first needed."""
        self.start()
        return self.run

    @property
    def version(self) -> str | None:
        return self.run.id if self.run is not None else None

    def start(self) -> None:
        """Open the run, or open it offline if the server does not answer.

        Raises:
            UserError: W&B refuses the settings; or the API key, if the run must be online.
        """
        if self.run is not None:
            return
        # a server that hangs would delay the end of the process by 22 s while W&B reports internal errors
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        Path(self.init_args["dir"]).mkdir(parents=True, exist_ok=True)
        is_usable = is_text(self.init_args["dir"]) or self.mode == "disabled"
        if is_usable and self.mode != "disabled":
            _replace_folders(Path(self.init_args["dir"], "wandb"))
        try:
            self.run = _init(**self.init_args) if is_usable else self._start_without_server()
        except (wandb.errors.UsageError, ValidationError) as error:  # also of a variable, such as WANDB_TAGS
            why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else first_line(error)
            raise UserError(f"W&B does not accept the settings of logger.wandb: {why}") from error
        except Exception as error:  # W&B raises many types
            refused = isinstance(error, wandb.errors.AuthenticationError) or "error 401" in str(error)
            what = f"{'W&B refuses the API key' if refused else 'the server did not answer'} ({first_line(error)})"
            if refused and self.config.mode == "online":
                raise UserError(f"{what}: run `wandb login` again, or use logger.wandb.mode=offline.") from error
            if self.mode == "online":
                log.warning("W&B: %s: the run continues offline.", what)
            self.run = self._start_without_server()
        self.id_file.unlink(missing_ok=True)  # it may be a link
        self.id_file.write_text(f"{self.run.id}\n")
        self.run.define_metric("trainer/global_step")
        self.run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        url = self.run.url if self.mode == "online" else None  # an offline run's would be a warning of W&B
        upload, view = (
            shlex.join(["wandb", *words])
            for words in (["sync", shown(self.folder)], ["leet", shown(self.folder.parent)])
        )
        more = {"online": f" {url}", "offline": f" To upload the run later: `{upload}`"}
        self.view = {"online": url, "offline": view}.get(self.mode)
        log.info("W&B: %s (%s).%s", self.mode, self.reason, more.get(self.mode, ""))

    def _start_without_server(self) -> Any:
        """Open the run offline, or, if W&B does not start at all, one that records nothing."""
        self.mode, self.reason, self.init_args["mode"] = "offline", "no answer", "offline"
        try:
            if not is_text(self.init_args["dir"]):  # W&B would print a traceback for each line of its log
                raise OSError("the path of the run is in no encoding")
            return _init(**self.init_args)
        except Exception as error:  # W&B raises many types
            log.warning("W&B does not start (%s): the run continues without W&B.", first_line(error))
            self.mode, self.reason = "disabled", "it does not start"
            return wandb.init(mode="disabled")

    @property
    def folder(self) -> Path:
        """The folder that `wandb sync` uploads."""
        return Path(self.run.dir).parent

    # -- metrics and facts

    def log_config(self, config: dict[str, Any]) -> None:
        """Log the config, nested as it is."""
        self.start()
        self._call(lambda run: run.config.update(config))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `log_config` logs the whole config."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log one row. Without test images, test/* were measured on val/: W&B's table of runs must not show them."""
        row = {key: value for key, value in metrics.items() if self.has_test_images or not key.startswith("test/")}
        if not row.keys() - {"epoch"} and row.keys() != metrics.keys():
            return
        if self.learning_rate_axes is not None and any(key.startswith("lr") for key in row):
            row = {**self.learning_rate_axes(), **row}  # W&B draws a curve over what is in the same row
        self.start()
        self._call(lambda run: run.log(row if step is None else {**row, "trainer/global_step": step}))

    def log_summary(self, values: dict[str, Any]) -> None:
        """Set values of the run's summary, if the run was opened."""
        summary = values if self.has_test_images or "test" not in values else {**values, "test": {}}
        self._call(lambda run: run.summary.update(summary))

    def _call(self, function: Callable[[Any], None]) -> None:
        """Call a function with the run, if it is open. If W&B's process is gone, warn once, and log no more."""
        if self.run is None or self.is_broken:
            return
        try:
            function(self.run)
        except Exception as error:  # W&B raises many types
            self.is_broken = True
            log.warning(
                "W&B failed (%s): no more metrics are sent to W&B. metrics.csv has all metrics.", first_line(error)
            )

    # -- artifacts

    def log_dataset(self, data: dict[str, Any], described: dict[str, Any], classes: list[str]) -> None:
        """Log the run's dataset as an input artifact: fingerprint, counts and class names, but no images.

        The artifact contains no path of this machine, so that all runs on the same images use the same version.
        """
        self.has_test_images = "test" in described["images"]
        name = PurePath(str(data["root"])).name if data["name"] in ("folder", "prepared") else str(data["name"])
        facts = {key: described[key] for key in ("fingerprint", "images", "num_classes")}
        name = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:100] or "images"  # the characters that W&B accepts
        self._upload(f"dataset-{name}", "dataset", facts, {"dataset.json": {**facts, "classes": classes[:MAX_CLASSES]}})

    def log_code(self, run_dir: Path) -> None:
        """Log code.json and code.patch of the run as an artifact, if `log_code` is set and the commit is known."""
        code = provenance.read(run_dir)
        if self.config.log_code and code.get("commit"):
            files = {"code.json": code, "code.patch": run_dir / "code.patch"}
            self._upload(CODE_ARTIFACT, "code", code, files, ["latest", code_alias(code)])

    def log_checkpoint(self, path: Path, metadata: dict[str, Any]) -> None:
        """Upload a checkpoint as the artifact `model-ID:best`, if `log_model` is set."""
        if self.config.log_model and self.run is not None and path.is_file():
            timeout = self.finish_timeout + path.stat().st_size / SLOWEST_UPLOAD
            self._upload(f"model-{self.run.id}", "model", metadata, {path.name: path}, ["best", "latest"], timeout)

    def _upload(
        self,
        name: str,
        kind: str,
        metadata: dict[str, Any],
        files: dict[str, Any],
        aliases: list[str] | None = None,
        timeout: float = ARTIFACT_TIMEOUT,
    ) -> None:
        """Upload an artifact in a thread: W&B asks the server about it first, and waits long for one that hangs. A
        dataset is an input of the run.

        Args:
            files: by name, the path of each, which is skipped if it does not exist, or values for JSON.
        """
        if self.run is None or self.is_broken or self.mode == "disabled":
            return
        run = self.run

        def upload() -> None:
            try:
                artifact = wandb.Artifact(name, type=kind, metadata=metadata)
                for file, content in files.items():
                    if not isinstance(content, Path):
                        with artifact.new_file(file, mode="w") as opened:
                            opened.write(json.dumps(content, indent=2, sort_keys=True) + "\n")
                    elif content.is_file():
                        artifact.add_file(str(content))
                if kind == "dataset" and self.mode == "online":
                    run.use_artifact(artifact)
                    return
                logged = run.log_artifact(artifact, aliases=aliases)
                if self.mode == "online":  # else `wandb sync` uploads it
                    logged.wait()
            except Exception as error:  # W&B raises many types; the run itself is well
                if not self.is_closing:
                    log.warning("W&B: the artifact %s was not uploaded (%s).", name, first_line(error))

        thread = threading.Thread(target=upload, name=f"W&B {name}", daemon=True)
        self.uploads.append((thread, timeout))
        thread.start()

    # -- the end

    def finish(self, status: Status, signal_number: int | None = None) -> None:
        """Close the run so that W&B shows how it ended. A second call does nothing.

        Args:
            signal_number: the signal that preempted the run. An agent sends SIGTERM to a run that the sweep stops;
                W&B would start a preempted run again, so such a run only counts as failed.
        """
        if self.run is None:
            return
        start = time.monotonic()
        for thread, timeout in self.uploads:
            thread.join(max(0.0, start + timeout - time.monotonic()))
            if thread.is_alive():
                log.warning("W&B: the artifact %s was not uploaded within %g s.", thread.name[4:], timeout)
        self.is_closing = True
        if status == "preempted" and not (agent() is not None and signal_number == signal.SIGTERM):
            self._call(lambda run: run.mark_preempting())
        folder, within = self.folder, ""
        try:
            if not self.is_broken:
                self.run.finish(exit_code=0 if status == "finished" else 1)
        except TimeoutError:
            within = f" within {self.finish_timeout:g} s"
        except Exception as error:  # W&B raises many types
            log.warning("W&B failed (%s): it may show another status of this run.", first_line(error))
        self.run = None
        # W&B reports only here that it gave up; if a version words this line differently, only our warning is lost
        internal_log = folder / "logs/debug-internal.log"
        gave_up = internal_log.is_file() and "filestream: fatal error" in internal_log.read_text(errors="replace")
        if within or gave_up:
            log.warning(
                "W&B: the server did not receive all metrics%s: upload them with `wandb sync %s`.",
                within,
                shlex.quote(shown(folder)),
            )


def _init(**init_args: Any) -> Any:
    """Open a run. W&B sends the words of the command line too, and fails if one of them cannot be encoded."""
    words = sys.argv
    sys.argv = [printable(word, "\n\t") for word in words]
    try:
        return wandb.init(**init_args)
    finally:
        sys.argv = words


def _replace_folders(replacement: Path) -> None:
    """Give W&B a folder of the run for its data, cache and settings, if those below HOME cannot be written."""
    os.environ["TMPDIR"] = tempfile.gettempdir()  # W&B's own process takes a TMPDIR that cannot be written
    config = os.environ.get("WANDB_CONFIG_DIR") or os.path.expanduser("~/.config/wandb")  # noqa: PTH111
    folders = {"DATA": wandb.env.get_data_dir(), "CACHE": str(wandb.env.get_cache_dir()), "CONFIG": config}
    refused = []
    for name, folder in folders.items():
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError:
            refused.append(folder)
            os.environ[f"WANDB_{name}_DIR"] = str(replacement / name.lower())
    if refused:
        log.warning("W&B cannot write to %s, and uses %s instead.", " and ".join(refused), shown(replacement))


def code_alias(code: dict[str, Any]) -> str:
    """Return the alias of the version of `CODE_ARTIFACT` that holds the state of the code in code.json."""
    unknown = code.get("patch_sha256") is None and (code.get("left_out") or code.get("dirty"))
    known = [str(code[key])[:12] for key in ("commit", "patch_sha256") if code.get(key)]
    return "-".join([*known, "unknown"] if unknown else known)
