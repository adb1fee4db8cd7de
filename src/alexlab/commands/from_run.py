"""`from_run=` and `from_wandb=`: train again with the config and seed of an earlier run, in a new directory.

The new run gets the saved config of the earlier one, not the defaults of conf/. Overrides of the command line change
that config. For keys that are derived from an overridden one (`model.net.name: ${model.name}`), conf/ is composed twice
with the options and overrides of the earlier run: without and with the new overrides. Keys in which the two results
differ are changed in the saved config.
"""

import contextlib
import copy
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from alexlab.data.class_names import SHIPPED
from alexlab.data.fingerprint import changed_splits
from alexlab.engine import checkpoint_io, provenance
from alexlab.engine import config as configs
from alexlab.engine.config import CONF, Plain, flat
from alexlab.engine.errors import UserError
from alexlab.engine.overrides import Override, by_key, get, has, key_of, parse, put, remove, shown
from alexlab.engine.resume import holds_run
from alexlab.engine.run_dir import find_run, read_summary
from alexlab.engine.run_dir import shown as shown_path
from alexlab.engine.settings import is_own_checkpoint

# top-level keys that are never copied from the earlier run
NEW = ("run_dir", "overrides", "paths", "sweep", "resume", "dry_run", "from_run", "from_wandb", "repeats", "task")
GROUPS = ("trainer", "model", "data", "augment", "optimizer", "scheduler", "logger", "callbacks", "choices", "resume")
# keys that older versions filled in when a run started; they are computed again if conf/ has this value
FILLED_IN = {"data.num_classes": None, "model.mean": "auto", "model.std": "auto", "logger.wandb.group": None}
OPTION = re.compile(r"[\w-]+(/[\w-]+)*")
TO_KEYS = re.compile(r"(?:[^$]|\$\{[\w.]+\})*")  # a text that refers to other keys only: "${seed}_x"
MOST = 12  # changes that are printed


@dataclass(frozen=True)
class Repeated:
    """An earlier run, and the config to train it again.

    Attributes:
        name: the run's directory, or ENTITY/PROJECT/RUN.
        config: what to train with, to be validated.
        dataset: the run's images, as the datamodule describes them; {} if unknown.
        code: the run's code.json, as `provenance.read` returns it.
        patch: the command that applies the run's code.patch.
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
    """Return the run that `from_run` or `from_wandb` names, with the config to train it again.

    Returns None if neither is set, or if `resume=auto` resumes a repetition that has already started.

    Args:
        today: the config that the command line composes.

    Raises:
        UserError: there is no such run; overrides do not fit it; or its saved config lacks values, such as secrets.
    """
    asked = [f"{key}={today[key]}" for key in ("from_run", "from_wandb") if today.get(key) is not None]
    resume = today["resume"]["run"]
    if not asked or (resume is not None and holds_run(Path(today["run_dir"]))):
        return None
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)}: only one run can be repeated: remove one of them.")
    if resume not in (None, "auto"):
        raise UserError(f"{asked[0]} starts a new run, and resume={resume} continues one: remove one of them.")
    run = _read_directory(today) if today["from_run"] is not None else _read_wandb(today, asked[0])
    _check_complete(run.config, asked[0])
    if is_own_checkpoint(run.config):  # it was resumed: its overrides name the checkpoint that it first started from
        values = dict(str(text).split("=", 1) for text in run.config["overrides"] if "=" in str(text))
        for key in ("ckpt_path", "init_from"):
            if values.get(key) == "latest":
                raise UserError(f"{asked[0]} started from {key}=latest, which was another run then: use that one.")
            run.config[key] = None if values.get(key, "null") == "null" else values[key]
    return _with_overrides(run, today, asked[0])


# -- the run


def _read_directory(today: Plain) -> Repeated:
    sweep = Path(today["run_dir"]).parent
    in_sweep = any(folder.name == "multiruns" for folder in sweep.parents)
    besides = sweep if in_sweep else Path(today["run_dir"])  # all jobs of a sweep repeat the same run
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
        config["ckpt_path"] = f"{config['run_dir']}/checkpoints/last.ckpt"  # the run's own; W&B has only the file name
    overridden = by_key(today["overrides"])
    limits = [key for key in flat(config) if key.startswith("trainer.limit_") and get(config, key) == 1]
    _ask(asked, config, limits if floats is None else [], overridden, "W&B stores one batch and all (1.0) alike")
    paths = ["data.root", "init_from", *([] if is_own_checkpoint(config) else ["ckpt_path"])]
    paths += [] if get(config, "data.class_names") in SHIPPED else ["data.class_names"]
    paths = [key for key in paths if get(config, key) is not None]
    _ask(asked, config, paths, overridden, "W&B has only the last part of paths")
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
            f"{asked}: its config is incomplete, as that of a run that failed before it started, or of another "
            "program: choose another run."
        )


def _ask(asked: str, config: Plain, keys: list[str], overridden: Any, why: str) -> None:
    """Raise UserError if the command line does not set all of `keys`."""
    missing = [f"{key}=... (the run has {shown(get(config, key))})" for key in keys if key not in overridden]
    if missing:
        raise UserError(f"{asked}: {why}: add {', '.join(missing)}.")


# -- the saved config with the new overrides


def _with_overrides(run: Repeated, today: Plain, asked: str) -> Repeated:
    choices, previous = run.config["choices"], [str(text) for text in run.config["overrides"]]
    own = [each for text in previous for each in _parsed(text)]
    overrides = [each for each in parse(today["overrides"]) if each.key.startswith("paths") or not _is_new(each.key)]
    before = {key: value for key, value in copy.deepcopy(run.config).items() if not _is_new(key)}
    _check_overrides(overrides, before, run.name, asked)
    overrides = [each for each in overrides if not each.chooses]  # the rest choose an option that the run already has

    # conf/ with the options of the run, without and with the overrides
    conf = _compose(choices, own)
    base = flat(conf or {})
    try:
        changed = base if conf is None else flat(_compose(choices, [*own, *overrides], strict=True) or {})
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(str(error).splitlines()[0]) from None

    # keys that are newer than the run, and keys that are computed again
    newer = [
        key
        for key, value in base.items()
        if not (has(before, key) or _is_new(key) or _is_argument(conf, key) or value == "???")
    ]
    set_by_run = {*by_key(previous), *(leaf for each in own for leaf in each.leaves)}
    filled_in = [key for key in FILLED_IN if key not in set_by_run and base.get(key, "") == FILLED_IN[key]]
    for key in [*newer, *filled_in]:
        put(before, key, base[key])

    # the overrides, and the keys derived from them; a key that the run had set itself stays
    after, absent = copy.deepcopy(before), object()
    new = {leaf: absent if each.deletes else value for each in overrides for leaf, value in each.leaves.items()}
    new = {key: changed.get(key, value) for key, value in new.items()}
    follow = {
        key: changed.get(key, absent)
        for key in {**base, **changed}
        if base.get(key, absent) != changed.get(key, absent)
        and (get(before, key) if has(before, key) else absent) == base.get(key, absent)
    }
    for key, value in {**follow, **new}.items():
        if value is absent:
            remove(after, key)
        elif not _is_new(key):
            put(after, key, copy.deepcopy(value))

    # what is reported
    secrets = [key for key, value in flat(after).items() if "${oc.env:" in str(value) or value == "***"]
    _ask(asked, after, secrets, new, "secrets are not saved with a run")  # a config from elsewhere gets none
    changes = _changes(before, after)
    more = f", and {len(changes) - MOST} more" if len(changes) > MOST else ""
    notes = [f"repeats {run.name}{', with ' if changes else ''}{', '.join(changes[:MOST])}{more}"]
    if newer:
        added = ", ".join(f"{key}={shown(get(before, key))}" for key in newer)
        notes.append(f"note: {run.name} is of an older version, and gets today's defaults for {added}.")
    if conf is None and changes:
        notes.append(
            f"note: conf/ no longer has the options or keys of {run.name}: keys that followed the overridden ones stay "
            "as they are."
        )

    # the new run's own keys
    overridden = by_key(today["overrides"])
    kept = [text for text in previous if key_of(text) not in overridden and not _is_new(key_of(text))]
    name = run.name if today["from_run"] is None else str(Path(run.name).resolve())
    after |= {key: today[key] for key in NEW if key in today}
    after |= {"overrides": [*kept, *today["overrides"]], "from_run": None, "from_wandb": None, "repeats": name}
    config = {key: after[key] for key in {**today, **after} if key in after}
    return replace(run, config=config, changes=changes, notes=notes)


def _check_overrides(overrides: list[Override], before: Plain, name: str, asked: str) -> None:
    """Raise UserError for an override that chooses another option, refers to another key, or sets an unknown key."""
    for each in overrides:
        option = get(before, f"choices.{each.key}")
        if each.chooses and each.value != option:
            raise UserError(
                f"{each.text}: {asked} keeps the options of that run ({each.key}={shown(option)}). Set single keys "
                f"instead, as in {each.key}.KEY=VALUE, or start from conf/ without {asked.partition('=')[0]}."
            )
        if TO_KEYS.fullmatch(each.text) and "${" in each.text:
            raise UserError(f"{each.text}: with {asked} an override cannot refer to another key: give the value.")
        for leaf in () if each.chooses or each.deletes or each.adds or _is_new(each.key) else each.leaves:
            if not has(before, leaf):
                raise UserError(f"{each.text}: {name} has no {leaf}; +{each.text} adds it.")


def _is_new(key: str) -> bool:
    return key.split(".")[0] in NEW


def _is_argument(conf: Plain | None, key: str) -> bool:
    """Check for an argument of a class, such as model.net.norm. If a run lacks it, the default of the class is used."""
    parts = key.split(".")
    return any(has(conf or {}, ".".join([*parts[:depth], "_target_"])) for depth in range(2, len(parts)))


def _parsed(text: str) -> list[Override]:
    """Parse an override of the earlier run. Returns a list of one, or an empty one if it is not applied again.

    Not applied are keys in `NEW`, options of groups, overrides that cannot be read (W&B may have shortened them), and
    references to anything but other keys, because the run may come from somebody else.
    """
    if not TO_KEYS.fullmatch(text) or (_is_new(key_of(text)) and not key_of(text).startswith("paths")):
        return []
    try:
        return [each for each in parse([text]) if not each.chooses]
    except UserError:
        return []


def _compose(choices: Plain, overrides: list[Override], strict: bool = False) -> Plain | None:
    """Compose conf/ with a run's options and overrides. Returns None if conf/ no longer has them, unless `strict`."""
    from alexlab.commands.cli import with_absolute_paths

    options = {key: value if isinstance(value, list) else [value] for key, value in choices.items()}
    if not all(OPTION.fullmatch(str(name)) for key, names in options.items() for name in (key, *names)):
        return None
    chosen = [f"{key}={names[0] if len(names) == 1 else '[' + ','.join(names) + ']'}" for key, names in options.items()]
    # the command has initialized Hydra, with its --config-dir; a notebook or a test has not
    is_initialized = GlobalHydra.instance().is_initialized()
    folder = contextlib.nullcontext() if is_initialized else hydra.initialize_config_dir(str(CONF), version_base="1.3")
    try:
        with folder:
            plain = configs.resolve(hydra.compose("train", [*chosen, *(each.text for each in overrides)]))
    except (HydraException, OmegaConfBaseException):
        if strict:
            raise
        return None
    return plain | {"data": with_absolute_paths(plain.get("data"))}


# -- what is reported


def _changes(before: Plain, result: Plain) -> list[str]:
    """Return the settings that differ, written as overrides."""
    old, new = flat(before), flat(result)
    changed = [key for key, value in new.items() if key not in old or old[key] != value]
    lines = [f"{key}={shown(new[key])} (the run has {shown(old[key]) if key in old else 'none'})" for key in changed]
    return lines + [f"~{key} (the run has {shown(value)})" for key, value in old.items() if key not in new]


def _other_images(name: str, then: Plain, now: Plain) -> str | None:
    """Return a sentence if the images are not those of the run, by their fingerprints."""
    counts = _dict(then.get("images"))
    if not isinstance(then.get("fingerprint"), dict):
        return f"it is unknown which images {name} was trained on: it stopped before it wrote that down."
    parts = [
        f"{split} {now['images'].get(split)} of fingerprint {now['fingerprint'].get(split)} (the run has "
        f"{counts.get(split)} of {then['fingerprint'].get(split)})"
        for split in changed_splits(then, now)
    ]
    return f"the images differ from those of {name}: {', '.join(parts)}." if parts else None
