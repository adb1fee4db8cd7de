"""What may stand in conf/dashboard/*.yaml: kinds of panels, their fields, and the names that runs log."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from alexlab.engine.config import CONF, flat
from alexlab.engine.errors import UserError
from alexlab.engine.kinds import BELOW_1, COUNT, SWITCH, TEXT, Rule, shown
from alexlab.loggers.wandb_names import FACTS, HISTORY, MEDIA, RATES

Plain = dict[str, Any]


@dataclass(frozen=True)
class Field:
    """One field of a panel.

    Attributes:
        of: a rule; or the names that it takes: of "history", "summary", "media", or "settings" (summary and config).
        many: a list of them, not empty.
        needed: it must be given.
    """

    of: Rule | str
    many: bool = False
    needed: bool = False


SECTION: dict[str, Rule] = {
    "title": TEXT,
    "open": SWITCH,
    "columns": COUNT,
    "rows": COUNT,
    "panels": ("panels by their names", lambda v: isinstance(v, dict) and len(v) > 0),
}
TITLE = Field(TEXT)
KINDS: dict[str, dict[str, Field]] = {
    "line": {
        "title": TITLE, "y": Field("history", many=True, needed=True), "x": Field("history"), "log_x": Field(SWITCH),
        "log_y": Field(SWITCH), "smoothing": Field(BELOW_1),
    },
    "bar": {"title": TITLE, "keys": Field("summary", many=True, needed=True)},
    "scatter": {
        "title": TITLE, "x": Field("settings", needed=True), "y": Field("settings", needed=True),
        "z": Field("settings"), "log_x": Field(SWITCH), "log_y": Field(SWITCH),
    },
    "parallel": {
        "title": TITLE, "columns": Field("settings", many=True, needed=True), "metric": Field("summary", needed=True),
        "log": Field("settings", many=True),
    },
    "importance": {"metric": Field("summary", needed=True)},
    "comparer": {"diff_only": Field(SWITCH)},
    "media": {"title": TITLE, "keys": Field("media", many=True, needed=True), "columns": Field(COUNT)},
}  # fmt: skip
LOGGED_IN = {
    "history": "no run logs that step by step", "summary": "no run's summary has that",
    "media": "no run logs pictures so", "settings": "no run has that setting, and none's summary has it",
}  # fmt: skip


class Names:
    """All that runs log, and what `also` adds to it.

    Attributes:
        config: keys of a run's config, such as "optimizer.lr".
        of: the names that a field may have, by `Field.of`.
    """

    def __init__(self, also: dict[str, list[str]]) -> None:
        history = HISTORY | RATES | {*also["history"]}
        summary = history | FACTS | {*also["summary"]}
        self.config = config_keys() | {*also["config"]}
        self.of = {
            "history": history, "summary": summary, "media": MEDIA | {*also["media"]},
            "settings": summary | self.config,
        }  # fmt: skip

    def mistake(self, name: Any, of: str) -> str | None:
        """What is wrong with a name, and the nearest that there is."""
        known = self.of[of]
        if name in known:
            return None
        part = "config or also.summary" if of == "settings" else of
        near = difflib.get_close_matches(str(name), sorted(known), n=1, cutoff=0.4)
        inside = sorted(key for key in known if key.startswith(f"{name}."))
        hint = f" Did you mean {(inside or near)[0]}?" if inside or near else ""
        return f"{LOGGED_IN[of]}.{hint} Your own code's names go into also.{part}."


def config_keys() -> set[str]:
    """Of every config that conf/ can compose for train.py: its own keys, and those of each option of its groups."""
    found: set[str] = set()
    train: Any = OmegaConf.to_container(OmegaConf.load(CONF / "train.yaml"), resolve=False)
    groups = [name for entry in train["defaults"] if isinstance(entry, dict) for name in entry if name != "hydra"]
    for group in groups:
        if group not in ("paths", "sweep"):
            found.add(f"choices.{group}")
        for path in (CONF / group).glob("*.yaml"):
            own: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
            at_top = "# @package _global_" in path.read_text()
            found |= flat(own if at_top else {group: own}).keys()
    found |= flat({key: value for key, value in train.items() if key not in ("choices", "overrides", "run_dir")}).keys()
    ours = {"defaults", "hydra"}
    return {key for key in found if not {key.split(".")[0], key.split(".")[-1]} & ours}


def check(plain: Plain, names: Names) -> None:
    """
    Args:
        plain: conf/dashboard.yaml, composed.

    Raises:
        UserError: with all that is wrong in it, one a line.
    """
    wrong = [f"{key}={name}: {said}" for key, name, of in _at_the_top(plain) if (said := names.mistake(name, of))]
    wrong = wrong or list(_of_sections(plain["dashboard"], names))
    if wrong:
        several = f"{len(wrong)} values of the dashboard are wrong:\n  "
        raise UserError(wrong[0] if len(wrong) == 1 else several + "\n  ".join(wrong))


def _at_the_top(plain: Plain) -> Iterator[tuple[str, str, str]]:
    yield "metric", plain["metric"], "summary"
    yield "x", plain["x"], "history"
    for name in plain["swept"]:
        yield "swept", name, "settings"


def _of_sections(layout: Plain, names: Names) -> Iterator[str]:
    yield from _strangers(layout, "dashboard", {"max_runs", "sections"})
    missing = [key for key in ("max_runs", "sections") if key not in layout]
    if missing:
        yield f"dashboard.{missing[0]} is missing: conf/dashboard/default.yaml has it."
        return
    for key, section in layout["sections"].items():
        place = f"dashboard.sections.{key}"
        if not isinstance(section, dict):
            yield f"{place}={shown(section)}: a section has panels; ~{place} takes it out."
            continue
        yield from _strangers(section, place, SECTION)
        for field, (words, test) in SECTION.items():
            if field in section and not test(section[field]):
                yield f"{place}.{field}={shown(section[field])}: must be {words}."
        if "panels" not in section:
            yield f"{place}.panels is missing: give {SECTION['panels'][0]}."
        panels = section.get("panels")
        for name, panel in panels.items() if isinstance(panels, dict) else ():
            yield from _of_panel(panel, f"{place}.panels.{name}", names)


def _of_panel(panel: Any, place: str, names: Names) -> Iterator[str]:
    if not isinstance(panel, dict):
        yield f"{place}={shown(panel)}: a panel has a kind and its keys; ~{place} takes it out."
        return
    kind = panel.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        yield f"{place}.kind={shown(kind)}: {_nearest(str(kind), KINDS)}"
        return
    fields = KINDS[kind]
    yield from _strangers(panel, place, {"kind": None, **fields})
    for name, field in fields.items():
        given = panel.get(name)
        if given is None:
            if field.needed:
                yield f"{place}.{name} is missing: a panel of kind {kind} needs it."
        elif not isinstance(field.of, str):
            if not field.of[1](given):
                yield f"{place}.{name}={shown(given)}: must be {field.of[0]}."
        elif field.many and not (isinstance(given, list) and given):
            yield f"{place}.{name}={shown(given)}: must be a list of names, such as [{min(names.of[field.of])}]."
        else:
            for one in given if field.many else [given]:
                if said := names.mistake(one, field.of):
                    yield f"{place}.{name}={shown(one)}: {said}"


def _strangers(node: Plain, place: str, known: Any) -> Iterator[str]:
    for key in node:
        if key not in known:
            yield f"{place}.{key}: {_nearest(str(key), known)}"


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"there is none such.{hint} There are: {', '.join(known)}."
