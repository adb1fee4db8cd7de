"""A run, from its composed config to its summary: the table of contents, and the place that instantiates."""

import contextlib
import faulthandler
import logging
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from alexlab.callbacks.checkpointing import Snapshots
from alexlab.callbacks.nan_guard import OnNan
from alexlab.callbacks.preemption import Notes, Preempted, Preemption
from alexlab.commands import from_run
from alexlab.commands import plan as plans
from alexlab.commands import summary as report
from alexlab.commands.build import build_callbacks, build_data, build_loggers, build_model
from alexlab.commands.checks import check_ckpt
from alexlab.commands.plan import Plan
from alexlab.commands.trainer import build_trainer, check_settings
from alexlab.data.datamodule import ImageFolders, cores
from alexlab.engine import checkpoint_io as checkpoint
from alexlab.engine import config as configs
from alexlab.engine import files, resume, rules, targets
from alexlab.engine import launcher as launch
from alexlab.engine import naming as identity
from alexlab.engine import provenance as code_state
from alexlab.engine import run_dir as rundir
from alexlab.engine.devices import Devices, choose_precision, find_devices
from alexlab.engine.errors import RunFailedError, UserError, lost_peer
from alexlab.engine.memory import keep_memory
from alexlab.tasks import optimizers as optim
from alexlab.tasks.classification import ImageClassifier
from alexlab.tasks.load import load_initial_weights, load_net

if TYPE_CHECKING:
    from alexlab.loggers.wandb_logger import Status, WandbLogger

log = logging.getLogger("alexlab")


def fit(config: DictConfig) -> float | None:
    """Train; the task of train.py, after `rules.check`. Returns the best `config.monitor`, for a sweep to optimize.

    Whatever can be found wrong is found before the run's directory is made.
    """
    config = configs.resolved(config)
    origin = from_run.repeat(configs.plain(config))
    if origin is not None:
        report_lines(origin.notes)
        config = configs.create(origin.config)
        rules.check(config)
    try:
        with Notes().taken():  # which end it at once, until a rank looks at them
            if config.resume.run is not None:
                logs = Path(config.paths.logs)
                resumed = resume.resume_config(configs.plain(config), list(config.overrides), logs)
                report_lines(resumed.notes)
                if resumed.finished:
                    return rundir.read_summary(Path(config.run_dir)).get("best", {}).get(config.monitor)
                config = configs.create(resumed.config)
                rules.check(config)
            return _fit(config, origin)
    except Preempted as error:
        if launch.rank() == 0:
            print("\n".join(report.of_signal(config, Path(config.run_dir), error.number)), flush=True)
        raise SystemExit(128 + error.number) from None


def _fit(config: DictConfig, origin: from_run.Repeated | None) -> float | None:
    """Claim the run's directory, and train in this process or in one a device."""
    devices = find_devices(config)
    if devices.nodes > 1 and not launch.external():
        raise UserError(
            f"trainer.num_nodes={devices.nodes} needs torchrun or srun to start the ranks on each machine: "
            "torchrun --nnodes N --nproc-per-node GPUS --rdzv-backend c10d --rdzv-endpoint HOST:PORT train.py ..."
        )
    if "wandb" in config.logger:
        from alexlab.loggers.wandb_logger import check_environment

        check_environment(config.logger.wandb.mode)
    check_settings(config)
    choose_precision(config.trainer.precision, devices.kind)  # told now where it cannot be
    data = build_data(config, devices).read()
    targets.check_targets(configs.plain(config.callbacks))
    differs = origin.compare(data.describe()) if origin is not None else []
    report_lines(f"warning: {line}" for line in differs)
    plan = plans.make_plan(config, devices.world_size, data.images)
    model = prepare_model(config, data, plan)
    if config.dry_run:
        if launch.rank() == 0:
            plans.show(plan, config, devices, data.images, model.net, len(data.classes))
        return None
    run_dir = Path(config.run_dir)
    alone = devices.world_size == 1 or launch.external()  # no ranks are started here
    if not alone:
        launch.free_port(config.trainer.master_port)  # told now where it is in use
    with contextlib.ExitStack() as held:
        if launch.rank() == 0:
            states = optim.state_tensors(configs.plain(config.optimizer))
            rundir.check_space(run_dir, plans.checkpoint_bytes(model.net, config, states))
            source = Path(config.ckpt_path) if config.ckpt_path is not None else None
            if config.resume.run is not None and resume.holds_run(run_dir):
                held.enter_context(files.lock(run_dir))
                held.enter_context(marking(run_dir))
                with files.lock(run_dir, ".lock.rank"):  # a rank may outlive the command that started it
                    configs.save(config, run_dir / "config.yaml")
                    report_lines(resume.reset_directory(run_dir, source))
            else:
                rundir.claim(config)
                held.enter_context(files.lock(run_dir))
                held.enter_context(marking(run_dir))
                print(f"run directory: {rundir.shown(run_dir)}", flush=True)
                if origin is not None:
                    rundir.write_json(run_dir / from_run.RECORD, origin.record(differs))
            if source is not None and not resume.is_own(source, run_dir):
                note = resume.copy_best(source, run_dir, config.monitor)
                report_lines([note] if note is not None else [])
            if (other := code_state.keep(run_dir)) is not None:
                print(f"warning: {other}", flush=True)
        if alone:
            return fit_rank(config, data, model)
        del model
        return fit_ranks(config, devices)


@contextlib.contextmanager
def marking(run_dir: Path) -> Iterator[None]:
    """summary.json tells of a signal that comes before any rank looks at them."""
    try:
        yield
    except Preempted as error:
        if not (run_dir / "summary.json").is_file():
            rundir.mark(run_dir, "preempted", str(error))
        raise


def fit_ranks(config: DictConfig, devices: Devices) -> float | None:
    """Train on several devices of this machine, a process each."""
    run_dir, threads = Path(config.run_dir), max(1, cores() // devices.local)
    ended = launch.spawn(run_dir, devices.world_size, threads, config.trainer.master_port)
    if ended.by_signal:
        if not ended.told:
            print("\n".join(report.of_signal(config, run_dir, ended.code - 128)), flush=True)
        rundir.mark(run_dir, "preempted", ended.why)
        sys.exit(ended.code)
    if ended.code:
        rundir.mark(run_dir, "failed", ended.why)
        if ended.code == 2:
            raise UserError(ended.why)
        raise RunFailedError(f"{ended.why}\n{report.how_to_go_on(config, run_dir)}", ended.code)
    return rundir.read_summary(run_dir)["best"].get(config.monitor)


def fit_rank(
    config: DictConfig, data: ImageFolders | None = None, model: ImageClassifier | None = None
) -> float | None:
    """Train as one rank, or alone; leaves summary.json and a closed W&B run behind, however it ends."""
    run_dir = Path(config.run_dir)
    rundir.set_up_logging(run_dir)
    faulthandler.enable(sys.__stderr__ or 2)  # a crash in a decoder or a driver shows where
    if hasattr(signal, "SIGUSR2"):  # kill -USR2 shows where each thread of a rank is
        faulthandler.register(signal.SIGUSR2, sys.__stderr__ or 2)
    with contextlib.ExitStack() as held:
        notes = held.enter_context(Notes().taken())
        if launch.rank() == 0:  # it may outlive the command that started it by some seconds
            held.enter_context(files.lock(run_dir, ".lock.rank"))
        try:
            summary, where = _fit_rank(config, data, model, notes)
        except Preempted as error:  # a second Ctrl-C, while the run was being closed
            raise SystemExit(128 + error.number) from None
    if launch.rank() == 0:
        report.show_end(summary, run_dir, where)
        report.show_standing(config)
    return summary["best"].get(config.monitor)


def _fit_rank(
    config: DictConfig, data: ImageFolders | None, model: ImageClassifier | None, notes: Notes
) -> tuple[dict[str, Any], str | None]:
    """Returns the summary, and what shows the run in W&B."""
    start = time.monotonic()
    run_dir = Path(config.run_dir)
    devices = find_devices(config)
    if devices.kind == "cpu":
        keep_memory()
    board: WandbLogger | None = None
    trainer: pl.Trainer | None = None
    facts: dict[str, Any] = {}
    result: dict[str, Any] = {"best": {}, "last": {}, "test": {}, "checkpoints": {}, "images_per_second": None}
    status: Status = "failed"
    ended_by: int | None = None  # the signal
    try:
        data = data or build_data(config, devices).read()
        plan = plans.make_plan(config, devices.world_size, data.images)
        model = model or prepare_model(config, data, plan)
        if config.compile:
            model.net.compile()  # in place: the state dict's keys stay clean
        facts = report.facts_of(config, devices, data, plan, model)
        loggers, board = build_loggers(config)
        if board is not None:
            tell_board(board, config, facts, data)
        report.tell_start(config, devices, data, plan, facts)
        if launch.rank() == 0:
            from_run.log_repetition(run_dir)
        on_nan, preemption, snapshots = own_callbacks(config, notes)
        callbacks = [*build_callbacks(config), on_nan, preemption, snapshots]
        trainer = build_trainer(config, devices, loggers, callbacks, plan.batches, type(model.net))
        preemption.install(trainer)
        snapshots.install(trainer)
        model.keeps_best = keeps_best(config)
        trainer.fit(model, datamodule=data, ckpt_path=config.ckpt_path, weights_only=True)
        preemption.agree(trainer)
        report.tell_stop(trainer, data)
        validate_end(trainer, model, data)
        result |= report.metrics_of(trainer, model, run_dir)
        pruned = any(getattr(callback, "pruned", False) for callback in callbacks)
        if pruned:
            result["pruned"] = True
        if config.test and config.trainer.limit_test_batches not in (0, 0.0) and not pruned:
            result["test"] = score_best(trainer, model, data, run_dir)
        model.share_skipped()
        preemption.agree(trainer)
        status = "finished"
    except Preempted as error:
        status, ended_by = "preempted", error.number
        result["error"] = str(error)
        for line in report.of_signal(config, run_dir, error.number) if launch.rank() == 0 else ():
            log.warning("%s", line)
        raise SystemExit(128 + error.number) from None
    except BaseException as error:
        lost = lost_peer(error, config.trainer.timeout)
        result["error"] = str(lost or f"{type(error).__name__}: {error}")
        log.error("failed: %s", result["error"], exc_info=not isinstance(error, UserError), extra={"file_only": True})
        if lost is not None:
            raise lost from error
        raise
    finally:
        notes.looked_at = True  # how it ended is settled: signals wait until that is written and told to W&B
        if trainer is not None and model is not None and status != "finished":
            result = report.metrics_of(trainer, model, run_dir) | {k: v for k, v in result.items() if v}
        if model is not None and model.skipped:
            result["skipped_images"] = list(model.skipped)
            log.warning("%d broken images were left out: %s", len(model.skipped), ", ".join(list(model.skipped)[:5]))
        summary = {
            "status": status,
            "seconds": report.seconds_since(start, trainer if resume.is_own(config.ckpt_path, run_dir) else None),
            "test": {},
            **result,
            **facts,
        }
        unwritten = keep_summary(run_dir, summary) if launch.rank() == 0 else None
        if torch.distributed.is_initialized() and status == "finished":
            torch.distributed.destroy_process_group()
        draws = status == "finished" and config.callbacks.figures and not result.get("pruned")
        if draws and data is not None and launch.rank() == 0:
            draw_figures(config, data, devices, board)
        if board is not None:
            if status == "finished":
                board.log_checkpoint(run_dir / "checkpoints/best.ckpt", report.metadata_of(config, summary))
            board.log_summary(identity.without_paths({k: v for k, v in summary.items() if k not in facts}))
            board.finish(status, ended_by)
        if unwritten is not None and status == "finished":
            raise unwritten
    return summary, board.where if board is not None else None


# -- the stages of a run


def tell_board(board: "WandbLogger", config: DictConfig, facts: dict[str, Any], data: ImageFolders) -> None:
    """What W&B knows of a run from its start: settings, facts, images and code."""
    run_dir = Path(config.run_dir)
    board.log_config(identity.for_others(config))
    board.log_summary(identity.without_paths({**facts, "code": code_state.read(run_dir)}))
    board.log_dataset(configs.plain(config.data), facts["dataset"], data.readable_classes)
    board.log_code(run_dir)


def own_callbacks(config: DictConfig, notes: Notes) -> tuple[OnNan, Preemption, Snapshots]:
    """Those of every run, in the order in which Lightning must call them."""
    run_dir = Path(config.run_dir)
    preemption = Preemption(notes, timedelta(minutes=config.trainer.timeout))
    source = Path(config.ckpt_path) if config.ckpt_path is not None else None
    last, every = run_dir / "checkpoints" / checkpoint.LAST, config.checkpoint
    on_nan = OnNan(config.on_nan, last, report.how_to_resume(run_dir), source)
    return on_nan, preemption, Snapshots(last, preemption, on_nan, every.every_n_steps, every.every_minutes)


def keep_summary(run_dir: Path, summary: dict[str, Any]) -> OSError | None:
    """Write summary.json; returns why it could not be: a full disk must not keep W&B from hearing how the run ended."""
    try:
        rundir.write_json(run_dir / "summary.json", summary)
    except OSError as error:
        log.error("summary.json could not be written: %s", error.strerror)
        return error
    return None


def prepare_model(config: DictConfig, data: ImageFolders, plan: Plan) -> ImageClassifier:
    """The classifier from its seed, after a look whether `ckpt_path` fits."""
    pl.seed_everything(config.seed, verbose=False)
    model = build_model(config, data, find_devices(config).kind, plan)
    logs, run_dir = Path(config.paths.logs), Path(config.run_dir)
    if config.init_from is not None and config.ckpt_path is not None:
        report_lines([f"note: init_from is ignored: ckpt_path={config.ckpt_path} holds the weights to continue with."])
    elif config.init_from is not None:
        path = resume.find_ckpt(config.init_from, "init_from", "best", logs, run_dir)
        config.init_from = str(path)
        m = config.model
        new_head = load_initial_weights(model.net, path, data.classes, config.data.image_size, m.mean, m.std)
        new = "; the last layer is new, as the classes are others" if new_head else ""
        report_lines([f"initial weights: {rundir.shown(path)}{new}"])
    if config.ckpt_path is not None:
        path = resume.find_ckpt(config.ckpt_path, "ckpt_path", "last", logs, run_dir)
        config.ckpt_path = str(path)
        check_ckpt(
            path, configs.told(config), model.net, data.describe(), list(data.classes), plan.steps_per_epoch,
            plan.steps, config.resume.run is not None, rundir.read_summary(run_dir).get("status") == "finished",
        )  # fmt: skip
    return model


def keeps_best(config: DictConfig) -> bool:
    """Check whether the best value of the checkpoint counts for this run, because its best.ckpt is there as well."""
    if config.ckpt_path is None:
        return False
    path = Path(config.ckpt_path)
    return resume.is_own(path, Path(config.run_dir)) or resume.best_of_same_run(path, config.monitor) is not None


def report_lines(lines: Iterable[str]) -> None:
    """Print lines once for all ranks."""
    for line in lines if launch.tells() else ():
        print(line, flush=True)


def validate_end(trainer: pl.Trainer, model: ImageClassifier, data: ImageFolders) -> None:
    """Validate the last weights where the run ended between two validations, as trainer.max_steps lets it."""
    if model.validated_at == trainer.global_step or trainer.limit_val_batches == 0 or not trainer.global_step:
        return
    before = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("train/")}
    trainer.validate(model, datamodule=data, verbose=False)
    trainer.callback_metrics.update(before)


def score_best(trainer: pl.Trainer, model: ImageClassifier, data: ImageFolders, run_dir: Path) -> dict[str, float]:
    """The test metrics of best.ckpt, or of the last weights where nothing was validated."""
    path = run_dir / "checkpoints/best.ckpt"
    sharded = isinstance(trainer.strategy, pl.strategies.FSDPStrategy)  # whose weights Lightning must lay out itself
    if path.is_file() and not sharded:
        load_net(model.net, checkpoint.load(path), path)
    ckpt_path = str(path) if path.is_file() and sharded else None
    tested = trainer.test(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True, verbose=False)
    return {key: float(value) for key, value in tested[0].items() if key.startswith("test/")}


def draw_figures(config: DictConfig, data: ImageFolders, devices: Devices, board: "WandbLogger | None") -> None:
    """The figures of a trained run, on the first rank alone. What goes wrong with them is told; the run is well."""
    from alexlab.analysis import gallery  # and with it Matplotlib

    run_dir = Path(config.run_dir)
    saved = [name for name in ("best", "last") if (run_dir / f"checkpoints/{name}.ckpt").is_file()]
    try:
        log.info("drawing figures ...")
        drawn = gallery.draw(run_dir, data, config.monitor, saved[0], among=500, device=devices.kind) if saved else []
        tested = [run_dir / f"figures/{name}.png" for name in ("confusion_matrix", "per_class", "mistakes")]
        if board is not None and drawn:
            gallery.log_to(board, [*drawn, *(path for path in tested if path.is_file())])
    except (Exception, Preempted) as error:
        log.warning("some figures could not be drawn (%s: %s)", type(error).__name__, str(error)[:200])
