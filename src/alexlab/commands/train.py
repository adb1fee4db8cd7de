"""THE RUN, in order: the task of `python train.py`."""

import contextlib
import faulthandler
import logging
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from alexlab.callbacks.preemption import Preempted, SignalRecorder
from alexlab.commands import plan as plans
from alexlab.commands import summary as summaries
from alexlab.commands.build import Experiment, build, build_data
from alexlab.commands.start import find_start
from alexlab.engine import checkpoint_io, launcher, provenance, resume, run_dir
from alexlab.engine.devices import Devices, choose_precision, find_devices
from alexlab.engine.errors import RunFailedError, UserError, lost_peer
from alexlab.engine.memory import keep_memory
from alexlab.engine.process import cores
from alexlab.engine.schema import TrainConfig

log = logging.getLogger("alexlab")


def train(config: TrainConfig) -> float | None:
    """Train one network; return the best value of `monitor`, for a sweep to optimize.

    Everything that can be found wrong is found before the run's directory exists.
    """
    recorder = SignalRecorder()
    try:
        with recorder.recording():  # a signal stops the run at once, until a callback looks for signals
            start = find_start(config)  # a new run, a resumed one, or one like another
            if start.is_finished:
                return run_dir.read_summary(start.run_dir).get("best", {}).get(config.monitor)
            config = start.config
            devices = find_devices(config.trainer)
            check_devices(config, devices)
            if config.dry_run:
                return show_plan(config, devices)
            if devices.world_size > 1 and not launcher.external():
                return train_on_workers(config, devices, start.notes)
            return train_rank(config, start.notes, recorder)
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


def show_plan(config: TrainConfig, devices: Devices) -> None:
    """Print what would run, and stop: dry_run=true."""
    experiment = build(config, devices)
    if launcher.rank() == 0:
        plans.show(
            experiment.plan, config, devices, experiment.data.images, experiment.task.net, experiment.data.readable_classes
        )


def train_on_workers(config: TrainConfig, devices: Devices, notes: list[str]) -> float | None:
    """Train with one worker process per device. This process reads the images once, so that workers do not race."""
    path = Path(config.run_dir)
    data = build_data(config, devices).read()
    plans.make_plan(config, devices.world_size, data.images)
    threads = max(1, cores() // devices.local)
    payload = {"config": config.model_dump(exclude_unset=True), "notes": notes}
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


def train_rank(config: TrainConfig, notes: list[str], recorder: SignalRecorder | None = None) -> float | None:
    """Train as one rank, or alone.

    Args:
        notes: lines about the start of the run, for train.log.
        recorder: of signals, if the caller has one already.
    """
    with contextlib.ExitStack() as stack:
        recorder = recorder or stack.enter_context(SignalRecorder().recording())
        devices = find_devices(config.trainer)
        if devices.kind == "cpu":
            keep_memory()
        experiment = build(config, devices, recorder)
        with RunSession(config, experiment, recorder, notes) as session:
            # train
            experiment.trainer.fit(
                experiment.task, datamodule=experiment.data, ckpt_path=config.ckpt_path, weights_only=True
            )
            experiment.preemption.agree(experiment.trainer)
            summaries.report_stop(experiment.trainer, experiment.data)
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

    def __init__(
        self, config: TrainConfig, experiment: Experiment, recorder: SignalRecorder, notes: list[str]
    ) -> None:
        self.config, self.experiment, self.recorder, self.notes = config, experiment, recorder, notes
        self.path = Path(config.run_dir)
        self.is_first = launcher.rank() == 0
        self.stack = contextlib.ExitStack()
        self.results: dict[str, Any] = {"best": {}, "last": {}, "test": {}, "checkpoints": {}, "images_per_second": None}
        self.summary: dict[str, Any] = {}
        self.status = "failed"

    def __enter__(self) -> "RunSession":
        self.start = time.monotonic()
        if self.is_first:
            self._open_directory()
        run_dir.set_up_logging(self.path)
        faulthandler.enable(sys.__stderr__ or 2)  # a crash in a decoder or a driver shows where it happened
        if hasattr(signal, "SIGUSR2"):  # kill -USR2 prints where each thread of a rank is
            faulthandler.register(signal.SIGUSR2, sys.__stderr__ or 2)
        for note in self.notes:
            log.info("%s", note, extra={"file_only": True})
        try:
            self.experiment.open_loggers(self.config)
            summaries.report_start(self.config, self.experiment)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _open_directory(self) -> None:
        """Create the run's directory, or restore that of a resumed run to what it was at its checkpoint."""
        config = self.config
        run_dir.check_space(self.path, plans.checkpoint_bytes(self.experiment.task.net, config))
        if resume.is_resumed(config.resume.run, self.path):
            self.stack.enter_context(run_dir.locked(self.path))
            resume.restore_directory(config.model_dump(exclude_unset=True))
            print(f"run directory: {run_dir.shown(self.path)} (resumed)", flush=True)
        else:
            run_dir.create(config.model_dump(exclude_unset=True))
            self.stack.enter_context(run_dir.locked(self.path))
            print(f"run directory: {run_dir.shown(self.path)}", flush=True)
        if (changed := provenance.record(self.path)) is not None:
            print(f"warning: {changed}", flush=True)

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
                measured = summaries.metrics_of(self.experiment, self.path)
                self.results = measured | {key: value for key, value in self.results.items() if value}
                self._write_summary()
            if wandb is not None:
                if self.status == "finished":
                    metadata = summaries.metadata_of(self.config, self.summary)
                    wandb.log_checkpoint(self.path / "checkpoints/best.ckpt", metadata)
                wandb.log_summary({key: v for key, v in self.summary.items() if key not in self.experiment.facts})
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
        seconds = time.monotonic() - self.start + self.experiment.seconds_before
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
    if task.validated_at == trainer.global_step or trainer.limit_val_batches == 0 or not trainer.global_step:
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
        checkpoint_io.load_net(experiment.task.net, checkpoint_io.load(best), best)
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
