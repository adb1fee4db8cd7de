"""Run many jobs from one command: a grid, an Optuna study, or the runs of a W&B agent.

Hydra calls the sweepers in src/hydra_plugins/, which call this module. Every command imports it, so it imports Optuna
only in the functions that a study needs.
"""

import ast
import contextlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import Override, Transformer
from hydra.utils import instantiate
from omegaconf import OmegaConf

from alexlab.engine import config as configs
from alexlab.engine import schema, validation
from alexlab.engine.config import CONF, Plain
from alexlab.engine.errors import RunFailedError, UserError, counted
from alexlab.engine.overrides import command_line, in_quotes, shown
from alexlab.engine.process import CORES, cores, importing
from alexlab.engine.run_dir import shown as shown_path
from alexlab.engine.run_dir import write_json
from alexlab.engine.schema import TrainConfig
from alexlab.engine.sweeps import agent

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

    from alexlab.callbacks.pruning import Pruning

log = logging.getLogger("alexlab")

Compose = Callable[[int, list[str]], Plain]  # number and overrides of a job -> config

# -- The check before the first job


def check_jobs(model: type[schema.Group], compose: Compose, jobs: list[list[str]]) -> None:
    """Check the configs of jobs with these overrides. A UserError has each mistake once, with the numbers of jobs."""
    wrong: dict[str, list[int]] = {}
    places: dict[Any, list[int]] = {}
    for number, overrides in enumerate(jobs):
        plain = compose(number, overrides)
        for mistake in validation.check(model, plain)[1]:
            wrong.setdefault(mistake, []).append(number)
        for key, place in places_of(plain).items():
            places.setdefault((key, place), []).append(number)
    for (key, place), numbers in places.items():
        if len(numbers) > 1:
            wrong[f"each would write over the results of the others: give each its own {key} (now {place})."] = numbers
    lines = []
    for mistake, numbers in wrong.items():
        named = f"{', '.join(map(str, numbers[:8]))}{', ...' * (len(numbers) > 8)}"
        which = "all jobs" if len(numbers) == len(jobs) else f"job{'s' * (len(numbers) > 1)} {named}"
        lines.append(f"{which}: {mistake}")
    if lines:
        more = [f"... and {len(lines) - 12} more mistakes"] if len(lines) > 12 else []
        listed = "\n  ".join([*lines[:12], *more])
        number = len(set().union(*wrong.values()))
        raise UserError(
            f"{number} of the sweep's {counted(len(jobs), 'job')} {'has' if number == 1 else 'have'} wrong values, so "
            f"no job was started (sweep.keep_going=true starts them, and records those that fail):\n  {listed}"
        )


def places_of(plain: Plain) -> dict[str, str]:
    """Return what a job writes, by the key that chooses it: the directory of a run, or the file for another run."""
    if plain.get("out"):
        return {"out": str(plain["out"])}
    if "run" in plain:
        named = [str(plain[key]) for key in ("run", "format", "crops") if key in plain]
        return {"out" if "out" in plain else "run": " ".join(named)}
    return {"hydra.sweep.subdir": plain["run_dir"]} if plain.get("dry_run") is False else {}


def values_of_grid(override: Override) -> list[str]:
    """Expand `lr=0.1,0.2` to one override per job: `lr=0.1` and `lr=0.2`. A single value stays one override."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        raise UserError(f"{override.input_line}: a grid needs single values. Add sweep=optuna, or list values: A,B,C.")
    values = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    if not values:
        raise UserError(f"{override.input_line} stands for no value, so no job would start.")
    return values


# -- Jobs, one after the other or side by side


@dataclass(frozen=True)
class End:
    """How a job ended. Launchers bring it from other processes and machines."""

    score: float | None = None  # the best value of `monitor`; None if the job failed
    folder: str | None = None  # of the sweep; None for a dry run
    monitor: str = "val/acc1"
    failure: str | None = None  # "job 3 (optimizer.lr=0.1): why"; None if the job did not fail
    code: int = 0  # exit code of the job


Launch = Callable[[int, list[str], int], End]  # number, overrides and place of a job


def run_jobs(launch: Launch, jobs: Iterator[tuple[int, list[str]]], at_once: int) -> Iterator[tuple[int, End]]:
    """Run jobs, and yield the number of each and how it ended, as soon as it ends.

    Args:
        launch: runs a job and waits for it. Jobs that run at the same time have different places, from 0 on.
        jobs: number and overrides of each; the next one is taken when a place is free.
        at_once: the number of places.
    """
    if at_once == 1:  # here, because a job in another thread would get no signals
        for number, overrides in jobs:
            yield number, launch(number, overrides, 0)
        return
    ends: SimpleQueue[tuple[int, int, End | BaseException]] = SimpleQueue()
    free = list(range(at_once))

    def work(number: int, overrides: list[str], place: int) -> None:
        try:
            ends.put((number, place, launch(number, overrides, place)))
        except BaseException as error:
            ends.put((number, place, error))

    while True:
        while free and (job := next(jobs, None)) is not None:
            # a daemon, so that Ctrl-C does not wait for the jobs
            threading.Thread(target=work, args=(*job, free.pop(0)), daemon=True).start()
        if len(free) == at_once:
            return
        number, place, end = ends.get()
        free.append(place)
        if isinstance(end, BaseException):
            raise end
        yield number, end


def finish(ends: list[End], keep_going: bool) -> None:
    """Print the table of a sweep's jobs. Raises RunFailedError if jobs failed."""
    for folder in dict.fromkeys(end.folder for end in ends if end.folder is not None):
        from alexlab.analysis.compare import sweep_table

        width = shutil.get_terminal_size((160, 24)).columns
        print("\n".join(sweep_table(Path(folder), ends[-1].monitor, width)))
        print("compare its jobs:", command_line("compare", f"runs={shown_path(Path(folder).absolute())}"), flush=True)
    if failed := [end for end in ends if end.failure]:
        lines = [f"{counted(len(failed), 'job')} of the sweep failed:", *(f"  {end.failure}" for end in failed)]
        if not keep_going:
            lines.append(STOPS)
        raise RunFailedError("\n".join(lines), 1 if keep_going else failed[0].code)


STOPS = "The sweep stops; sweep.keep_going=true continues."


def runs_here(launcher: Any) -> bool:
    """Check whether hydra.launcher is Hydra's basic one, which runs jobs in this process, one after the other."""
    return str(launcher["_target_"]).endswith("BasicLauncher")


# a part of a launcher's class -> the module that it needs, and the extra that brings it
LAUNCHERS = {
    "hydra_submitit_launcher": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
    "RayLauncher": ("ray", "ray"),
}


def check_launcher(launcher: Any, n_jobs: int | None) -> None:
    """Raise UserError if hydra.launcher is not installed, or cannot run hydra.sweeper.n_jobs at once."""
    for part, (module, extra) in LAUNCHERS.items():
        if part in launcher["_target_"] and find_spec(module) is None:
            raise UserError(f"This hydra/launcher needs an extra: pip install 'alexlab[{extra}]'.")
    if n_jobs is not None and not (type(n_jobs) is int and n_jobs > 0):
        raise UserError(f"`hydra.sweeper.n_jobs={shown(n_jobs)}` must be a whole number of at least 1, or null.")
    if runs_here(launcher) and n_jobs not in (None, 1):
        raise UserError(
            f"`hydra.sweeper.n_jobs={n_jobs}`: Hydra's basic launcher runs one job after the other: add "
            "hydra/launcher=local, slurm or ray."
        )


def places(launcher: Any, n_jobs: int | None, jobs: int) -> int:
    """Return how many of `jobs` jobs run at once.

    n_jobs=null means as many as this machine has GPUs if the jobs run on this machine, else all.
    """
    if runs_here(launcher):
        return 1
    if n_jobs is None and is_local(launcher):
        n_jobs = len(gpus())
    return max(1, jobs if n_jobs is None else min(n_jobs, jobs))


def is_local(launcher: Any) -> bool:
    """Check whether hydra.launcher starts all jobs at once on this machine, so that nothing else shares it out."""
    return str(launcher["_target_"]).endswith("LocalLauncher")


def gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        visible = [each.strip() for each in named.split(",") if each.strip()]
        return visible[: visible.index("-1")] if "-1" in visible else visible  # as CUDA reads it
    with importing():
        import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def shares(at_once: int, own: Any) -> list[list[str]]:
    """Return, for each place, overrides that give a job a part of this machine: cores, and GPUs as far as they go.

    `own` is hydra.job.env_set, the variables that the user sets.
    """
    visible, count = gpus(), max(1, cores() // at_once)
    each = len(visible) // at_once
    parts: list[list[str]] = []
    for place in range(at_once):
        variables = {CORES: str(count), "OMP_NUM_THREADS": str(count)}
        if visible:
            part = visible[place * each :][:each] or [visible[place % len(visible)]]
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(part)
        parts.append([f"++hydra.job.env_set.{key}='{value}'" for key, value in variables.items() if key not in own])
    return parts


# -- Studies of Optuna

HEARTBEAT = 20  # seconds
GRACE = 60  # seconds without a heartbeat after which a running trial counts as killed
TRIAL = "ALEXLAB_TRIAL"  # the environment variable that names the trial of a job, for all processes of the job


def run_study(
    given: Plain,
    overrides: list[Override],
    folder: Path,
    compose: Compose,
    run: Callable[[Iterator[tuple[int, list[str]]]], Iterator[tuple[int, End]]],
) -> None:
    """Run trials until the study has `n_trials` that are complete or pruned.

    Args:
        given: the keys of `hydra.sweeper`.
        overrides: the ranges to search, and what all trials share.
        run: runs jobs, see `run_jobs`.
    """
    optuna = import_optuna()

    # what to search
    settings, wrong = validation.check(schema.StudyConfig, given)
    if settings is None:
        raise UserError("\n  ".join(line.replace("`", "`hydra.sweeper.", 1) for line in wrong))
    space = {each.get_key_element(): distribution_of(each) for each in overrides if each.is_sweep_override()}
    fixed = [str(each.input_line) for each in overrides if not each.is_sweep_override()]
    config = check_space(compose, space, fixed)
    url = None if config.dry_run else settings.storage
    if settings.storage is None and config.sweep.pruner != "none":
        raise UserError(
            f"`sweep.pruner={config.sweep.pruner}` needs a storage that jobs can read. Remove "
            "hydra.sweeper.storage=null, or add sweep.pruner=none."
        )

    # the study, new or continued
    with storage_errors(settings.storage):
        if url is not None:
            config.paths.local.mkdir(parents=True, exist_ok=True)  # in which SQLite creates the file
        storage = open_storage(url) if url else None
        study = optuna.create_study(
            storage=storage,
            study_name=settings.study_name,
            direction=settings.direction,
            sampler=instantiate(settings.sampler),
            pruner=make_pruner(config),
            load_if_exists=True,
        )
        check_study(study, settings, config.monitor, space)
        study.set_metric_names([config.monitor])
        finished, count = _count_finished(study), settings.n_trials
        if study.trials:
            study.sampler.reseed_rng()  # a sampler with a seed would draw the first values again
        if not config.dry_run:
            done = f"{finished} of {count} trials are done" if study.trials else "new"
            print(f"study {study.study_name}: {done}", flush=True)
            if finished >= count:
                print(f"hydra.sweeper.n_trials={2 * finished} adds as many.", flush=True)
            elif settings.storage is not None:
                words = [word for word in sys.argv[1:] if not word.startswith("hydra.sweeper.study_name=")]
                command = command_line("train", *words, f"hydra.sweeper.study_name={study.study_name}")
                print(f"to continue it after an interruption: {command}", flush=True)

        ends = _run_trials(study, storage, space, fixed, 1 if config.dry_run else count - finished, count, run)
        if config.dry_run:
            print("dry_run=true shows the first trial alone: its result would choose the next values.", flush=True)
            return
        _save_results(study, config.monitor, folder)
    finish(ends, config.sweep.keep_going)


def _run_trials(
    study: "optuna.Study",
    storage: "optuna.storages.RDBStorage | None",
    space: "dict[str, BaseDistribution]",
    fixed: list[str],
    most: int,
    count: int,
    run: Callable[[Iterator[tuple[int, list[str]]]], Iterator[tuple[int, End]]],
) -> list[End]:
    """Run at most `most` trials, until `count` of the study are complete or pruned; return how they ended."""
    optuna = import_optuna()
    from alexlab.callbacks.pruning import STORAGE_ERRORS

    trials: dict[int, tuple[Any, contextlib.ExitStack]] = {}  # that run, with their heartbeats

    def ask() -> Iterator[tuple[int, list[str]]]:
        for _ in range(most):
            if _count_finished(study) >= count:  # another process may have added some
                return
            optuna.storages.fail_stale_trials(study)  # of processes that were killed; Optuna retries each once
            trial, beats = study.ask(space), contextlib.ExitStack()
            beats.enter_context(heartbeat(storage, trial))
            trials[trial.number] = trial, beats
            yield trial.number, [*(f"{name}={value}" for name, value in trial.params.items()), *fixed]

    ends: list[End] = []
    try:
        for number, end in run(ask()):
            ends.append(end)
            trial, beats = trials.pop(number)
            beats.close()
            pruned = "pruned" in study.trials[number].user_attrs  # the job has written this to the storage
            study.tell(trial, **_result(end.score, pruned), skip_if_finished=True)
    except BaseException:
        for trial, beats in trials.values():
            beats.close()
            with contextlib.suppress(*STORAGE_ERRORS):  # without heartbeats the trial will count as killed
                study.tell(trial, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)
        raise
    return ends


def import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError(f"sweep=optuna needs the extra: pip install 'alexlab[optuna]' ({error}).") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # heartbeats, metric names
    warnings.filterwarnings("ignore", "Heartbeat of storage")  # without Study.optimize: see `heartbeat`
    return optuna


def distribution_of(override: Override) -> "BaseDistribution":
    """Turn Hydra's `interval`, `range`, `choice` or `a,b,c` into what Optuna draws from.

    Both ends of an interval and of a range can be drawn. `tag(log, interval(...))` draws the logarithm uniformly, and
    `int(interval(...))` draws whole numbers.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value: Any = override.value()
    try:
        if override.is_choice_sweep():  # null, lists and mappings become texts, which Optuna can store
            return CategoricalDistribution(list(override.sweep_iterator(transformer=Transformer.encode)))  # type: ignore[arg-type]
        is_range = override.is_range_sweep()
        low, high, step = (value.start, value.stop, value.step) if is_range else (value.start, value.end, None)
        if all(isinstance(each, int) for each in (low, high, step or 1)):
            return IntDistribution(low, high, log="log" in value.tags, step=step or 1)
        return FloatDistribution(low, high, log="log" in value.tags, step=step)
    except ValueError as error:
        raise UserError(
            f"{override.input_line}: Optuna cannot draw from this ({str(error).splitlines()[0]}). Write interval(LOW, "
            "HIGH), tag(log, interval(LOW, HIGH)) with LOW above 0, range(LOW, HIGH) or choice(A, B)."
        ) from None


def check_space(compose: Compose, space: "dict[str, BaseDistribution]", fixed: list[str]) -> TrainConfig:
    """Check configs at the ends of the search space: all parameters at their first value, then each at the rest.

    Returns the first config. With `sweep.keep_going`, this is the only one that is checked.

    Raises:
        UserError: the space is empty, or configs are wrong.
    """
    if not space:
        raise UserError("the study has nothing to search. Give a range: 'optimizer.lr=tag(log, interval(0.001, 0.1))'.")
    ends: dict[str, list[Any]] = {
        name: list(getattr(each, "choices", ())) or [each.low, each.high]  # type: ignore[attr-defined]
        for name, each in space.items()
    }
    first = {name: values[0] for name, values in ends.items()}
    corners = [first, *({**first, name: end} for name, values in ends.items() for end in values[1:])]
    jobs = [[*(f"{name}={value}" for name, value in corner.items()), *fixed] for corner in corners]
    plain = compose(0, jobs[0])
    if plain["sweep"].get("keep_going") is not True:
        check_jobs(TrainConfig, compose, jobs)
    return validation.validate(TrainConfig, plain)


def check_study(
    study: "optuna.Study", settings: schema.StudyConfig, monitor: str, space: "dict[str, BaseDistribution]"
) -> None:
    """Raise UserError if the study's trials have another metric, or parameters of another kind."""
    from optuna.distributions import check_distribution_compatibility

    direction, metric = study.direction.name.lower(), (study.metric_names or [monitor])[0]  # older ones have no names
    if (direction, metric) != (settings.direction, monitor):
        raise UserError(
            f"`hydra.sweeper.study_name={study.study_name}`: that study is to {direction} {metric}, and this command "
            f"is to {settings.direction} monitor={monitor}. Choose another name."
        )
    for name, earlier in {name: each for trial in study.trials for name, each in trial.distributions.items()}.items():
        try:
            check_distribution_compatibility(earlier, space.get(name, earlier))
        except ValueError:
            raise UserError(
                f"{name}: study {study.study_name} has drawn from {earlier}, and this command draws from "
                f"{space[name]}. A study can move the ends of a range. For another kind of range or new choices, "
                "choose another hydra.sweeper.study_name."
            ) from None


def _result(score: float | None, pruned: bool) -> dict[str, Any]:
    """Return the arguments of `Study.tell`. For a pruned trial, Optuna uses the last value that it reported."""
    from optuna.trial import TrialState

    if pruned:
        return {"state": TrialState.PRUNED}
    valid = score is not None and math.isfinite(score)
    return {"values": score, "state": TrialState.COMPLETE} if valid else {"state": TrialState.FAIL}


def _count_finished(study: "optuna.Study") -> int:
    return sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in study.trials)


def _save_results(study: "optuna.Study", monitor: str, folder: Path) -> None:
    """Print how the trials ended and which is the best, and write that and plots to `folder`."""
    states = sorted(trial.state.name.lower() for trial in study.trials)
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    print(f"study {study.study_name}: {counts}", flush=True)
    if "complete" not in states:
        return
    best = study.best_trial
    values = " ".join(f"{name}={value}" for name, value in best.params.items())
    print(f"best: trial {best.number}, {monitor} {best.value:.4f} with {values}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    result = {"name": "optuna", "best_trial": best.number, "best_params": best.params, "best_value": best.value}
    OmegaConf.save(OmegaConf.create(result), folder / "optimization_results.yaml")
    from alexlab.analysis import study_plots  # imports Matplotlib

    try:
        plots = study_plots.draw(study, monitor, folder / "figures")
        print(f"plots: {', '.join(shown_path(path) for path in plots)}", flush=True)
    except Exception as error:  # a plot must not turn a complete study into a failed command
        print(f"warning: the study's plots could not be drawn ({type(error).__name__}: {error})", flush=True)


def open_storage(url: str) -> "optuna.storages.RDBStorage":
    """Open a database. Optuna creates the tables in a new one, which fails if another process does so just now."""
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback

    from alexlab.callbacks.pruning import STORAGE_ERRORS

    # SQLite waits 5 seconds by default, too few if several processes write to a file on a network disk
    patient = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") and "timeout=" not in url else {}
    retry = RetryHeartbeatStaleTrialCallback(max_retry=1)
    for tries in itertools.count():
        try:
            return RDBStorage(
                url, patient, heartbeat_interval=HEARTBEAT, grace_period=GRACE, heartbeat_stale_trial_callback=retry
            )
        except STORAGE_ERRORS as error:
            if tries == 5 or not re.search("already exists|duplicate key", str(error)):
                raise
            time.sleep(1)
    raise AssertionError


@contextlib.contextmanager
def storage_errors(url: str | None) -> Iterator[None]:
    """Turn the errors of a database into a UserError."""
    from alexlab.callbacks.pruning import STORAGE_ERRORS

    try:
        yield
    except (ImportError, RuntimeError, *STORAGE_ERRORS) as error:
        address = re.sub(r":[^:@/]*@", ":***@", str(url))  # without a password
        if "table schema" in str(error):
            raise UserError(
                f"`hydra.sweeper.storage={address}` was made by another version of Optuna. Upgrade it with `optuna "
                f"storage upgrade --storage {address}`, or choose another storage."
            ) from None
        if isinstance(error, RuntimeError):
            raise
        raise UserError(
            f"`hydra.sweeper.storage={address}` cannot be used ({str(error.__cause__ or error).splitlines()[0]}). Try "
            "again, or give another address, such as sqlite:///logs/optuna.db."
        ) from error


@contextlib.contextmanager
def heartbeat(storage: "optuna.storages.RDBStorage | None", trial: "optuna.Trial") -> Iterator[None]:
    """Send a heartbeat to the study while a trial runs. Optuna itself does so only in `Study.optimize`."""
    from alexlab.callbacks.pruning import STORAGE_ERRORS

    finished = threading.Event()

    def record() -> None:
        while storage is not None:
            with contextlib.suppress(*STORAGE_ERRORS):  # the next one may succeed
                storage.record_heartbeat(trial._trial_id)
            if finished.wait(HEARTBEAT):
                return

    thread = threading.Thread(target=record, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


@contextlib.contextmanager
def as_trial(hydra_config: Any, is_dry: bool) -> Iterator[None]:
    """Tell the processes of a job which trial of which study it is. The number of the job is that of the trial."""
    url, name = (hydra_config.sweeper.get(key) for key in ("storage", "study_name"))
    if url is None or is_dry:
        yield
        return
    os.environ[TRIAL] = json.dumps([url, name, hydra_config.job.num])
    try:
        yield
    finally:
        del os.environ[TRIAL]


def make_pruning_callback(config: TrainConfig, rank: int) -> "Pruning | None":
    """Build the callback that reports this job's metrics to the study; None if the job is not a trial."""
    if TRIAL not in os.environ:
        return None
    optuna, trial = import_optuna(), None
    from alexlab.callbacks.pruning import STORAGE_ERRORS, Pruning

    url, study_name, number = json.loads(os.environ[TRIAL])
    if rank == 0:
        sampler = optuna.samplers.RandomSampler()  # draws nothing: the trial has all values
        pruner = make_pruner(config)
        try:
            study = optuna.load_study(study_name=study_name, storage=open_storage(url), sampler=sampler, pruner=pruner)
            trial = optuna.Trial(study, study._storage.get_trial_id_from_study_id_trial_number(study._study_id, number))
        except STORAGE_ERRORS as error:
            why = str(error.__cause__ or error).splitlines()[0]
            log.warning(
                "the storage of the study %s does not answer, so this trial cannot be pruned: %s", study_name, why
            )
    return Pruning(trial, config.monitor)


def make_pruner(config: TrainConfig) -> "optuna.pruners.BasePruner":
    """Build Optuna's pruner from the keys of conf/sweep/optuna.yaml."""
    from optuna import pruners

    if config.sweep.pruner == "median":
        return pruners.MedianPruner(config.sweep.startup_trials, config.sweep.warmup_epochs)
    if config.sweep.pruner == "hyperband":
        return pruners.HyperbandPruner(max(1, config.sweep.warmup_epochs), config.trainer.max_epochs or "auto")
    return pruners.NopPruner()


# -- W&B's agent, which starts train.py once for each run of a sweep of W&B

PLAIN = re.compile(r"[A-Za-z0-9_./:+\-]+")  # a text that Hydra reads without quotes


def agent_overrides(words: list[str]) -> list[str]:
    """Turn the arguments that W&B's agent passes into Hydra's overrides.

    A parameter with parameters below it, `optimizer={'lr': 0.1}`, becomes `optimizer.lr=0.1`, and `choices={'model':
    'vgg'}` becomes `model=vgg`. All else stays as it is. The option None of a group is `~group`, or no override
    if train.yaml gives the group no option.

    Raises:
        UserError: an argument is -m.
    """
    if {"-m", "--multirun"} & set(words):
        raise UserError("-m: a run of a W&B agent is one run; the sweep's file says what varies. Remove -m.")
    overrides: list[str] = []
    for word in words:
        key, _, text = word.partition("=")
        value: Any = None
        with contextlib.suppress(ValueError, SyntaxError):  # else it is no literal of Python
            value = ast.literal_eval(text)
        if text == "None":
            overrides.append(f"{key}=null")
        elif not isinstance(value, dict):
            overrides.append(word)
        elif key == "choices":
            entries = configs.read(CONF / "train.yaml")["defaults"]
            has_default = {group for entry in entries if isinstance(entry, dict) for group in entry if entry[group]}
            for group, option in value.items():
                if option is not None or group in has_default:
                    overrides.append(f"~{group}" if option is None else f"{group}={option}")
        else:
            overrides += [f"{name}={_written(item)}" for name, item in configs.flat(value, f"{key}.").items()]
    return overrides


def _written(value: Any) -> str:
    """Write a value in Hydra's grammar."""
    if isinstance(value, str) and not PLAIN.fullmatch(value):
        return in_quotes(value)
    return f"[{','.join(map(_written, value))}]" if isinstance(value, list) else shown(value)


def check_agent(config: TrainConfig) -> None:
    """Raise UserError if W&B's agent has started a run that does not log to W&B."""
    wandb = config.logger.wandb
    if agent() is not None and (wandb is None or wandb.mode in ("offline", "disabled")):
        what = "without W&B" if wandb is None else f"with logger.wandb.mode={wandb.mode}"
        raise UserError(
            f"a run of a W&B agent {what}: the sweep would never receive {config.monitor}. Add logger=wandb "
            "logger.wandb.mode=auto, or run python train.py -m sweep=grid, which needs no agent."
        )


# -- The folders of jobs


def name_of(run_dir: Path) -> str | None:
    """Return the name of the sweep that a run belongs to; None for a single run."""
    started_by = agent()
    if started_by is not None:
        return started_by[0]
    for folder in run_dir.parents[:4]:  # with hydra.sweep.dir and hydra.sweep.subdir it may be anywhere
        if folder.parent.name == "multiruns" or (folder / "multirun.yaml").is_file():
            return folder.name
    return None


def record_failure(run_dir: Path, config: Plain, why: str) -> None:
    """Write the config and the summary of a job that failed before it could do so itself."""
    with contextlib.suppress(OSError):  # a full disk must not hide what went wrong
        run_dir.mkdir(parents=True, exist_ok=True)
        if not (run_dir / "config.yaml").exists():
            configs.save(config, run_dir / "config.yaml")
        if not (run_dir / "summary.json").exists():
            write_json(run_dir / "summary.json", {"status": "failed", "error": why})


def remove_empty(folder: Path, top: Path) -> None:
    """Remove `folder` and the parents below `top`, as far as they are empty."""
    with contextlib.suppress(OSError):  # it has files
        for each in [folder, *(parent for parent in folder.parents if top in parent.parents)]:
            if each not in (Path.cwd(), top):
                each.rmdir()
