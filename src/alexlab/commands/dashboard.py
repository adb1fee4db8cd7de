"""Save the view of a W&B project that conf/dashboard/*.yaml describes, or update it in place."""

import dataclasses
import hashlib
import os
import string
from typing import Any

from omegaconf import DictConfig, OmegaConf

from alexlab.engine import config as configs
from alexlab.engine.config import Plain
from alexlab.engine.errors import UserError

# kind of panel -> class in wandb-workspaces, required keys, {our key: name of the field} if the names differ
KINDS: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {
    "line": ("LinePlot", ("y",), {"smoothing": "smoothing_factor"}),
    "bar": ("BarPlot", ("keys",), {"keys": "metrics"}),
    "scatter": ("ScatterPlot", ("x", "y"), {}),
    "parallel": ("ParallelCoordinatesPlot", ("columns", "metric"), {}),
    "importance": ("ParameterImportancePlot", ("metric",), {"metric": "with_respect_to"}),
    "comparer": ("RunComparer", (), {}),
    "media": ("MediaBrowser", ("keys",), {"keys": "media_keys", "columns": "num_columns"}),
}


def save_dashboard(config: DictConfig) -> None:
    """Save the view, or update the one with the same name, and print the address.

    Raises:
        UserError: the config has a mistake; the extra or the API key is missing; or the server does not save the view.
    """
    plain = config.model_dump(exclude_unset=True)
    # both packages read these when they are imported
    os.environ.setdefault("WANDB_HTTP_TIMEOUT", str(plain["timeout"]))
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # such reports are uploaded, and W&B waits for that
    try:
        import wandb_workspaces.workspaces  # noqa: F401
    except ImportError as error:
        raise UserError(f"The dashboard needs an extra: pip install 'alexlab[dashboard]' ({error}).") from None
    from alexlab.loggers.wandb_api import has_api_key

    workspace = build(plain)
    if plain["dry_run"]:
        view = {key: plain[key] for key in ("entity", "project", "name", "x")}
        print(OmegaConf.to_yaml({**view, **plain["dashboard"]}), flush=True)
    elif has_api_key():
        save(workspace, plain)
    else:
        raise UserError(
            "The dashboard needs an API key of W&B: run `wandb login` or set WANDB_API_KEY. dry_run=true needs none."
        )


# -- from yaml to wandb-workspaces, which checks the values


def build(plain: Plain) -> Any:
    """Build the workspace."""
    import wandb_workspaces.workspaces as ws

    sections = []
    for key, section in plain["dashboard"]["sections"].items():
        place = f"dashboard.sections.{key}"
        if not isinstance(section, dict) or not isinstance(section.get("panels"), dict):
            raise UserError(f"`{place}` must have panels by name; ~{place} removes the section.")
        panels = [build_panel(f"{place}.panels.{name}", panel, plain["x"]) for name, panel in section["panels"].items()]
        arguments = {"title": key.replace("_", " "), "open": True, "columns": 3, "rows": 2, **section, "panels": panels}
        grid = {name: arguments.pop(name) for name in ("columns", "rows")}
        arguments["layout_settings"] = make(ws.SectionLayoutSettings, place, grid, {})
        sections.append(make(ws.Section, place, arguments, {"title": "name", "open": "is_open"}))
    return ws.Workspace(
        entity=plain["entity"] or "",
        project=plain["project"],
        name=plain["name"],
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=plain["x"], max_runs=plain["dashboard"]["max_runs"]),
    )


def build_panel(place: str, panel: Any, x: str) -> Any:
    """Build the panel at the key `place`, with any options of the class in wandb-workspaces; `x` is for line plots."""
    import wandb_workspaces.reports.v2 as wr

    kind = panel.get("kind") if isinstance(panel, dict) else None
    if kind not in KINDS:
        raise UserError(f"`{place}.kind={kind}` must be one of {', '.join(KINDS)}; ~{place} removes the panel.")
    name, needs, fields = KINDS[kind]
    cls = getattr(wr, name)
    for key in needs:
        if not panel.get(key):
            raise UserError(f"`{place}.{key}` is missing: a panel of kind {kind} needs it.")
    arguments = {key: value for key, value in panel.items() if key != "kind"}
    if "title" in (field.name for field in dataclasses.fields(cls)):
        arguments.setdefault("title", place.rpartition(".panels.")[2].replace("_", " "))
    if kind == "line":
        arguments.setdefault("x", x)
        if panel.get("smoothing"):
            arguments.setdefault("smoothing_type", "exponentialTimeWeighted")
    if kind == "scatter":
        arguments |= {axis: setting_or_summary(panel[axis]) for axis in "xyz" if panel.get(axis)}
    if kind == "parallel":
        logarithmic, column_of = arguments.pop("log", None) or (), wr.ParallelCoordinatesPlotColumn
        arguments["columns"] = [
            column_of(setting_or_summary(name), display_name=name, log=name in logarithmic or None)
            for name in (*panel["columns"], arguments.pop("metric"))
        ]
    return make(cls, place, arguments, fields)


def setting_or_summary(name: Any) -> Any:
    """Return a setting for "optimizer.lr" or "seed", otherwise a value of the summary.

    wandb-workspaces reads a plain text as a value of the summary, even "c::optimizer.lr", W&B's form of a setting.
    """
    import wandb_workspaces.reports.v2 as wr

    is_setting = "/" not in str(name) and ("." in str(name) or name in OmegaConf.load(configs.CONF / "train.yaml"))
    return wr.Config(name) if is_setting else wr.SummaryMetric(name)


def make(cls: Any, place: str, values: Plain, fields: dict[str, str]) -> Any:
    """Build an object of wandb-workspaces; UserError names a wrong key or value. `fields`: our key -> another name."""
    from pydantic import ValidationError

    try:
        return cls(**{fields.get(key, key): value for key, value in values.items()})
    except ValidationError as error:
        first, keys = error.errors()[0], {field: key for key, field in fields.items()}
        key = keys.get(str(first["loc"][0]), str(first["loc"][0]))
        known = [keys.get(field.name, field.name) for field in dataclasses.fields(cls) if field.name[0] != "_"]
        hint = "" if key in known else f" The keys are {', '.join(known)}."
        raise UserError(f"`{place}.{key}={values.get(key)}`: {first['msg']}.{hint}") from None


# -- the server


def save(workspace: Any, plain: Plain) -> None:
    """Save the view under an internal name made of entity, project and `name`, by which any machine finds it."""
    import wandb
    import wandb_workspaces.workspaces as ws

    from alexlab.loggers.wandb_api import first_line

    wandb.setup(settings=wandb.Settings(silent=True))
    project, done = plain["project"], "created"
    try:
        entity = plain["entity"] or wandb.Api().default_entity
        if not entity:
            raise UserError(
                "`entity=null`: the server knows no entity of yours; set a user or a team with entity=NAME."
            )
        workspace.entity, name = entity, view_id(f"{entity}/{project}/{plain['name']}")
        try:
            saved = ws.Workspace.from_url(f"https://wandb.ai/{entity}/{project}?nw={name}")
            saved.name, saved.sections, saved.settings = workspace.name, workspace.sections, workspace.settings
            workspace, done = saved, "updated"
        except ValueError as error:
            if not str(error).startswith("Workspace "):  # "Workspace ..." says that no such view exists yet
                raise
            # The public way gives a random name, by which no later call could look the view up. An error message of
            # wandb-workspaces recommends this private attribute.
            workspace._internal_name = f"nw-{name}-v"
        workspace.save()
        print(f"{done} the view {plain['name']}: {workspace.url.replace(' ', '%20')}", flush=True)
    except UserError:
        raise
    except Exception as error:  # W&B raises many types
        raise UserError(
            f"`project={project}`: W&B did not save the view ({first_line(error)}): check the API key (`wandb login`), "
            "the project and its entity (the first online run creates a project), and whether the server answers "
            f"(timeout={2 * plain['timeout']} waits longer)."
        ) from error


def view_id(text: str) -> str:
    """Return 11 letters and digits, like W&B's own ids, that follow from `text`."""
    number, alphabet = int.from_bytes(hashlib.sha256(text.encode()).digest()), string.ascii_lowercase + string.digits
    return "".join(alphabet[number // 36**place % 36] for place in range(11))
