"""A sweep by Optuna: trials that are asked for and told one by one, in a study that goes on after it was ended."""

import difflib
import functools
import math
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl, create_params_from_overrides
from omegaconf import DictConfig, OmegaConf
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from alexlab.commands import beforehand
from alexlab.commands import study_terms as terms
from alexlab.engine import config as configs
from alexlab.engine import sweeps
from alexlab.engine.errors import UserError
from alexlab.engine.run_dir import read_summary, shown
from alexlab.engine.secrecy import masked

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
        space, fixed = self._space(arguments)
        settings = self._check_values(space, fixed)
        self.given, folder = self.storage, Path(self.config.hydra.sweep.dir)
        self.storage = terms.patient(self.given)
        if self.config.get("dry_run"):
            self._look(settings, space)
            self.storage = None  # of a dry run nothing stays
        with terms.only_one(self.storage and self.given, self.study_name):
            with terms.reached(self.given):
                study = self._study()
                settled = self._settle(study)
                terms.check_settings(study, settings, space, folder)
                terms.check_space(study, space)
                number = self._begin(study, settled)
            for _ in range(self.n_trials - number):
                study = self._run(study, space, fixed)
            with terms.reached(self.given):
                self._end(study)

    def _look(self, settings: dict[str, Any], space: terms.Space) -> None:
        """Check, for a command that is only shown, whether it may go on with a study that is there."""
        if self.storage is None or not terms.there(self.storage):
            return
        with terms.reached(self.given):
            names = [each.study_name for each in optuna.get_all_study_summaries(self.storage)]
            if self.study_name in names:
                study = self._study()
                terms.check_settings(study, settings, space, Path(self.config.hydra.sweep.dir), keep=False)
                terms.check_space(study, space)

    def _run(self, study: Study, space: terms.Space, fixed: dict[str, Any]) -> Study:
        """One trial, until the study has been told of it. Returns the study, which knows of that."""
        assert self.launcher is not None
        with terms.reached(self.given):
            trial = study.ask()
        try:
            with terms.reached(self.given):
                words = self._configure_trials([trial], space, fixed)
            sweeps.current = sweeps.Trial(self.storage, study.study_name, trial.number, trial._trial_id)
            (job,) = self.launcher.launch(words, initial_job_idx=trial.number)
            value = job.return_value
        except BaseException:
            try:
                study.tell(trial, state=TrialState.FAIL)
            except terms.UNREACHED as error:  # what ended the trial is what is to be told
                why = str(error.__cause__ or error).splitlines()[0]
                print(f"warning: trial {trial.number} is marked as failed when the study goes on ({why})", flush=True)
            raise
        finally:
            sweeps.current = None
        with terms.reached(self.given):
            if self.storage:  # a study looks at its own trials once, and the job has written to this one
                study = self._study()
            if sweeps.PRUNED in study.trials[trial.number].user_attrs:
                study.tell(trial.number, state=TrialState.PRUNED)  # its value is the last that was reported
            else:
                study.tell(trial.number, value, TrialState.FAIL if value is None else TrialState.COMPLETE)
        return study

    def _space(self, arguments: list[str]) -> tuple[terms.Space, dict[str, Any]]:
        """What the trials' values are drawn from, and those that are fixed; of a key's words the last one counts."""
        self._process_searchspace_config()
        drawn: terms.Space = dict(self.search_space_distributions or {})
        fixed: dict[str, Any] = {}
        for word in [*self._parse_sweeper_params_config(), *arguments]:
            try:
                its, others = create_params_from_overrides([word])
            except (ValueError, AssertionError, NotImplementedError) as error:
                raise UserError(
                    f"{word}: nothing can be drawn from that ({str(error).splitlines()[0]}): write interval(LOW,HIGH), "
                    "tag(log,interval(LOW,HIGH)) with LOW above 0, range(FROM,TO) or choice(A,B)."
                ) from None
            for name in {**its, **others}:
                for values, now in ((drawn, its), (fixed, others)):
                    for same in [each for each in values if each.lstrip("+") == name.lstrip("+") and each not in now]:
                        del values[same]
            drawn, fixed = {**drawn, **its}, {**fixed, **others}
        return drawn, fixed

    def _check_values(self, space: terms.Space, fixed: dict[str, Any]) -> dict[str, Any]:
        """The settings that all trials share.

        Raises:
            UserError: they are wrong, or some that could be drawn; told together, before there is a study.
        """
        of = beforehand.jobs_of
        assert of is not None
        shared: dict[str, Any] = {}
        wrong: dict[str, None] = {}

        def composed(values: dict[str, Any]) -> DictConfig:
            return of.composed(self, 0, [f"{name}={value}" for name, value in {**values, **fixed}.items()])

        for values, within in terms.extremes(space):
            config = composed(values)
            new = [mistake for mistake in of.mistakes(config) if mistake not in wrong]
            if new and within and not {*of.mistakes(composed(within))} - {*wrong}:
                continue
            wrong |= dict.fromkeys(new)
            shared = shared or ({} if wrong else terms.kept(config, space))
        if wrong:
            lines = list(wrong)[: beforehand.SHOWN]
            lines += [f"... and {len(wrong) - len(lines)} more mistakes"] * (len(wrong) > len(lines))
            raise UserError(
                "the study's trials would have wrong values, and none was started (sweep.keep_going=true records such "
                "ones as failed, and goes on):\n  " + "\n  ".join(lines)
            )
        return shared

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
        if self.n_trials < 1:
            raise UserError(f"hydra.sweeper.n_trials={self.n_trials}: must be a whole number, at least 1.")
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

    def _begin(self, study: Study, settled: list[str]) -> int:
        """Say how to go on with the study. Returns how many trials count already.

        Args:
            settled: what became of those that an earlier process has left.
        """
        counted = sum(trial.state in COUNTED for trial in study.trials)
        if study.trials:
            study.sampler.reseed_rng()  # one with a seed would draw its first values again
            more = f" ({'; '.join(settled)})" if settled else ""
            print(f"study {study.study_name} goes on: {counted} of {self.n_trials} trials are done{more}", flush=True)
        elif self.storage:
            count = f"{self.n_trials} trial{'s' * (self.n_trials > 1)}"
            print(f"study {study.study_name} is new: {count}{self._others(study)}", flush=True)
        if self.storage and counted < self.n_trials:
            words = [word for word in sys.argv[1:] if not word.startswith("hydra.sweeper.study_name=")]
            command = shlex.join(["python", *sys.argv[:1], *words, f"hydra.sweeper.study_name={study.study_name}"])
            print(masked(f"if it is ended, go on with it: {command}"), flush=True)
        if counted >= self.n_trials and counted:
            print(f"all are there: hydra.sweeper.n_trials={2 * counted} adds as many.", flush=True)
        return counted

    def _settle(self, study: Study) -> list[str]:
        """Tell the study what became of trials that an earlier process did not: of one whose run had ended, how it
        did; else that it failed. Returns the same in words."""
        said, folder = [], Path(self.config.hydra.sweep.dir)
        for trial in study.trials:
            if trial.state not in (TrialState.RUNNING, TrialState.WAITING):
                continue
            ended = self._ended(trial, terms.metric_of(study, folder) or self.config.monitor)
            if ended is None:
                study.tell(trial.number, state=TrialState.FAIL)
                said.append(f"trial {trial.number} had not ended: marked as failed")
            else:
                study.tell(trial.number, ended.get("value"), ended["state"])
                said.append(f"trial {trial.number} had ended: its summary.json says how")
        return said

    def _ended(self, trial: FrozenTrial, metric: str) -> dict[str, Any] | None:
        """What the run of a trial has reached, where its folder has that of a run which had these very values."""
        folder = Path(self.config.hydra.sweep.dir, str(trial.number))
        summary = read_summary(folder)
        if summary.get("status") != "finished":
            return None
        try:
            words = configs.read(folder / "config.yaml").get("overrides")
        except (UserError, OSError, AttributeError):
            return None
        if not isinstance(words, list) or not {f"{k}={v}" for k, v in trial.params.items()} <= set(map(str, words)):
            return None
        if summary.get("pruned") is True:
            return {"state": TrialState.PRUNED}
        value = summary.get("best", {}).get(metric)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return {"state": TrialState.COMPLETE, "value": float(value)}

    def _others(self, study: Study) -> str:
        """Of a study that was named, what it may have been meant to go on with."""
        if not any(word.startswith("hydra.sweeper.study_name=") for word in sys.argv[1:]):
            return ""
        names = [each.study_name for each in optuna.get_all_study_summaries(study._storage)]
        names = [name for name in names if name != study.study_name]
        if not names:
            return ""
        near = difflib.get_close_matches(study.study_name, names, n=3, cutoff=0) or names[:3]
        return f"; to go on with another, give its name: {', '.join(near)}{', ...' if len(names) > len(near) else ''}"

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
        if drawn:
            print(f"drawn: {shown(folder / 'figures')} ({', '.join(path.stem for path in drawn)})", flush=True)


def draw(study: Study, metric: str, folder: Path) -> list[Path]:
    """The study's plots as PNG files in `folder`. Returns their paths; those that need more trials, or parameters that
    trials share, are left out, and one that fails is told.

    Args:
        metric: what the trials' values are.
    """
    from alexlab.analysis import study_plots as plots  # and with it Matplotlib

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
    images: dict[str, Callable[[], Any]] = {"history": lambda: plots.history(points, metric, maximize)}
    if parameters:
        images["parallel"] = lambda: plots.parallel(points, parameters, metric, maximize)
        images["slices"] = lambda: plots.slices(points, parameters, metric)
        images["importances"] = lambda: plots.importances(points, parameters, metric)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, make in images.items():
        try:
            image = make()
            if image is not None:
                image.save(folder / f"{name}.png")
                drawn.append(folder / f"{name}.png")
        except Exception as error:  # a picture is no reason to end a sweep
            print(f"warning: {name}.png was not drawn: {type(error).__name__}: {error}", flush=True)
    return drawn
