"""`from_run=` and `from_wandb=`: train again with the config and seed of an earlier run, in a new directory.

The run's saved config counts, not today's conf/; the command line's overrides are applied on top of it. References are
worked out in a saved config. Those that conf/ has for the run's options (`model.net.name: ${model.name}`), and that
still hold, are put back first, so that a key that follows another one follows an override of that, too.
"""

import copy
import logging
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alexlab.data.class_names import SHIPPED
from alexlab.engine import checkpoint_io, provenance
from alexlab.engine import config as configs
from alexlab.engine.config import CONF, flat
from alexlab.engine.errors import UserError
from alexlab.engine.overrides import by_key, get, has, key_of, parse, put, shown
from alexlab.engine.resume import holds_run
from alexlab.engine.run_dir import find_run, read_summary
from alexlab.engine.run_dir import shown as shown_path
from alexlab.engine.settings import is_own_checkpoint

log = logging.getLogger("alexlab")
Plain = dict[str, Any]

# top-level keys that belong to the new run, whatever the earlier run had
NEW = ("run_dir", "overrides", "paths", "sweep", "resume", "dry_run", "from_run", "from_wandb", "repeats", "task")
GROUPS = ("trainer", "model", "data", "augment", "optimizer", "scheduler", "logger", "callbacks", "choices", "resume")
# keys that older versions filled in when a run started, and what conf/ has if they are to be worked out again
FILLED_IN = {"data.num_classes": None, "model.mean": "auto", "model.std": "auto", "logger.wandb.group": None}
OPTION = re.compile(r"[\w-]+(/[\w-]+)*")
TO_KEYS = re.compile(r"(?:[^$]|\$\{[\w.]+\})*")  # text whose references are to other keys alone: "${seed}_x"
MOST = 12  # changes that are printed


@dataclass(frozen=True)
class Repeated:
    """An earlier run, and the config to train it again.

    Attributes:
        name: the run's directory, or ENTITY/PROJECT/RUN.
        config: what to train with, to be validated.
        dataset: the run's images, as the datamodule describes them; {} if unknown.
        code: the run's commit and differences, as `provenance.read` returns them.
        patch: the command that applies the differences.
        changes: the settings that differ from the run's: "optimizer.lr=0.1 (the run has 0.05)".
        notes: lines to print once.
    """

    name: str
    config: Plain
    dataset: Plain
    code: Plain
    patch: str
    changes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def compare(self, dataset: Plain) -> list[str]:
        """Return a sentence for the images of the new run (`dataset`), and for the code, if they are not the run's."""
        code = provenance.difference(self.code, self.name, self.patch)
        return [line for line in (_other_images(self.name, self.dataset, dataset), code) if line]


def repeat(today: Plain) -> Repeated | None:
    """Return the run that `from_run` or `from_wandb` names, with the config to train it again; None if neither is
    given, or if `resume=auto` finds the repetition in its directory already.

    Args:
        today: the config that the command line composes.

    Raises:
        UserError: no such run, overrides that do not fit it, or values that its config does not hold.
    """
    asked = [f"{key}={today[key]}" for key in ("from_run", "from_wandb") if today.get(key) is not None]
    resume = today["resume"]["run"]
    if not asked or (resume is not None and holds_run(Path(today["run_dir"]))):
        return None
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)}: only one run can be repeated: leave one of them out.")
    if resume not in (None, "auto"):
        raise UserError(f"{asked[0]} starts a new run, and resume={resume} continues one: leave one of them out.")
    run = _read_directory(today) if today["from_run"] is not None else _read_wandb(today, asked[0])
    _check_complete(run.config, asked[0])
    if is_own_checkpoint(run.config):  # it was resumed; what it first started from is in its overrides
        given = dict(str(text).split("=", 1) for text in run.config["overrides"] if "=" in str(text))
        for key in ("ckpt_path", "init_from"):
            if given.get(key) == "latest":
                raise UserError(f"{asked[0]} started from {key}=latest, which was another run then: use that one.")
            run.config[key] = None if given.get(key, "null") == "null" else given[key]
    return _with_overrides(run, today, asked[0])


# -- the run


def _read_directory(today: Plain) -> Repeated:
    sweep = Path(today["run_dir"]).parent
    sweeping = any(folder.name == "multiruns" for folder in sweep.parents)
    besides = sweep if sweeping else Path(today["run_dir"])  # all jobs of a sweep repeat the same run
    run_dir = find_run(today["from_run"], Path(today["paths"]["logs"]), "", "from_run", besides)
    dataset, last = read_summary(run_dir).get("dataset"), run_dir / "checkpoints" / checkpoint_io.LAST
    if dataset is None and last.is_file():  # a killed run has no summary
        dataset = checkpoint_io.load(last)["alexlab"]["dataset"]
    config, patch = configs.load(run_dir / "config.yaml"), shown_path(run_dir / "code.patch")
    return Repeated(shown_path(run_dir), config, _dict(dataset), provenance.read(run_dir), f"git apply {patch}")


def _read_wandb(today: Plain, asked: str) -> Repeated:
    from alexlab.loggers.wandb_api import fetch
    from alexlab.loggers.wandb_logger import CODE_ARTIFACT, code_alias

    name = today["from_wandb"]
    config, summary = fetch(name)
    config = configs.upgrade(config)
    _check_complete(config, asked)
    config["run_dir"], floats = str(config.pop("run", "")), config.pop("floats", None)
    for key in floats if isinstance(floats, list) else []:
        _make_float(config, str(key).split("."))
    if config["resume"].get("run") is not None and config.get("ckpt_path") in ("last.ckpt", "previous.ckpt"):
        config["ckpt_path"] = f"{config['run_dir']}/checkpoints/last.ckpt"  # its own, of which W&B has the name alone
    given = by_key(today["overrides"])
    limits = [key for key in flat(config) if key.startswith("trainer.limit_") and get(config, key) == 1]
    _ask(asked, config, limits if floats is None else [], given, "W&B does not tell one batch from all (1.0)")
    paths = ["data.root", "init_from", *([] if is_own_checkpoint(config) else ["ckpt_path"])]
    paths += [] if get(config, "data.class_names") in SHIPPED else ["data.class_names"]
    paths = [key for key in paths if get(config, key) is not None]
    _ask(asked, config, paths, given, "W&B has only the last part of paths")
    code = _dict(summary.get("code")) or _dict(summary.get("git"))
    patch = f"wandb artifact get {name.rpartition('/')[0]}/{CODE_ARTIFACT}:{code_alias(code)} --root code"
    return Repeated(name, config, _dict(summary.get("dataset")), code, f"{patch} && git apply code/code.patch")


def _make_float(node: Any, parts: list[str]) -> None:
    """Turn a whole number back into the float that it was; "augment.scale.1" is in a list."""
    for depth, part in enumerate(parts, 1):
        place: Any = int(part) if isinstance(node, list) and part.isdecimal() else part
        inside = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        if place not in inside:
            return
        if depth == len(parts) and isinstance(node[place], int):
            node[place] = float(node[place])
        node = node[place]


def _dict(value: Any) -> Plain:
    return value if isinstance(value, dict) else {}


def _check_complete(config: Plain, asked: str) -> None:
    complete = all(isinstance(config.get(key), dict) for key in GROUPS)
    if not complete or not isinstance(config.get("overrides"), list):
        raise UserError(
            f"{asked}: its config is incomplete, as of a run that failed before it started, or of another program: "
            "choose another run."
        )


def _ask(asked: str, config: Plain, keys: list[str], given: Any, why: str) -> None:
    """Raise UserError for those of `keys` whose values the command line must give, and does not."""
    missing = [f"{key}=... (the run has {shown(get(config, key))})" for key in keys if key not in given]
    if missing:
        raise UserError(f"{asked}: {why}: give {', '.join(missing)}.")


# -- its config with the overrides


def _with_overrides(run: Repeated, today: Plain, asked: str) -> Repeated:
    config, previous = copy.deepcopy(run.config), [str(text) for text in run.config["overrides"]]
    conf, values = _compose(config["choices"]), _values(previous)
    fixed = {key for key, value in values.items() if "${" not in str(value) or not TO_KEYS.fullmatch(str(value))}
    for key, value in FILLED_IN.items():
        if conf is not None and key not in fixed and has(config, key) and get(conf, key) == value:
            put(config, key, value)
    made = _create({"paths": today["paths"], **config})
    newer = _add_newer(made, config, today if conf is None else conf)
    references = {key: text for key, text in {**flat(conf or {}), **values}.items() if key not in fixed}
    _restore_references(made, config, references)
    before = _resolved(made)
    _apply(made, before, today, run.name, asked)
    result = _resolved(made)

    new = by_key(today["overrides"])
    leaves = {leaf for override in parse(today["overrides"]) for leaf in override.leaves}
    hidden = [key for key, value in flat(result).items() if "${oc.env:" in str(value) or value == "***"]
    hidden = [key for key in hidden if not key.startswith("logger.")]  # there a reference is never looked up
    hidden = [key for key in hidden if get(before, key) == get(result, key)]
    _ask(asked, result, hidden, leaves, "secrets are not saved with a run")  # a config from elsewhere gets none
    changes = _changes(before, result)
    notes = [_headline(run.name, changes)]
    if newer:
        defaults = ", ".join(f"{key}={shown(get(before, key))}" for key in newer)
        notes.append(f"note: {run.name} is of an older version, and gets today's defaults for {defaults}.")
    if conf is None and not all(map(_is_new, new)):
        notes.append(f"note: conf/ no longer has the options of {run.name}: what followed other keys there is kept.")
    old = [text for text in previous if key_of(text) not in new and not _is_new(key_of(text))]
    name = run.name if today["from_run"] is None else str(Path(run.name).resolve())
    result |= {key: today[key] for key in NEW if key in today}
    result |= {"overrides": [*old, *today["overrides"]], "from_run": None, "from_wandb": None, "repeats": name}
    ordered = {key: result[key] for key in {**today, **result} if key in result}
    return replace(run, config=ordered, changes=changes, notes=notes)


def _is_new(key: str) -> bool:
    return key.split(".")[0] in NEW


def _compose(choices: Plain) -> Plain | None:
    """Today's conf/ with the options of a run, references as text; None if it no longer has them."""
    options = {key: value if isinstance(value, list) else [value] for key, value in choices.items()}
    if not all(OPTION.fullmatch(str(name)) for key, names in options.items() for name in (key, *names)):
        return None
    chosen = [f"{key}={names[0] if len(names) == 1 else '[' + ','.join(names) + ']'}" for key, names in options.items()]
    try:
        if GlobalHydra.instance().is_initialized():  # by the command, which knows its --config-dir
            return OmegaConf.to_container(hydra.compose("train", chosen))  # type: ignore[return-value]
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return OmegaConf.to_container(hydra.compose("train", chosen))  # type: ignore[return-value]
    except HydraException:
        return None


def _values(overrides: list[str]) -> Plain:
    """The keys that a run's overrides set, with their values as they were given."""
    found: Plain = {}
    for text in overrides:
        try:
            (override,) = parse([text])
        except UserError:  # W&B's copy may lack a part of it
            found[key_of(text)] = text
            continue
        found |= {} if override.chooses or override.deletes else override.leaves
    return found


def _add_newer(made: DictConfig, config: Plain, defaults: Plain) -> list[str]:
    """Add the keys that a run is too old to have, and return them.

    Not those that its overrides took out, nor arguments of a class (model.net.norm): there the class's default counts.
    """
    removed = tuple(f"{key_of(str(text))}." for text in config["overrides"] if str(text).startswith("~"))
    newer = []
    for key, value in flat(defaults).items():
        parts = key.split(".")
        argument = any(has(defaults, ".".join([*parts[:depth], "_target_"])) for depth in range(2, len(parts)))
        if not (has(config, key) or _is_new(key) or argument or value == "???" or f"{key}.".startswith(removed)):
            OmegaConf.update(made, key, value, force_add=True)
            newer.append(key)
    return newer


def _restore_references(made: DictConfig, config: Plain, references: Plain) -> None:
    """Put back the references whose values are those of the run."""
    for key, text in references.items():
        if "${" not in str(text) or not has(config, key) or _is_new(key):
            continue
        OmegaConf.update(made, key, text, merge=False)
        try:
            value = OmegaConf.select(made, key, throw_on_missing=True)
            holds = (OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value) == get(
                config, key
            )
        except OmegaConfBaseException:
            holds = False
        if not holds:
            OmegaConf.update(made, key, _escaped(get(config, key)), merge=False)


def _apply(made: DictConfig, before: Plain, today: Plain, name: str, asked: str) -> None:
    """Apply the overrides of the command line, as Hydra does."""
    for override in parse(today["overrides"]):
        text, key = override.text, override.key
        if override.chooses and not _is_new(key):
            option = get(before, f"choices.{key}")
            if override.value != option:
                raise UserError(
                    f"{text}: {asked} keeps the options of that run ({key}={shown(option)}). Give single keys instead, "
                    f"as {key}.KEY=VALUE, or start from conf/ without {asked.partition('=')[0]}."
                )
        elif override.chooses or (_is_new(key) and key.split(".")[0] != "paths"):
            continue
        elif override.deletes:
            parent = OmegaConf.select(made, key.rpartition(".")[0]) if "." in key else made
            if OmegaConf.is_dict(parent):
                parent.pop(key.rpartition(".")[2], None)
        else:
            for leaf, value in override.leaves.items():
                if not (override.adds or _is_new(leaf) or has(before, leaf)):
                    raise UserError(f"{text}: {name} has no {leaf}; +{text} adds it.")
                # whether a reference to the environment is looked up was settled when today's config was composed
                value = _escaped(get(today, leaf)) if "oc.env:" in str(value) else value
                OmegaConf.update(made, leaf, value, force_add=True)


def _resolved(made: DictConfig) -> Plain:
    try:
        resolved: Any = OmegaConf.to_container(made, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from None
    return {key: value for key, value in resolved.items() if not _is_new(key)}


def _create(plain: Plain) -> DictConfig:
    """Return a config of these very values: a text that looks like a reference is none."""
    return OmegaConf.create(_escaped(plain))


def _escaped(value: Any) -> Any:
    """Return a value as a config must hold it so that nothing in it is a reference."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r"(?<!\\)(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


# -- what is reported


def _headline(name: str, changes: list[str]) -> str:
    more = f", and {len(changes) - MOST} more" if len(changes) > MOST else ""
    return f"repeats {name}, with {', '.join(changes[:MOST])}{more}" if changes else f"repeats {name}"


def _changes(before: Plain, result: Plain) -> list[str]:
    """The settings that differ, as a command line has them."""
    old, new = flat(before), flat(result)
    changed = [key for key, value in new.items() if key not in old or old[key] != value]
    found = [f"{key}={shown(new[key])} (the run has {shown(old[key]) if key in old else 'none'})" for key in changed]
    return found + [f"~{key} (the run has {shown(value)})" for key, value in old.items() if key not in new]


def _other_images(name: str, then: Plain, now: Plain) -> str | None:
    """A sentence if the images are not those of the run, by their fingerprints."""
    ours, theirs, counts = now["fingerprint"], then.get("fingerprint"), _dict(then.get("images"))
    if not isinstance(theirs, dict):
        return f"it is unknown which images {name} was trained on: it stopped before it wrote that down."
    parts = [
        f"{split} {now['images'].get(split)} of fingerprint {ours.get(split)} (the run has {counts.get(split)} of "
        f"{theirs.get(split)})"
        for split in {**ours, **theirs}
        if ours.get(split) != theirs.get(split)
    ]
    return f"the images differ from those of {name}: {', '.join(parts)}." if parts else None
