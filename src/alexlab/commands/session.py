"""Open and lock the directory of a run that trains, log to it, and record how the run ended."""

import contextlib
import faulthandler
import logging
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alexlab.commands import summary as summaries
from alexlab.commands.build import Experiment
from alexlab.engine import checkpoint_io, launcher, naming, provenance, resume, run_dir
from alexlab.engine.config import is_address, masker, save
from alexlab.engine.errors import RankLostError, UserError, counted, lost_peer
from alexlab.engine.files import RANK_LOCK, lock, lock_against_machines
from alexlab.engine.mirror import Mirror
from alexlab.engine.ranks import Ranks
from alexlab.engine.schema import TrainConfig
from alexlab.engine.signals import Preempted, SignalRecorder, of_stacks

if TYPE_CHECKING:
    from alexlab.loggers.wandb_logger import Status

log = logging.getLogger("alexlab")


class RunSession:
    """Hold the directory, lock, log and W&B run of a run that trains, and record the status at the end."""

    def __init__(
        self, config: TrainConfig, experiment: Experiment, recorder: SignalRecorder, ranks: Ranks, notes: list[str]
    ) -> None:
        self.config, self.experiment, self.recorder, self.notes = config, experiment, recorder, notes
        self.ranks = ranks
        self.path, self.plain = Path(config.run_dir), config.model_dump(exclude_unset=True)
        self.mask = masker(self.plain)
        self.is_first = launcher.rank() == 0
        self.is_open = False  # whether the directory belongs to this run; only rank 0 writes into it
        self.is_created = False  # whether the directory is new, or was empty
        self.status: Status = "failed"
        self.measured: dict[str, Any] = {}  # by `summaries.metrics_of`, after the training
        self.results: dict[str, Any] = {}  # further entries of summary.json
        self.summary: dict[str, Any] = {}  # the content of summary.json, once the run has ended
        self.mirror: Mirror | None = None
        self._lock = contextlib.ExitStack()

    def __enter__(self) -> "RunSession":
        self._started = time.monotonic()
        try:
            self._open()
        except BaseException as error:
            if isinstance(error, UserError) and self.is_created:  # a mistake leaves no directory
                shutil.rmtree(self.path, ignore_errors=True)
                self.is_open = False
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _open(self) -> None:
        config, experiment, wandb = self.config, self.experiment, self.experiment.wandb
        self.ranks.first(self._open_directory)
        if not self.is_first:
            self.is_open = True
            run_dir.set_up_logging(self.path, self.mask)
        faulthandler.enable(sys.__stderr__ or 2)  # a crash in a decoder or a driver shows where it happened
        faulthandler.register(of_stacks(), sys.__stderr__ or 2)  # kill -USR2 prints where each thread is
        for note in self.notes:
            log.info("%s", note, extra={"file_only": True})
        experiment.facts = facts = summaries.facts_of(config, experiment)
        if wandb is not None:
            wandb.log_config(naming.for_others(self.plain))
            wandb.log_summary(naming.without_paths({**facts, "code": provenance.read(self.path)}))
            wandb.log_dataset(self.plain["data"], facts["dataset"], experiment.data.readable_classes)
            wandb.log_code(self.path)
        summaries.report_start(config, experiment)

    def _open_directory(self) -> None:
        """Create the run directory, or reset that of a resumed run to the checkpoint, and start the loggers.

        Raises:
            UserError: another process trains this run, or a logger does not start. In both cases, a resumed run is not
                changed.
        """
        config, path = self.config, self.path
        source = Path(config.ckpt_path) if config.ckpt_path is not None else None
        resumed = config.resume.run is not None and resume.holds_run(path)
        if is_address(config.paths.logs):
            self.mirror = Mirror(config.paths, path, 60 * config.trainer.timeout)
        path.mkdir(parents=True, exist_ok=True)
        is_empty = not any(path.iterdir())
        self._lock.enter_context(lock(path, RANK_LOCK))
        self._lock.enter_context(lock_against_machines(path, launcher.job(), config.resume.break_lock))
        if not resumed:
            run_dir.create(path, self.plain)
            self.is_created = is_empty
        run_dir.set_up_logging(path, self.mask)
        if not resumed:
            self.is_open = True  # from here on a signal is reported in the log
            print(f"run directory: {run_dir.shown(path)}", flush=True)
        if self.experiment.wandb is not None:
            self.experiment.wandb.start()
        for tracker in self.experiment.trackers:
            tracker.start(naming.for_others(self.plain))
        lines: list[str] = []
        if self.mirror is not None:
            self.mirror.hold(launcher.job(), config.resume.break_lock, is_new=not resumed)
        if resumed:
            self.is_open = True
            save(self.plain, path / "config.yaml")
            lines += resume.reset_directory(path, source)
        if source is not None and not resume.is_own(source, path):
            lines.append("note: `best` counts from here, because the run continues the checkpoint of another run.")
        if self.mirror is not None:
            self.mirror.start()
            checkpoints: Any = self.experiment.trainer.strategy.checkpoint_io
            checkpoints.after = self.mirror.checkpoint_written
            print(f"copied to {self.mirror.bucket.address}", flush=True)
        if (changed := provenance.save(path)) is not None:
            lines.append(f"warning: {changed}")
        for line in lines:
            print(line, flush=True)

    def complete(self) -> None:
        """Agree with the other ranks that the run is finished, and write the summary."""
        self.experiment.task.share_skipped()
        self.experiment.preemption.agree(self.experiment.trainer)
        self.recorder.is_polled = True  # from here on a signal waits until the run is closed
        self.status = "finished"
        self._write_summary()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.recorder.is_polled = True
        try:
            replacement = self._close(error)
        except Preempted as second:  # Ctrl-C again: the user does not want to wait
            raise SystemExit(128 + second.number) from None
        finally:
            self._lock.close()
        if replacement is not None:
            raise replacement from error

    def _close(self, error: BaseException | None) -> BaseException | None:
        """Write how the run ended, and close the loggers. Returns what to raise instead of `error`."""
        config, wandb = self.config, self.experiment.wandb
        replacement: BaseException | None = None
        stopped_by = error.number if isinstance(error, Preempted) else None
        if stopped_by is not None and self.is_open:
            replacement = SystemExit(128 + stopped_by)
            if self.status != "finished":
                self.status = "preempted"
                self.results["error"] = str(error)
                if self.is_first:
                    log.warning(summaries.of_signal(config, stopped_by))
        elif error is not None and self.is_open:
            self.status = "failed"
            replacement = lost_peer(error, config.trainer.timeout)
            if replacement is None:
                self.ranks.report_failure()
            self.results["error"] = self.mask(str(replacement or f"{type(error).__name__}: {error}"))
            has_trace = not isinstance(error, UserError)
            log.error(f"failed: {self.results['error']}", exc_info=has_trace, extra={"file_only": True})
        if self.is_open and self.status != "finished":
            self._write_summary()
        if self.mirror is not None:
            try:
                self.mirror.finish()
            except UserError as lost:
                replacement = replacement or lost
        if wandb is not None:
            if self.status == "finished":
                wandb.log_checkpoint(self.path / "checkpoints/best.ckpt", summaries.metadata_of(config, self.summary))
            measured = {key: value for key, value in self.summary.items() if key not in self.experiment.facts}
            wandb.log_summary(naming.without_paths(measured))
            wandb.finish(self.status, stopped_by)
        for tracker in self.experiment.trackers:
            tracker.finish(self.status)
        if self.status == "finished" and self.is_first:
            folder = self.path / "checkpoints"
            names, why = checkpoint_io.not_kept(folder, config.checkpoint.keep)
            checkpoint_io.remove(folder, names)
            if why is not None:
                log.warning(f"checkpoint.keep={config.checkpoint.keep}: all checkpoints are kept, because {why}")
        # last, because SLURM sends SIGTERM at once; not after an error, which would come again at the same step
        is_lost = isinstance(replacement, RankLostError)
        if self.is_first:
            requeues = summaries.is_requeued(config, stopped_by, is_lost and not self.ranks.has_failed())
        else:  # rank 0 may be the lost one; if it had an error itself, it has written so
            asks = is_lost and self.ranks.rank == 1 and summaries.is_requeued(config, None, is_lost)
            shares = asks and (self.path / "config.yaml").is_file()  # whether the machines have a common file system
            failed = shares and run_dir.read_summary(self.path).get("status") == "failed"
            requeues = shares and not failed and self.ranks.first_is_gone()
        if requeues:
            text = f"{launcher.requeue()}."
            if self.is_first:
                log.warning(text)
            else:
                print(text, flush=True)
        return replacement

    def _write_summary(self) -> None:
        """Write summary.json on rank 0. If a run that failed cannot write it, W&B still gets the status."""
        experiment = self.experiment
        skipped = list(experiment.task.skipped)
        if skipped:
            self.results["skipped_images"] = skipped
            log.warning(f"skipped {counted(len(skipped), 'broken image')}: {', '.join(skipped[:5])}")
        if experiment.is_pruned:
            self.results["pruned"] = True
        names = experiment.task.class_names
        per_class = experiment.task.per_class
        if "test" in self.results and per_class:  # before the test it is of the last validation, which is no best
            self.results["per_class"] = {name: dict(zip(names, each, strict=True)) for name, each in per_class.items()}
        seconds = time.monotonic() - self._started
        if resume.is_own(self.config.ckpt_path, self.path):
            seconds += experiment.throughput.seconds_before
        measured = self.measured or summaries.metrics_of(experiment, self.path)
        self.summary = {"status": self.status, "seconds": round(seconds, 2), "test": {}}
        self.summary |= {**measured, **self.results, **experiment.facts}
        try:
            if self.is_first:
                run_dir.write_json(self.path / "summary.json", self.summary)
        except OSError as error:
            log.error(f"summary.json could not be written: {error.strerror}")
            if self.status == "finished":
                raise
