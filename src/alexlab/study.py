"""A sweep by Optuna: trials that are asked for and told one by one, in a study that goes on after it was ended."""

import contextlib
import functools
import hashlib
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import optuna
from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl, create_params_from_overrides
from omegaconf import DictConfig, OmegaConf
from optuna.study import Study
from optuna.trial import TrialState

from alexlab import sweeps
from alexlab.errors import UserError
from alexlab.rundir import shown
from alexlab.secrecy import masked

COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)  # toward n_trials; one that failed is tried anew, with other values


class StudySweep(OptunaSweeperImpl):
    """hydra-optuna-sweeper's reading of the settings, with a loop of our own.

    `n_trials` is of the study in all, whose jobs are called by their trials' numbers. They run one after the other, as
    Hydra's own launcher has it.
    """

    config: DictConfig

    def sweep(self, arguments: list[str]) -> None:
        assert self.launcher is not None
        self._check()
        self._process_searchspace_config()
        space, fixed = create_params_from_overrides([*self._parse_sweeper_params_config(), *arguments])
        space = {**(self.search_space_distributions or {}), **space}
        space = {name: distribution for name, distribution in space.items() if name not in fixed}
        if self.config.get("dry_run"):
            self.storage = None  # nothing of it stays
        with only_one(self.storage, self.study_name):
            study = self._study()
            number = self._begin(study)
            for _ in range(self.n_trials - number):
                trial = study.ask()
                words = self._configure_trials([trial], space, fixed)
                sweeps.current = sweeps.Trial(self.storage, study.study_name, trial.number, trial._trial_id)
                try:
                    (job,) = self.launcher.launch(words, initial_job_idx=trial.number)
                    value = job.return_value
                except BaseException:
                    study.tell(trial, state=TrialState.FAIL)
                    raise
                finally:
                    sweeps.current = None
                if self.storage:  # a study looks at its own trials once, and the job has written to this one
                    study = self._study()
                if sweeps.PRUNED in study.trials[trial.number].user_attrs:
                    study.tell(trial.number, state=TrialState.PRUNED)  # its value is the last that was reported
                else:
                    study.tell(trial.number, value, TrialState.FAIL if value is None else TrialState.COMPLETE)
            self._end(study)

    def _check(self) -> None:
        if isinstance(self.sampler, functools.partial):
            raise UserError("hydra/sweeper/sampler=grid: a grid needs no study: python train.py -m key=A,B other=C,D.")
        if len(self._get_directions()) > 1:
            raise UserError(
                f"hydra.sweeper.direction={list(self.direction)}: a run has one objective, its monitor: leave it out."
            )
        if not self.study_name:
            raise UserError(
                "hydra.sweeper.study_name=null: a study goes on by its name, and is its folder's: give one."
            )
        if self.n_jobs != 1:
            raise UserError(f"hydra.sweeper.n_jobs={self.n_jobs}: trials run one after the other here: leave it out.")
        if self.max_failure_rate != 1:
            raise UserError(
                f"hydra.sweeper.max_failure_rate={self.max_failure_rate}: a trial that fails ends the sweep, or with "
                "sweep.keep_going=true none does: leave it out."
            )
        if not self.storage and self.config.sweep.get("pruner", "none") != "none":
            raise UserError(
                f"sweep.pruner={self.config.sweep.pruner} needs a storage that the runs can ask: leave "
                "hydra.sweeper.storage as it is, or say sweep.pruner=none."
            )

    def _study(self) -> Study:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        (direction,) = self._get_directions()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is experimental in hyperband
            pruner = sweeps.make_pruner(self.config.sweep, self.config.trainer.max_epochs)
        settings = {"study_name": self.study_name, "storage": self.storage, "sampler": self.sampler, "pruner": pruner}
        try:
            return optuna.create_study(direction=direction, load_if_exists=True, **settings)
        except ValueError as error:
            if "direction" not in str(error):
                raise
            raise UserError(
                f"hydra.sweeper.study_name={self.study_name}: that study is not to {direction} "
                f"monitor={self.config.monitor}: choose another name for another metric."
            ) from None

    def _begin(self, study: Study) -> int:
        """Settle what an earlier process has left, and say how to go on. Returns how many trials count already."""
        left = [trial for trial in study.trials if trial.state in (TrialState.RUNNING, TrialState.WAITING)]
        for trial in left:
            study.tell(trial.number, state=TrialState.FAIL)
        counted = sum(trial.state in COUNTED for trial in study.trials)
        if study.trials:
            study.sampler.reseed_rng()  # one with a seed would draw its first values again
            failed = f" ({', '.join(str(t.number) for t in left)} had not ended: marked as failed)" if left else ""
            print(f"study {study.study_name} goes on: {counted} of {self.n_trials} trials are done{failed}", flush=True)
        elif self.storage:
            print(f"study {study.study_name}: {self.n_trials} trials", flush=True)
        if self.storage and counted < self.n_trials:
            words = [word for word in sys.argv[1:] if not word.startswith("hydra.sweeper.study_name=")]
            command = shlex.join(["python", *sys.argv[:1], *words, f"hydra.sweeper.study_name={study.study_name}"])
            print(masked(f"if it is ended, go on with it: {command}"), flush=True)
        if counted >= self.n_trials and counted:
            print(f"all are there: hydra.sweeper.n_trials={2 * counted} adds as many.", flush=True)
        return counted

    def _end(self, study: Study) -> None:
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        counts = {state: sum(trial.state == state for trial in study.trials) for state in TrialState}
        told = ", ".join(f"{count} {state.name.lower()}" for state, count in counts.items() if count)
        print(f"study {study.study_name}: {told}", flush=True)
        if not counts[TrialState.COMPLETE]:
            return
        best = study.best_trial
        words = " ".join(f"{name}={value}" for name, value in best.params.items())
        print(f"best: trial {best.number}, {self.config.monitor} {best.value:.4f} with {words}", flush=True)
        found = {"name": "optuna", "best_trial": best.number, "best_params": best.params, "best_value": best.value}
        OmegaConf.save(OmegaConf.create(found), folder / "optimization_results.yaml")
        drawn = draw(study, self.config.monitor, folder / "figures")
        print(f"drawn: {shown(folder / 'figures')} ({', '.join(path.stem for path in drawn)})", flush=True)


def draw(study: Study, metric: str, folder: Path) -> list[Path]:
    """The study's plots as PNG files in `folder`. Returns their paths; without enough trials importances are left out.

    Args:
        metric: what the trials' values are.
    """
    from alexlab import study_plots as plots  # and with it Matplotlib

    held = [trial for trial in study.trials if trial.state in COUNTED and trial.value is not None]
    points = [
        plots.Point(trial.number, trial.value, trial.params, trial.state == TrialState.PRUNED)  # type: ignore[arg-type]
        for trial in held
    ]
    kinds = {name: kind for trial in held for name, kind in trial.distributions.items()}
    values = {name: [point.params[name] for point in points if name in point.params] for name in kinds}
    parameters = [
        plots.Parameter(
            name,
            log=getattr(kind, "log", False) or type(kind).__name__.endswith("LogUniformDistribution"),
            options=tuple(sorted(set(map(str, values[name])))) if hasattr(kind, "choices") else (),
        )
        for name, kind in kinds.items()
    ]
    maximize = study.direction.name == "MAXIMIZE"
    images = {"history": plots.history(points, metric, maximize)}
    if parameters:
        images["parallel"] = plots.parallel(points, parameters, metric, maximize)
        images["slices"] = plots.slices(points, parameters, metric)
        told = plots.importances(points, parameters, metric)
        images |= {"importances": told} if told is not None else {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in images]


@contextlib.contextmanager
def only_one(storage: str | None, name: str | None) -> Iterator[None]:
    """Keep other processes of this machine from a study, as a trial of theirs looks like one that was left.

    Raises:
        UserError: another process is at it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    if not storage or name is None:
        yield
        return
    known_by = hashlib.sha256(f"{storage}\n{name}".encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir(), f"alexlab-study-{os.getuid()}-{known_by}.lock")
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"hydra.sweeper.study_name={name}: another process is at that study: wait for it, or choose another "
                "name."
            ) from None
        yield
    finally:
        os.close(file)
