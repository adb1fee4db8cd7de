"""THE RUN, in order: the task of `python train.py`."""

import contextlib
import faulthandler
import logging
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch

from alexlab.callbacks.preemption import Preempted, SignalRecorder
from alexlab.commands import plan as plans
from alexlab.commands import summary as summaries
from alexlab.commands.build import Experiment, build, build_data, build_task, load_checkpoint
from alexlab.commands.start import Start, find_start, is_resumed
from alexlab.data.datamodule import ImageFolders
from alexlab.engine import checkpoint_io, launcher, naming, provenance, resume, run_dir
from alexlab.engine.config import masker, save
from alexlab.engine.devices import Devices, choose_precision, find_devices
from alexlab.engine.errors import RunFailedError, UserError, lost_peer
from alexlab.engine.files import lock
from alexlab.engine.memory import keep_memory
from alexlab.engine.process import cores
from alexlab.engine.schema import TrainConfig
from alexlab.tasks.load import load_net

if TYPE_CHECKING:
    from alexlab.loggers.wandb_logger import Status

LOCK = ".lock.rank"  # held by rank 0, also after the command that started it has died

log = logging.getLogger("alexlab")


def train(config: TrainConfig) -> float | None:
    """Train one network; return the best value of `monitor`, for a sweep to optimize.

    All checks of config, images, network and checkpoint come before the run's directory exists.
    """
    with stopping_on_signals(config) as recorder:
        start = find_start(config)  # a new run, a resumed one, or one like another
        report(start.notes)
        config = start.config
        if start.is_finished:
            return run_dir.read_summary(Path(config.run_dir)).get("best", {}).get(config.monitor)
        devices = find_devices(config.trainer)
        check_devices(config, devices)
        if config.dry_run:
            show_plan(start, devices)
            return None
        if devices.world_size > 1 and not launcher.external():
            return train_on_workers(start, devices)
        return train_rank(start, recorder)


@contextlib.contextmanager
def stopping_on_signals(config: TrainConfig) -> Iterator[SignalRecorder]:
    """Record signals in this block. If one stops the run, print how to resume it and exit with 128 + its number."""
    recorder = SignalRecorder()
    try:
        with recorder.recording():
            yield recorder
    except Preempted as error:
        if launcher.rank() == 0:
            print("\n".join(summaries.of_signal(config, error.number)), flush=True)
        raise SystemExit(128 + error.number) from None


def check_devices(config: TrainConfig, devices: Devices) -> None:
    """Raise UserError for settings that the devices do not support, before the images are read."""
    if devices.nodes > 1 and not launcher.external():
        raise UserError(
            f"`trainer.num_nodes={devices.nodes}` needs torchrun or srun to start the ranks on each machine: "
            "torchrun --nnodes N --nproc-per-node GPUS --rdzv-backend c10d --rdzv-endpoint HOST:PORT train.py ..."
        )
    choose_precision(config.trainer.precision, devices.kind)


def report(lines: Iterable[str]) -> None:
    """Print lines once for all ranks."""
    for line in lines if launcher.prints() else ():
        print(line, flush=True)


def show_plan(start: Start, devices: Devices) -> None:
    """Print what would run, and stop: dry_run=true."""
    config = start.config
    data = build_data(config, devices).read()
    report(f"warning: {line}" for line in start.compare(data.describe()))
    plan = plans.make_plan(config, devices.world_size, data.images)
    task = build_task(config, data, devices.kind, plan)
    load_checkpoint(config, task, data, plan)
    if launcher.rank() == 0:
        plans.show(plan, config, devices, data.images, task.net, data.readable_classes)


def train_on_workers(start: Start, devices: Devices) -> float | None:
    """Train with one worker process per device. This process reads the images once, so that workers do not race."""
    config, path = start.config, Path(start.config.run_dir)
    data = build_data(config, devices).read()
    plans.make_plan(config, devices.world_size, data.images)
    notes = [*start.notes, *report_changes(start, data)]
    threads = max(1, cores() // devices.local)
    before = written_at(path)
    outcome = launcher.run_workers(
        {"config": config.model_dump(exclude_unset=True), "notes": notes},
        devices.world_size,
        threads,
        config.trainer.master_port,
    )
    has_started = written_at(path) != before  # otherwise a resumed run stays as it was
    if outcome.code and has_started:
        run_dir.mark(path, "preempted" if outcome.by_signal else "failed", outcome.why)
    if outcome.by_signal:
        if not outcome.reported:
            print("\n".join(summaries.of_signal(config, outcome.code - 128)), flush=True)
        sys.exit(outcome.code)
    if outcome.code == 2:
        raise UserError(outcome.why)
    if outcome.code:
        raise RunFailedError(f"{outcome.why}\n{summaries.how_to_continue(path)}", outcome.code)
    return run_dir.read_summary(path)["best"].get(config.monitor)


def report_changes(start: Start, data: ImageFolders) -> list[str]:
    """Print how the images and the code differ from those of the run that `from_run=` names, and return these lines."""
    changes = [f"warning: {line}" for line in start.compare(data.describe())]
    report(changes)
    return changes


def written_at(path: Path) -> int | None:
    """Return when config.yaml was written, which tells whether the run has started; None if it does not exist."""
    file = path / "config.yaml"
    return file.stat().st_mtime_ns if file.is_file() else None


def train_rank(start: Start, recorder: SignalRecorder) -> float | None:
    """Train as one rank, or alone."""
    config, path = start.config, Path(start.config.run_dir)
    devices = find_devices(config.trainer)
    if devices.kind == "cpu":
        keep_memory()
    run_dir.quiet_libraries()  # before the trainer is built, which logs the devices
    experiment = build(config, devices, recorder)
    notes = [*start.notes, *report_changes(start, experiment.data)]
    with RunSession(config, experiment, recorder, notes) as session:
        # train
        experiment.trainer.fit(
            experiment.task, datamodule=experiment.data, ckpt_path=config.ckpt_path, weights_only=True
        )
        experiment.preemption.agree(experiment.trainer)
        summaries.report_stop(experiment)
        validate_last(experiment)
        session.measured = summaries.metrics_of(experiment, path)
        # test the best weights
        if config.test and config.trainer.limit_test_batches not in (0, 0.0) and not experiment.is_pruned:
            session.results["test"] = test_best(experiment, path)
        session.complete()
        # draw
        if config.callbacks.figures and not experiment.is_pruned and launcher.rank() == 0:
            save_figures(config, experiment)
    if launcher.rank() == 0:
        summaries.show_end(session.summary, path, experiment.wandb)
        summaries.show_standing(config)
    return session.summary["best"].get(config.monitor)


class RunSession:
    """The directory, lock, log and W&B run of a run that trains. At the end, summary.json and W&B record the status.

    Attributes:
        measured: what `summaries.metrics_of` returns after the training.
        results: further entries of summary.json.
        summary: the content of summary.json, once the run has ended.
    """

    def __init__(self, config: TrainConfig, experiment: Experiment, recorder: SignalRecorder, notes: list[str]) -> None:
        self.config, self.experiment, self.recorder, self.notes = config, experiment, recorder, notes
        self.path = Path(config.run_dir)
        self.mask = masker(config.model_dump(exclude_unset=True))
        self.is_first = launcher.rank() == 0
        self.is_open = not self.is_first  # whether the directory belongs to this run already; only rank 0 writes there
        self.is_created = False  # whether the directory is new, or was empty
        self.status: Status = "failed"
        self.measured: dict[str, Any] = {}
        self.results: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "RunSession":
        self._started = time.monotonic()
        config, experiment = self.config, self.experiment
        try:
            if self.is_first:
                self._open_directory()
            else:
                run_dir.set_up_logging(self.path, self.mask)
            faulthandler.enable(sys.__stderr__ or 2)  # a crash in a decoder or a driver shows where it happened
            if hasattr(signal, "SIGUSR2"):  # kill -USR2 prints where each thread of a rank is
                faulthandler.register(signal.SIGUSR2, sys.__stderr__ or 2)
            for note in self.notes:
                log.info("%s", note, extra={"file_only": True})
            experiment.facts |= summaries.facts_of(
                config, experiment.devices, experiment.data, experiment.plan, experiment.task.net
            )
            experiment.open_loggers(config)
            summaries.report_start(config, experiment)
        except BaseException as error:
            if isinstance(error, UserError) and self.is_created:  # a mistake leaves no directory
                shutil.rmtree(self.path, ignore_errors=True)
                self.is_open = False
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _open_directory(self) -> None:
        """Create the run's directory, or reset that of a resumed run to its checkpoint, and start the W&B run.

        Raises:
            UserError: another process trains there, or W&B refuses the settings. A resumed run is not changed then.
        """
        config, path, wandb = self.config, self.path, self.experiment.wandb
        plain = config.model_dump(exclude_unset=True)
        source = Path(config.ckpt_path) if config.ckpt_path is not None else None
        resumed = is_resumed(config.resume.run, path)
        run_dir.check_space(path, plans.checkpoint_bytes(self.experiment.task.net, config))
        path.mkdir(parents=True, exist_ok=True)
        is_empty = not any(path.iterdir())
        self._stack.enter_context(lock(path, LOCK))
        if not resumed:
            run_dir.create(path, plain)
            self.is_created = is_empty
        run_dir.set_up_logging(path, self.mask)
        if not resumed:
            self.is_open = True  # from here on a signal is reported in the log
            print(f"run directory: {run_dir.shown(path)}", flush=True)
        if wandb is not None:
            wandb.start()
        lines: list[str] = []
        if resumed:
            self.is_open = True
            save(plain, path / "config.yaml")
            lines += resume.reset_directory(path, source)
        if source is not None and not resume.is_own(source, path):
            lines += [note] if (note := resume.copy_best(source, path, config.monitor)) is not None else []
        if (changed := provenance.save(path)) is not None:
            lines.append(f"warning: {changed}")
        for line in lines:
            print(line, flush=True)

    def complete(self) -> None:
        """Agree with the other ranks that the run is finished, and write its summary."""
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
            self._stack.close()
        if replacement is not None:
            raise replacement from error

    def _close(self, error: BaseException | None) -> BaseException | None:
        """Write how the run ended, and close its W&B run. Returns what to raise instead of `error`."""
        config, experiment, wandb = self.config, self.experiment, self.experiment.wandb
        replacement: BaseException | None = None
        stopped_by = error.number if isinstance(error, Preempted) else None
        if stopped_by is not None and self.is_open:
            replacement = SystemExit(128 + stopped_by)
            if self.status != "finished":
                self.status = "preempted"
                self.results["error"] = str(error)
                for line in summaries.of_signal(config, stopped_by) if self.is_first else ():
                    log.warning("%s", line)
        elif error is not None and self.is_open:
            self.status = "failed"
            replacement = lost_peer(error, config.trainer.timeout)
            self.results["error"] = self.mask(str(replacement or f"{type(error).__name__}: {error}"))
            has_trace = not isinstance(error, UserError)
            log.error("failed: %s", self.results["error"], exc_info=has_trace, extra={"file_only": True})
        if self.is_open and self.status != "finished":
            self._write_summary()
        if wandb is not None:
            if self.status == "finished":
                wandb.log_checkpoint(self.path / "checkpoints/best.ckpt", summaries.metadata_of(config, self.summary))
            measured = {key: value for key, value in self.summary.items() if key not in experiment.facts}
            wandb.log_summary(naming.without_paths(measured))
            wandb.finish(self.status, stopped_by)
        return replacement

    def _write_summary(self) -> None:
        """Write summary.json on rank 0. If a run that failed cannot write it, W&B still gets the status."""
        experiment = self.experiment
        skipped = list(experiment.task.skipped)
        if skipped:
            self.results["skipped_images"] = skipped
            log.warning("%d broken images were skipped: %s", len(skipped), ", ".join(skipped[:5]))
        if experiment.is_pruned:
            self.results["pruned"] = True
        seconds = time.monotonic() - self._started
        if resume.is_own(self.config.ckpt_path, self.path):
            seconds += experiment.throughput.seconds_before
        self.summary = {
            "status": self.status,
            "seconds": round(seconds, 2),
            "test": {},
            **(self.measured or summaries.metrics_of(experiment, self.path)),
            **self.results,
            **experiment.facts,
        }
        try:
            if self.is_first:
                run_dir.write_json(self.path / "summary.json", self.summary)
        except OSError as error:
            log.error("summary.json could not be written: %s", error.strerror)
            if self.status == "finished":
                raise


# -- the stages of a run


def validate_last(experiment: Experiment) -> None:
    """Validate the last weights if the run stopped after a step without validation, as with trainer.max_steps."""
    trainer, task = experiment.trainer, experiment.task
    if (
        experiment.checkpointing.validated_at == trainer.global_step
        or trainer.limit_val_batches == 0
        or not trainer.global_step
    ):
        return
    before = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("train/")}
    trainer.validate(task, datamodule=experiment.data, verbose=False)
    trainer.callback_metrics.update(before)


def test_best(experiment: Experiment, path: Path) -> dict[str, float]:
    """Return the test metrics of best.ckpt, or of the last weights if nothing was validated."""
    best = path / "checkpoints/best.ckpt"
    # FSDP: Lightning must load and shard the weights
    is_sharded = isinstance(experiment.trainer.strategy, pl.strategies.FSDPStrategy)
    if best.is_file() and not is_sharded:
        load_net(experiment.task.net, checkpoint_io.load(best), best)
    tested = experiment.trainer.test(
        experiment.task,
        datamodule=experiment.data,
        ckpt_path=str(best) if best.is_file() and is_sharded else None,
        weights_only=True,
        verbose=False,
    )
    return {key: float(value) for key, value in tested[0].items() if key.startswith("test/")}


def save_figures(config: TrainConfig, experiment: Experiment) -> None:
    """Draw the figures of a trained run. An error is only a warning, because the run is complete."""
    from alexlab.analysis import gallery  # imports Matplotlib

    path = Path(config.run_dir)
    saved = [name for name in ("best", "last") if (path / f"checkpoints/{name}.ckpt").is_file()]
    try:
        log.info("drawing figures ...")
        kind = experiment.devices.kind
        drawn = gallery.draw(path, experiment.data, config.monitor, saved[0], among=500, device=kind) if saved else []
        tested = [path / f"figures/{name}.png" for name in ("confusion_matrix", "per_class", "mistakes")]
        if experiment.wandb is not None and drawn:
            gallery.log_to(experiment.wandb, [*drawn, *(path for path in tested if path.is_file())])
    except (Exception, Preempted) as error:
        log.warning("some figures could not be drawn (%s: %s)", type(error).__name__, str(error)[:200])
