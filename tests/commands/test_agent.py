"""W&B's own sweeps: `wandb sweep` and `wandb agent` for real, against a small server on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, TINY, clean_env, command, summary_of
from test_naming import composed
from wandb_server import Sweep, WandbServer, wandb_server

from alexlab.commands.refound import check_told
from alexlab.engine import sweeps
from alexlab.engine.errors import UserError

SHIPPED = ROOT / "conf/sweep/wandb.yaml"
# the command `wandb`, whose agent looks at its runs ten times as often
WANDB = "from wandb.cli import cli; cli.wandb_agent.Agent.POLL_INTERVAL = 0.5; cli.cli(prog_name='wandb')"


def called(*words: str, server: WandbServer, folder: Path, timeout: float = 120) -> subprocess.CompletedProcess:
    """`wandb <words>` in the project's root; what it writes by itself goes below `folder`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # whose python the agent takes
    env = clean_env({**server.env(), "WANDB_DIR": str(folder), "PATH": path, "WANDB_AGENT_KILL_DELAY": "120"})
    return subprocess.run(
        [sys.executable, "-c", WANDB, *words],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def made(server: WandbServer, folder: Path, parameters: dict[str, Any], *words: str) -> tuple[Sweep, str]:
    """The shipped sweep with other parameters, and the more words that make its runs small; and what names it."""
    told = yaml.safe_load(SHIPPED.read_text())
    told["parameters"] = parameters
    told["command"] += [*TINY, "data=folder", "data.batch_size=8", "test=false", "logger=wandb", *words]
    folder.mkdir(exist_ok=True)
    (folder / "sweep.yaml").write_text(yaml.safe_dump(told))
    done = called("sweep", str(folder / "sweep.yaml"), server=server, folder=folder)
    assert done.returncode == 0, done.stderr
    path = done.stderr.split("wandb agent ")[-1].split()[0]
    return server.sweeps[path.rpartition("/")[2]], path


def test_a_grid_is_run_by_an_agent(shapes: Path, tmp_path: Path) -> None:
    """Two runs, on two ranks each, with their own rates and nothing twice in their configs."""
    logs = tmp_path / "logs"
    before = subprocess.run(["git", "status", "--short"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    grid = {
        "optimizer": {"parameters": {"lr": {"values": [0.02, 0.5]}}},
        "choices": {"parameters": {"scheduler": {"value": "constant"}}},
        "label_smoothing": {"value": 0.1},
        "data": {"parameters": {"root": {"value": str(shapes)}}},  # told as its last part alone, and looked for by none
    }
    with wandb_server() as server:
        sweep, path = made(server, tmp_path / "w", grid, f"paths.logs={logs}", "debug=fast", "trainer=ddp_cpu")
        done = called("agent", path, server=server, folder=tmp_path / "w")
        printed = done.stdout + done.stderr
        assert done.returncode == 0, printed
    assert path == "tester/alexlab/sweep0"
    calls = ["UpsertSweep", "SweepWithRuns", "CreateAgent", "Heartbeat"]
    assert [call for call in dict.fromkeys(server.calls) if call in calls] == calls
    assert set(server.runs) == set(sweep.given) == {"sweep0r0", "sweep0r1"}, printed
    for (name, run), rate in zip(sorted(server.runs.items()), (0.02, 0.5), strict=True):
        config = json.loads(run.fields["config"])
        assert config["optimizer"]["value"]["lr"] == rate
        assert config["optimizer"]["value"]["momentum"] == 0.9, "the group is whole"
        assert config["choices"]["value"]["scheduler"] == config["scheduler"]["value"]["name"] == "constant"
        assert config["label_smoothing"]["value"] == 0.1
        assert [key for key in config if "." in key] == []
        assert (run.fields["groupName"], run.fields["project"]) == ("sweep0", "alexlab")
        assert (run.complete, run.exit_code) == (True, 0), printed
        summary = summary_of(logs / "train/runs/sweep-sweep0" / name)
        assert (summary["effective_lr"], summary["world_size"]) == (rate, 2)
        assert run.summary["val/acc1_best"] == pytest.approx(summary["best"]["val/acc1"])
        assert f"-lr{rate}-" in run.fields["displayName"]
    known = ("ServerFeaturesQuery", "ServerInfo")  # what it is asked for and need not know
    assert [told for told in server.unknown if not told.startswith(known)] == []
    after = subprocess.run(["git", "status", "--short"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert after == before, "an agent leaves nothing beside the code"


def test_the_shipped_file_is_a_sweep_of_the_metric_that_runs_log(tmp_path: Path) -> None:
    with wandb_server() as server:
        done = called("sweep", "conf/sweep/wandb.yaml", server=server, folder=tmp_path)
    assert "wandb agent tester/alexlab/sweep0" in done.stderr
    grid = server.sweeps["sweep0"]
    told = yaml.safe_load(grid.text)
    assert told["metric"] == {"name": "val/acc1_best", "goal": "maximize"}
    assert told["command"][:4] == ["${env}", "${interpreter}", "${program}", "${args_no_hyphens}"]
    assert len(grid.grid) == 6
    (first,) = grid.commands({})
    assert first["args"] == {"optimizer": {"value": {"lr": 0.003, "weight_decay": 0.0001}}}


def test_a_run_that_was_stopped_goes_on_when_it_is_given_out_again(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one whose rate is wrong fails by itself."""
    logs = tmp_path / "logs"
    run_dir = logs / "train/runs/sweep-sweep0/sweep0r1"
    heartbeat, ended = Sweep.commands, []

    def stopping(self: Sweep, running: dict[str, bool]) -> list[dict[str, Any]]:
        if not ended and (run_dir / "checkpoints/last.ckpt").is_file():
            self.stop, self.again = {"sweep0r1"}, ["sweep0r1"]
            ended.append("sweep0r1")
        return heartbeat(self, running)

    monkeypatch.setattr(Sweep, "commands", stopping)
    grid = {"optimizer": {"parameters": {"lr": {"values": [-1, 0.01]}}}}
    words = [f"data.root={shapes}", f"paths.logs={logs}", "trainer.max_epochs=999", "+trainer.max_time='00:00:00:06'"]
    with wandb_server() as server:
        _, path = made(server, tmp_path / "w", grid, *words)
        done = called("agent", path, server=server, folder=tmp_path / "w")
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert "optimizer.lr=-1: must be a number above 0" in printed
    assert ended
    run = server.runs["sweep0r1"]
    assert not run.preempting, "W&B wants it ended, as `stop` of early_terminate does"
    assert (run.complete, run.exit_code) == (True, 0), printed
    assert "stopped by SIGTERM. Go on with it" in printed
    assert summary_of(run_dir)["status"] == "finished"
    epochs = [line for line in (run_dir / "train.log").read_text().splitlines() if "| train/loss" in line]
    numbers = [int(line.split("epoch ")[1].split("/")[0]) for line in epochs]
    assert numbers == sorted(set(numbers)), "each epoch once"
    assert [path.name for path in run_dir.parent.iterdir()] == ["sweep0r1"]


@pytest.fixture
def under_an_agent(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setenv("WANDB_RUN_ID", "r")
    return monkeypatch


def test_an_agents_words_become_hydras(under_an_agent: pytest.MonkeyPatch) -> None:
    words = [
        "optimizer={'lr': 0.1, 'nesterov': True}", "model={'net': {'hidden': [64, 48]}}", "seed=3", "logger=csv",
        "choices={'model': 'vgg', 'debug': None, 'experiment': 'demo', 'augment': None}", "init_from=None",
        "logger={'wandb': {'notes': \"it's one, two\", 'group': None}}",
    ]  # fmt: skip
    assert sweeps.agent_words(words) == [
        "optimizer.lr=0.1", "optimizer.nesterov=true", "model.net.hidden=[64,48]", "seed=3", "logger=csv", "model=vgg",
        "experiment=demo", "~augment", "init_from=null",
        r"logger.wandb.notes='it\'s one, two'", "logger.wandb.group=null",
    ]  # fmt: skip
    under_an_agent.delenv("WANDB_SWEEP_ID")
    assert sweeps.agent_words(words) == words, "of nobody else"


def test_no_option_of_an_agents_is_none_of_hydras(under_an_agent: pytest.MonkeyPatch) -> None:
    words = sweeps.agent_words(["choices={'debug': None, 'experiment': None, 'augment': None, 'optimizer': 'adamw'}"])
    config = composed(*words)
    assert config.choices.optimizer == "adamw"
    assert {"debug", "experiment", "augment"} & {*config.choices, *(key for key in config if key == "augment")} == set()


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("optimizer.lr", r"optimizer.lr: in a sweep's file .* write optimizer: \{parameters: \{lr: \.\.\.\}\}, as"),
        ("model.net.width", r"write model: \{parameters: \{net: \{parameters: \{width: \.\.\.\}\}\}\}, as"),
        ("scheduler", r"scheduler: .* write choices: \{parameters: \{scheduler: \.\.\.\}\}\."),
    ],
)
def test_a_parameter_that_would_not_be_found_is_refused(
    key: str, told: str, under_an_agent: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"wandb_version": 1, key: {"value": 1}}))
    under_an_agent.setenv("WANDB_SWEEP_PARAM_PATH", str(tmp_path / "config.yaml"))
    with pytest.raises(UserError, match=told):
        sweeps.agent_words([f"{key}=1"])


@pytest.mark.parametrize(
    ("words", "agent", "told"),
    [
        (["sweep=wandb"], False, "sweep=wandb: conf/sweep/wandb.yaml is a file for W&B's own sweeps"),
        (["-m", "sweep=wandb"], False, "`wandb sweep conf/sweep/wandb.yaml` makes one"),
        (["-m", "seed=1,2"], True, "-m: a run of W&B's agent is one run"),
        (["logger=csv"], True, "a run of W&B's agent without W&B: the sweep would never hear of its val/acc1"),
        (["logger.wandb.mode=offline"], True, "a run of W&B's agent with logger.wandb.mode=offline"),
    ],
)
def test_what_cannot_be_is_told(words: list[str], agent: bool, told: str, tmp_path: Path) -> None:
    env = {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r"} if agent else {}
    done = command("train.py", *words, f"paths.logs={tmp_path}", env=env)
    assert done.returncode == 2, done.stdout
    assert told in done.stderr
    assert "Traceback" not in done.stderr


FAR = "/images/photos5"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"data": {"root": FAR}}, (f"data.root={FAR}: W&B is told photos5, and its search would not find again what "
         "it has given, where it is one of several of a grid: of a path it is the last part. One that all runs share "
         "goes to the end of the sweep's command, as - data.root=PATH; others into options of a group, choices: "
         "{parameters: {data: {values: [A, B]}}} with "
         "conf/data/A.yaml.")),
        ({"init_from": "2026-11-25"}, "choices: {parameters: {experiment: {values: [A, B]}}} with conf/experiment/A."),
        ({"data": {"class_names": "/names.txt"}}, "data.class_names=/names.txt: W&B is told names.txt, and its"),
        ({"augment": {"scale": [0.5, 1.0]}}, "write whole numbers in lists without a point, 1 for 1.0."),
        ({"optimizer": {"lr": "1e-3"}}, ("optimizer.lr=1e-3: W&B is told 0.001, and its search would not find again "
         "what it has given, where it is one of several of a grid: it is a text in the sweep's file: write "
         "0.001 there.")),
    ],
)  # fmt: skip
def test_a_value_that_would_not_be_found_again_is_refused(given: dict[str, Any], told: str, tmp_path: Path) -> None:
    """W&B's grid would give it out again without an end. The run is refused before W&B is told of it."""
    parameters = tmp_path / "parameters.yaml"
    parameters.write_text(yaml.safe_dump({"wandb_version": 1, **{key: {"value": each} for key, each in given.items()}}))
    words = [f"{key}={value}" for key, value in given.items()]  # as ${args_no_hyphens} has them
    env = {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r", "WANDB_SWEEP_PARAM_PATH": str(parameters), "WANDB_MODE": ""}
    done = command("train.py", *words, f"paths.logs={tmp_path / 'logs'}", "logger.wandb.mode=auto", env=env)
    assert done.returncode == 2, done.stdout
    assert told in done.stderr
    assert not list(tmp_path.glob("logs/**/config.yaml"))


def test_values_that_are_found_again_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As json has a run's config at W&B: numbers that are whole without a point."""
    monkeypatch.setattr(sweeps, "given", {
        "optimizer.lr": 1.0, "data.root": "photos5", "augment.scale": [0.5, 1], "init_from": None, "seed": 3,
        "choices.model": "vgg", "compile": False,
    })  # fmt: skip
    told = {
        "optimizer": {"lr": 1.0}, "data": {"root": "photos5"}, "augment": {"scale": [0.5, 1.0]}, "init_from": None,
        "seed": 3, "choices": {"model": "vgg"}, "compile": False,
    }  # fmt: skip
    check_told(told, lambda: pytest.fail("nobody is asked"))
    grid = {"method": "grid", "parameters": {"compile": {"values": [True, False]}, "seed": {"values": [3]}}}
    lost = "and its search would not find again what it has given: another word of the command sets it: leave one of"
    for key, text in (("compile", "compile=False: W&B is told 0, "), ("seed", "seed=3: W&B is told None, ")):
        with pytest.raises(UserError, match=f"^{text}{lost} them out.$"):
            check_told({**told, key: {"compile": 0, "seed": None}[key]}, lambda: grid)
    with pytest.raises(UserError, match="has given, where it is one of several of a grid: another word"):
        check_told({**told, "seed": 4}, lambda: None)


def test_only_values_of_a_grid_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant is looked for by no grid, and nothing is by `random`; a run that goes on is no setting."""
    monkeypatch.setattr(sweeps, "given", {"data.root": "/images/a", "resume": "auto", "resume.run": "/logs/x"})
    told = {"data": {"root": "a"}, "resume": {"run": None}}
    root: dict[str, Any] = {"values": ["/images/a", "/images/b"]}
    grid = {"method": "grid", "parameters": {"data": {"parameters": {"root": root}}}}
    with pytest.raises(UserError, match=r"^data.root=/images/a: W&B is told a, and its search .* of a path it is"):
        check_told(told, lambda: grid)
    check_told(told, lambda: {**grid, "method": "random"})
    for constant in ({"data": {"parameters": {"root": {"value": "/images/a"}}}}, {"data": {"value": {"root": "/i"}}}):
        check_told(told, lambda same=constant: {**grid, "parameters": same})  # type: ignore[misc]
    with pytest.raises(UserError, match="its search would not find again"):
        check_told(told, lambda: {"method": "grid", "parameters": {"seed": {"values": [1]}}})


def test_the_number_of_classes_is_told_as_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "given", {"data.num_classes": None, "init_from": None})
    told: dict[str, Any] = {"data": {"num_classes": None}, "init_from": None}
    with pytest.raises(UserError, match=r"=None: W&B is told how many there are, .* give numbers alone"):
        check_told(told, lambda: None)
    monkeypatch.setattr(sweeps, "given", {"data.num_classes": 5})
    check_told({"data": {"num_classes": 5}}, lambda: None)


def test_wrong_values_are_told_before_they_are_looked_for(tmp_path: Path) -> None:
    parameters = tmp_path / "parameters.yaml"
    parameters.write_text(yaml.safe_dump({"data": {"value": {"class_names": 5}}}))
    env = {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r", "WANDB_SWEEP_PARAM_PATH": str(parameters), "WANDB_MODE": ""}
    words = ["data={'class_names': 5}", f"paths.logs={tmp_path / 'logs'}", "logger.wandb.mode=auto"]
    done = command("train.py", *words, env=env)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: data.class_names=5: must be ")
