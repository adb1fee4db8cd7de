"""Save the view of a W&B project that conf/dashboard/*.yaml describes, or update it in place."""

import dataclasses
import difflib
import hashlib
import json
import os
import string
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from alexlab.engine import config as configs
from alexlab.engine.errors import UserError

Plain = dict[str, Any]


class Kind(NamedTuple):
    """A kind of panel."""

    panel: str  # the class in wandb-workspaces
    needs: tuple[str, ...] = ()  # the keys that must be set
    names: tuple[tuple[str, str], ...] = ()  # pairs of a key and the name of its field in that class, if they differ


KINDS = {
    "line": Kind("LinePlot", ("y",), (("smoothing", "smoothing_factor"),)),
    "bar": Kind("BarPlot", ("keys",), (("keys", "metrics"),)),
    "scatter": Kind("ScatterPlot", ("x", "y")),
    "parallel": Kind("ParallelCoordinatesPlot", ("columns", "metric")),
    "importance": Kind("ParameterImportancePlot", ("metric",), (("metric", "with_respect_to"),)),
    "comparer": Kind("RunComparer"),
    "media": Kind("MediaBrowser", ("keys",), (("keys", "media_keys"), ("columns", "num_columns"))),
}


def save_dashboard(config: DictConfig) -> None:
    """Save the view, or update the one with the same name, and print its address.

    Raises:
        UserError: the config has mistakes; the extra or the API key is missing; or the server does not save the view.
    """
    plain = config.model_dump(exclude_unset=True)
    # both packages read these when they are imported
    os.environ.setdefault("WANDB_HTTP_TIMEOUT", str(plain["timeout"]))
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # such reports are uploaded, and W&B waits for that
    if os.environ.get("WANDB_MODE") == "":
        del os.environ["WANDB_MODE"]  # W&B fails on an empty one
    try:
        import wandb_workspaces.workspaces  # noqa: F401
    except ImportError as error:
        raise UserError(f"The dashboard needs an extra: pip install 'alexlab[dashboard]' ({error}).") from None
    from alexlab.loggers.wandb_api import has_api_key

    workspace = build(plain)
    if plain["dry_run"]:
        view = {key: plain[key] for key in ("entity", "project", "name", "x")}
        print(json.dumps({**view, **plain["dashboard"]}, indent=2), flush=True)
    elif has_api_key():
        save(workspace, plain)
    else:
        raise UserError(
            "The dashboard needs an API key of W&B: run `wandb login` or set WANDB_API_KEY. dry_run=true needs none."
        )


# -- from yaml to wandb-workspaces, which checks the values


def build(plain: Plain) -> Any:
    """Build the workspace; UserError has all mistakes, one per line."""
    import wandb_workspaces.workspaces as ws

    sections, mistakes = [], []
    for key, section in plain["dashboard"]["sections"].items():
        place, panels = f"dashboard.sections.{key}", []
        if not isinstance(section, dict) or not isinstance(section.get("panels"), dict):
            mistakes.append(f"`{place}` must have panels by name; ~{place} removes the section.")
            continue
        for name, panel in section["panels"].items():
            try:
                panels.append(build_panel(f"{place}.panels.{name}", panel, plain["x"]))
            except UserError as error:
                mistakes.append(str(error))
        arguments = {"title": key.replace("_", " "), "open": True, **section, "panels": panels}
        grid = {name: arguments.pop(name, default) for name, default in (("columns", 3), ("rows", 2))}
        try:
            arguments["layout_settings"] = make(ws.SectionLayoutSettings, place, grid)
            sections.append(make(ws.Section, place, arguments, (("title", "name"), ("open", "is_open"))))
        except UserError as error:
            mistakes.append(str(error))
    if mistakes:
        lines = "\n".join(mistakes).splitlines()
        count = f"{len(lines)} values of the dashboard are wrong:\n  " if len(lines) > 1 else ""
        raise UserError(count + "\n  ".join(lines))
    shown = {"x_axis": plain["x"], "max_runs": plain["dashboard"]["max_runs"]}
    settings = make(ws.WorkspaceSettings, "dashboard", shown)
    about = {"entity": plain["entity"] or "", "project": plain["project"], "name": plain["name"]}
    return make(ws.Workspace, "dashboard", {**about, "sections": sections, "settings": settings})


def build_panel(place: str, panel: Any, x: str) -> Any:
    """Build one panel, whose keys may be any options of the class in wandb-workspaces.

    Args:
        place: key of the panel in the config, for messages; the last part is the title if the panel has none.
        x: the axis of line plots.
    """
    import wandb_workspaces.reports.v2 as wr

    kind = panel.get("kind") if isinstance(panel, dict) else None
    if kind not in KINDS:
        raise UserError(f"`{place}.kind={kind}` must be one of {', '.join(KINDS)}; ~{place} removes the panel.")
    panel_class, needs, names = KINDS[kind]
    missing = [key for key in needs if not panel.get(key)]
    if missing:
        raise UserError(f"`{place}.{missing[0]}` is missing: a panel of kind {kind} needs it.")
    arguments = {key: value for key, value in panel.items() if key != "kind"}
    if "title" in field_names(getattr(wr, panel_class)):
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
    return make(getattr(wr, panel_class), place, arguments, names)


def setting_or_summary(name: Any) -> Any:
    """Return a setting for "optimizer.lr", "seed" or "config:NAME", otherwise a value of the summary.

    wandb-workspaces reads a plain text as a value of the summary, also "c::optimizer.lr", its own form of a setting.
    """
    import wandb_workspaces.reports.v2 as wr

    section, _, rest = str(name).partition(":")
    if section in ("config", "summary") and rest:
        return wr.Config(rest) if section == "config" else wr.SummaryMetric(rest)
    is_setting = "/" not in str(name) and ("." in str(name) or name in OmegaConf.load(configs.CONF / "train.yaml"))
    return wr.Config(name) if is_setting else wr.SummaryMetric(name)


def make(cls: Any, place: str, values: Plain, names: tuple[tuple[str, str], ...] = ()) -> Any:
    """Build an object of wandb-workspaces; UserError has all wrong keys, one per line.

    Args:
        values: the fields by their names in the yaml.
        names: pairs of the name in the yaml and the name of the field, if these differ.
    """
    from pydantic import ValidationError

    to_field, to_yaml = dict(names), {field: name for name, field in names}
    try:
        return cls(**{to_field.get(key, key): value for key, value in values.items()})
    except ValidationError as error:
        lines: Plain = {}
        for each in error.errors():
            key = to_yaml.get(str(each["loc"][0]), str(each["loc"][0]))
            known = [to_yaml.get(field, field) for field in field_names(cls)]
            near = difflib.get_close_matches(key, known, n=1) if key not in known else []
            hint = f" Did you mean {near[0]}?" if near else ""
            lines.setdefault(key, f"`{place}.{key}={values.get(key)}`: {each['msg']}.{hint}")
        raise UserError("\n".join(lines.values())) from None


def field_names(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if not field.name.startswith("_")]


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
                raise UserError(
                    f"`project={project}`: {first_line(error)} The first run creates a project (python train.py "
                    f"logger.wandb.mode=online logger.wandb.project={project}); or choose another one with "
                    "entity=NAME project=NAME."
                ) from error
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
            f"whether you may write to the project, and whether the server answers (timeout={2 * plain['timeout']} "
            "waits longer)."
        ) from error


def view_id(text: str) -> str:
    """Return 11 letters and digits, like W&B's own ids, that follow from `text`."""
    number, alphabet = int.from_bytes(hashlib.sha256(text.encode()).digest()), string.ascii_lowercase + string.digits
    return "".join(alphabet[number // 36**place % 36] for place in range(11))
