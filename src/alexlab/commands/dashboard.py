"""The dashboard of a W&B project, built from conf/dashboard/*.yaml: the task of dashboard.py."""

import hashlib
import json
import os
import string
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from alexlab.commands import panels
from alexlab.engine import config as configs
from alexlab.engine.errors import UserError
from alexlab.loggers.wandb_key import key_at_hand, refused

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

Plain = dict[str, Any]


def make(config: DictConfig) -> None:
    """Save the view, or update the one that was saved under this name before, and print its address.

    Raises:
        UserError: a mistake in the config, or no extra, key, server or project.
    """
    plain = configs.plain(config)
    names = panels.Names(plain["also"])
    panels.check(plain, names)
    need_extra(plain["timeout"])
    if plain["dry_run"]:
        print(json.dumps(as_json(build(plain, names), plain), indent=2), flush=True)
        return
    if not key_at_hand():
        raise UserError(
            "dashboard.py needs an API key of W&B: run `wandb login` or set WANDB_API_KEY; dry_run=true needs none."
        )
    save(plain, names)


def need_extra(timeout: int) -> None:
    """Import W&B's packages, which read their settings as they are imported.

    Raises:
        UserError: wandb-workspaces is missing.
    """
    os.environ.setdefault("WANDB_HTTP_TIMEOUT", str(timeout))
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B's reports on itself hold a command up for long
    if os.environ.get("WANDB_MODE") == "":
        del os.environ["WANDB_MODE"]  # which W&B's client does not take
    try:
        import wandb_workspaces.workspaces  # noqa: F401
    except ImportError as error:
        raise UserError(f"dashboard.py needs the extra: pip install 'alexlab[dashboard]' ({error}).") from None


def build(plain: Plain, names: panels.Names) -> "Workspace":
    """The view of a checked config; the same at each call."""
    import wandb_workspaces.workspaces as ws

    layout = plain["dashboard"]
    sections = []
    for key, section in layout["sections"].items():
        made = []
        for name, panel in section["panels"].items():
            made.append(panel_of({"title": words(name), "x": plain["x"], **panel}, names))
            made[-1]._id = token(f"{key}.{name}")  # the library's are random
        size = ws.SectionLayoutSettings(columns=section.get("columns", 3), rows=section.get("rows", 2))
        title, is_open = section.get("title", words(key)), section.get("open", True)
        sections.append(ws.Section(name=title, panels=made, is_open=is_open, layout_settings=size))
    settings = ws.WorkspaceSettings(x_axis=plain["x"], max_runs=layout["max_runs"])
    return ws.Workspace(
        entity=plain["entity"] or "", project=plain["project"], name=plain["name"], sections=sections, settings=settings
    )


def panel_of(panel: Plain, names: panels.Names) -> Any:
    """A panel of wandb-workspaces.

    A setting and a value of a run's summary must be said to be one: a plain text would be taken for the latter, and
    the short form "c::optimizer.lr" as well.
    """
    import wandb_workspaces.reports.v2 as wr

    def value(name: str) -> Any:
        return wr.Config(name) if name in names.config else wr.SummaryMetric(name)

    def column(name: str, log: bool) -> Any:
        return wr.ParallelCoordinatesPlotColumn(metric=value(name), display_name=name, log=log or None)

    kind, title, get = panel["kind"], panel["title"], panel.get
    if kind == "line":
        smoothing = get("smoothing")
        return wr.LinePlot(
            title=title, x=panel["x"], y=panel["y"], log_x=get("log_x"), log_y=get("log_y"),
            smoothing_factor=smoothing, smoothing_type="exponentialTimeWeighted" if smoothing else None,
        )  # fmt: skip
    if kind == "bar":
        return wr.BarPlot(title=title, metrics=panel["keys"])
    if kind == "scatter":
        z = value(panel["z"]) if get("z") else None
        x, y = value(panel["x"]), value(panel["y"])
        return wr.ScatterPlot(title=title, x=x, y=y, z=z, log_x=get("log_x"), log_y=get("log_y"))
    if kind == "parallel":
        columns = [column(name, name in (get("log") or ())) for name in (*panel["columns"], panel["metric"])]
        return wr.ParallelCoordinatesPlot(title=title, columns=columns)
    if kind == "importance":
        return wr.ParameterImportancePlot(with_respect_to=panel["metric"])
    if kind == "comparer":
        return wr.RunComparer(diff_only=get("diff_only") or None)
    assert kind == "media", kind
    return wr.MediaBrowser(title=title, media_keys=panel["keys"], num_columns=get("columns"))


def as_json(workspace: "Workspace", plain: Plain) -> Plain:
    """What would be sent, and for whom."""
    spec = workspace._to_model().spec.model_dump(by_alias=True, exclude_none=True, mode="json")
    return {"entity": plain["entity"], "project": plain["project"], "displayName": plain["name"], "spec": spec}


def save(plain: Plain, names: panels.Names) -> None:
    """The view's own name follows from entity, project and `name`, so that it is found again from any machine.

    Raises:
        UserError: the server does not answer, or refuses.
    """
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError
    from wandb_workspaces.workspaces import internal

    wandb.setup(settings=wandb.Settings(silent=True))
    try:
        entity = plain["entity"] or wandb.Api().default_entity
        if not entity:
            raise UserError("entity=null: the server knows none of yours: give a user or a team with entity=NAME.")
        plain = {**plain, "entity": entity}
        workspace = build(plain, names)
        name = token(f"{entity}/{plain['project']}/{plain['name']}")
        workspace._internal_name = f"nw-{name}-v"
        workspace._internal_id = known_as = _id_of(internal, entity, plain["project"], name)
        workspace.save()
        address = workspace.url.replace(" ", "%20")
        print(f"{'updated' if known_as else 'made'} the view {plain['name']}: {address}", flush=True)
    except wandb.errors.AuthenticationError as error:
        if refused(error):
            raise UserError(f"W&B refuses the API key ({_first_line(error)}): run `wandb login` again.") from error
        raise UserError(_silent(error, plain["timeout"])) from error
    except WandbApiFailedError as error:
        if error.response is None:
            raise UserError(_silent(error, plain["timeout"])) from error
        whose = f"entity={plain['entity']} project={plain['project']}"
        raise UserError(f"{whose}: W&B does not take the view ({_first_line(error)}): may you write there?") from error


def _id_of(internal: Any, entity: str, project: str, name: str) -> str:
    """The server's id of the view, or "" where it has none of that name."""
    try:
        return internal.get_view_dict(entity, project, name)["id"]
    except ValueError as error:
        if str(error).startswith("Workspace "):
            return ""
        raise UserError(
            f"project={project}: {entity} has no such project, or you may not see it: the first run makes it "
            f"(python train.py logger.wandb.mode=online logger.wandb.project={project}), or give another with "
            "entity=NAME project=NAME."
        ) from error


def _silent(error: Exception, seconds: int) -> str:
    return (
        f"W&B's server did not answer ({_first_line(error)}): try again, with timeout={2 * seconds} where it is slow; "
        "dry_run=true needs none."
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def words(key: str) -> str:
    return key.replace("_", " ")


def token(text: str) -> str:
    """11 letters and digits, as W&B's own names have, that follow from `text`."""
    number, alphabet = int.from_bytes(hashlib.sha256(text.encode()).digest()), string.ascii_lowercase + string.digits
    return "".join(alphabet[number // 36**place % 36] for place in range(11))
