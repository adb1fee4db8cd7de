"""THE RUN, in order: what `python train.py` does."""

import contextlib
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from alexlab.commands import plan as plans
from alexlab.commands import summary as summaries
from alexlab.commands import sweep
from alexlab.commands.build import Experiment, build, build_data, build_task, load_checkpoint
from alexlab.commands.build_transforms import build_transforms
from alexlab.commands.find import find
from alexlab.commands.session import RunSession
from alexlab.commands.start import Start, agree
from alexlab.data import first_look
from alexlab.data.sources import Data
from alexlab.engine import checkpoint_io, launcher, run_dir
from alexlab.engine.config import is_address
from alexlab.engine.devices import Devices, choose_precision, find_devices
from alexlab.engine.errors import RunFailedError, UserError
from alexlab.engine.memory import keep_memory
from alexlab.engine.mirror import Mirror
from alexlab.engine.process import cores
from alexlab.engine.ranks import Ranks, meet
from alexlab.engine.schema import TrainConfig
from alexlab.engine.signals import Preempted, SignalRecorder
from alexlab.engine.sweeps import agent
from alexlab.engine.targets import packages_of
from alexlab.engine.text import printable
from alexlab.tasks.load import load_task

# set for ranks by torchrun, srun and our own launcher
RANK_VARIABLES = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)$|(MASTER|TORCHELASTIC|SLURM|OMPI|PMI)_|ALEXLAB_(?!CORES$)"
)

log = logging.getLogger("alexlab")


def train(config: TrainConfig) -> float | None:
    """Train one network; return the best value of `monitor`, for a sweep to optimize.

    All checks of config, images, network and checkpoint come before the run's directory exists.
    """
    run_dir.close_log()
    with stopping_on_signals(config) as recorder:
        ranks = meet(config.trainer.timeout)  # of torchrun, srun and the like; else this process alone
        start = agree(ranks, config)  # a new run, a resumed one, or one like another
        report(start.notes)
        config = start.config
        if start.is_finished:
            ranks.first(lambda: copy_rest(config))
            return run_dir.read_summary(Path(config.run_dir)).get("best", {}).get(config.monitor)
        devices, precision = ranks.each(lambda: checked_devices(config.trainer))
        advice = "Set trainer.accelerator and trainer.precision, or start without that machine."
        ranks.check_same({"accelerator": devices.kind, "precision": str(precision)}, advice)
        if devices.nodes > 1 and not launcher.external():
            raise UserError(
                f"`trainer.num_nodes={devices.nodes}` needs torchrun, srun or another launcher, which starts the ranks "
                "on each machine: torchrun --nnodes N --nproc-per-node GPUS --rdzv-backend c10d --rdzv-endpoint "
                "HOST:PORT train.py ..."
            )
        if config.dry_run:
            ranks.first(lambda: show_plan(start, devices))
            return None
        if devices.world_size > 1 and not launcher.external():
            return train_on_workers(start, devices)
        return train_rank(start, recorder, ranks)


def copy_rest(config: TrainConfig) -> None:
    """Copy what the bucket lacks of a finished run that was killed, or stopped by an error, in its last copy."""
    if is_address(config.paths.logs):
        mirror = Mirror(config.paths, Path(config.run_dir), 60 * config.trainer.timeout)
        mirror.hold(launcher.job(), config.resume.break_lock, is_new=False)
        mirror.start()
        mirror.finish()


def checked_devices(settings: Any) -> tuple[Devices, Any]:
    """Return devices and precision, whose mistakes are found here and not after the images were read."""
    devices = find_devices(settings)
    return devices, choose_precision(settings.precision, devices.kind)


@contextlib.contextmanager
def stopping_on_signals(config: TrainConfig) -> Iterator[SignalRecorder]:
    """Record signals in this block. If one stops the run, print how to resume it and exit with 128 + signal number."""
    recorder = SignalRecorder()
    try:
        with recorder.recording():
            yield recorder
    except Preempted as error:
        if launcher.rank() == 0:
            print_end(config, error.number)
        raise SystemExit(128 + error.number) from None


def print_end(config: TrainConfig, number: int) -> None:
    """Print how a signal stopped a run that had no log yet, and ask SLURM for the job again if that is wanted."""
    print(summaries.of_signal(config, number), flush=True)
    if summaries.is_requeued(config, number):
        print(f"{launcher.requeue()}.", flush=True)


def report(lines: Iterable[str]) -> None:
    """Print lines once for all ranks."""
    if launcher.prints():
        for line in lines:
            print(printable(line, "\n"), flush=True)


def report_changes(start: Start, data: Data) -> list[str]:
    """Print how the images and the code differ from those of the run that `from_run=` names, and return these lines."""
    changes = [f"warning: {line}" for line in start.compare(data.describe())]
    report(changes)
    return changes


def show_plan(start: Start, devices: Devices) -> None:
    """Print what would run, and stop: dry_run=true."""
    config = start.config
    data = build_data(config, devices, build_transforms(config, start.trusted), start.trusted).read()
    report_changes(start, data)
    plan = plans.make_plan(config, devices.world_size, data.images, data.train_batches)
    pl.seed_everything(config.seed, verbose=False)
    task = build_task(config, data, devices.kind, plan, start.trusted)
    load_checkpoint(config, task, data, plan, start.trusted)
    report(find(config, devices, data, plan, task))
    if launcher.rank() == 0:
        plans.show(plan, config, devices, data.images, task.net, data.readable_classes)
        report([f"note: {line}" for line in (*data.notes(), *first_look.warnings_of(data.splits))])


def train_on_workers(start: Start, devices: Devices) -> float | None:
    """Train with one worker process per device. This process reads the images once, so that workers do not race."""
    config, path = start.config, Path(start.config.run_dir)
    data = build_data(config, devices, trusted=start.trusted).read()
    plans.make_plan(config, devices.world_size, data.images, data.train_batches)
    payload = replace(start, notes=[*start.notes, *report_changes(start, data)]).plain()
    before = written_at(path)
    threads = max(1, cores() // devices.local)
    outcome = launcher.run_workers(payload, devices.world_size, threads, config.trainer.master_port)
    if outcome.code and written_at(path) != before:  # it has started; otherwise a resumed run stays as it was
        run_dir.mark(path, "preempted" if outcome.by_signal else "failed", outcome.why)
    if outcome.by_signal:
        if not outcome.reported:
            print_end(config, outcome.code - 128)
        sys.exit(outcome.code)
    if outcome.code == 2:
        raise UserError(outcome.why)
    if outcome.code:
        raise RunFailedError(f"{outcome.why}\n{summaries.how_to_continue(path, config.paths)}", outcome.code)
    return run_dir.read_summary(path)["best"].get(config.monitor)


def written_at(path: Path) -> int | None:
    """Return when config.yaml was written, which a run does when it starts; None if it does not exist."""
    file = path / "config.yaml"
    return file.stat().st_mtime_ns if file.is_file() else None


def train_rank(start: Start, recorder: SignalRecorder, ranks: Ranks) -> float | None:
    """Train as one rank, or alone."""
    config, path, is_first = start.config, Path(start.config.run_dir), launcher.rank() == 0
    devices = find_devices(config.trainer)
    if devices.kind == "cpu":
        keep_memory()
    if ranks.size > 1 and not os.environ.get("PYTHONBREAKPOINT"):
        sys.breakpointhook = refuse_to_debug
    run_dir.quiet_libraries()  # before the trainer is built, which logs the devices
    if ranks.size > 1 and launcher.external() and config.data.target is None:
        # one rank of each machine lists the files of a large folder; the rest take the list that it has saved
        lists = os.environ["LOCAL_RANK"] == "0"
        ranks.each(lambda: build_data(config, devices, trusted=start.trusted).read() if lists else None)
    experiment = ranks.each(lambda: build(config, devices, recorder, start.trusted, ranks))
    trainer, task, data = experiment.trainer, experiment.task, experiment.data
    check_images(ranks, data)
    found = ranks.each(lambda: find(config, devices, data, experiment.plan, task))
    report(found)
    notes = [*start.notes, *report_changes(start, data), *found]
    with RunSession(config, experiment, recorder, ranks, notes) as session:
        # train
        trainer.fit(task, datamodule=data, ckpt_path=config.ckpt_path, weights_only=True)
        experiment.preemption.agree(trainer)
        summaries.report_stop(experiment)
        validate_last(experiment)
        session.measured = summaries.metrics_of(experiment, path)
        # test the best weights
        if config.test and config.trainer.limit_test_batches not in (0, 0.0) and not experiment.is_pruned:
            session.results["test"] = test_best(experiment, path, ranks)
        session.complete()
        # draw
        if config.callbacks.figures and not experiment.is_pruned and is_first:
            save_figures(config, experiment)
    if is_first:
        views = [each.view for each in (experiment.wandb, *experiment.trackers) if each is not None]
        in_sweep = sweep.name_of(path) is not None and agent() is None and config.resume.run in (None, "auto")
        summaries.show_end(config, session.summary, views, in_sweep)
        if not in_sweep:
            summaries.show_standing(config)
        if config.metrics.report and not experiment.is_pruned:
            run_eval(config)
    return session.summary["best"].get(config.monitor)


def refuse_to_debug(*_: Any, **__: Any) -> None:
    """Raise UserError instead of starting pdb in a rank, whose standard input is no terminal."""
    raise UserError("breakpoint() works in a run with one process only: set trainer.devices=1.")


def check_images(ranks: Ranks, data: Data) -> None:
    """Raise UserError on rank 0 if the machine of another rank has other images."""
    if ranks.size == 1:
        return

    def compare(each: list[Any]) -> None:
        for rank, (root, fingerprint) in enumerate(each):
            if fingerprint != each[0][1]:
                raise UserError(
                    f"{ranks.named([rank])}: the images in {root} are not those that {ranks.named([0])} has in "
                    f"{each[0][0]}: the fingerprints differ. Copy the same images to all machines."
                )

    ranks.collect([str(data.root), data.describe()["fingerprint"]], compare)


def validate_last(experiment: Experiment) -> None:
    """Validate the last weights if the run stopped after a step without validation, as with trainer.max_steps."""
    trainer, step = experiment.trainer, experiment.trainer.global_step
    if step in (0, experiment.checkpointing.validated_at) or trainer.limit_val_batches == 0:
        return
    before = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("train/")}
    trainer.validate(experiment.task, datamodule=experiment.data, verbose=False)
    trainer.callback_metrics.update(before)


def test_best(experiment: Experiment, path: Path, ranks: Ranks) -> dict[str, float]:
    """Return the test metrics of best.ckpt, or of the last weights if nothing was validated."""
    best, trainer, task = path / "checkpoints/best.ckpt", experiment.trainer, experiment.task
    # FSDP: Lightning must load and shard the weights
    is_sharded, exists = isinstance(trainer.strategy, pl.strategies.FSDPStrategy), ranks.first(best.is_file)
    if exists and not is_sharded:
        load_task(task, checkpoint_io.share(lambda: checkpoint_io.load(best), ranks), best)
    ckpt = str(best) if exists and is_sharded else None
    tested = trainer.test(task, datamodule=experiment.data, ckpt_path=ckpt, weights_only=True, verbose=False)
    return {key: float(value) for key, value in tested[0].items() if key.startswith("test/")}


def run_eval(config: TrainConfig) -> None:
    """Run `python eval.py` of this run, in a process that is not one of the ranks."""
    env = {name: value for name, value in os.environ.items() if not RANK_VARIABLES.match(name)}
    packages = ",".join(sorted({*config.allow, *packages_of(config.model_dump(exclude_unset=True))}))
    words = [f"run={Path(config.run_dir).absolute()}", f"allow=[{packages}]"]
    words += [f"paths.{key}={value}" for key, value in config.paths.model_dump().items()]
    words += [] if config.test else ["split=val"]  # the test images are not looked at
    print("python eval.py ...", flush=True)
    code = subprocess.run([sys.executable, "-m", "alexlab", "eval", *words], env=env, check=False).returncode
    if code:
        print(f"warning: report.html was not written: python eval.py ended with exit code {code}.", flush=True)


def save_figures(config: TrainConfig, experiment: Experiment) -> None:
    """Draw the figures of a trained run. An error is only a warning, because the run is complete."""
    path, kind = Path(config.run_dir), experiment.devices.kind
    saved = [name for name in ("best", "last") if (path / f"checkpoints/{name}.ckpt").is_file()]
    try:
        log.info("drawing figures ...")
        from alexlab.analysis import gallery  # imports Matplotlib

        drawn = []
        if saved:
            drawn = gallery.draw(path, experiment.data, config.monitor, saved[0], 500, kind, experiment.trusted)
        tested = [path / f"figures/{name}.png" for name in ("confusion_matrix", "per_class", "mistakes")]
        if drawn:
            paths, step = [*drawn, *(path for path in tested if path.is_file())], experiment.trainer.global_step
            gallery.log_to(experiment.trainer.loggers, paths, step)
    except (Exception, Preempted) as error:
        log.warning(f"some figures could not be drawn ({type(error).__name__}: {str(error)[:200]})")
