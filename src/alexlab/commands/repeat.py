"""`from_run=` and `from_wandb=`: a run anew, in a new directory, with the config and seed of one that there was."""

import json
import logging
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from omegaconf import DictConfig

from alexlab.commands import restore
from alexlab.commands.reworded import OWN, Plain, differences, follow, key_of, stays
from alexlab.data.class_names import SHIPPED
from alexlab.data.fingerprint import changed_splits
from alexlab.engine import checkpoint_io as checkpoint
from alexlab.engine import config as configs
from alexlab.engine import launcher as launch
from alexlab.engine import naming as identity
from alexlab.engine import options, rules
from alexlab.engine import provenance as code_state
from alexlab.engine import run_dir as rundir
from alexlab.engine.config import CONF
from alexlab.engine.errors import UserError
from alexlab.engine.kinds import shown
from alexlab.engine.options import at, put, take
from alexlab.engine.settings import is_own_checkpoint

log = logging.getLogger("alexlab")

NOTES = "repeats.json"  # in the run's directory: what run it repeats, and how it differs
MOST = 12  # settings that are told


@dataclass
class Origin:
    """The run that is repeated.

    Attributes:
        asked: the word that names it.
        name: a directory, or ENTITY/PROJECT/RUN.
        config: plain values, and the run's own: what is given now is not in it.
        dataset: what it was trained on, as `ImageFolders.describe` tells, or {}.
        code: as `code_state.read` tells.
        applies: the command that applies its patch.
        changes: the settings that are other now, in words.
        differs: the images or the code where they are others, in words.
    """

    asked: str
    name: str
    config: Plain
    dataset: Plain
    code: Plain
    applies: str
    changes: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)

    def compare(self, described: Plain) -> None:
        """Say where the images here, or the code, are not those of the run."""
        other = code_state.difference(self.code, self.name, self.applies)
        self.differs = [line for line in (_images(self.name, self.dataset, described), other) if line]
        for line in self.differs:
            restore.tell(f"warning: {line}")

    def notes(self) -> Plain:
        return {"run": self.name, "changes": self.changes, "differs": self.differs, "code": self.code}


def repeat(config: DictConfig) -> tuple[DictConfig, Origin | None]:
    """The config to train with, and whose it is; as it came, and None, where no run is to be repeated, or the directory
    holds the repetition already, which goes on (resume=auto).

    Raises:
        UserError: no such run, words that do not fit it, or a value that the run's config does not tell.
    """
    asked = [f"{key}={config[key]}" for key in ("from_run", "from_wandb") if config.get(key) is not None]
    if not asked or restore.goes_on(config):
        return config, None
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)}: one run is repeated at a time: leave one of them out.")
    if config.resume.run not in (None, "auto"):
        raise UserError(f"{asked[0]} trains anew, and resume={config.resume.run} goes on: leave one of them out.")
    today = configs.plain(config)
    words = {key_of(word): word for word in today["overrides"]}
    origin = _of_directory(config) if config.from_run is not None else _of_board(today, words)
    changed = _changed(origin, today, words)
    made = configs.create(changed)
    rules.check(made)
    return made, origin


def tell_again(run_dir: Path) -> None:
    """In train.log what the command has printed."""
    if launch.rank() == 0 and (run_dir / NOTES).is_file():
        notes = json.loads((run_dir / NOTES).read_text())
        log.info("%s", _as(notes["run"], notes["changes"]), extra={"file_only": True})
        for line in notes["differs"]:
            log.warning("%s", line, extra={"file_only": True})


def _as(name: str, changes: list[str]) -> str:
    more = f", and {len(changes) - MOST} more" if len(changes) > MOST else ""
    return f"as {name}, but for {', '.join(changes[:MOST])}{more}" if changes else f"as {name}"


# -- where the run comes from


def _of_directory(config: DictConfig) -> Origin:
    asked, sweep = f"from_run={config.from_run}", Path(config.run_dir).parent
    sweeping = any(folder.name == "multiruns" for folder in sweep.parents)
    besides = sweep if sweeping else Path(config.run_dir)  # all jobs repeat the same one
    run_dir = rundir.find_run(config.from_run, Path(config.paths.logs), "", "from_run", besides)
    plain = configs.plain(configs.load(run_dir / "config.yaml"))
    dataset = rundir.read_summary(run_dir).get("dataset")
    last = run_dir / "checkpoints" / checkpoint.LAST
    if dataset is None and last.is_file():  # it was killed
        dataset = checkpoint.load(last)["alexlab"]["dataset"]
    name = rundir.shown(run_dir)
    patch = f"git apply {rundir.shown(run_dir / 'code.patch')}"
    origin = Origin(asked, name, plain, dataset or {}, code_state.read(run_dir), patch)
    _check_whole(origin)
    here = Path(str(plain.get("ckpt_path"))).parent == run_dir / "checkpoints"
    _begin_as_then(origin, here or is_own_checkpoint(plain))  # which knows it of a run that was moved
    return origin


def _of_board(today: Plain, words: dict[str, str]) -> Origin:
    from alexlab.loggers.wandb_api import fetch
    from alexlab.loggers.wandb_logger import CODE_ARTIFACT, code_alias

    name = today["from_wandb"]
    config, summary = fetch(name)
    config = configs.with_current_targets(config)
    dataset, code = _dict(summary.get("dataset")), _dict(summary.get("code")) or _dict(summary.get("git"))
    board = name.rpartition("/")[0]
    patch = f"wandb artifact get {board}/{CODE_ARTIFACT}:{code_alias(code)} --root code"
    patch = f"{patch} && git apply code/code.patch"
    origin = Origin(f"from_wandb={name}", name, identity.without_paths(config), dataset, code, patch)
    _check_whole(origin)
    plain = origin.config
    run, floats = str(plain.pop("run", "")), plain.pop("floats", None)
    plain["run_dir"] = run  # SWEEP/JOB of a sweep's
    _restore_floats(plain, floats)
    if floats is None:
        unknown = [key for key in configs.flat(plain) if key.startswith("trainer.limit_") and at(plain, key) == 1]
        _ask(origin, words, unknown, "W&B does not keep whether it was one batch or all of them (1.0)")
    ckpts = (checkpoint.LAST, checkpoint.PREVIOUS)
    _begin_as_then(origin, own=plain["resume"]["run"] is not None and plain.get("ckpt_path") in ckpts)
    files = [key for key in ("ckpt_path", "init_from", "data.class_names") if at(plain, key) is not None]
    if at(plain, "data.class_names") in SHIPPED:
        files.remove("data.class_names")
    _ask(origin, words, files, "W&B keeps the names of folders and files alone")
    root, there = plain["data"].get("root"), Path(today["paths"]["data"])
    near = Path(options.read("data", plain["choices"].get("data"), today).get("root") or there / str(root))
    near = next((path for path in (near, there / str(root)) if path.name == root), near)
    others = "data" in words and today["choices"].get("data") != plain["choices"].get("data")
    if "data.root" not in words and not others:
        made = plain["data"].get("demo_seed") is not None or plain["data"].get("idx") is not None
        if near.name != root or not (near.exists() or made):
            raise UserError(
                f"{origin.asked}: its images were in a folder {root}, and {there} has none of that name: give it with "
                "data.root=PATH."
            )
        plain["data"]["root"] = str(near)
    elif PurePath(str(today["data"]["root"])).name == root:
        plain["data"]["root"] = today["data"]["root"]
    return origin


def _restore_floats(plain: Plain, keys: Any) -> None:
    """Make 1.0 of those that W&B has made 1; "augment.scale.1" is in a list."""
    for key in keys if isinstance(keys, list) else []:
        node: Any = plain
        value: Any = plain
        place: Any = None
        for part in str(key).split("."):
            node, place = value, int(part) if isinstance(value, list) and part.isdecimal() else part
            inside = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
            value = node[place] if place in inside else None
        if isinstance(value, int):
            node[place] = float(value)


def _dict(value: Any) -> Plain:
    """What a summary has, which may be anybody's."""
    return value if isinstance(value, dict) else {}


def _check_whole(origin: Origin) -> None:
    groups = ("trainer", "model", "data", "augment", "optimizer", "scheduler", "logger", "callbacks", "choices")
    plain = origin.config
    whole = all(isinstance(plain.get(key), dict) for key in (*groups, "resume"))
    if not whole or not isinstance(plain.get("overrides"), list):
        raise UserError(
            f"{origin.asked}: its config is not whole, as of a run that failed before it began, or is another "
            "program's: choose another run."
        )


def _begin_as_then(origin: Origin, own: bool) -> None:
    """A run that went on was begun without its own checkpoint; what it was begun with only its first words tell."""
    if not own:
        return
    plain = origin.config
    given = dict(str(word).split("=", 1) for word in plain["overrides"] if "=" in str(word))
    plain["ckpt_path"] = None
    for key in ("ckpt_path", "init_from"):
        if given.get(key, "null") == "latest":
            raise UserError(f"{origin.asked} was begun with {key}=latest, which was another run then: name that one.")
        plain[key] = None if given.get(key, "null") == "null" else given[key]


def _ask(origin: Origin, words: dict[str, str], keys: list[str], why: str) -> None:
    """Raises UserError for those of `keys` that the command line does not give."""
    missing = [f"{key}=... (there {shown(at(origin.config, key))})" for key in keys if key not in words]
    if missing:
        raise UserError(f"{origin.asked}: {why}: give {', '.join(missing)}.")


# -- its config, and what is given now


def _changed(origin: Origin, today: Plain, words: dict[str, str]) -> Plain:
    there = {key: value for key, value in origin.config.items() if key not in OWN}
    before = [str(word) for word in origin.config["overrides"]]
    given = {key_of(word) for word in before}
    original = json.loads(json.dumps(there))
    _forget(origin, there, given, words)
    removed = {word[1:].partition("=")[0] for word in before if word.startswith("~")}
    newer = options.add_newer(there, today, removed, OWN)
    changed: Plain = {**json.loads(json.dumps(there)), **{key: today[key] for key in OWN if key in today}}
    exchanged = {group for group in words if (CONF / group).is_dir() and group not in OWN
                 and today["choices"].get(group) != there["choices"].get(group)}  # fmt: skip
    renewed: set[str] = set()
    for group in (key for key in words if key in exchanged):
        renewed |= options.exchange(changed, today, group, words[group], before)
    kept = [word for word in before if stays(key_of(word), there, changed, exchanged)]
    for key, word in words.items():
        if key.split(".")[0] in OWN:
            continue
        inners, text = options.given(word)
        if not inners and text.startswith("{"):  # such as optimizer={lr:${label_smoothing}}
            raise UserError(f"{word}: beside {origin.asked} its keys are given one by one, as {key}.NAME=VALUE.")
        for inner in inners:
            take(changed, inner) if word.startswith("~") else put(changed, inner, at(today, inner))
    old = [word for word in kept if key_of(word) not in words and key_of(word).split(".")[0] not in OWN]
    given = {inner for word in words.values() for inner in options.given(word)[0]}
    paths = {key: value for key, value in _dict(origin.config.get("paths")).items() if f"paths.{key}" in given}
    follow(there, changed, renewed, (before, [*old, *words.values()]), words.values(), paths)
    _check_start(origin, today, words)
    hidden = [key for key, value in configs.flat(changed).items()
              if key.split(".")[0] not in OWN and ("${oc.env:" in str(value) or value == "***")]  # fmt: skip
    _ask(origin, {}, hidden, "secrets are not kept with a run")
    changed |= {"overrides": [*old, *today["overrides"]], "from_run": None, "from_wandb": None}
    changed["repeats"] = origin.name if today["from_run"] is None else str(Path(origin.name).resolve())
    origin.changes = differences(there, changed, original)
    restore.tell(_as(origin.name, origin.changes))
    if newer:
        restore.tell(f"note: {origin.name} has no {', '.join(newer)}: today's defaults.")
    return {key: changed[key] for key in {**today, **changed} if key in changed}  # in today's order


def _forget(origin: Origin, there: Plain, given: set[str], words: Collection[str]) -> None:
    """Take out of a run's config what was filled in when it ran: how many classes it had, of which sweep it was, and,
    where it may be another now, how its network's images are normalized."""
    if "data.num_classes" not in given:
        there["data"]["num_classes"] = options.default(there["choices"], "data.num_classes")
    for key in ("model.mean", "model.std") if any(word.split(".")[0] == "model" for word in words) else ():
        if key not in given and options.default(there["choices"], key) == "auto":
            put(there, key, "auto")
    board = there["logger"].get("wandb")
    sweep = PurePath(str(origin.config.get("run_dir"))).parent.name
    its = origin.config.get("run", "")
    sweeps = {sweep, sweep.removeprefix("sweep-"), *PurePath(str(its)).parts[:-1]}
    own = options.default(there["choices"], "logger.wandb.group")  # a recipe's
    if isinstance(board, dict) and "logger.wandb.group" not in given and board.get("group") != own:
        agent = re.fullmatch(r"[a-z0-9]{8}", str(board.get("group")))  # W&B's name of its sweep
        if agent or board.get("group") in sweeps:
            board["group"] = None


def _check_start(origin: Origin, today: Plain, words: dict[str, str]) -> None:
    """Its own checkpoint is no start to train it anew from."""
    named = today["ckpt_path"]
    if "ckpt_path" not in words or named is None or today["from_run"] is None:
        return
    path = Path(named).expanduser().resolve()
    run_dir = Path(origin.name).resolve()
    if path == run_dir or path.parent == run_dir / "checkpoints" or named == today["from_run"]:
        raise UserError(
            f"{origin.asked} trains it anew, and ckpt_path={named} is its own checkpoint: resume={origin.name} goes "
            "on with it, in its directory."
        )


def _images(name: str, then: Plain, now: Plain) -> str | None:
    """What to tell where the images are others."""
    ours, theirs = now["fingerprint"], then.get("fingerprint")
    if not isinstance(theirs, dict):
        return f"which images {name} was trained on is not known: it ended before it could tell."
    counts = _dict(then.get("images"))
    other = changed_splits(then, now)
    told = ", ".join(
        f"{split} {now['images'].get(split)} of fingerprint {ours.get(split)} (there {counts.get(split)} of "
        f"{theirs.get(split)})"
        for split in other
    )
    return f"the images differ from those of {name}: {told}." if other else None
