"""The dashboard: its keys are those that a real run logs, and its view is made once and then updated."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from conftest import ROOT, command, tiny_train
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from wandb_server import Run, WandbServer, wandb_server

from alexlab.commands import dashboard, panels
from alexlab.commands.cli import register_resolvers
from alexlab.engine import rules
from alexlab.engine.config import flat, plain
from alexlab.engine.errors import UserError
from alexlab.loggers.wandb_names import FACTS, HISTORY, MEDIA, RATES

LAYOUTS = sorted(path.stem for path in (ROOT / "conf/dashboard").glob("*.yaml"))
PAGE = (ROOT / "docs/dashboard.md").read_text()
ASKED = {"train/grad_norm"}  # logged where callbacks.grad_norm asks for it
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style")  # within wandb-workspaces
DEAD = "http://wandb.invalid"  # RFC 2606: resolves nowhere


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with wandb_server() as running:
        yield running


@pytest.fixture(scope="module")
def run(server: WandbServer, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run, as the server was told of it."""
    done = tiny_train(
        shapes, tmp_path_factory.mktemp("logs") / "whole", "logger=wandb", "trainer.log_every_n_steps=1",
        "callbacks.figures=true", env=server.env(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return server.run_of("whole")


def is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, str))


def is_picture(value: Any) -> bool:
    return isinstance(value, dict) and value.get("_type") == "image-file"


def settings_of(run: Run) -> dict[str, Any]:
    return flat({key: told["value"] for key, told in json.loads(run.fields["config"]).items()})


def composed(*words: str) -> dict[str, Any]:
    register_resolvers("now")
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = hydra.compose("dashboard", overrides=list(words))
    rules.check(config, rules.DASHBOARD_RULES)
    found = plain(config)
    panels.check(found, panels.Names(found["also"]))
    return found


# -- names


def test_the_names_are_those_that_a_run_logs(run: Run) -> None:
    logged = {key: value for row in run.history for key, value in row.items()}
    numbers = {key for key, value in logged.items() if is_plain(value)}
    assert numbers <= HISTORY | RATES
    assert {"lr/decay", "lr/no_decay"} <= numbers
    assert numbers >= HISTORY - ASKED
    assert {key for key, value in logged.items() if is_picture(value)} == MEDIA
    facts = {key for key, value in run.summary.items() if is_plain(value)} - HISTORY - RATES
    assert facts <= FACTS
    assert facts >= FACTS
    assert all(is_plain(run.summary[key]) for key in HISTORY & run.summary.keys())


def test_each_curve_has_points_over_each_axis(run: Run) -> None:
    """W&B draws what stands in one row with the axis."""
    sections = composed()["dashboard"]["sections"].values()
    curves = [key for section in sections for panel in section["panels"].values() for key in panel.get("y", ())
              if panel["kind"] == "line"]  # fmt: skip
    axes = ("trainer/global_step", "epoch", "perf/images", "perf/seconds", "_runtime")
    assert len(curves) > 10
    assert [
        (key, axis) for key in curves for axis in axes if not any({key, axis} <= row.keys() for row in run.history)
    ] == []
    rates = [(row["trainer/global_step"], row["perf/images"]) for row in run.history if "lr/decay" in row]
    assert rates == [(0, 8), (1, 16)], "images of eight a step, with those of the row's own"
    images = {(row["trainer/global_step"], row["perf/images"]) for row in run.history if "perf/images" in row}
    assert len(images) == len(dict(images)), "at each step one value"


def test_rates_of_a_warm_up_before_a_plateau_are_known(server: WandbServer, shapes: Path, tmp_path: Path) -> None:
    words = ["logger=wandb", "trainer.log_every_n_steps=1", "scheduler=plateau", "scheduler.warmup=1", "test=false"]
    done = tiny_train(shapes, tmp_path / "plateau", *words, env=server.env())
    assert done.returncode == 0, done.stderr
    logged = {key for row in server.run_of("plateau").history for key in row if key.startswith("lr")}
    assert {"lr/decay", "lr-warmup/decay"} <= logged <= RATES


def test_settings_are_the_keys_of_a_runs_config(run: Run) -> None:
    had = {key for key in settings_of(run) if not key.startswith(("_wandb.", "overrides", "run", "floats"))}
    assert had <= panels.config_keys()
    assert {"choices.model", "model.net.dropout", "optimizer.betas", "scheduler.step_size"} <= panels.config_keys()
    assert not panels.config_keys() & (HISTORY | FACTS), "a scatter plot's names are one or the other"


def keys_of(panel: dict[str, Any]) -> dict[str, set[str]]:
    """What a panel asks W&B for, read from what is sent to it."""
    config = panel["config"]
    found: dict[str, set[str]] = {"history": set(), "summary": set(), "config": set(), "media": set()}
    if panel["viewType"] == "Run History Line Plot":
        found["history"] = {*config["metrics"], config["xAxis"]}
    elif panel["viewType"] == "Bar Chart":
        found["summary"] = {*config["metrics"]}
    elif panel["viewType"] == "Parameter Importance":
        found["summary"] = {config["targetKey"]}
    elif panel["viewType"] == "Media Browser":
        found["media"] = {*config["mediaKeys"]}
    elif panel["viewType"] in ("Scatter Plot", "Parallel Coordinates Plot"):
        axes = [config.get(f"{axis}Axis") for axis in "xyz"] + [c["accessor"] for c in config.get("columns", [])]
        for axis in filter(None, axes):
            section, _, name = axis.partition(":")
            if section == "config":
                first, _, rest = name.partition(".value")
                name = first + rest
            found[section].add(name)
    else:
        assert panel["viewType"] == "Run Comparer"
    return found


def panels_of(told: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for section in told["spec"]["section"]["panelBankConfig"]["sections"] for panel in section["panels"]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_key_of_a_dashboard_is_logged_by_a_run(layout: str, run: Run) -> None:
    """Without a server or a key, and nothing else on stdout."""
    done = command("dashboard.py", "dry_run=true", f"dashboard={layout}")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    logged = {key: value for row in run.history for key, value in row.items()}
    there = {
        "history": {key for key, value in logged.items() if is_plain(value)},
        "summary": {key for key, value in run.summary.items() if is_plain(value)},
        "config": set(settings_of(run)),
        "media": {key for key, value in logged.items() if is_picture(value)},
    }
    asked = [keys_of(panel) for panel in panels_of(json.loads(done.stdout))]
    for section, names in there.items():
        assert set().union(*(keys[section] for keys in asked)) <= names, section


def test_the_default_has_every_kind_and_says_settings_as_settings() -> None:
    config = composed("swept=[optimizer.lr,seed]", "x=perf/images")
    told = dashboard.as_json(dashboard.build(config, panels.Names(config["also"])), config)
    made = panels_of(told)
    assert {panel["viewType"] for panel in made} == {
        "Run History Line Plot", "Bar Chart", "Scatter Plot", "Parallel Coordinates Plot", "Parameter Importance",
        "Run Comparer", "Media Browser",
    }  # fmt: skip
    (parallel,) = (panel["config"] for panel in made if panel["viewType"] == "Parallel Coordinates Plot")
    assert parallel["columns"] == [
        {"accessor": "config:optimizer.value.lr", "displayName": "optimizer.lr", "log": True},
        {"accessor": "config:seed.value", "displayName": "seed"},
        {"accessor": "summary:val/acc1_best", "displayName": "val/acc1_best"},
    ]
    scatters = [panel["config"] for panel in made if panel["viewType"] == "Scatter Plot"]
    axes = {(config["xAxis"], config["yAxis"]) for config in scatters}
    assert axes >= {(f"summary:{x}", "summary:val/acc1_best") for x in ("images_per_second", "parameters")}
    lines = [panel["config"] for panel in made if panel["viewType"] == "Run History Line Plot"]
    assert {"train/loss", "val/loss"} in [set(config["metrics"]) for config in lines]
    assert {config["xAxis"] for config in lines} == {"perf/images"}
    assert told["spec"]["section"]["settings"]["xAxis"] == "perf/images"


# -- mistakes


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["metric=val/ac1_best"],
            ("metric=val/ac1_best: no run's summary has that. Did you mean val/acc1_best? Your "
            "own code's names go into also.summary."),
        ),
        (["x=perf/image"], "x=perf/image: no run logs that step by step. Did you mean perf/images?"),
        (
            ["swept=[seed,optimizer.lrr]"],
            ("swept=optimizer.lrr: no run has that setting, and none's summary has it. "
            "Did you mean optimizer.lr? Your own code's names go into also.config or also.summary."),
        ),
        (["swept=[ema]"], "Did you mean ema.decay?"),
        (["swept=[]"], "swept=[]: must be a list of settings"),
        (["name=a+b"], "name=a+b: must be a text without symbols, such as + < = > | ~ ^ $ and emojis."),
        (["project=a/b"], "project=a/b: must be a name without spaces around it, and without / \\ # ? % :."),
        (["dashboard.sections=null"], "dashboard.sections=null: must be sections by their names, each with panels."),
        (["dashboard.max_runs=0"], "dashboard.max_runs=0: must be a whole number, at least 1."),
        (["dashboard.sections.best=null"], "dashboard.sections.best=null: a section has panels; ~dashboard.sections."),
        (
            ["+dashboard.sections.best.opened=true"],
            ("dashboard.sections.best.opened: there is none such. Did you mean "
            "open? There are: title, open, columns, rows, panels."),
        ),
        (["dashboard.sections.sweep.columns=0"], "dashboard.sections.sweep.columns=0: must be a whole number"),
        (["~dashboard.sections.best.panels"], "dashboard.sections.best.panels is missing: give panels by their names."),
        (["+dashboard.section=1"], "dashboard.section: there is none such. Did you mean sections?"),
        (
            ["dashboard.sections.curves.panels.loss.kind=lines"],
            ("dashboard.sections.curves.panels.loss.kind=lines: "
            "there is none such. Did you mean line? There are: line, bar, scatter, parallel, importance, comparer, m"),
        ),
        (["~dashboard.sections.curves.panels.loss.kind"], "panels.loss.kind=null: there is none such."),
        (["dashboard.sections.curves.panels.loss=3"], "panels.loss=3: a panel has a kind and its keys; ~dashboard."),
        (
            ["+dashboard.sections.curves.panels.loss.smoothin=1"],
            ("loss.smoothin: there is none such. Did you mean "
            "smoothing? There are: kind, title, y, x, log_x, log_y, smoothing."),
        ),
        (["+dashboard.sections.curves.panels.loss.smoothing=1"], "smoothing=1: must be a number from 0 to below 1."),
        (["~dashboard.sections.curves.panels.loss.y"], "loss.y is missing: a panel of kind line needs it."),
        (["dashboard.sections.curves.panels.loss.y=val/loss"], "loss.y=val/loss: must be a list of names, such as ["),
        (["dashboard.sections.curves.panels.loss.y=[images/train]"], "loss.y=images/train: no run logs that step by"),
        (
            ["dashboard.sections.pictures.panels.mistakes.keys=[test/mistakes]"],
            ("keys=test/mistakes: no run logs "
            "pictures so. Did you mean figures/mistakes? Your own code's names go into also.media."),
        ),
    ],
)  # fmt: skip
def test_mistake(words: list[str], told: str) -> None:
    with pytest.raises(UserError) as error:
        composed(*words)
    assert told in str(error.value)


def test_all_mistakes_are_told_together_on_one_screen() -> None:
    done = command(
        "dashboard.py", "dry_run=true", "dashboard.sections.curves.panels.loss.y=[val/los,val/acc1,train/los]"
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "2 values of the dashboard are wrong:" in done.stderr
    assert "y=val/los: no run logs that step by step. Did you mean val/loss?" in done.stderr
    assert "y=train/los: no run logs that step by step. Did you mean train/loss?" in done.stderr


def test_names_of_ones_own_code_are_known_when_they_are_said() -> None:
    words = ["x=mine/step", "metric=mine", "swept=[optimizer.mine]"]
    with pytest.raises(UserError, match="3 values of the dashboard are wrong"):
        composed(*words)
    found = composed(
        *words, "also.history=[mine/step]", "also.summary=[mine]", "also.config=[optimizer.mine]", "also.media=[a]",
        "dashboard.sections.pictures.panels.mistakes.keys=[a]",
    )  # fmt: skip
    assert found["swept"] == ["optimizer.mine"]


def test_every_key_has_a_rule() -> None:
    found = composed()
    found["dashboard"]["sections"] = None  # held by panels.check
    filled_in = {"task", "run_dir", "overrides", "paths.data", "paths.logs"}
    assert flat(found).keys() - filled_in == set(rules.DASHBOARD_RULES)


def test_help_shows_the_group_and_the_keys() -> None:
    told = command("dashboard.py", "--help").stdout
    assert re.search(r"^  dashboard +default$", told, re.M)
    assert "metric: val/acc1_best" in told


# -- the server


def test_it_is_made_once_and_then_updated_in_place(server: WandbServer) -> None:
    server.views.clear()
    first = command("dashboard.py", env=server.env())
    assert (first.returncode, first.stderr) == (0, ""), first.stderr
    (view,) = server.views
    before = {**view}
    address = rf"{server.url}/tester/alexlab\?nw=[a-z0-9]{{11}}"
    assert re.fullmatch(f"made the view alexlab: {address}\n", first.stdout)
    assert json.loads(view["spec"]) == json.loads(command("dashboard.py", "dry_run=true").stdout)["spec"]
    second = command("dashboard.py", "x=epoch", env={**server.env(), "WANDB_MODE": "offline"})
    assert second.stdout == first.stdout.replace("made", "updated")
    assert server.views == [view]
    assert {key for key in view if view[key] != before[key]} == {"spec"}
    settings = json.loads(view["spec"])["section"]["settings"]
    assert settings["xAxis"] == "epoch"
    assert settings["maxRuns"] == 100
    other = command("dashboard.py", "name=of two", "entity=tester", env=server.env())
    assert re.fullmatch(f"made the view of two: {address}\n", other.stdout), other.stderr
    assert [view["displayName"] for view in server.views] == ["alexlab", "of two"]
    assert not [line for line in server.unknown if "View" in line or "Entity" in line]
    # what is saved is read back by the library, as it would be from the website
    url = first.stdout.split()[-1]
    read = command("-c", READ, url, env={key: value for key, value in server.env().items() if value})
    assert read.stdout.split() == ["LinePlot", "6", "0", "curves", "best", "sweep", "cost", "speed", "pictures"]


READ = """
import os, sys
os.environ.pop("WANDB_MODE", None)
import wandb_workspaces.workspaces as ws
found = ws.Workspace.from_url(sys.argv[1])
kinds = [type(panel).__name__ for section in found.sections for panel in section.panels]
print(kinds[0], len(found.sections), kinds.count("UnknownPanel"), *(section.name for section in found.sections))
"""


def test_the_pages_own_dashboard(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    (tmp_path / "dashboard").mkdir()
    (tmp_path / "dashboard/mine.yaml").write_text(text)
    done = command("dashboard.py", "--config-dir", str(tmp_path), "dashboard=mine", "dry_run=true")
    assert done.returncode == 0, done.stderr
    sections = json.loads(done.stdout)["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections][-2:] == ["pictures", "What dropout does"]
    scatter, line = (panel["config"] for panel in sections[-1]["panels"])
    assert (scatter["xAxis"], scatter["yAxis"]) == ("config:model.value.net.dropout", "summary:val/acc1_best")
    assert scatter["zAxis"] == "config:optimizer.value.lr"
    assert (line["chartTitle"], line["xAxis"], line["yLogScale"]) == ("loss by time", "_runtime", True)
    assert (line["smoothingWeight"], line["smoothingType"]) == (0.6, "exponentialTimeWeighted")
    for kind, fields in panels.KINDS.items():  # the page's table
        (row,) = re.findall(rf"^\| `{kind}` \|.*$", PAGE, re.M)
        assert set(re.findall(r"`(\w+)`", row)) == {kind, *fields}


def test_without_a_key() -> None:
    done = command("dashboard.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert "dashboard.py needs an API key of W&B: run `wandb login` or set WANDB_API_KEY; dry_run=true" in done.stderr


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """What dashboard.py tells of a mistake, without the seconds that a process of its own takes to import W&B."""
    import wandb

    for name in ("WANDB_HTTP_TIMEOUT", "WANDB_ERROR_REPORTING", "WANDB_MODE", "WANDB_ENTITY", "WANDB_PROJECT"):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)

    def told(server: WandbServer, *words: str, **env: str) -> str:
        for name, value in {**server.env(), **env}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError) as error:
            dashboard.make(OmegaConf.create(composed(*words)))
        assert server.views == []
        return str(error.value)

    wandb.teardown()
    yield told
    wandb.teardown()


@pytest.mark.parametrize(
    ("words", "fault", "told"),
    [
        ([], 401, "W&B refuses the API key (Failed to verify credentials with "),
        ([], "short key", "W&B refuses the API key (WANDB_API_KEY invalid: API key must have 40+ characters"),
        (
            ["project=none"], None,
            ("project=none: tester has no such project, or you may not see it: the first run "
            "makes it (python train.py logger.wandb.mode=online logger.wandb.project=none)"),
        ),
        (["entity=other"], None, "project=alexlab: other has no such project"),
        ([], "UpsertView2", "entity=tester project=alexlab: W&B does not take the view (input: no permission)"),
        ([], "View", "entity=tester project=alexlab: W&B does not take the view (input: no permission)"),
        ([], "nobody", "entity=null: the server knows none of yours: give a user or a team with entity=NAME."),
    ],
)  # fmt: skip
def test_what_the_server_refuses(words: list[str], fault: Any, told: str, here: Callable[..., str]) -> None:
    with wandb_server() as server:
        if isinstance(fault, int):
            server.fault, server.faulty_from = fault, "start"
        server.entity = None if fault == "nobody" else "tester"
        server.refuses = {str(fault): "no permission"}
        found = here(server, *words, **({"WANDB_API_KEY": "x"} if fault == "short key" else {}))
    assert found.startswith(told)


@pytest.mark.parametrize("dead", [True, False])
def test_a_server_that_does_not_answer(dead: bool) -> None:
    with wandb_server() as server:
        server.fault, server.faulty_from = 500, "start"
        env = {**server.env(), **({"WANDB_BASE_URL": DEAD} if dead else {})}
        done = command("dashboard.py", "timeout=1", env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"error: W&B's server did not answer \(.*\): try again, with timeout=2 where it is slow; dry_run=true needs "
        r"none\.\n", done.stderr,
    )  # fmt: skip


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb_workspaces"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    for name in ("WANDB_HTTP_TIMEOUT", "WANDB_ERROR_REPORTING"):  # put back afterwards
        monkeypatch.setenv(name, "8")
    with pytest.raises(UserError, match=r"dashboard.py needs the extra: pip install 'alexlab\[dashboard\]' \(.*wandb"):
        dashboard.make(OmegaConf.create({**composed(), "dry_run": True}))
