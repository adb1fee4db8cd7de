"""Sweeps by Optuna that are killed and go on, and trials that are ended early."""

import re
import shlex
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from conftest import ROOT, TINY, clean_env, command, summary_of
from omegaconf import OmegaConf
from optuna.trial import FrozenTrial, TrialState, create_trial
from wandb_server import wandb_server

from alexlab import sweeps
from alexlab.callbacks.pruning import Pruning
from alexlab.errors import UserError
from alexlab.study import draw, only_one

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
LR = {"optimizer.lr": optuna.distributions.LogUniformDistribution(0.001, 0.1)}


def words(shapes: Path, logs: Path, *more: str) -> list[str]:
    return ["train.py", "-m", "sweep=optuna", *TINY, "data=folder", f"data.root={shapes}", "data.batch_size=8",
            "test=false", "trainer.limit_train_batches=2", f"paths.logs={logs}", *more]  # fmt: skip


def trials(logs: Path, name: str) -> list[FrozenTrial]:
    return optuna.load_study(name, f"sqlite:///{logs}/optuna.db").trials


def test_a_sweep_that_was_killed_goes_on(shapes: Path, tmp_path: Path) -> None:
    """With the command that it has printed: the trial that was lost is not counted, those that are done are."""
    process = subprocess.Popen(
        [sys.executable, *words(shapes, tmp_path, "trainer.max_epochs=500", "hydra.sweeper.n_trials=2")],
        cwd=ROOT, env=clean_env(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    hint = ""
    for line in process.stdout:
        hint = line if line.startswith("if it is ended, go on with it: python ") else hint
        if line.startswith("epoch 1/"):
            break
    process.kill()
    process.communicate()
    again = shlex.split(hint)[9:]
    assert again[0] == "train.py"
    name = again[-1].removeprefix("hydra.sweeper.study_name=")
    assert [trial.state for trial in trials(tmp_path, name)] == [TrialState.RUNNING]
    again += ["trainer.max_epochs=1"]
    done = command(*again)
    assert done.returncode == 0, done.stderr
    assert f"study {name} goes on: 0 of 2 trials are done (0 had not ended: marked as failed)" in done.stdout
    assert f"study {name}: 2 complete, 1 fail" in done.stdout
    for number, more in ((3, 0), (3, 0), (4, 1)):
        done = command(*again, f"hydra.sweeper.n_trials={2 + more}")
        assert done.returncode == 0, done.stderr
        states = [trial.state.name for trial in trials(tmp_path, name)]
        assert states == ["FAIL", *["COMPLETE"] * (number - 1)]
        assert ("all are there: hydra.sweeper.n_trials=4 adds as many." in done.stdout) == (not more)
    folder = tmp_path / "train/multiruns" / name
    assert {path.parent.name for path in folder.glob("*/config.yaml")} == {"0", "1", "2", "3"}, "one folder a study"
    assert {path.name for path in (folder / "figures").iterdir()} == {"history.png", "parallel.png", "slices.png"}
    assert f"drawn: {folder}/figures (history, parallel, slices)" in done.stdout
    best = OmegaConf.load(folder / "optimization_results.yaml")
    scores = {n: summary_of(folder / str(n))["best"]["val/acc1"] for n in (1, 2, 3)}
    assert best.best_value == pytest.approx(max(scores.values()))
    assert scores[best.best_trial] == max(scores.values())


def test_a_trial_that_looks_bad_is_ended_on_all_ranks(shapes: Path, tmp_path: Path) -> None:
    study = optuna.create_study(f"sqlite:///{tmp_path}/optuna.db", study_name="mine", direction="maximize")
    better = dict.fromkeys(range(5), 2.0)  # than any accuracy
    study.add_trial(create_trial(params={"optimizer.lr": 0.01}, distributions=LR, value=2.0,
                                 intermediate_values=better))  # fmt: skip
    with wandb_server() as server:
        done = command(*words(
            shapes, tmp_path, "hydra.sweeper.study_name=mine", "hydra.sweeper.n_trials=2", "sweep.startup_trials=1",
            "sweep.warmup_epochs=1", "trainer.max_epochs=4", "trainer=ddp_cpu", "test=true", "logger=wandb",
        ), env=server.env())  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = server.runs.values()
    assert (run.summary["pruned"], run.summary["status"], run.exit_code) == (True, "finished", 0)
    assert run.fields["groupName"] == "mine"
    assert run is server.run_of("mine/1")
    assert "pruned after epoch 2: val/acc1 " in done.stdout
    assert "study mine: 1 complete, 1 pruned" in done.stdout
    _, pruned = trials(tmp_path, "mine")
    assert pruned.state == TrialState.PRUNED
    assert sorted(pruned.intermediate_values) == [0, 1]
    summary = summary_of(tmp_path / "train/multiruns/mine/1")
    assert (summary["status"], summary["pruned"], summary["world_size"], summary["test"]) == ("finished", True, 2, {})
    assert pruned.intermediate_values[1] == pytest.approx(summary["last"]["val/acc1"])
    assert re.findall(r"^epoch (\d)/4", done.stdout, re.M) == ["1", "2"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["monitor=val/loss"], "study_name=mine: that study is not to minimize monitor=val/loss: choose another"),
        (["hydra.sweeper.storage=null"], "sweep.pruner=median needs a storage that the runs can ask"),
        (["hydra/sweeper/sampler=grid"], "hydra/sweeper/sampler=grid: a grid needs no study"),
        (["hydra.sweeper.direction=[minimize,maximize]"], "a run has one objective, its monitor"),
        (["hydra.sweeper.study_name=null"], "hydra.sweeper.study_name=null: a study goes on by its name"),
        (["hydra.sweeper.n_jobs=2"], "hydra.sweeper.n_jobs=2: trials run one after the other here"),
        (["hydra.sweeper.max_failure_rate=0.5"], "a trial that fails ends the sweep, or with sweep.keep_going=true"),
        (["sweep.pruner=mean"], "sweep.pruner=mean: must be one of median, hyperband, none."),
    ],
)
def test_what_a_study_refuses(more: list[str], told: str, shapes: Path, tmp_path: Path) -> None:
    optuna.create_study(f"sqlite:///{tmp_path}/optuna.db", study_name="mine", direction="maximize")
    done = command(*words(shapes, tmp_path, "hydra.sweeper.study_name=mine", *more))
    assert done.returncode == 2, done.stdout
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_a_studys_plots_follow_its_distributions(tmp_path: Path) -> None:
    """Logarithms of rates, options of choices, trials that failed left out, parameters that some trials lack."""
    kinds = {
        **LR, "model": optuna.distributions.CategoricalDistribution(["alexnet", "vgg"]),
        "augment.policy_ops": optuna.distributions.IntUniformDistribution(1, 4),
    }  # fmt: skip
    study = optuna.create_study(direction="minimize")
    for number in range(7):
        params = {"optimizer.lr": 0.001 * 1.9**number, "model": ("vgg", "alexnet")[number % 2], "augment.policy_ops": 2}
        if number == 0:
            del params["model"]
        state = (TrialState.FAIL, TrialState.PRUNED, TrialState.COMPLETE)[min(number, 2)]
        value = None if state == TrialState.FAIL else 1.0 / (1 + number)
        study.add_trial(create_trial(params=params, value=value, state=state,
                                     distributions={name: kinds[name] for name in params}))  # fmt: skip
    drawn = draw(study, "val/loss", tmp_path / "figures")
    assert [path.name for path in drawn] == ["history.png", "parallel.png", "slices.png", "importances.png"]
    assert all(path.stat().st_size > 5000 for path in drawn)


def test_a_study_has_one_process_at_a_time(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/optuna.db"
    taken = pytest.raises(UserError, match="study_name=mine: another process is at that study: wait")
    with only_one(storage, "mine"), only_one(storage, "other"), taken, only_one(storage, "mine"):
        pass
    with only_one(storage, "mine"):
        pass


def test_pruners_are_optunas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten trials the median stops those below half of the others; hyperband most of a tail; none nobody."""
    shared = {"startup_trials": 2, "warmup_epochs": 1}
    stopped = {}
    for kind in ("median", "hyperband", "none"):
        pruner = sweeps.make_pruner(OmegaConf.create({"pruner": kind, **shared}), 9)
        study = optuna.create_study(study_name="s", direction="maximize", pruner=pruner)
        for score in range(10, 0, -1):  # each is worse than all before
            trial = study.ask()
            for epoch in range(9):
                trial.report(score, epoch)
                if trial.should_prune():
                    stopped.setdefault(kind, []).append((10 - score, epoch))
                    break
            study.tell(trial, score)
    assert stopped["median"] == [(number, 1) for number in range(2, 10)]
    assert len(stopped["hyperband"]) > 2
    assert "none" not in stopped


def test_a_storage_that_is_locked_costs_no_trial(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another process holds SQLite's file for longer than it waits."""
    storage = f"sqlite:///{tmp_path}/optuna.db?timeout=0.05"
    study = optuna.create_study(study_name="mine", storage=storage, direction="maximize")
    place = sweeps.Trial(storage, "mine", 0, study.ask()._trial_id)
    callback = Pruning(place, sweeps.make_pruner(OmegaConf.create({"pruner": "none"}), 3), "val/acc1")
    trainer = SimpleNamespace(
        is_global_zero=True, sanity_checking=False, state=SimpleNamespace(fn="fit"), current_epoch=0, max_epochs=3,
        callback_metrics={"val/acc1": 0.5}, strategy=SimpleNamespace(broadcast=bool), should_stop=False,
    )  # fmt: skip
    callback.on_fit_start(trainer, None)  # type: ignore[arg-type]
    with sqlite3.connect(tmp_path / "optuna.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        callback.on_validation_end(trainer, None)  # type: ignore[arg-type]
        other.execute("ROLLBACK")
    assert "mine could not be asked whether to prune, and the trial goes on: (sqlite3.OperationalError)" in caplog.text
    assert not trainer.should_stop
    trainer.current_epoch = 1
    callback.on_validation_end(trainer, None)  # type: ignore[arg-type]
    assert trials(tmp_path, "mine")[0].intermediate_values == {1: 0.5}


def test_the_place_of_a_trial_is_told_to_its_job_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    place = sweeps.Trial("sqlite:///x.db", "mine", 3, 17)
    monkeypatch.setattr(sweeps, "current", place)
    with sweeps.told():
        assert sweeps.trial() == place
    assert sweeps.trial() is None
    monkeypatch.setattr(sweeps, "current", sweeps.Trial(None, "mine", 3, 17))
    with sweeps.told():
        assert sweeps.trial() is None, "nobody can ask what is in another process's memory"
