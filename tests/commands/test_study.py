"""Sweeps by Optuna that are killed and go on, and trials that are ended early."""

import errno
import fcntl
import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from conftest import ROOT, TINY, clean_env, command, summary_of
from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides
from omegaconf import OmegaConf
from optuna.trial import FrozenTrial, TrialState, create_trial
from wandb_server import wandb_server

from alexlab.analysis import study_plots
from alexlab.callbacks.pruning import Pruning
from alexlab.commands.study import StudySweep, draw
from alexlab.commands.study_terms import check_settings, only_one, patient, reached, there, written
from alexlab.engine import sweeps
from alexlab.engine.errors import UserError

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
    assert f"study {name} goes on: 0 of 2 trials are done (trial 0 had not ended: marked as failed)" in done.stdout
    assert f"study {name}: 2 complete, 1 fail" in done.stdout
    assert f"study {name} was begun with other settings" not in done.stdout, "it holds no value of them"
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
        (["hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0: must be a whole number, at least 1."),
        (["hydra.sweeper.n_trials=x"], "hydra.sweeper.n_trials=x: must be a whole number."),
        (["hydra.sweeper.storage=5"], "hydra.sweeper.storage=5: must be an address such as sqlite:///logs/optuna.db"),
        (["hydra.sweeper.storage=logs"], "hydra.sweeper.storage=logs: must be an address such as sqlite:///logs/"),
        (["optimizer.lr=interval(0.3,0.001)"], "optimizer.lr=interval(0.3,0.001): nothing can be drawn from that"),
        (["optimizer.lr=tag(log,interval(0,1.0))"], "write interval(LOW,HIGH), tag(log,interval(LOW,HIGH)) with LOW"),
    ],
)
def test_what_a_study_refuses(more: list[str], told: str, shapes: Path, tmp_path: Path) -> None:
    optuna.create_study(f"sqlite:///{tmp_path}/optuna.db", study_name="mine", direction="maximize")
    done = command(*words(shapes, tmp_path, "hydra.sweeper.study_name=mine", *more))
    assert done.returncode == 2, done.stdout
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_what_could_be_drawn_is_looked_at_before_there_is_a_study(tmp_path: Path) -> None:
    """The end of an interval is never drawn where the other values are below it."""
    wrong = [
        "optimizer.lr=interval(-1,0.3)", "optimizer.momentum=interval(0.5,1.5)", "label_smoothing=interval(0.0,1.0)",
        "data.batch_size=choice(8,0)", "seed=x", "sweep.pruner=medain", "ema.decay=tag(log,interval(0.1,1.0))",
        "augment.policy_ops=range(1,4)", "augment.policy_magnitude=range(0,31)",
    ]  # fmt: skip
    logs = tmp_path / "logs"
    logs.mkdir()
    done = command("train.py", "-m", "sweep=optuna", "logger=csv", f"paths.logs={logs}", *wrong)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: the study's trials would have wrong values, and none was started (sweep.keep_going=true records such "
        "ones as failed, and goes on):\n"
        "  seed=x: must be a whole number from 0 to 4294967295.\n"
        "  sweep.pruner=medain: must be one of median, hyperband, none.\n"
        "  optimizer.lr=-1.0: must be a number above 0.\n"
        "  optimizer.momentum=1.5: must be a number from 0 to below 1.\n"
        "  data.batch_size=0: must be a whole number, at least 1.\n"
        "  augment.policy_magnitude=31: must be a whole number from 0 to 30.\n"
    )
    for word, told in (
        ("optimiser.lr=interval(0.001,0.3)", "optimiser.lr: there is no such key. Did you mean optimizer.lr?"),
        ("optimizer=choice(sgd,adamx)", "optimizer=adamx: there is no such option. Did you mean optimizer=adamw?"),
        (f"seed=choice({','.join('x' + str(n) for n in range(20))})", "... and 8 more mistakes"),
    ):
        done = command("train.py", "-m", "sweep=optuna", "logger=csv", f"paths.logs={logs}", word)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert told in done.stderr
    assert list(logs.iterdir()) == [], "no study, and no folder of one"


@pytest.fixture(scope="module")
def begun(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The logs of a study `mine` with one trial."""
    logs = tmp_path_factory.mktemp("begun")
    done = command(*words(shapes, logs, *GOES_ON, "hydra.sweeper.n_trials=1"))
    assert done.returncode == 0, done.stderr
    return logs


GOES_ON = ["hydra.sweeper.study_name=mine", "trainer.max_epochs=1", "optimizer=choice(sgd,adamw)"]


def test_a_study_goes_on_with_its_own_metric(shapes: Path, begun: Path) -> None:
    """Not with another one that is maximized, too; other settings and images are told."""
    once = [*GOES_ON, "hydra.sweeper.n_trials=1"]
    before = [trial.value for trial in trials(begun, "mine")]
    done = command(*words(shapes, begun, *once, "monitor=val/acc5"))
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert "study_name=mine: the values of that study are val/acc1, and monitor=val/acc5 here: give" in done.stderr
    other = begun / "other"
    other.mkdir(exist_ok=True)
    done = command(*words(shapes, begun, *once, f"data.root={other}", "label_smoothing=0.1", "optimizer.lr=0.1"))
    assert done.returncode == 0, done.stderr
    told = f"differ in more than they draw: data.root={other} (there {shapes}), label_smoothing=0.1 (there 0.0), "
    told += "optimizer.lr not drawn (there drawn)\n"
    assert "warning: study mine was begun with other settings, and trials are compared that " + told in done.stdout
    done = command(*words(shapes, begun, *once, "logger=none", "test=true", "trainer.log_every_n_steps=7"))
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stdout, "what makes no difference"
    assert [trial.value for trial in trials(begun, "mine")] == before


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("optimizer.lr=interval(0.001,0.1)",
         "=interval(0.001,0.1): study mine has drawn it from tag(log,interval(0.001,0.1)), and within a study an"),
        ("optimizer.lr=choice(0.1,0.2)", "optimizer.lr=choice(0.1,0.2): study mine has drawn it from tag(log,"),
        ("optimizer.lr=range(1,5,step=2)", "optimizer.lr=range(1,5,step=2): study mine has drawn it from tag(log,"),
        ("optimizer.lr=range(0.1,0.5,step=0.2)", "optimizer.lr=range(0.1,0.5,step=0.2): study mine has drawn it"),
        ("optimizer=choice(adamw,sgd)", "optimizer=choice(adamw,sgd): study mine has drawn it from choice(sgd,adamw)"),
    ],
)  # fmt: skip
def test_a_studys_parameters_keep_their_kinds(word: str, told: str, shapes: Path, begun: Path) -> None:
    done = command(*words(shapes, begun, *GOES_ON, "hydra.sweeper.n_trials=2", word))
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert told in done.stderr
    assert [trial.state for trial in trials(begun, "mine")] == [TrialState.COMPLETE], "none is left under way"


@pytest.mark.parametrize(
    ("then", "now", "told"),
    [(1, 1.0, "=1.0 (there 1)"), (None, 1.0, None), (0.5, 0.5, None)],
)
def test_all_batches_are_not_one(
    then: float | None, now: float, told: str | None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Of a limit 1 is a batch, and 1.0 all, as null is."""
    study = optuna.create_study(study_name="mine", direction="maximize")
    study.add_trial(create_trial(params={"optimizer.lr": 0.01}, distributions=LR, value=0.5))
    settings = {"monitor": "val/acc1", "trainer.limit_train_batches": then}
    study.set_user_attr("settings", settings)
    check_settings(study, {**settings, "trainer.limit_train_batches": now}, {**LR}, tmp_path)
    assert (f"trainer.limit_train_batches{told}\n" if told else "") == capsys.readouterr().out.rpartition(": ")[2]


def test_what_was_fixed_and_is_drawn_now_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    study = optuna.create_study(study_name="mine", direction="maximize")
    study.add_trial(create_trial(params={"optimizer.lr": 0.01}, distributions=LR, value=0.5))
    study.set_user_attr("settings", {"monitor": "val/acc1", "seed": 1, "choices.model": "vgg"})
    space = {"seed": optuna.distributions.IntUniformDistribution(0, 9),
             "model": optuna.distributions.CategoricalDistribution(["vgg", "alexnet"])}  # fmt: skip
    check_settings(study, {"monitor": "val/acc1", "optimizer.lr": 0.02}, space, tmp_path)
    told = "than they draw: model drawn (there vgg), optimizer.lr=0.02 (there drawn), seed drawn (there 1)\n"
    assert capsys.readouterr().out.endswith(told)


def test_a_study_of_an_older_version_keeps_its_metric(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Which a word of its command says, or the config of a run of its."""

    def older(**more: object) -> optuna.Study:
        study = optuna.create_study(study_name="mine", direction="maximize")
        study.add_trial(create_trial(params={"optimizer.lr": 0.01}, distributions=LR, value=0.5, **more))
        return study

    now = {"monitor": "val/acc1"}
    check_settings(older(), now, {**LR}, tmp_path)
    told = "warning: study mine does not say what its values are: they are taken for monitor=val/acc1\n"
    assert capsys.readouterr().out == told
    with pytest.raises(UserError, match="the values of that study are val/acc5, and monitor=val/acc1 here"):
        check_settings(older(user_attrs={"monitor": "val/acc5"}), now, {**LR}, tmp_path)
    (tmp_path / "0").mkdir()
    (tmp_path / "0/config.yaml").write_text("monitor: val/acc5\n")
    study = older()
    with pytest.raises(UserError, match="the values of that study are val/acc5, and monitor=val/acc1 here"):
        check_settings(study, now, {**LR}, tmp_path)
    check_settings(study, {"monitor": "val/acc5"}, {**LR}, tmp_path)
    assert capsys.readouterr().out == ""
    assert study.user_attrs["settings"] == {"monitor": "val/acc5"}


@pytest.mark.parametrize(
    "word",
    ["range(1,5)", "range(1,5,step=2)", "range(0.1,0.5,step=0.2)", "tag(log,int(interval(1,64)))", "interval(1.0,5.0)",
     "tag(log,interval(0.001,0.1))", "choice(true,2)", "null,0.5", "choice(sgd,adamw)"],
)  # fmt: skip
def test_a_distribution_is_written_as_the_word_that_makes_it(word: str) -> None:
    kind = create_params_from_overrides([f"key={word}"])[0]["key"]
    assert written(kind) == word
    for other in ("int(interval(1,5))", "int(tag(log,interval(1,64)))"):
        kind = create_params_from_overrides([f"key={other}"])[0]["key"]
        assert create_params_from_overrides([f"key={written(kind)}"])[0]["key"] == kind


def test_of_a_keys_words_the_last_one_counts() -> None:
    """Also where it is fixed in the sweep's file, and however many + it has."""
    sweep = StudySweep(None, "maximize", None, "mine", 1, 1, 1.0, None, None, OmegaConf.create(
        {"seed": 3, "optimizer.lr": "interval(0.1,0.2)", "label_smoothing": "interval(0,0.1)"}
    ))  # fmt: skip
    space, fixed = sweep._space(["seed=range(5,9)", "++optimizer.lr=tag(log,interval(0.001,0.1))", "label_smoothing=0"])
    assert fixed == {"label_smoothing": "0"}
    assert space == {"seed": optuna.distributions.IntUniformDistribution(5, 9), "++optimizer.lr": LR["optimizer.lr"]}


def test_a_dry_run_of_a_study_checks_whether_it_may_go_on(shapes: Path, begun: Path) -> None:
    before = (begun / "optuna.db").read_bytes()
    for more, told in (("monitor=val/acc5", "the values of that study are val/acc1, and monitor=val/acc5 here: give"),
                       ("optimizer.lr=interval(0.001,0.1)", "study mine has drawn it from tag(log,")):  # fmt: skip
        done = command(*words(shapes, begun, *GOES_ON, "hydra.sweeper.n_trials=2", "dry_run=true", more))
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert told in done.stderr
    done = command(*words(shapes, begun, *GOES_ON, "dry_run=true", "label_smoothing=0.1"))
    assert done.returncode == 0, done.stderr
    assert "warning: study mine was begun with other settings" in done.stdout
    assert (begun / "optuna.db").read_bytes() == before


def test_a_wrong_value_that_is_to_be_recorded_needs_no_traceback(tmp_path: Path) -> None:
    """With keep_going no value was checked when the study looks at its settings; a dry run records nothing."""
    wrong = ["data.class_names=5", "sweep.keep_going=true", "hydra.sweeper.n_trials=1", "dry_run=true"]
    done = command("train.py", "-m", "sweep=optuna", "logger=csv", f"paths.logs={tmp_path}", *wrong)
    assert done.returncode == 1, done.stdout
    assert "data.class_names=5: must be " in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.rglob("*.yaml")) == []
    assert not list(tmp_path.glob("train/multiruns/*/*"))


def test_a_study_that_is_new_names_those_that_it_may_have_been(shapes: Path, tmp_path: Path) -> None:
    for name in ("mine", "pets", "alexnet"):
        optuna.create_study(f"sqlite:///{tmp_path}/optuna.db", study_name=name)
    once = ["hydra.sweeper.n_trials=1", "trainer.max_epochs=1"]
    done = command(*words(shapes, tmp_path, "hydra.sweeper.study_name=mien", *once))
    assert "study mien is new: 1 trial; to go on with another, give its name: mine, " in done.stdout, done.stderr
    done = command(*words(shapes, tmp_path, *once))
    assert re.search(r"^study \S+ is new: 1 trial$", done.stdout, re.M), "one that was not named is meant to be"


def test_a_run_that_had_ended_is_its_trials_value(shapes: Path, tmp_path: Path) -> None:
    """Killed between the end of the run and telling the study; other runs in a trial's folder are none of its."""
    study = optuna.create_study(f"sqlite:///{tmp_path}/optuna.db", study_name="mine", direction="maximize")
    folder = tmp_path / "train/multiruns/mine"
    kept = {"status": "finished", "best": {"val/acc1": 0.75, "val/acc5": 1.0}}
    runs = [
        kept, {**kept, "pruned": True}, kept, {**kept, "status": "failed"}, {**kept, "best": {"val/acc1": None}}, None,
    ]  # fmt: skip
    for number, summary in enumerate(runs):
        trial = study.ask(LR)
        trial.report(0.25, 0)
        (folder / str(number)).mkdir(parents=True)
        rate = 0.5 if number == 2 else trial.params["optimizer.lr"]
        (folder / str(number) / "config.yaml").write_text(f"overrides: [seed=1, optimizer.lr={rate}]\n")
        if summary is not None:
            (folder / str(number) / "summary.json").write_text(json.dumps(summary))
    done = command(*words(shapes, tmp_path, "hydra.sweeper.study_name=mine", "hydra.sweeper.n_trials=2"))
    assert done.returncode == 0, done.stderr
    failed = "; ".join(f"trial {number} had not ended: marked as failed" for number in (2, 3, 4, 5))
    ended = "trial 0 had ended: its summary.json says how; trial 1 had ended: its summary.json says how; "
    assert f"study mine goes on: 2 of 2 trials are done ({ended}{failed})" in done.stdout
    found = trials(tmp_path, "mine")
    assert [(t.state.name, t.value) for t in found] == [("COMPLETE", 0.75), ("PRUNED", 0.25), *[("FAIL", None)] * 4]


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


def test_a_plot_that_fails_ends_no_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    study = optuna.create_study(direction="maximize")
    study.add_trial(create_trial(params={"optimizer.lr": 0.01}, distributions=LR, value=0.5))

    def failing(*given: object) -> None:
        raise ValueError("min() of nothing")

    monkeypatch.setattr(study_plots, "parallel", failing)
    drawn = draw(study, "val/acc1", tmp_path / "figures")
    assert [path.stem for path in drawn] == ["history", "slices"]
    assert capsys.readouterr().out == "warning: parallel.png was not drawn: ValueError: min() of nothing\n"


def test_a_study_has_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However its file is written, and wherever that process keeps temporary files."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "link").symlink_to("logs")
    storage = f"sqlite:///{tmp_path}/logs/optuna.db"
    linked, relative = f"sqlite:///{tmp_path}/link/optuna.db?timeout=3", "sqlite:///logs/../logs/optuna.db"
    monkeypatch.chdir(tmp_path)
    for other in (storage, linked, relative):
        taken = pytest.raises(UserError, match="study_name=mine: another process is at that study: wait")
        with only_one(storage, "mine"), only_one(other, "a/b"), taken:
            monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "link"))
            with only_one(other, "mine"):
                pass
    with only_one(linked, "mine"):
        assert [path.name for path in (tmp_path / "logs").iterdir()] == ["optuna.db.mine.lock"]
    assert list((tmp_path / "logs").iterdir()) == [], "nothing is left"
    server = "postgresql://host/studies"
    taken = pytest.raises(UserError, match="another process is at")
    with only_one(server, "mine"), only_one(server, "other"), taken, only_one(server, "mine"):
        pass
    for nobodys in (None, "sqlite://", "sqlite:///:memory:"):
        with only_one(nobodys, None):
            pass


def test_file_systems_without_locks_have_one_process_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """By a lock in the folder for temporary files; where there is none either, that is told."""
    storage, lock, nowhere = f"sqlite:///{tmp_path}/optuna.db", fcntl.flock, [tmp_path]
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def locked(opened: int, how: int) -> None:
        if Path(f"/proc/self/fd/{opened}").resolve().parent in nowhere:
            raise OSError(errno.ENOLCK, "No locks available")
        lock(opened, how)

    monkeypatch.setattr(fcntl, "flock", locked)
    taken = pytest.raises(UserError, match="another process is at that study")
    with only_one(storage, "mine"), taken, only_one(storage, "mine"):
        pass
    assert list(tmp_path.rglob("*.lock")) == []
    nowhere.append(tmp_path / "temporary")
    with only_one(storage, "mine"):
        assert capsys.readouterr().out.startswith("warning: no file system here has locks: see that no other process")


def test_another_users_lock_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "optuna.db.mine.lock"
    path.touch()

    def denied(*given: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    told = pytest.raises(UserError, match=f"another user's process is at that study: wait for it, remove {path} ")
    with told, only_one(f"sqlite:///{tmp_path}/optuna.db", "mine"):
        pass
    path.unlink()
    with pytest.raises(PermissionError), only_one(f"sqlite:///{tmp_path}/optuna.db", "mine"):
        pass


def test_sqlites_own_addresses_are_known(tmp_path: Path) -> None:
    """file:PATH with uri=true."""
    for path in (f"file:{tmp_path}/optuna.db", f"file://{tmp_path}/optuna.db", f"file://localhost{tmp_path}/optuna.db"):
        storage = f"sqlite:///{path}?uri=true"
        assert not there(storage)
        with only_one(storage, "mine"):
            assert [each.name for each in tmp_path.iterdir()] == ["optuna.db.mine.lock"]
    optuna.create_study(study_name="mine", storage=patient(f"sqlite:///file:{tmp_path}/optuna.db?uri=true"))
    assert there(f"sqlite:///file:{tmp_path}/optuna.db?uri=true")
    assert not there("sqlite:///file:optuna?mode=memory&uri=true")


def test_another_optunas_storage_is_told() -> None:
    told = pytest.raises(UserError, match=r"storage=sqlite:///x.db: it does not answer .*: try again, or give another")
    with told, reached("sqlite:///x.db"):
        raise RuntimeError("The runtime optuna version 2.10.1 is no longer compatible with the table schema (set up by")
    with pytest.raises(RuntimeError), reached("sqlite:///x.db"):
        raise RuntimeError("of anything else")


def test_a_storage_that_does_not_answer_is_told(shapes: Path, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/optuna.db?timeout=0.05"
    optuna.create_study(study_name="mine", storage=storage, direction="maximize")
    with sqlite3.connect(tmp_path / "optuna.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        done = command(*words(shapes, tmp_path, f"hydra.sweeper.storage='{storage}'", "hydra.sweeper.study_name=mine"))
        other.execute("ROLLBACK")
    assert done.returncode == 2, done.stdout
    assert f"hydra.sweeper.storage={storage}: it does not answer (" in done.stderr
    assert "database is locked): try again, or give another." in done.stderr
    for address, told in (
        (f"sqlite:///{tmp_path}/none/x.db", f"x.db: there is no folder {tmp_path}/none: make it, or give"),
        ("oracle://host/x", "storage=oracle://host/x: it does not answer (No module named 'cx_Oracle'): try again"),
    ):
        done = command(*words(shapes, tmp_path, f"hydra.sweeper.storage={address}"))
        assert done.returncode == 2, done.stdout
        assert told in done.stderr


def test_sqlite_waits_for_a_minute_unless_it_says_how_long() -> None:
    assert patient("sqlite:////logs/optuna.db") == "sqlite:////logs/optuna.db?timeout=60"
    assert patient("sqlite:///logs/optuna.db?cache=shared") == "sqlite:///logs/optuna.db?cache=shared&timeout=60"
    for same in (None, "sqlite:///logs/optuna.db?timeout=5", "sqlite://", "mysql://host/studies"):
        assert patient(same) == same


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


def test_a_storage_that_is_locked_when_a_trial_begins_costs_no_trial(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = f"sqlite:///{tmp_path}/optuna.db?timeout=0.05"
    study = optuna.create_study(study_name="mine", storage=storage, direction="maximize")
    place = sweeps.Trial(storage, "mine", 0, study.ask()._trial_id)
    callback = Pruning(place, optuna.pruners.NopPruner(), "val/acc1")
    trainer = SimpleNamespace(
        is_global_zero=True, sanity_checking=False, state=SimpleNamespace(fn="fit"), current_epoch=0, max_epochs=3,
        callback_metrics={"val/acc1": 0.5}, strategy=SimpleNamespace(broadcast=bool), should_stop=False,
    )  # fmt: skip
    with sqlite3.connect(tmp_path / "optuna.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        callback.on_fit_start(trainer, None)  # type: ignore[arg-type]
        other.execute("ROLLBACK")
    assert "mine could not be asked, and this trial goes on unpruned: database is locked" in caplog.text
    callback.on_validation_end(trainer, None)  # type: ignore[arg-type]
    assert not trainer.should_stop


@pytest.mark.parametrize("ends", [True, False])
def test_a_storage_that_is_locked_at_a_trials_end_hides_nothing(
    ends: bool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """What ended the trial is told, and of one that was well that the storage does not answer."""
    storage = f"sqlite:///{tmp_path}/optuna.db?timeout=0.05"
    study = optuna.create_study(study_name="mine", storage=storage, direction="maximize")
    sweep = StudySweep(None, "maximize", storage, "mine", 1, 1, 1.0, None, None, None)
    sweep.given = storage
    sweep.config = OmegaConf.create({"sweep": {}, "trainer": {"max_epochs": 1}, "monitor": "val/acc1"})
    other = sqlite3.connect(tmp_path / "optuna.db", isolation_level=None)

    def launch(words: list[object], initial_job_idx: int) -> list[SimpleNamespace]:
        other.execute("BEGIN EXCLUSIVE")
        if not ends:
            raise KeyboardInterrupt
        return [SimpleNamespace(return_value=0.5)]

    sweep.launcher = SimpleNamespace(launch=launch)
    with pytest.raises(UserError if ends else KeyboardInterrupt) as told:
        sweep._run(study, {**LR}, {})
    other.execute("ROLLBACK")
    warned = (
        "warning: trial 0 is marked as failed when the study goes on ((sqlite3.OperationalError) database is locked)"
    )
    if ends:
        assert f"hydra.sweeper.storage={storage}: it does not answer (" in str(told.value)
    else:
        assert capsys.readouterr().out == f"{warned}\n"
    assert trials(tmp_path, "mine")[0].state == TrialState.RUNNING


def test_the_place_of_a_trial_is_told_to_its_job_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    place = sweeps.Trial("sqlite:///x.db", "mine", 3, 17)
    monkeypatch.setattr(sweeps, "current", place)
    with sweeps.told():
        assert sweeps.trial() == place
    assert sweeps.trial() is None
    monkeypatch.setattr(sweeps, "current", sweeps.Trial(None, "mine", 3, 17))
    with sweeps.told():
        assert sweeps.trial() is None, "nobody can ask what is in another process's memory"
