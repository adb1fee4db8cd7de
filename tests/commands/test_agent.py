"""W&B's own sweeps: `wandb sweep` and `wandb agent` for real, against a small server on loopback."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, TINY, clean_env, command, composed, summary_of
from wandb_server import Sweep, WandbServer, wandb_server

from alexlab.commands import sweep
from alexlab.engine.errors import UserError
from alexlab.engine.sweeps import agent

SHIPPED = ROOT / "conf/sweep/wandb.yaml"
# the command `wandb` with an agent that polls its runs ten times as often
WANDB = "from wandb.cli import cli; cli.wandb_agent.Agent.POLL_INTERVAL = 0.5; cli.cli(prog_name='wandb')"


def run_wandb(*words: str, server: WandbServer, folder: Path, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run `wandb <words>` in the project's root. Its own files go to `folder`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the agent starts the first python
    env = clean_env({**server.env(), "WANDB_DIR": str(folder), "PATH": path, "WANDB_AGENT_KILL_DELAY": "120"})
    return subprocess.run(
        [sys.executable, "-c", WANDB, *words],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def create_sweep(server: WandbServer, folder: Path, parameters: dict[str, Any], *words: str) -> tuple[Sweep, str]:
    """Create the shipped sweep with other parameters, and small runs. Returns the sweep and its path."""
    content = yaml.safe_load(SHIPPED.read_text())
    content["parameters"] = parameters
    content["command"] += [*TINY, "data=folder", "data.batch_size=8", "test=false", "logger=wandb", *words]
    folder.mkdir(exist_ok=True)
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content))
    done = run_wandb("sweep", str(folder / "sweep.yaml"), server=server, folder=folder)
    assert done.returncode == 0, done.stderr
    path = done.stderr.split("wandb agent ")[-1].split()[0]
    return server.sweeps[path.rpartition("/")[2]], path


def test_an_agent_runs_a_grid_and_resumes_a_run_that_it_has_stopped(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run has a wrong learning rate; the second one trains on two ranks, and is stopped and started again."""
    run_dir = tmp_path / "logs/train/runs/sweep-sweep0/sweep0r1"
    heartbeat, stopped = Sweep.commands, list[str]()

    def stopping(self: Sweep, running: dict[str, bool]) -> list[dict[str, Any]]:
        last = run_dir / "checkpoints/last.ckpt"
        if not stopped and last.is_file():
            self.stop, self.again = {"sweep0r1"}, ["sweep0r1"]
            stopped.append("sweep0r1")
        if stopped and not running:  # the stopped run is started again, for two more epochs
            done = torch.load(last, weights_only=True)["epoch"]
            self.given["sweep0r1"]["trainer"]["value"]["max_epochs"] = done + 3
        return heartbeat(self, running)

    monkeypatch.setattr(Sweep, "commands", stopping)
    before = subprocess.run(["git", "status", "--short"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    grid = {
        "optimizer": {"parameters": {"lr": {"values": [-1, 0.02]}}},
        "choices": {"parameters": {"scheduler": {"value": "constant"}}},
        "label_smoothing": {"value": 0.1},
        "data": {"parameters": {"root": {"value": str(shapes)}}},  # W&B gets the last part of the path
        "trainer": {"parameters": {"max_epochs": {"value": 9999}}},
    }
    with wandb_server() as server:
        wandb_sweep, path = create_sweep(server, tmp_path / "w", grid, f"paths.logs={tmp_path}/logs", "trainer=ddp_cpu")
        done = run_wandb("agent", path, server=server, folder=tmp_path / "w")
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed

    # what the agent has asked for and started
    assert path == "tester/alexlab/sweep0"
    calls = ["UpsertSweep", "SweepWithRuns", "CreateAgent", "Heartbeat"]
    assert [call for call in dict.fromkeys(server.calls) if call in calls] == calls
    known = ("ServerFeaturesQuery", "ServerInfo")  # queries that the server may leave unanswered
    assert [query for query in server.unknown if not query.startswith(known)] == []
    assert set(wandb_sweep.given) == {"sweep0r0", "sweep0r1"}, printed
    assert set(server.runs) == {"sweep0r1"}
    assert [path.name for path in run_dir.parent.iterdir()] == ["sweep0r1"]
    assert "`optimizer.lr=-1` must be above 0" in printed

    # the run at W&B: no key is twice in the config
    run, summary = server.runs["sweep0r1"], summary_of(run_dir)
    assert run.config["optimizer"]["lr"] == summary["effective_lr"] == 0.02
    assert run.config["optimizer"]["momentum"] == 0.9, "the group is whole"
    assert run.config["choices"]["scheduler"] == run.config["scheduler"]["name"] == "constant"
    assert run.config["label_smoothing"] == 0.1
    assert [key for key in run.config if "." in key] == []
    assert (run.fields["groupName"], run.fields["project"]) == ("sweep0", "alexlab")
    assert "-lr0.02-" in run.fields["displayName"]
    assert run.summary["val/acc1_best"] == pytest.approx(summary["best"]["val/acc1"])

    # it was stopped, and has continued
    assert stopped
    assert not run.preempting, "W&B stopped it, as early_terminate does"
    assert (run.complete, run.exit_code) == (True, 0), printed
    assert "Stopped by SIGTERM. Resume the run with" in printed
    assert (summary["status"], summary["world_size"]) == ("finished", 2)
    epochs = [line for line in (run_dir / "train.log").read_text().splitlines() if "| train/loss" in line]
    numbers = [int(line.split("epoch ")[1].split("/")[0]) for line in epochs]
    assert numbers == list(range(1, summary["epochs"] + 1)), "each epoch once"

    after = subprocess.run(["git", "status", "--short"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert after == before, "an agent leaves no file in the project"


def test_the_shipped_file_is_a_sweep_of_the_metric_that_runs_log(tmp_path: Path) -> None:
    with wandb_server() as server:
        done = run_wandb("sweep", "conf/sweep/wandb.yaml", server=server, folder=tmp_path)
    assert "wandb agent tester/alexlab/sweep0" in done.stderr
    grid = server.sweeps["sweep0"]
    content = yaml.safe_load(grid.text)
    assert content["metric"] == {"name": "val/acc1_best", "goal": "maximize"}
    assert content["command"][:4] == ["${env}", "${interpreter}", "${program}", "${args_no_hyphens}"]
    assert len(grid.grid) == 6
    (first,) = grid.commands({})
    assert first["args"] == {"optimizer": {"value": {"lr": 0.003, "weight_decay": 0.0001}}}


def test_the_words_of_an_agent_become_hydras_overrides() -> None:
    words = [
        "optimizer={'lr': 0.1, 'nesterov': True}", "model={'net': {'hidden': [64, 48]}}", "seed=3", "logger=csv",
        "choices={'model': 'vgg', 'debug': None, 'experiment': 'demo', 'augment': None}", "init_from=None",
        "logger={'wandb': {'notes': \"it's one, two\", 'group': None}}",
    ]  # fmt: skip
    assert sweep.agent_overrides(words) == [
        "optimizer.lr=0.1", "optimizer.nesterov=true", "model.net.hidden=[64,48]", "seed=3", "logger=csv", "model=vgg",
        "experiment=demo", "~augment", "init_from=null",
        r"logger.wandb.notes='it\'s one, two'", "logger.wandb.group=null",
    ]  # fmt: skip
    with pytest.raises(UserError, match="-m: a run of a W&B agent is one run"):
        sweep.agent_overrides(["-m", "seed=1,2"])


def test_no_option_of_a_group_is_no_option_of_hydras() -> None:
    words = sweep.agent_overrides(
        ["choices={'debug': None, 'experiment': None, 'augment': None, 'optimizer': 'adamw'}"]
    )
    config = composed(*words)
    assert config["choices"]["optimizer"] == "adamw"
    assert {"debug", "experiment", "augment"} & {*config["choices"]} == set()
    assert "augment" not in config


def test_an_agent_is_known_by_its_sweep_and_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    monkeypatch.setenv("WANDB_RUN_ID", "r")
    assert agent() is None, "a run's id alone is the user's choice"
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    assert agent() == ("s", "r")


@pytest.mark.parametrize(
    ("words", "under_an_agent", "message"),
    [
        (["-m", "sweep=wandb"], False, "sweep=wandb is for W&B's agents: `wandb sweep conf/sweep/wandb.yaml` prints"),
        (["-m", "seed=1,2"], True, "-m: a run of a W&B agent is one run"),
        (["logger=csv"], True, "a run of a W&B agent without W&B: the sweep would never receive val/acc1"),
        (["logger.wandb.mode=offline"], True, "a run of a W&B agent with logger.wandb.mode=offline"),
        (["data={'class_names': 5}", "logger.wandb.mode=auto"], True, "error: data.class_names=5 is not a file"),
    ],
)
def test_what_an_agent_cannot_run_is_refused(
    words: list[str], under_an_agent: bool, message: str, tmp_path: Path
) -> None:
    env = {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r", "WANDB_MODE": ""} if under_an_agent else {}
    done = command("train.py", *words, f"paths.logs={tmp_path}", env=env)
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
    assert "Traceback" not in done.stderr
