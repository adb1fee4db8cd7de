"""`from_run=` and `from_wandb=`: train again with the config and seed of an earlier run, in a new directory.

The new run gets the saved config of the earlier one, not the defaults of conf/. Overrides of the command line change
that config, and the keys in `FOLLOWS` follow them.
"""

import copy
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alexlab.data.class_names import SHIPPED
from alexlab.data.fingerprint import changed_splits
from alexlab.engine import checkpoint_io, provenance
from alexlab.engine import config as configs
from alexlab.engine.config import Plain, flat
from alexlab.engine.errors import UserError, counted
from alexlab.engine.overrides import Override, by_key, get, has, key_of, parse, put, remove, shown
from alexlab.engine.resume import holds_run
from alexlab.engine.run_dir import find_run, read_summary
from alexlab.engine.run_dir import shown as shown_path
from alexlab.engine.schema import TrainConfig
from alexlab.engine.settings import is_own_checkpoint
from alexlab.engine.validation import reset

# top-level keys that are never copied from the earlier run
NEW = ["run_dir", "overrides", "paths", "sweep", "resume", "dry_run", "from_run", "from_wandb"]
NEW += ["repeats", "command", "allow"]
# keys whose value may be a path, of which W&B has only the last part
PATHS = ["data.root", "data.file", "data.path", "data.class_names", "init_from", "ckpt_path", "task.teacher"]
PATHS += ["loss.class_weights"]
# key -> key whose value conf/ gives it: an override of the second sets both, unless the run has set the first
FOLLOWS = {
    "model.net.name": "model.name",
    "model.net.pretrained": "model.pretrained",
    "model.net.in_channels": "model.in_channels",
    "optimizer.bias_lr_factor": "model.bias_lr_factor",
    "optimizer.lr": "model.training.lr",
    "optimizer.weight_decay": "model.training.weight_decay",
    "scheduler.warmup": "model.training.warmup",
    "scheduler.monitor": "monitor",
}


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
            counts = ", ".join(f"{split} {counted(dataset['images'].get(split, 0), 'image')}" for split in changed)
            images = f"the images differ from those of {self.name}: {counts} with another fingerprint."
        return [line for line in (images, provenance.difference(self.code, self.name, self.patch)) if line]


def repeat(today: Plain) -> Repeated | None:
    """Return the run that `from_run` or `from_wandb` names, with the config to train it again.

    Returns None if neither is set, or if `resume=auto` resumes a repetition that has already started.

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
    run = _read_directory(today) if today["from_run"] is not None else _read_wandb(today, asked[0])
    if is_own_checkpoint(run.config):  # resumed: the overrides name the checkpoint that the run first started from
        values = dict(str(text).split("=", 1) for text in run.config.get("overrides") or [] if "=" in str(text))
        for key in ("ckpt_path", "init_from"):
            if key == "init_from" and run.config[key] not in (None, "latest"):  # older versions did not keep it
                continue
            if values.get(key) == "latest":
                raise UserError(f"{asked[0]} started from {key}=latest, which was another run then: use that one.")
            run.config[key] = None if values.get(key, "null") == "null" else values[key]
    return _with_overrides(run, today, asked[0])


# -- the run


def _read_directory(today: Plain) -> Repeated:
    run_dir = find_run(today["from_run"], configs.logs_of(today), "", "from_run", Path(today["run_dir"]))
    dataset, last = read_summary(run_dir).get("dataset"), run_dir / "checkpoints" / checkpoint_io.LAST
    if dataset is None and last.is_file():  # a killed run has no summary
        dataset = checkpoint_io.load(last)["alexlab"]["dataset"]
    config, patch = configs.load(run_dir / "config.yaml"), shown_path(run_dir / "code.patch")
    return Repeated(
        shown_path(run_dir), config, _dict(dataset), provenance.read(run_dir), shlex.join(["git", "apply", patch])
    )


def _read_wandb(today: Plain, asked: str) -> Repeated:
    from alexlab.loggers.wandb_api import fetch
    from alexlab.loggers.wandb_logger import CODE_ARTIFACT, code_alias

    name = today["from_wandb"]
    config, summary = fetch(name)
    config = configs.upgrade(config)
    config["run_dir"], floats = str(config.pop("run", "")), config.pop("floats", None)
    config = _with_floats(config, floats or [])
    if get(config, "resume.run") is not None and config.get("ckpt_path") in ("last.ckpt", "previous.ckpt"):
        config["ckpt_path"] = f"{config['run_dir']}/checkpoints/last.ckpt"  # the run's own; W&B has only the file name
    overridden = by_key(today["overrides"])
    limits = [key for key in flat(config) if key.startswith("trainer.limit_") and get(config, key) == 1]
    _ask(asked, config, limits if floats is None else [], overridden, "W&B stores one batch and all (1.0) alike")
    own = ["ckpt_path"] if is_own_checkpoint(config) else []
    paths = [key for key in PATHS if key not in own and isinstance(get(config, key), str)]
    paths = [key for key in paths if get(config, key) not in ("auto", *SHIPPED)]
    _ask(asked, config, paths, overridden, "W&B has only the last part of paths")
    code = _dict(summary.get("code")) or _dict(summary.get("git"))
    patch = f"wandb artifact get {name.rpartition('/')[0]}/{CODE_ARTIFACT}:{code_alias(code)} --root code"
    return Repeated(name, config, _dict(summary.get("dataset")), code, f"{patch} && git apply code/code.patch")


def _with_floats(node: Any, floats: list[str], above: str = "") -> Any:
    """Turn whole numbers back into the floats that they were; "augment.scale.1" is in a list."""
    if isinstance(node, dict):
        return {key: _with_floats(value, floats, f"{above}.{key}") for key, value in node.items()}
    if isinstance(node, list):
        return [_with_floats(value, floats, f"{above}.{index}") for index, value in enumerate(node)]
    return float(node) if isinstance(node, int) and above.removeprefix(".") in floats else node


def _dict(value: Any) -> Plain:
    return value if isinstance(value, dict) else {}


def _ask(asked: str, config: Plain, keys: list[str], overridden: Any, why: str) -> None:
    """Raise UserError if the command line does not set all of `keys`."""
    missing = [f"{key}=... (the run has {shown(get(config, key))})" for key in keys if key not in overridden]
    if missing:
        raise UserError(f"{asked}: {why}: add {', '.join(missing)}.")


# -- the saved config with the new overrides


def _with_overrides(run: Repeated, today: Plain, asked: str) -> Repeated:
    previous = [str(text) for text in run.config.get("overrides") or []]
    saved = {key: value for key, value in run.config.items() if key not in NEW}
    if "paths.data" in by_key(today["overrides"]):
        raise UserError(f"paths.data has no effect with {asked}, which has the run's data.root: give data.root=PATH.")
    overrides = [each for each in parse(today["overrides"]) if each.key.split(".")[0] not in NEW]
    for each in overrides:
        _check_override(each, saved, run.name, asked)

    # the overrides, and the keys that follow them
    config, own = copy.deepcopy(saved), by_key(previous)
    values = {key: get(today, key) for each in overrides if not each.chooses for key in each.leaves}
    for key, source in FOLLOWS.items():
        follows = has(saved, key) and key not in own and get(saved, source) in (None, get(saved, key))
        if source in values and follows:
            values.setdefault(key, values[source])
    for key, value in values.items():
        put(config, key, value)
    for each in overrides:
        if each.deletes:
            remove(config, each.key)
            reset(TrainConfig, config, each.key)

    # what is reported
    old, result = flat(saved), flat({key: value for key, value in config.items() if key not in NEW})
    secrets = [key for key, value in result.items() if "${oc.env:" in str(value) or value == "***"]
    _ask(asked, config, secrets, values, "secrets are not saved with a run")  # a config from elsewhere gets none
    changes = [
        f"{key}={shown(value)} (the run has {shown(old[key]) if key in old else 'none'})"
        for key, value in result.items()
        if key not in old or old[key] != value
    ]
    changes += [f"~{key} (the run has {shown(value)})" for key, value in old.items() if key not in result]
    notes = [f"repeats {run.name}{', with ' if changes else ''}{', '.join(changes)}"]

    # the new run's own keys
    again = by_key(today["overrides"])
    kept = [text for text in previous if key_of(text) not in again and key_of(text).split(".")[0] not in NEW]
    name = run.name if today["from_run"] is None else str(Path(run.name).resolve())
    config |= {key: today[key] for key in NEW if key in today}
    configs.use_own_disk_cache(config, by_key([*previous, *today["overrides"]]))
    config |= {"overrides": [*kept, *today["overrides"]], "from_run": None, "from_wandb": None, "repeats": name}
    return replace(run, config={key: config[key] for key in {**today, **config} if key in config}, notes=notes)


def _check_override(each: Override, saved: Plain, name: str, asked: str) -> None:
    """Raise UserError for an override that chooses another option, refers to another key, or sets an unknown key."""
    option = get(saved, f"choices.{each.key}")
    if each.chooses and each.value != option:
        raise UserError(
            f"{each.text}: {asked} keeps the options of that run ({each.key}={shown(option)}). Set single keys "
            f"instead, as in {each.key}.KEY=VALUE, or start from conf/ without {asked.partition('=')[0]}."
        )
    if "${" in each.text.replace("${oc.env:", ""):
        raise UserError(f"{each.text}: with {asked} an override cannot refer to another key: give the value.")
    for leaf in () if each.chooses or each.adds else each.leaves:
        if not has(saved, leaf):
            raise UserError(f"{each.text}: {name} has no {leaf}{'' if each.deletes else f'; +{each.text} adds it'}.")
