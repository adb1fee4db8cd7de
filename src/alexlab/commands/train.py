"""THE RUN, in order: the task of `python train.py`."""

import contextlib
import faulthandler
import logging
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch

from alexlab.callbacks.preemption import Preempted, SignalRecorder
from alexlab.commands import plan as plans
from alexlab.commands import summary as summaries
from alexlab.commands.build import Experiment, build, build_data, build_task, load_checkpoint
from alexlab.commands.start import Start, find_start, is_resumed
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

    Everything that can be found wrong is found before the run's directory exists.
    """
    recorder = SignalRecorder()
    try:
        with recorder.recording():  # a signal stops the run at once, until a callback looks for signals
            start = find_start(config)  # a new run, a resumed one, or one like another
            report(start.notes)
            config = start.config
            if start.is_finished:
                return run_dir.read_summary(Path(config.run_dir)).get("best", {}).get(config.monitor)
            devices = find_devices(config.trainer)
            check_devices(config, devices)
            if config.dry_run:
                show_plan(config, devices)
                return None
            if devices.world_size > 1 and not launcher.external():
                return train_on_workers(start, devices)
            return train_rank(start, recorder)
    except Preempted as error:
        if launcher.rank() == 0:
            print("\n".join(summaries.of_signal(config, error.number)), flush=True)
        raise SystemExit(128 + error.number) from None


def check_devices(config: TrainConfig, devices: Devices) -> None:
    """Refuse what the devices cannot do, before the images are read."""
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


def show_plan(config: TrainConfig, devices: Devices) -> None:
    """Print what would run, and stop: dry_run=true."""
    data = build_data(config, devices).read()
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
    changes = [f"warning: {line}" for line in start.compare(data.describe())]
    report(changes)
    threads = max(1, cores() // devices.local)
    payload = {"config": config.model_dump(exclude_unset=True), "notes": [*start.notes, *changes]}
    outcome = launcher.run_workers(payload, devices.world_size, threads, config.trainer.master_port)
    if outcome.by_signal:
        if not outcome.reported:
            print("\n".join(summaries.of_signal(config, outcome.code - 128)), flush=True)
        run_dir.mark(path, "preempted", outcome.why)
        sys.exit(outcome.code)
    if outcome.code:
        run_dir.mark(path, "failed", outcome.why)
        if outcome.code == 2:
            raise UserError(outcome.why)
        raise RunFailedError(f"{outcome.why}\n{summaries.how_to_continue(path)}", outcome.code)
    return run_dir.read_summary(path)["best"].get(config.monitor)


def train_rank(start: Start, recorder: SignalRecorder | None = None) -> float | None:
    """Train as one rank, or alone.

    Args:
        recorder: of signals, if the caller has one already.
    """
    config = start.config
    with contextlib.ExitStack() as stack:
        recorder = recorder or stack.enter_context(SignalRecorder().recording())
        devices = find_devices(config.trainer)
        if devices.kind == "cpu":
            keep_memory()
        run_dir.quiet_libraries()
        experiment = build(config, devices, recorder)
        changes = [f"warning: {line}" for line in start.compare(experiment.data.describe())]
        report(changes)
        notes = [*start.notes, *changes]
        with RunSession(config, experiment, recorder, notes) as session:
            # train
            experiment.trainer.fit(
                experiment.task, datamodule=experiment.data, ckpt_path=config.ckpt_path, weights_only=True
            )
            experiment.preemption.agree(experiment.trainer)
            summaries.report_stop(experiment)
            validate_last(experiment)
            session.collect()
            # test the best weights
            if session.tests:
                session.results["test"] = test_best(experiment, Path(config.run_dir))
            session.complete()
            # draw
            if session.draws:
                save_figures(config, experiment)
    if launcher.rank() == 0:
        summaries.show_end(session.summary, Path(config.run_dir), experiment.wandb)
        summaries.show_standing(config)
    return session.summary["best"].get(config.monitor)


class RunSession:
    """What surrounds the training: the run's directory, its lock and log, W&B; and summary.json however it ends."""

    def __init__(self, config: TrainConfig, experiment: Experiment, recorder: SignalRecorder, notes: list[str]) -> None:
        self.config, self.experiment, self.recorder, self.notes = config, experiment, recorder, notes
        self.path = Path(config.run_dir)
        self.is_first = launcher.rank() == 0
        self.stack = contextlib.ExitStack()
        self.results: dict[str, Any] = {
            "best": {},
            "last": {},
            "test": {},
            "checkpoints": {},
            "images_per_second": None,
        }
        self.summary: dict[str, Any] = {}
        self.status: Status = "failed"
        self.opened = not self.is_first  # whether the directory is this run's

    def __enter__(self) -> "RunSession":
        self.start = time.monotonic()
        config, experiment = self.config, self.experiment
        mask = masker(config.model_dump(exclude_unset=True))
        try:
            if self.is_first:
                self._open_directory()
            run_dir.set_up_logging(self.path, mask)
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
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _open_directory(self) -> None:
        """Create the run's directory, or reset that of a resumed run to its checkpoint."""
        config, path = self.config, self.path
        plain = config.model_dump(exclude_unset=True)
        source = Path(config.ckpt_path) if config.ckpt_path is not None else None
        run_dir.check_space(path, plans.checkpoint_bytes(self.experiment.task.net, config))
        if is_resumed(config.resume.run, path):
            self.stack.enter_context(lock(path, LOCK))
            save(plain, path / "config.yaml")
            lines = resume.reset_directory(path, source)
        else:
            run_dir.create(path, plain)
            self.stack.enter_context(lock(path, LOCK))
            lines = [f"run directory: {run_dir.shown(path)}"]
        self.opened = True
        if source is not None and not resume.is_own(source, path):
            lines += [note] if (note := resume.copy_best(source, path, config.monitor)) is not None else []
        if (changed := provenance.save(path)) is not None:
            lines.append(f"warning: {changed}")
        print("\n".join(lines), flush=True)

    @property
    def tests(self) -> bool:
        config = self.config
        return config.test and config.trainer.limit_test_batches not in (0, 0.0) and not self.results.get("pruned")

    @property
    def draws(self) -> bool:
        return self.is_first and self.config.callbacks.figures and not self.results.get("pruned")

    def collect(self) -> None:
        """Gather what the run has measured so far."""
        self.results |= summaries.metrics_of(self.experiment, self.path)
        if self.experiment.is_pruned:
            self.results["pruned"] = True

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
        if not self.opened:  # nothing was written
            self.stack.close()
            return
        self.recorder.is_polled = True
        wandb, stopped_by = self.experiment.wandb, None
        replaced: BaseException | None = None
        if isinstance(error, Preempted) and self.status != "finished":
            self.status, stopped_by = "preempted", error.number
            self.results["error"] = str(error)
            for line in summaries.of_signal(self.config, error.number) if self.is_first else ():
                log.warning("%s", line)
            replaced = SystemExit(128 + error.number)
        elif error is not None:
            self.status = "failed"
            lost = lost_peer(error, self.config.trainer.timeout)
            self.results["error"] = str(lost or f"{type(error).__name__}: {error}")
            with_trace = not isinstance(error, UserError)
            log.error("failed: %s", self.results["error"], exc_info=with_trace, extra={"file_only": True})
            replaced = lost
        try:
            if self.status != "finished":
                so_far = summaries.metrics_of(self.experiment, self.path)
                self.results = so_far | {key: value for key, value in self.results.items() if value}
                self._write_summary()
            if wandb is not None:
                if self.status == "finished":
                    metadata = summaries.metadata_of(self.config, self.summary)
                    wandb.log_checkpoint(self.path / "checkpoints/best.ckpt", metadata)
                measured = {key: v for key, v in self.summary.items() if key not in self.experiment.facts}
                wandb.log_summary(naming.without_paths(measured))
                wandb.finish(self.status, stopped_by)
        finally:
            self.stack.close()
        if replaced is not None:
            raise replaced from error

    def _write_summary(self) -> None:
        """Write summary.json on rank 0. A full disk must not keep W&B from hearing how the run ended."""
        skipped = self.experiment.task.skipped
        if skipped:
            self.results["skipped_images"] = list(skipped)
            log.warning("%d broken images were skipped: %s", len(skipped), ", ".join(list(skipped)[:5]))
        seconds = time.monotonic() - self.start
        if resume.is_own(self.config.ckpt_path, self.path):
            seconds += self.experiment.throughput.seconds_before
        self.summary = {
            "status": self.status,
            "seconds": round(seconds, 2),
            "test": {},
            **self.results,
            **self.experiment.facts,
        }
        if not self.is_first:
            return
        try:
            run_dir.write_json(self.path / "summary.json", self.summary)
        except OSError as error:
            log.error("summary.json could not be written: %s", error.strerror)
            if self.status == "finished":
                self.status = "failed"
                raise


# -- the stages of a run


def validate_last(experiment: Experiment) -> None:
    """Validate the last weights if the run stopped between two validations, as trainer.max_steps lets it."""
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
    # Lightning must shard the weights itself
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
    """Draw the figures of a trained run. A figure that fails is reported; the run is complete without it."""
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
