"""Write the JSON schemas of conf/, which editors read, into .vscode/schemas: python docs/schemas.py

all.json has a definition for each command and each group, made from engine/schema.py. Each other file points to one of
them, and .vscode/settings.json says for which yaml files it is.

A yaml file is a part of a config, so no key is required. Any value may also be a reference, `${...}`, or `???`.
"""

import json
from typing import Any, get_args

from pydantic.json_schema import models_json_schema

from alexlab.commands.cli import COMMANDS
from alexlab.engine import schema
from alexlab.engine.config import CONF, ROOT
from alexlab.engine.validation import FILLED_IN, SYNONYMS

FOLDER, ALL = ROOT / ".vscode/schemas", "all.json"
REFERENCE = {"type": "string", "pattern": r"\$\{|^\?\?\?$"}
OMITTED = ("title", "default", "required", "give", "option")  # a default may be a path of this machine
# Groups in which an unknown key is a mistake unless a class takes it, with their options that have no `_target_`.
CLOSED = {
    "data": ("demo", "fashion_mnist", "folder", "imagenet", "imagenette"),
    "scheduler": get_args(schema.SchedulerConfig.model_fields["name"].annotation),
}
OF_ANY_SCHEDULE = ("_target_", "interval", "monitor", "defaults")  # keys that are ours next to a class
OTHER_DEFAULTS = "^(_self_|_base|allow|train|none@sweep|callbacks/_base)$"  # which choose no option of these groups
Node = dict[str, Any]


def relaxed(node: Node) -> Node:
    """Return pydantic's schema of a value without required keys and defaults, because a file is a part of a config."""
    kept = {key: each for key, each in node.items() if key not in OMITTED}
    if "anyOf" in kept:
        kept["anyOf"] = [relaxed(each) for each in kept["anyOf"]]
    for key in ("items", "additionalProperties"):
        if isinstance(kept.get(key), dict):
            kept[key] = or_reference(kept[key])
    if "properties" in kept:
        named = kept["properties"].items()
        kept["properties"] = {name: or_reference(each) for name, each in named if name not in FILLED_IN}
    return kept


def or_reference(node: Node) -> Node:
    node = relaxed(node)
    about = {"description": node.pop("description")} if "description" in node else {}
    return {"anyOf": [*node.get("anyOf", [node]), REFERENCE], **about}


def to(name: str, file: str = "") -> Node:
    return {"$ref": f"{file}#/$defs/{name}"}


def close(group: str, defs: Node) -> None:
    """Forbid further keys of a group in files that choose no class for it, and no option of your own."""
    of_group = {f"^(override )?/?{group}$": {"enum": [None, *CLOSED[group]]}}
    entries = [{"type": "string", "pattern": OTHER_DEFAULTS}, {"type": "object", "patternProperties": of_group}]
    no_option = {"properties": {"defaults": {"items": {"anyOf": entries}}}}
    no_class = {"allOf": [no_option, {"not": {"required": ["_target_"]}}]}
    name = f"{group.title()}Config"
    known, of_class = defs[name], f"{name}OfClass"
    ours = {key: each for key, each in known["properties"].items() if group == "data" or key in OF_ANY_SCHEDULE}
    defs[of_class] = {**known, "properties": ours}
    defs[name] = {"if": no_class, "then": {**known, "additionalProperties": False}, "else": to(of_class)}
    for command in COMMANDS.values():
        whole = defs[command.model.__name__]
        value = whole["properties"].get(group, {})
        if to(name) in value.get("anyOf", ()):  # not another group of this name, as in eval
            whole["properties"][group] = {"description": value.pop("description")}
            then, other = ({"properties": {group: each}} for each in (value, or_reference(to(of_class))))
            whole["allOf"] = [*whole.get("allOf", ()), {"if": no_option, "then": then, "else": other}]


def schemas() -> dict[str, str]:
    """Return the files by their names."""
    fields = schema.fields_of(schema.TrainConfig) | schema.fields_of(schema.DashboardConfig)
    groups: Any = {name: schema.group_in(field) for name, field in fields.items() if (CONF / name).is_dir()}
    models: Any = [*groups.values(), *(command.model for command in COMMANDS.values())]
    written = models_json_schema([(model, "validation") for model in models])[1]["$defs"]
    defs = {name: relaxed(each) for name, each in written.items()}
    for model in models:
        of_hydra = {"defaults": {"type": "array", "description": "Options that Hydra merges with this file."}}
        if issubclass(model, schema.CommandConfig):
            of_hydra["hydra"] = {"type": "object", "description": "Hydra's own settings."}
        defs[model.__name__]["properties"] |= of_hydra
    optimizer = defs["OptimizerConfig"]["properties"]
    optimizer |= {name: False for name in SYNONYMS if name not in optimizer}
    for group in CLOSED:
        close(group, defs)
    keys = (*groups, "hydra")  # of files that begin with `# @package _global_`
    defs["Global"] = {"anyOf": [{"required": [key], "properties": {key: {"type": "object"}}} for key in keys]}

    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(each)}" for name, each in defs.items())
    files = {ALL: f'{{"$defs": {{\n{lines}\n}}}}\n'}
    for name, command in COMMANDS.items():
        files[f"{name}.json"] = json.dumps(to(command.model.__name__, ALL)) + "\n"
    for name, model in groups.items():
        own = {"if": to("Global", ALL), "then": to("TrainConfig", ALL), "else": to(model.__name__, ALL)}
        files[f"{name}.group.json"] = json.dumps(own) + "\n"
    return files


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in schemas().items():
        (FOLDER / name).write_text(text)
