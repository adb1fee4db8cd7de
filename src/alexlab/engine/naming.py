"""What a run is called, and what others are told of its config: nothing of this machine's folders."""

import hashlib
import re
from pathlib import PurePath
from typing import Any

from omegaconf import DictConfig

from alexlab.engine import config as configs
from alexlab.engine import options
from alexlab.engine.kinds import shown
from alexlab.engine.overrides import get
from alexlab.engine.run_dir import name_of
from alexlab.engine.settings import IGNORED, same_as, settings_of

LONGEST = 80  # letters of a name
SHORT = {"seed": "s", "trainer.max_epochs": "ep", "data.batch_size": "bs", "optimizer.weight_decay": "wd",
         "label_smoothing": "smooth", "data.image_size": "px"}  # fmt: skip
# told by another part of the name, or no setting of what is learned
NAMELESS = {"model", "model.name", "trainer", "trainer.devices", "trainer.accelerator", "monitor",
            "sweep"}  # fmt: skip


def readable(config: DictConfig) -> str:
    """A name of what the command line changed: alexnet_bn-lr0.05-s1 for `model=alexnet_bn optimizer.lr=0.05 seed=1`.

    Where letters, a folder or places of a number are left out of it, it ends with six letters that follow from the
    settings; a folder of images is told by its name alone.
    """
    plain = configs.told(config)
    name, whole = _named(plain, None)
    return _cut(name, None if whole and len(name) <= LONGEST else _digest(plain, None))


def group_of(config: DictConfig) -> str:
    """The name of the runs that differ from this one in their seed alone, and of no others: it always ends with the six
    letters, as words do not tell what conf/ says. Words that give defaults are left out, and the others sorted."""
    plain = configs.told(config)
    words = {str(word).lstrip("+~").partition("=")[0]: str(word) for word in plain.get("overrides") or []}
    plain["overrides"] = [word for key, word in sorted(words.items()) if not _gives_default(plain, key, word)]
    return _cut(_named(plain, "seed")[0], _digest(plain, "seed"))


def _gives_default(plain: dict[str, Any], key: str, word: str) -> bool:
    choices = plain.get("choices") or {}
    if word.startswith(("~", "+")):
        return False
    if key in choices:
        return bool(choices[key] == options.default_option(choices, key))
    value = get(plain, key)
    return value is not None and same_as(value, key) == same_as(options.default(choices, key), key)


def _named(plain: dict[str, Any], without: str | None) -> tuple[str, bool]:
    """A name of any length, and whether it tells the whole values."""
    parts, whole = [str(plain["model"]["name"])], True
    for word in plain.get("overrides") or []:
        key, _, value = str(word).lstrip("+").partition("=")
        leaf = key.rpartition(".")[2]
        if key.startswith("~"):
            parts.append(f"no_{key[1:].rpartition('.')[2]}")
        elif key == "data.root" and plain["choices"].get("data") == "folder":
            continue
        elif key == "data.root":
            parts.append(PurePath(value).name)
        elif value == "null" or key == without:
            continue
        elif key == "data" and value == "folder":
            parts.append(PurePath(str(plain["data"]["root"])).name)
        elif key in NAMELESS or {key, key.split(".")[0]} & IGNORED:
            continue
        elif key in plain.get("choices", {}):
            parts.append(value)
        else:
            short = _short(PurePath(value).name)
            whole = whole and _exact(short) == _exact(value)
            parts.append(leaf if value.lower() == "true" else f"{SHORT.get(key, leaf)}{short}")
    return "-".join(re.sub(r"[^\w.+-]+", "_", part).strip("_") for part in parts if part), whole


def _cut(name: str, digest: str | None) -> str:
    """At most `LONGEST` letters; the last words tell the jobs of a sweep apart."""
    most = LONGEST - (len(digest) + 1 if digest else 0)
    name = name if len(name) <= most else f"{name[: most - 31]}…{name[-30:]}"
    return f"{name}-{digest}" if digest else name


def _digest(plain: dict[str, Any], without: str | None) -> str:
    """Six letters that are others for other settings, whether a word, a recipe or conf/ has given them."""
    found = settings_of(plain)
    root, shipped = PurePath(str(found.get("data.root"))), str((plain.get("paths") or {}).get("data"))
    if root.is_relative_to(shipped):  # the same on another machine
        found["data.root"] = str(root.relative_to(shipped))
    texts = {key: same_as(value, key) for key, value in found.items() if key != without}
    lines = [f"{key}={text}" for key, text in sorted(texts.items()) if text != same_as(None, key)]
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:6]


def _short(value: str) -> str:
    """Five places of a number, as a sweep may have drawn it, written in one way; a whole number as it is. 1.0 is none:
    of a limit it is all of it."""
    try:
        number = float(value)
    except ValueError:
        return value
    if value.lstrip("-").isdigit():
        return value
    return f"{number:.1f}" if number.is_integer() and abs(number) < 1e5 else f"{number:.5g}"


def _exact(value: str) -> str:
    """A number written in one way, with all its places."""
    try:
        return value if value.lstrip("-").isdigit() else repr(float(value))
    except ValueError:
        return value


def for_others(config: DictConfig) -> dict[str, Any]:
    """The config as plain values, without secrets; of a folder or file of this machine its name alone, and of a run's
    checkpoint the run's before it.

    `run` is the run's name in `logs/`, by which compare.py, eval.py and the like take it. `floats` are the keys of
    1.0 and the like ("augment.scale.1" is in a list): W&B makes it 1, and of a limit one is a share and the other a
    number of batches.
    """
    plain = configs.told(config)
    run_dir = PurePath(plain.pop("run_dir"))
    plain.pop("paths", None)
    started = {key: _checkpoint(plain[key], run_dir) for key in ("init_from", "ckpt_path") if plain.get(key)}
    return {**without_paths(plain), **started, "run": name_of(run_dir), "floats": _floats(plain)}


def _checkpoint(path: str, run_dir: PurePath) -> str:
    """RUN/best.ckpt for a checkpoint of another run's."""
    file = PurePath(path)
    if file.suffix != ".ckpt" or file.parent.name != "checkpoints" or file.parent.parent == run_dir:
        return str(without_paths(path))
    return f"{name_of(file.parent.parent)}/{file.name}"


def _floats(node: Any, prefix: str = "") -> list[str]:
    if isinstance(node, dict | list):
        inner = node.items() if isinstance(node, dict) else enumerate(node)
        return [found for key, value in inner for found in _floats(value, f"{prefix}.{key}" if prefix else str(key))]
    return [prefix] if isinstance(node, float) and node.is_integer() else []


# the folders of a path that is absolute, of home (~) or of here (./, ../), with or without a drive; not of an address
FOLDERS = re.compile(
    r"""(?:file://|(?<![\w.:/\\~])(?:[A-Za-z]:(?=[\\/]))?)(?:~|\.\.?)?[\\/](?=\S)(?:[^\s,'"\[\]{}()=]*[\\/])?"""
)


# a path from one of them, and nothing else; quoted as a word of the command line may be
WHOLE = re.compile(r"""([~+]{0,2}[\w.@/-]*=)?(['"]?)((?:file://|[A-Za-z]:)?(?:~|\.{0,2})[\\/](?=\S).*)\2""", re.DOTALL)


def without_paths(node: Any) -> Any:
    """Plain values, of folders in them the last part alone."""
    if isinstance(node, dict):
        return {key: without_paths(value) for key, value in node.items()}
    if isinstance(node, list):
        return [without_paths(value) for value in node]
    if not isinstance(node, str):
        return node
    whole = WHOLE.fullmatch(node)
    if whole is not None:  # whatever letters are in it
        key, quote, path = whole.groups()
        name = path.replace("\\", "/").rstrip("/").rpartition("/")[2]
        return f"{key or ''}{quote}{name}{quote}"
    return FOLDERS.sub("", re.sub(r"[\w.\-]+(?:/[\w.\-]+)*/\.\./", "../", node))


def tags_for(config: DictConfig) -> list[str]:
    """Of W&B: the network, the images, the recipe."""
    data = PurePath(str(config.data.root)).name if config.data.name == "folder" else config.data.name
    found = [config.model.name, data, (config.get("choices") or {}).get("experiment")]
    return list(dict.fromkeys(shown(tag) for tag in found if tag))
