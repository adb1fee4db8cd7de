"""The dashboard: a real run logs what it shows, mistakes are reported before a server is asked, a view is updated."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, command, tiny_train
from conftest import composed as compose
from wandb_server import Run, WandbServer, wandb_server

from alexlab.commands import dashboard
from alexlab.engine.config import flat
from alexlab.engine.errors import UserError
from alexlab.engine.schema import DashboardConfig

PAGE = (ROOT / "docs/dashboard.md").read_text()
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style")  # within wandb-workspaces


@pytest.fixture(scope="module")
def run(server: WandbServer, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run, as the server received it; its scheduler logs learning rates under two names."""
    words = ["logger=wandb", "trainer.log_every_n_steps=1", "callbacks.figures=true", "scheduler=plateau"]
    run_dir = tmp_path_factory.mktemp("logs") / "whole"
    done = tiny_train(shapes, run_dir, *words, "scheduler.warmup=1", env=server.env())
    assert done.returncode == 0, done.stderr
    return server.run_of("whole")


def composed(*overrides: str) -> dict[str, Any]:
    return compose(*overrides, command="dashboard")


def panels_of(view: dict[str, Any]) -> list[dict[str, Any]]:
    sections = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    return [panel for section in sections for panel in section["panels"]]


def keys_of(panel: dict[str, Any]) -> dict[str, set[str]]:
    """Return what a saved panel asks W&B for."""
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
            found[section].add(name.replace(".value", "", 1) if section == "config" else name)
    else:
        assert panel["viewType"] == "Run Comparer"
    return found


# -- the view, and what it shows


def test_a_view_is_created_once_and_then_updated(
    server: WandbServer, connect: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    server.views.clear()
    assert connect(server) == ""
    first = capsys.readouterr().out
    (view,) = server.views
    before = {**view}
    address = rf"{server.url}/tester/alexlab\?nw=[a-z0-9]{{11}}"
    assert re.fullmatch(f"created the view alexlab: {address}\n", first)
    assert connect(server, "x=epoch", WANDB_MODE="offline") == ""
    assert capsys.readouterr().out == first.replace("created", "updated")
    assert server.views == [view]
    assert {key for key in view if view[key] != before[key]} == {"spec"}
    settings = json.loads(view["spec"])["section"]["settings"]
    assert (settings["xAxis"], settings["maxRuns"]) == ("epoch", 100)
    assert len(panels_of(view)) == len(panels_of(before)), "replaced, not added"
    assert connect(server, "name=of two", "entity=tester") == ""
    assert re.fullmatch(f"created the view of two: {address}\n", capsys.readouterr().out)
    assert [view["displayName"] for view in server.views] == ["alexlab", "of two"]
    assert not [line for line in server.unknown if "View" in line or "Entity" in line]


def test_a_run_logs_what_the_default_shows(server: WandbServer, run: Run, connect: Callable[..., str]) -> None:
    server.views.clear()
    connect(server, "swept=[optimizer.lr,seed,choices.model]", "x=perf/images")
    (view,) = server.views
    panels = panels_of(view)
    assert {panel["viewType"] for panel in panels} == {
        "Run History Line Plot", "Bar Chart", "Scatter Plot", "Parallel Coordinates Plot", "Parameter Importance",
        "Run Comparer", "Media Browser",
    }  # fmt: skip
    logged = {key: value for row in run.history for key, value in row.items()}
    is_image = {
        key for key, value in logged.items() if isinstance(value, dict) and value.get("_type") == "images/separated"
    }
    known = {
        "history": {key for key, value in logged.items() if isinstance(value, int | float)},
        "summary": {key for key, value in run.summary.items() if isinstance(value, int | float | str)},
        "config": set(flat(run.config)),
        "media": is_image,
    }
    for section, names in known.items():
        asked = set().union(*(keys_of(panel)[section] for panel in panels))
        assert asked, section
        assert asked <= names, section
    (parallel,) = (panel["config"] for panel in panels if panel["viewType"] == "Parallel Coordinates Plot")
    assert parallel["columns"] == [
        {"accessor": "config:optimizer.value.lr", "displayName": "optimizer.lr", "log": True},
        {"accessor": "config:seed.value", "displayName": "seed"},
        {"accessor": "config:choices.value.model", "displayName": "choices.model"},
        {"accessor": "summary:val/acc1_best", "displayName": "val/acc1_best"},
    ]


def test_each_curve_has_points_over_each_axis(run: Run) -> None:
    """W&B draws only values that are in one row with the axis."""
    sections = composed()["dashboard"]["sections"].values()
    curves = [key for section in sections for panel in section["panels"].values() for key in panel.get("y", ())
              if panel["kind"] == "line"]  # fmt: skip
    curves.append("lr-warmup/decay")
    axes = ("trainer/global_step", "epoch", "perf/images", "perf/seconds", "_runtime")
    assert len(curves) > 10
    missing = [(y, x) for y in curves for x in axes if not any({y, x} <= row.keys() for row in run.history)]
    assert missing == []
    rates = [(row["trainer/global_step"], row["perf/images"]) for row in run.history if "lr/decay" in row]
    assert rates == [(0, 8), (1, 16)], "eight images per step, this step included"
    images = {(row["trainer/global_step"], row["perf/images"]) for row in run.history if "perf/images" in row}
    assert len(images) == len(dict(images)), "one value per step"


def test_the_dashboard_of_the_page(tmp_path: Path) -> None:
    """An option of the user's own, with options of wandb-workspaces."""
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    (tmp_path / "dashboard").mkdir()
    (tmp_path / "dashboard/mine.yaml").write_text(text)
    done = command("dashboard", "--config-dir", str(tmp_path), "dashboard=mine", "dry_run=true", "entity=team")
    assert done.returncode == 0, done.stderr
    view = yaml.safe_load(done.stdout)
    assert (view["entity"], view["project"], view["x"]) == ("team", "alexlab", "trainer/global_step")
    assert list(view["sections"])[-2:] == ["pictures", "dropout"]
    workspace = dashboard.build({**view, "dashboard": view})
    assert workspace.sections[-1].name == "What dropout does"
    scatter, line, mine = workspace.sections[-1].panels
    assert (scatter.x.name, scatter.y.name, scatter.z.name) == ("model.net.dropout", "val/acc1_best", "optimizer.lr")
    assert [type(axis).__name__ for axis in (scatter.x, scatter.y, scatter.z)] == ["Config", "SummaryMetric", "Config"]
    assert (line.title, line.x, line.y, line.log_y) == ("loss by time", "_runtime", ["train/loss_step"], True)
    assert (line.smoothing_factor, line.smoothing_type) == (0.6, "exponentialTimeWeighted")
    assert (mine.x.name, type(mine.x).__name__, mine.regression) == ("images_per_second", "SummaryMetric", True)
    for name, (_, needs, fields) in dashboard.KINDS.items():  # the table of the page
        (row,) = re.findall(rf"^\| `{name}` \|.*$", PAGE, re.M)
        assert {name, *needs, *fields} <= set(re.findall(r"`(\w+)`", row))


# -- mistakes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["best.panels=null"], "`dashboard.sections.best` must have panels by name; ~dashboard.sections.best removes"),
        (
            ["+best.opened=true"],
            "`dashboard.sections.best.opened=True`: Unexpected keyword argument. The keys are tit",
        ),
        (["sweep.columns=x"], "`dashboard.sections.sweep.columns=x`: Input should be a valid integer"),
        (["curves.panels.loss.kind=lines"], "panels.loss.kind=lines` must be one of line, bar, scatter, parallel, imp"),
        (["+curves.panels.loss.smoothin=1"], "loss.smoothin=1`: Unexpected keyword argument. The keys are "),
        (["+curves.panels.loss.smoothing=x"], "loss.smoothing=x`: Input should be a valid number"),
        (["curves.panels.loss.y=null"], "`dashboard.sections.curves.panels.loss.y` is missing: a panel of kind line"),
        (["curves.panels.loss.y=val/loss"], "panels.loss.y=val/loss`: Input should be a valid list."),
    ],
)
def test_mistakes_in_panels_name_the_panel(overrides: list[str], message: str) -> None:
    words = [re.sub(r"^(\+?)", r"\1dashboard.sections.", word) for word in overrides]
    with pytest.raises(UserError) as error:
        dashboard.build(composed(*words))
    assert message in str(error.value)


def test_mistakes_are_reported_before_a_server_is_asked() -> None:
    words = ["dashboard.max_runs=0", "swept=[]"]
    done = command("dashboard", *words, env={"WANDB_API_KEY": "0" * 40})
    assert (done.returncode, done.stdout) == (2, "")
    assert all(word in done.stderr for word in words)
    assert "Traceback" not in done.stderr


def test_a_missing_api_key_is_an_error_with_the_fix(server: WandbServer, connect: Callable[..., str]) -> None:
    error = connect(server, WANDB_API_KEY="", NETRC="/nonexistent")
    assert "needs an API key of W&B: run `wandb login` or set WANDB_API_KEY. dry_run=true needs none." in error


def test_a_missing_extra_is_an_error_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb_workspaces"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    for name in ("WANDB_HTTP_TIMEOUT", "WANDB_ERROR_REPORTING"):  # restored afterwards
        monkeypatch.setenv(name, "8")
    with pytest.raises(UserError, match=r"needs an extra: pip install 'alexlab\[dashboard\]' \(.*wandb"):
        dashboard.save_dashboard(DashboardConfig.model_validate({**composed(), "dry_run": True}))


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Run the command in this process, which has imported W&B already; return the message of its error, or ""."""
    import wandb

    for name in ("WANDB_HTTP_TIMEOUT", "WANDB_ERROR_REPORTING", "WANDB_MODE", "WANDB_ENTITY", "WANDB_PROJECT"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)

    def run(server: WandbServer, *overrides: str, **env: str) -> str:
        for name, value in {**server.env(), **env}.items():
            monkeypatch.setenv(name, value)
        if not os.environ["WANDB_MODE"]:
            monkeypatch.delenv("WANDB_MODE")
        try:
            dashboard.save_dashboard(DashboardConfig.model_validate(composed(*overrides)))
        except UserError as error:
            return str(error)
        return ""

    wandb.teardown()
    yield run
    wandb.teardown()


@pytest.mark.parametrize(
    ("overrides", "fault", "message"),
    [
        ([], 401, "`project=alexlab`: W&B did not save the view (Failed to verify credentials with "),
        ([], "UpsertView2", "`project=alexlab`: W&B did not save the view (input: no permission): check the API key"),
        ([], "View", "`project=alexlab`: W&B did not save the view (input: no permission): check the API key"),
        ([], "nobody", "`entity=null`: the server knows no entity of yours; set a user or a team with entity=NAME."),
        (["entity=other"], None, "`project=alexlab`: W&B did not save the view (Project `other/alexlab` not found."),
    ],
)
def test_what_a_server_refuses(overrides: list[str], fault: Any, message: str, connect: Callable[..., str]) -> None:
    with wandb_server() as server:
        if isinstance(fault, int):
            server.fault, server.faulty_from = fault, "start"
        server.entity = None if fault == "nobody" else "tester"
        server.refuses = {str(fault): "no permission"}
        assert message in connect(server, *overrides)
        assert server.views == []


def test_a_server_that_does_not_answer_is_an_error_with_the_timeout() -> None:
    with wandb_server() as server:
        env = {**server.env(), "WANDB_BASE_URL": "http://wandb.invalid"}  # RFC 2606: resolves nowhere
        done = command("dashboard", "timeout=1", env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"error: `project=alexlab`: W&B did not save the view \(.*\): .* \(timeout=2 waits longer\)\.\n", done.stderr
    )
