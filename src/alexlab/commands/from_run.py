"""`from_run=` and `from_wandb=`: train again with the config and seed of an earlier run, in a new directory.

The new run gets the saved config of the earlier one, not the defaults of conf/. Overrides of the command line change
that config. So that keys that refer to an overridden one follow it (`model.net.name: ${model.name}`), conf/ is composed
with the options and overrides of the earlier run, and the saved values replace those that differ.
"""

import contextlib
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alexlab.commands import cli
from alexlab.data.class_names import SHIPPED
from alexlab.data.fingerprint import changed_splits
from alexlab.engine import checkpoint_io, provenance
from alexlab.engine import config as configs
from alexlab.engine.config import Plain, flat
from alexlab.engine.errors import UserError
from alexlab.engine.overrides import Override, by_key, get, has, key_of, parse, put, remove, shown
from alexlab.engine.resume import holds_run
from alexlab.engine.run_dir import find_run, read_summary
from alexlab.engine.run_dir import shown as shown_path
from alexlab.engine.settings import is_own_checkpoint

# top-level keys that are never copied from the earlier run
NEW = (
    "run_dir",
    "overrides",
    "paths",
    "sweep",
    "resume",
    "dry_run",
    "from_run",
    "from_wandb",
    "repeats",
    "command",
    "allow",
)
GROUPS = ("trainer", "model", "data", "augment", "optimizer", "scheduler", "logger", "callbacks", "choices", "resume")
# keys that older versions filled in when a run started; they are computed again if conf/ has this value
FILLED_IN = {"data.num_classes": None, "model.mean": "auto", "model.std": "auto", "logger.wandb.group": None}
OPTION = re.compile(r"[\w-]+(/[\w-]+)*")
TO_KEYS = re.compile(r"(?:[^$]|\$\{[\w.]+\})*")  # a text that refers to other keys only: "${seed}_x"
MOST = 12  # changes that are printed
ABSENT = object()


@dataclass(frozen=True)
class Repeated:
    """An earlier run, and the config to train it again."""

    name: str  # the run's directory, or ENTITY/PROJECT/RUN
    config: Plain  # what to train with, to be validated
    dataset: Plain  # the run's images, as the datamodule describes them; {} if unknown
    code: Plain  # the run's code.json, as `provenance.read` returns it
    patch: str  # the command that applies the run's code.patch
    notes: list[str] = field(default_factory=list)  # lines to print once

    def compare(self, dataset: Plain) -> list[str]:
        """Return a sentence for the images of the new run (`dataset`), and for the code, if they are not the run's."""
        then, images = self.dataset, None
        if not isinstance(then.get("fingerprint"), dict):
            images = f"it is unknown which images {self.name} was trained on: that run stopped before it recorded them."
        elif changed := changed_splits(then, dataset):
            counts = _dict(then.get("images"))
            parts = [
                f"{split} {dataset['images'].get(split)} of fingerprint {dataset['fingerprint'].get(split)} (the run "
                f"has {counts.get(split)} of {then['fingerprint'].get(split)})"
                for split in changed
            ]
            images = f"the images differ from those of {self.name}: {', '.join(parts)}."
        return [line for line in (images, provenance.difference(self.code, self.name, self.patch)) if line]


def repeat(today: Plain) -> Repeated | None:
    """Return the run that `from_run` or `from_wandb` names, with the config to train it again.

    Returns None if neither is set, or if `resume=auto` resumes a repetition that has already started.

    Args:
        today: the config that the command line composes.

    Raises:
        UserError: the run does not exist; overrides do not fit it; or the saved config lacks values, such as secrets.
    """
    asked = [f"{key}={today[key]}" for key in ("from_run", "from_wandb") if today.get(key) is not None]
    resume = today["resume"]["run"]
    if not asked or (resume is not None and holds_run(Path(today["run_dir"]))):
        return None
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)}: only one run can be repeated: remove one of them.")
    if resume not in (None, "auto"):
        raise UserError(f"{asked[0]} starts a new run, and resume={resume} continues one: remove one of them.")
    run = _read_directory(today, asked[0]) if today["from_run"] is not None else _read_wandb(today, asked[0])
    if is_own_checkpoint(run.config):  # it was resumed: its overrides name the checkpoint that it first started from
        values = dict(str(text).split("=", 1) for text in run.config["overrides"] if "=" in str(text))
        for key in ("ckpt_path", "init_from"):
            if values.get(key) == "latest":
                raise UserError(f"{asked[0]} started from {key}=latest, which was another run then: use that one.")
            run.config[key] = None if values.get(key, "null") == "null" else values[key]
    return _with_overrides(run, today, asked[0])


# -- the run


def _read_directory(today: Plain, asked: str) -> Repeated:
    sweep = Path(today["run_dir"]).parent
    in_sweep = any(folder.name == "multiruns" for folder in sweep.parents)
    besides = sweep if in_sweep else Path(today["run_dir"])  # all jobs of a sweep repeat the same run
    run_dir = find_run(today["from_run"], Path(today["paths"]["logs"]), "", "from_run", besides)
    dataset, last = read_summary(run_dir).get("dataset"), run_dir / "checkpoints" / checkpoint_io.LAST
    if dataset is None and last.is_file():  # a killed run has no summary
        dataset = checkpoint_io.load(last)["alexlab"]["dataset"]
    config, patch = _complete(configs.load(run_dir / "config.yaml"), asked), shown_path(run_dir / "code.patch")
    return Repeated(shown_path(run_dir), config, _dict(dataset), provenance.read(run_dir), f"git apply {patch}")


def _read_wandb(today: Plain, asked: str) -> Repeated:
    from alexlab.loggers.wandb_api import fetch
    from alexlab.loggers.wandb_logger import CODE_ARTIFACT, code_alias

    name = today["from_wandb"]
    config, summary = fetch(name)
    config = _complete(configs.upgrade(config), asked)
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
    paths += [key for key in ("data.file", "data.path") if has(config, key)]
    paths += [key for key in ("task.teacher", "loss.class_weights") if isinstance(get(config, key), str)]
    paths = [key for key in paths if get(config, key) not in (None, "auto")]
    _ask(asked, config, paths, overridden, "W&B has only the last part of paths")
    code = _dict(summary.get("code")) or _dict(summary.get("git"))
    patch = f"wandb artifact get {name.rpartition('/')[0]}/{CODE_ARTIFACT}:{code_alias(code)} --root code"
    return Repeated(name, config, _dict(summary.get("dataset")), code, f"{patch} && git apply code/code.patch")


def _make_float(node: Any, parts: list[str]) -> None:
    """Turn a whole number back into the float that it was; "augment.scale.1" is in a list."""
    with contextlib.suppress(LookupError, TypeError, ValueError):  # the run has no such key
        for part in parts[:-1]:
            node = node[int(part) if isinstance(node, list) else part]
        last: Any = int(parts[-1]) if isinstance(node, list) else parts[-1]
        if isinstance(node[last], int):
            node[last] = float(node[last])


def _dict(value: Any) -> Plain:
    return value if isinstance(value, dict) else {}


def _complete(config: Plain, asked: str) -> Plain:
    if all(isinstance(config.get(key), dict) for key in GROUPS) and isinstance(config.get("overrides"), list):
        return config
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
    previous = [str(text) for text in run.config["overrides"]]
    saved = {key: value for key, value in run.config.items() if key not in NEW}
    overrides = [each for each in parse(today["overrides"]) if each.key.startswith("paths") or not _is_new(each.key)]
    for each in overrides:
        _check_override(each, saved, run.name, asked)
    overrides = [each for each in overrides if not each.chooses]  # the rest choose an option that the run already has

    # what conf/ would give with the run's options and overrides, with references that are not resolved yet
    own = [each for text in previous for each in _parsed(text)]
    conf = _compose(run.config["choices"], own)
    config = conf or _escaped(saved)
    base, before = flat(_resolved(config)), flat(saved)

    # the run's values replace those that differ; keys that older versions filled in are computed again
    set_by_run = {*by_key(previous), *(leaf for each in own for leaf in each.leaves)}
    filled_in = [key for key in FILLED_IN if key not in set_by_run and base.get(key, "") == FILLED_IN[key]]
    for key, value in before.items():
        if key not in filled_in and repr(base.get(key, ABSENT)) != repr(value):  # 1 is not 1.0
            put(config, key, _escaped(value))
    newer = [key for key in base if key not in before and not _is_new(key)]
    arguments = [key for key in newer if base[key] == "???" or _is_argument(config, key)]
    for key in arguments:
        remove(config, key)

    # the overrides; keys that refer to them follow
    before = flat(_resolved(config))
    for each in overrides:
        if each.deletes:
            remove(config, each.key)
        for key, value in () if each.deletes else each.leaves.items():
            put(config, key, value)
    try:
        after = {key: value for key, value in _resolved(config).items() if key not in NEW}
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from None

    # what is reported
    old, result = {key: value for key, value in before.items() if not _is_new(key)}, flat(after)
    secrets = [key for key, value in result.items() if "${oc.env:" in str(value) or value == "***"]
    overridden = {key for each in overrides for key in each.leaves}
    _ask(asked, after, secrets, overridden, "secrets are not saved with a run")  # a config from elsewhere gets none
    changes = [
        f"{key}={shown(value)} (the run has {shown(old[key]) if key in old else 'none'})"
        for key, value in result.items()
        if key not in old or old[key] != value
    ]
    changes += [f"~{key} (the run has {shown(value)})" for key, value in old.items() if key not in result]
    more = f", and {len(changes) - MOST} more" if len(changes) > MOST else ""
    notes = [f"repeats {run.name}{', with ' if changes else ''}{', '.join(changes[:MOST])}{more}"]
    if added := [f"{key}={shown(base[key])}" for key in newer if key not in arguments]:
        names = ", ".join(added)
        notes.append(f"note: {run.name} is of an older version, and gets today's defaults for {names}.")
    if conf is None and changes:
        notes.append(
            f"note: conf/ no longer has the options or keys of {run.name}: keys that refer to overridden ones stay "
            "as they are."
        )

    # the new run's own keys
    again = by_key(today["overrides"])
    kept = [text for text in previous if key_of(text) not in again and not _is_new(key_of(text))]
    name = run.name if today["from_run"] is None else str(Path(run.name).resolve())
    after |= {key: today[key] for key in NEW if key in today}
    after |= {"overrides": [*kept, *today["overrides"]], "from_run": None, "from_wandb": None, "repeats": name}
    return replace(run, config={key: after[key] for key in {**today, **after} if key in after}, notes=notes)


def _check_override(each: Override, saved: Plain, name: str, asked: str) -> None:
    """Raise UserError for an override that chooses another option, refers to another key, or sets an unknown key."""
    option = get(saved, f"choices.{each.key}")
    if each.chooses and each.value != option:
        raise UserError(
            f"{each.text}: {asked} keeps the options of that run ({each.key}={shown(option)}). Set single keys "
            f"instead, as in {each.key}.KEY=VALUE, or start from conf/ without {asked.partition('=')[0]}."
        )
    if TO_KEYS.fullmatch(each.text) and "${" in each.text:
        raise UserError(f"{each.text}: with {asked} an override cannot refer to another key: give the value.")
    for leaf in () if each.chooses or each.adds or _is_new(each.key) else each.leaves:
        if not has(saved, leaf):
            raise UserError(f"{each.text}: {name} has no {leaf}{'' if each.deletes else f'; +{each.text} adds it'}.")


def _is_new(key: str) -> bool:
    return key.split(".")[0] in NEW


def _is_argument(config: Plain, key: str) -> bool:
    """Check for an argument of a class, such as model.net.norm. If a run lacks it, the default of the class is used."""
    parts = key.split(".")
    return any(has(config, ".".join([*parts[:depth], "_target_"])) for depth in range(2, len(parts)))


def _parsed(text: str) -> list[Override]:
    """Parse an override of the earlier run. Returns a list of one, or an empty one if it is not applied again.

    Not applied are keys in `NEW`, options of groups, overrides that cannot be read (W&B may have shortened them), and
    references to anything but other keys, because the run may come from somebody else.
    """
    if not TO_KEYS.fullmatch(text) or (_is_new(key_of(text)) and not key_of(text).startswith("paths")):
        return []
    with contextlib.suppress(UserError):
        return [each for each in parse([text]) if not each.chooses]
    return []


def _compose(choices: Plain, overrides: list[Override]) -> Plain | None:
    """Compose conf/ with a run's options and overrides, without resolving it; None if conf/ no longer has them."""
    options = {key: value if isinstance(value, list) else [value] for key, value in choices.items()}
    if not all(OPTION.fullmatch(str(name)) for key, names in options.items() for name in (key, *names)):
        return None
    words = [word for word in sys.argv if word.startswith(cli.CONFIG_DIR)]
    words += [f"{key}={names[0] if len(names) == 1 else '[' + ','.join(names) + ']'}" for key, names in options.items()]
    with contextlib.suppress(HydraException, OmegaConfBaseException):
        composed, _ = cli.compose(cli.COMMANDS["train"], [*words, *(each.text for each in overrides)])
        configs.resolve(composed)  # raises for a reference to nothing
        return OmegaConf.to_container(composed, resolve=False)  # type: ignore[return-value]
    return None


def _resolved(config: Plain) -> Plain:
    plain = configs.resolve(OmegaConf.create(config))
    cli.make_paths_absolute(plain)
    return plain


def _escaped(value: Any) -> Any:
    """Return a value of the run such that nothing in it is a reference: the run may come from somebody else."""
    return configs.each_text(value, lambda text: re.sub(r"(\\*)\$\{", r"\1\1\\${", text))
