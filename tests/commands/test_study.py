"""Optuna's studies: the search space, studies that are continued after a kill, pruned trials, refused settings."""

import copy
import json
import os
import re
import shlex
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import yaml
from conftest import TINY, command, composed, summary_of
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from wandb_server import wandb_server

from alexlab.analysis import study_plots
from alexlab.callbacks.pruning import Pruning
from alexlab.commands import sweep
from alexlab.engine.errors import UserError
from alexlab.engine.overrides import put
from alexlab.engine.schema import TrainConfig

LR = FloatDistribution(0.001, 0.1, log=True)
RANDOM = {"_target_": "optuna.samplers.RandomSampler", "seed": 1}


def parsed(*overrides: str) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))


def trials(logs: Path, name: str = "mine") -> list[FrozenTrial]:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{logs}/optuna.db").trials


def command_line(shapes: Path, logs: Path, *more: str) -> list[str]:
    return ["train.py", "-m", "sweep=optuna", *TINY, "data=folder", f"data.root={shapes}", "data.batch_size=8",
            "test=false", "trainer.limit_train_batches=2", f"paths.logs={logs}", *more]  # fmt: skip


# -- The search space


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("interval(1,5)", FloatDistribution(1.0, 5.0)),
        ("tag(log,interval(0.001,0.1))", LR),
        ("int(interval(1,64))", IntDistribution(1, 64)),
        ("tag(log,int(interval(1,64)))", IntDistribution(1, 64, log=True)),
        ("int(tag(log,interval(1,64)))", IntDistribution(1, 64, log=True)),
        ("range(1,5)", IntDistribution(1, 5)),
        ("range(1,5,step=2)", IntDistribution(1, 5, step=2)),
        ("range(0.1,0.5,step=0.2)", FloatDistribution(0.1, 0.5, step=0.2)),
        ("choice(sgd,adamw)", CategoricalDistribution(["sgd", "adamw"])),
        ("true,2,null,0.5,[1,2]", CategoricalDistribution([True, 2, "null", 0.5, "[1,2]"])),
    ],
)
def test_hydras_syntax_becomes_optunas_distributions(value: str, expected: object) -> None:
    (override,) = parsed(f"key={value}")
    assert sweep.distribution_of(override) == expected


@pytest.mark.parametrize("value", ["interval(0.3,0.001)", "tag(log,interval(0,1.0))", "range(1,5,step=-1)"])
def test_a_range_that_optuna_refuses_is_a_users_mistake(value: str) -> None:
    (override,) = parsed(f"lr={value}")
    with pytest.raises(
        UserError, match=rf"^lr={re.escape(value)}: Optuna cannot draw from this \(.*\)\. Write interval"
    ):
        sweep.distribution_of(override)


def test_the_ends_of_the_space_are_checked_before_there_is_a_study(tmp_path: Path) -> None:
    wrong = [
        "optimizer.lr=interval(-1,0.3)", "optimizer.momentum=interval(0.5,1.5)", "data.batch_size=choice(8,0)",
        "seed=x", "sweep.pruner=medain", "augment.policy_ops=range(1,4)", "augment.policy_magnitude=range(0,31)",
    ]  # fmt: skip
    done = command("train.py", "-m", "sweep=optuna", "logger=csv", f"paths.logs={tmp_path}", *wrong)
    assert (done.returncode, done.stdout) == (2, "")
    first, *lines = done.stderr.splitlines()
    assert first.startswith("error: 7 of the sweep's 7 jobs have wrong values, so no job was started (")
    assert sorted(line.split("=")[0].split("`")[1] for line in lines) == [
        "augment.policy_magnitude", "data.batch_size", "optimizer.lr", "optimizer.momentum", "seed", "sweep.pruner",
    ]  # fmt: skip
    assert "  job 3: `optimizer.momentum=1.5` must be below 1." in lines
    assert list(tmp_path.iterdir()) == [], "neither a database nor a folder"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sweep=optuna", "optimiser.lr=interval(0.001,0.3)"], "there is no such key. Did you mean `optimizer.lr`?"),
        (["sweep=optuna", "optimizer=choice(sgd,adamx)"], "there is no such option. Did you mean `optimizer=adamw`?"),
        (["sweep=optuna", "hydra/sweeper/sampler=grid"], "The options are cmaes, nsgaii, random, tpe."),
        (["sweep=optuna", "hydra.sweeper.n_trials=x"], "`hydra.sweeper.n_trials=x` must be a whole number."),
        (["sweep=optuna", "hydra.sweeper.storage=null"], "`sweep.pruner=median` needs a storage that jobs can read."),
        (["hydra/sweeper=optuna"], "the study has nothing to search. Give a range: 'optimizer.lr=tag(log, interval("),
    ],
)  # fmt: skip
def test_a_wrong_study_starts_no_job(overrides: list[str], message: str, tmp_path: Path) -> None:
    done = command("train.py", "-m", *overrides, "logger=csv", f"paths.logs={tmp_path}")
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


# -- The loop of ask and tell, with a function for a job


class Runner:
    """Runs studies of `lr` in [0.001, 0.1] whose trials reach 1 - lr, without any training.

    Attributes:
        seen: lr of the trials that were started, by number.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(study_plots, "draw", lambda study, metric, folder: [])
        monkeypatch.setenv(sweep.TRIAL, "")  # is restored after the test
        self.folder, self.seen = folder, dict[int, float]()
        self.plain = composed("sweep=optuna", "sweep.pruner=none", "logger=csv", "trainer.max_epochs=3")
        self.url = f"sqlite:///{folder}/optuna.db"
        self.job: Callable[[int, float], float | None] = lambda number, lr: 1 - lr

    def compose(self, number: int, overrides: list[str]) -> dict[str, Any]:
        config = copy.deepcopy(self.plain) | {"run_dir": str(self.folder / str(number))}
        for override in overrides:
            key, _, value = override.partition("=")
            put(config, key, yaml.safe_load(value))
        return config

    def launch(self, jobs: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, sweep.End]]:
        for number, overrides in jobs:
            self.seen[number] = float(overrides[0].removeprefix("optimizer.lr="))
            yield number, sweep.End(self.job(number, self.seen[number]))

    def run(self, *overrides: str, space: str = "tag(log,interval(0.001,0.1))", **settings: Any) -> list[FrozenTrial]:
        given = {"study_name": "mine", "storage": self.url, "direction": "maximize", "n_trials": 3, "sampler": RANDOM}
        made = {**given, **settings}
        sweep.run_study(made, parsed(f"optimizer.lr={space}", *overrides), self.folder, self.compose, self.launch)
        return trials(self.folder) if made["storage"] == self.url and (self.folder / "optuna.db").exists() else []


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    return Runner(tmp_path, monkeypatch)


def test_a_study_is_continued_up_to_n_trials_in_all(runner: Runner, capsys: pytest.CaptureFixture) -> None:
    first = runner.run(n_trials=2)
    assert "study mine: new\nto continue it after an interruption: python " in capsys.readouterr().out
    found = runner.run(n_trials=5)
    printed = capsys.readouterr().out
    assert "study mine: 2 of 5 trials are done\n" in printed
    assert [trial.value for trial in found] == [1 - lr for lr in runner.seen.values()]
    assert len({round(lr, 9) for lr in runner.seen.values()}) == 5, "a sampler with a seed does not repeat itself"
    assert [trial.params for trial in found[:2]] == [trial.params for trial in first]
    best = max(found, key=lambda trial: trial.value or 0)
    values = f"{best.value:.4f} with optimizer.lr={best.params['optimizer.lr']}"
    assert f"best: trial {best.number}, val/acc1 {values}" in printed
    saved = yaml.safe_load((runner.folder / "optimization_results.yaml").read_text())
    expected = {"name": "optuna", "best_trial": best.number, "best_params": best.params, "best_value": best.value}
    assert saved == expected
    assert len(runner.run(n_trials=5)) == 5
    assert "study mine: 5 of 5 trials are done\nhydra.sweeper.n_trials=10 adds as many." in capsys.readouterr().out


def test_failed_trials_do_not_count_but_end_the_command_in_time(runner: Runner) -> None:
    runner.job = lambda number, lr: None if number < 2 else float("nan") if number == 2 else 0.5
    states = [trial.state.name for trial in runner.run(n_trials=3)]
    assert states == ["FAIL"] * 3, "the command has started as many as were missing"
    states = [trial.state.name for trial in runner.run(n_trials=3)]
    assert states == ["FAIL"] * 3 + ["COMPLETE"] * 3


def test_a_trial_that_is_interrupted_has_failed(runner: Runner) -> None:
    def interrupted(number: int, lr: float) -> float:
        raise KeyboardInterrupt

    runner.job = interrupted
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    assert [trial.state for trial in trials(runner.folder)] == [TrialState.FAIL]


def test_a_killed_trial_is_retried_once_after_its_heartbeats_stop(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial of a living process is left alone."""
    sweep.import_optuna()
    killed = optuna.create_study(study_name="mine", storage=sweep.open_storage(runner.url), direction="maximize")
    trial = killed.ask({"optimizer.lr": LR})
    with sweep.heartbeat(killed._storage, trial):  # type: ignore[arg-type]
        pass
    assert [each.state.name for each in runner.run(n_trials=1)] == ["RUNNING", "COMPLETE"]
    with sqlite3.connect(runner.folder / "optuna.db") as database:
        database.execute("update trial_heartbeats set heartbeat = datetime(heartbeat, '-61 seconds')")
    found = runner.run(n_trials=2)
    assert [each.state.name for each in found] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert found[2].params == found[0].params


def test_two_processes_add_trials_to_one_study(runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_another(number: int, lr: float) -> float:
        if number == 0:
            runner.job = lambda number, lr: 0.1
            runner.run(n_trials=2)
        return 0.2

    runner.job = with_another
    assert [trial.value for trial in runner.run(n_trials=2)] == [0.2, 0.1, 0.1]


def test_a_dry_run_starts_one_trial_outside_of_the_study(runner: Runner, capsys: pytest.CaptureFixture) -> None:
    runner.run("dry_run=true")
    assert list(runner.seen) == [0]
    assert capsys.readouterr().out.startswith("dry_run=true shows the first trial alone")
    assert list(runner.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "settings", "message"),
    [
        ([], {"study_name": None}, "`hydra.sweeper.study_name=null` must be a text that is not empty."),
        ([], {"direction": ["minimize"]}, r"`hydra.sweeper.direction=\[minimize\]` must be minimize or maximize."),
        ([], {"n_trials": 0}, "`hydra.sweeper.n_trials=0` must be at least 1."),
        ([], {"direction": "minimize"}, "that study is to maximize val/acc1, and this command is to minimize monitor"),
        (["monitor=val/acc5"], {}, "maximize val/acc1, and this command is to maximize monitor=val/acc5. Choose"),
        ([], {"space": "interval(0.001,0.1)"}, "optimizer.lr: study mine has drawn from Float.*, and this command d"),
        ([], {"storage": "nowhere"}, "`hydra.sweeper.storage=nowhere` cannot be used .* such as sqlite:///logs/opt"),
        (
            [], {"storage": "oracle://me:secret@host/x"},  # pragma: allowlist secret
            r"oracle://me:\*\*\*@host/x` cannot be used \(No module named",
        ),
        ([], {"storage": "sqlite:////nowhere/x.db"}, "`hydra.sweeper.storage=sqlite:////nowhere/x.db` cannot be used"),
    ],
)  # fmt: skip
def test_a_study_refuses_wrong_settings(
    overrides: list[str], settings: dict[str, Any], message: str, runner: Runner
) -> None:
    runner.run(n_trials=1)
    with pytest.raises(UserError, match=message):
        runner.run(*overrides, **settings)
    assert len(trials(runner.folder)) == 1, "no trial is left running"


def test_a_database_of_another_optuna_is_upgraded_by_its_command(runner: Runner) -> None:
    runner.run(n_trials=1)
    with sqlite3.connect(runner.folder / "optuna.db") as database:
        database.execute("update alembic_version set version_num = 'v2.6.0.a'")
    with pytest.raises(UserError, match=r"Upgrade it with `optuna storage upgrade --storage sqlite:///.*optuna.db`"):
        runner.run()


def test_a_locked_database_is_a_users_mistake_and_hides_no_interruption(runner: Runner) -> None:
    url = f"{runner.url}?timeout=0.05"
    locked = sqlite3.connect(runner.folder / "optuna.db", isolation_level=None)

    def lock(number: int, lr: float) -> float:
        locked.execute("BEGIN EXCLUSIVE")
        if number == 0:
            return 0.5
        raise KeyboardInterrupt

    runner.job = lock
    for expected, message in ((UserError, r"cannot be used \(.*database is locked\). Try"), (KeyboardInterrupt, None)):
        with pytest.raises(expected, match=message):
            runner.run(storage=url)
        locked.execute("ROLLBACK")
    locked.close()
    assert [trial.state.name for trial in trials(runner.folder)] == ["RUNNING", "RUNNING"]


def test_a_plot_that_fails_stops_no_study(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def failing(*_: object) -> None:
        raise ValueError("min() of nothing")

    monkeypatch.setattr(study_plots, "draw", failing)
    runner.run(n_trials=1)
    printed = capsys.readouterr().out
    assert printed.endswith("warning: the study's plots could not be drawn (ValueError: min() of nothing)\n")


# -- Pruning


def test_pruners_are_optunas() -> None:
    """Of ten trials median stops those below half of the others, hyperband some of the last ones, none no trial."""
    stopped: dict[str, list[tuple[int, int]]] = {"median": [], "hyperband": [], "none": []}
    for kind, found in stopped.items():
        settings = SimpleNamespace(pruner=kind, startup_trials=2, warmup_epochs=1)
        config: Any = SimpleNamespace(sweep=settings, trainer=SimpleNamespace(max_epochs=9))
        pruner = sweep.make_pruner(config)
        study = optuna.create_study(study_name="s", direction="maximize", pruner=pruner)
        for score in range(10, 0, -1):  # each is worse than all before
            trial = study.ask()
            for epoch in range(9):
                trial.report(score, epoch)
                if trial.should_prune():
                    found.append((10 - score, epoch))
                    break
            study.tell(trial, score)
    assert stopped["median"] == [(number, 1) for number in range(2, 10)]
    assert len(stopped["hyperband"]) > 2
    assert stopped["none"] == []


@pytest.fixture
def in_a_trial(runner: Runner) -> tuple[TrainConfig, SimpleNamespace]:
    """The config of a job that is the first trial of a study, and a trainer in its first epoch."""
    config = TrainConfig.model_validate(runner.compose(0, []))
    trainer = SimpleNamespace(
        sanity_checking=False, state=SimpleNamespace(fn="fit"), current_epoch=0, max_epochs=3,
        callback_metrics={"val/acc1": 0.5}, strategy=SimpleNamespace(broadcast=bool), should_stop=False,
    )  # fmt: skip
    return config, trainer


@pytest.mark.parametrize("at_the_start", [True, False])
def test_a_locked_database_costs_no_trial(
    at_the_start: bool,
    in_a_trial: tuple[TrainConfig, SimpleNamespace],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config, trainer = in_a_trial
    url = f"sqlite:///{tmp_path}/optuna.db?timeout=0.05"
    study = optuna.create_study(study_name="mine", storage=url, direction="maximize")
    locked = sqlite3.connect(tmp_path / "optuna.db", isolation_level=None)
    monkeypatch.setenv(sweep.TRIAL, json.dumps([url, "mine", study.ask().number]))
    if at_the_start:
        locked.execute("BEGIN EXCLUSIVE")
    callback = sweep.make_pruning_callback(config, rank=0)
    assert callback is not None
    if not at_the_start:
        locked.execute("BEGIN EXCLUSIVE")
    callback.on_validation_end(trainer, None)  # type: ignore[arg-type]
    locked.execute("ROLLBACK")
    locked.close()
    what = "so this trial cannot be pruned: " if at_the_start else "so the trial continues: "
    assert f"the storage of the study mine does not answer, {what}" in caplog.text
    assert "database is locked" in caplog.text
    assert not trainer.should_stop
    trainer.current_epoch = 1
    callback.on_validation_end(trainer, None)  # type: ignore[arg-type]
    assert trials(tmp_path)[0].intermediate_values == ({} if at_the_start else {1: 0.5})


def test_only_trials_whose_study_can_be_reached_are_pruned(
    in_a_trial: tuple[TrainConfig, SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = in_a_trial
    monkeypatch.delenv(sweep.TRIAL, raising=False)
    assert sweep.make_pruning_callback(config, rank=0) is None
    monkeypatch.setenv(sweep.TRIAL, json.dumps(["sqlite:///never_opened.db", "mine", 0]))
    other_rank = sweep.make_pruning_callback(config, rank=1)
    assert isinstance(other_rank, Pruning)
    assert other_rank.trial is None


def test_a_bad_trial_is_pruned_on_all_ranks(shapes: Path, tmp_path: Path) -> None:
    study = optuna.create_study(study_name="mine", storage=f"sqlite:///{tmp_path}/optuna.db", direction="maximize")
    better = dict.fromkeys(range(5), 2.0)  # than any accuracy
    study.add_trial(create_trial(params={"optimizer.lr": 0.01}, distributions={"optimizer.lr": LR}, value=2.0,
                                 intermediate_values=better))  # fmt: skip
    with wandb_server() as server:
        done = command(*command_line(
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
    _, pruned = trials(tmp_path)
    assert pruned.state == TrialState.PRUNED
    assert sorted(pruned.intermediate_values) == [0, 1]
    run_dir = tmp_path / "train/multiruns/mine/1"
    summary = summary_of(run_dir)
    assert (summary["status"], summary["pruned"], summary["world_size"], summary["test"]) == ("finished", True, 2, {})
    assert pruned.intermediate_values[1] == pytest.approx(summary["last"]["val/acc1"])
    assert summary["effective_lr"] == pytest.approx(pruned.params["optimizer.lr"])
    assert re.findall(r"^epoch (\d)/4", done.stdout, re.M) == ["1", "2"]


# -- The command


def test_a_killed_sweep_is_continued_by_the_command_that_it_printed(shapes: Path, tmp_path: Path) -> None:
    """Each sweep is a study of its own, in a folder of logs that does not exist yet."""
    logs = tmp_path / "new/logs"

    def kill(pid: int) -> None:
        if list(logs.glob("train/multiruns/*/0/checkpoints/last.ckpt")):
            os.kill(pid, signal.SIGKILL)

    overrides = ["trainer.max_epochs=500", "hydra.sweeper.n_trials=2"]
    killed = command(*command_line(shapes, logs, *overrides), watch=kill)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    hint = re.search(r"^to continue it after an interruption: python (train.py .*)$", killed.stdout, re.M)
    assert hint is not None
    again = shlex.split(hint[1])
    name = again[-1].removeprefix("hydra.sweeper.study_name=")
    assert [trial.state for trial in trials(logs, name)] == [TrialState.RUNNING]
    done = command(*again, "trainer.max_epochs=1")
    assert done.returncode == 0, done.stderr
    assert f"study {name}: 0 of 2 trials are done\n" in done.stdout
    assert f"study {name}: 2 complete, 1 running\n" in done.stdout
    folder = logs / "train/multiruns" / name
    assert {path.parent.name for path in folder.glob("*/config.yaml")} == {"0", "1", "2"}, "the trials' numbers"
    best = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    scores = {n: summary_of(folder / str(n))["best"]["val/acc1"] for n in (1, 2)}
    assert best["best_value"] == pytest.approx(max(scores.values()))
    assert scores[best["best_trial"]] == max(scores.values())
    assert f"plots: {folder}/figures/history.png, {folder}/figures/slices.png\n" in done.stdout
    assert "3 runs" in done.stdout, "the table of the jobs"
    config = yaml.safe_load((folder / "2/config.yaml").read_text())
    assert config["optimizer"]["lr"] == pytest.approx(trials(logs, name)[2].params["optimizer.lr"])


def test_a_job_without_a_result_stops_the_sweep(shapes: Path, tmp_path: Path) -> None:
    done = command(*command_line(shapes, tmp_path, "trainer.limit_val_batches=0", "trainer.max_epochs=1"))
    assert done.returncode == 2, done.stdout
    assert "Nothing to optimize: the job has not measured `monitor=val/acc1`." in done.stderr
    (folder,) = (tmp_path / "train/multiruns").iterdir()
    assert [trial.state for trial in trials(tmp_path, folder.name)] == [TrialState.FAIL]


def test_a_dry_run_of_a_study_leaves_no_file(shapes: Path, tmp_path: Path) -> None:
    """A mistake that every trial has is reported without a traceback, also with keep_going."""
    done = command(*command_line(shapes, tmp_path, "dry_run=true"))
    assert done.returncode == 0, done.stderr
    assert "dry_run=true shows the first trial alone" in done.stdout
    done = command(*command_line(shapes, tmp_path, "dry_run=true", "data.num_classes=1", "sweep.keep_going=true"))
    assert done.returncode == 2, done.stdout
    assert "error: `data.num_classes=1` must be " in done.stderr
    assert "Traceback" not in done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_study_without_optuna_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"^sweep=optuna needs the extra: pip install 'alexlab\[optuna\]' \("):
        sweep.import_optuna()
