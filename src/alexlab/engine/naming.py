"""Name runs in W&B, and remove the folders of this machine from the config that W&B gets."""

import contextlib
import hashlib
import re
from collections.abc import Collection
from pathlib import PurePath
from typing import Any

from alexlab.engine.config import Plain, each_text
from alexlab.engine.overrides import by_key, key_of
from alexlab.engine.run_dir import name_of
from alexlab.engine.settings import IGNORED, REPETITIONS, canonical, settings_of
from alexlab.engine.text import printable, shorten

MAX_LENGTH = 80  # characters of a name
MAX_TAG, MAX_GROUP = 64, 128  # that W&B accepts
ABBREVIATIONS = {"seed": "s", "trainer.max_epochs": "ep", "data.batch_size": "bs", "data.image_size": "px"}
ABBREVIATIONS |= {"optimizer.weight_decay": "wd", "label_smoothing": "smooth"}
# overrides that are not part of a name: another part shows them, or they do not change what is learned
UNNAMED = {"model", "model.name", "trainer", "trainer.devices", "trainer.accelerator", "monitor", "sweep"}


def run_name(config: Plain) -> str:
    """Name a run by the model and what the command line changed: "alexnet_bn-lr0.05-s1".

    A name that omits a folder, digits of a number, or letters above `MAX_LENGTH` ends with a hash of the settings.
    """
    parts, is_exact = _name_parts(config, config["overrides"])
    name = "-".join(parts)
    return name if is_exact and len(name) <= MAX_LENGTH else _shorten(name, _settings_hash(config))


def group_name(config: Plain) -> str:
    """Name the runs of one command that differ only in their seed and fold.

    The name always ends with a hash of the settings, because overrides do not show what conf/ contains.
    """
    shared = [text for text in sorted(config["overrides"], key=key_of) if key_of(text) not in REPETITIONS]
    return _shorten("-".join(_name_parts(config, shared)[0]), _settings_hash(config, REPETITIONS))


def tags(config: Plain) -> list[str]:
    """Return the tags of a run: the network, the images, the experiment, as long as W&B accepts."""
    data = config["data"]
    images = PurePath(str(data["root"])).name if data["name"] == "folder" else data["name"]
    names = [config["model"]["name"], images, (config.get("choices") or {}).get("experiment")]
    return list(dict.fromkeys(shorten(printable(str(tag)), MAX_TAG) for tag in names if tag))


def _name_parts(config: Plain, overrides: list[str]) -> tuple[list[str], bool]:
    """Return the parts of a name, and whether they show each value exactly."""
    parts, is_exact = [str(config["model"]["name"])], True
    for override in by_key(overrides).values():
        key, _, value = override.lstrip("+").partition("=")
        leaf = key.rpartition(".")[2]
        if key.startswith("~"):
            parts.append(f"no_{leaf.removeprefix('~')}")
        elif key == "data.root" or (key == "data" and value == "folder"):
            folder = PurePath(str(config["data"]["root"])).name
            parts += [folder] if folder not in parts else []
        elif value == "null" or key in UNNAMED or {key, key.split(".")[0]} & IGNORED:
            continue
        elif key in (config.get("choices") or {}):
            parts.append(value)
        elif value.lower() == "true":
            parts.append(leaf)
        else:
            short = _shorten_value(value)
            is_exact = is_exact and short == value
            parts.append(f"{ABBREVIATIONS.get(key, leaf)}{short}")
    parts = [re.sub(r"[^\w.+-]+", "_", part).strip("_") for part in parts]
    return [part for part in parts if part], is_exact


def _shorten_value(value: str) -> str:
    """Return the last part of a path, and five significant digits of a long number."""
    if len(value) > 8 and not value.lstrip("-").isdigit():
        with contextlib.suppress(ValueError):
            return f"{float(value):.5g}"
    return PurePath(value).name


def _shorten(name: str, digest: str) -> str:
    """Append a hash; cut the middle of a long name, because the last overrides distinguish the jobs of a sweep."""
    length = MAX_LENGTH - len(digest) - 1
    return f"{shorten(name, length)}-{digest}"


def _settings_hash(config: Plain, without: Collection[str] = ()) -> str:
    """Return six characters that depend on all settings, whether an override, an experiment or conf/ has set them."""
    texts = {key: canonical(value, key) for key, value in settings_of(config).items() if key not in without}
    lines = [f"{key}={text}" for key, text in sorted(texts.items()) if text != canonical(None, key)]
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:6]


# -- what W&B gets


def for_others(config: Plain) -> Plain:
    """Return the config without this machine's folders: only the last part of a path, RUN/best.ckpt of a checkpoint.

    Adds `run`, the name of the run in logs/, by which `alexlab eval run=NAME` finds it; and `floats`, the keys of
    values such as 1.0 ("augment.scale.1" is in a list): W&B stores 1, and a limit of 1 is one batch, of 1.0 all.
    """
    run_dir = PurePath(config["run_dir"])
    shared = {key: value for key, value in config.items() if key not in ("run_dir", "paths")}
    starts = {key: _without_folder(shared[key], run_dir) for key in ("init_from", "ckpt_path") if shared.get(key)}
    return {**without_paths(shared), **starts, "run": name_of(run_dir), "floats": _whole_floats(shared)}


def _without_folder(checkpoint: str, run_dir: PurePath) -> str:
    """Return RUN/best.ckpt for a checkpoint of another run, otherwise the name of the file."""
    file = PurePath(checkpoint)
    if file.suffix != ".ckpt" or file.parent.name != "checkpoints" or file.parent.parent == run_dir:
        return str(without_paths(checkpoint))
    return f"{name_of(file.parent.parent)}/{file.name}"


def _whole_floats(node: Any, prefix: str = "") -> list[str]:
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        return [key for name, value in items for key in _whole_floats(value, f"{prefix}.{name}")]
    return [prefix.removeprefix(".")] if isinstance(node, float) and node.is_integer() else []


# The folders at the start of a path: absolute, or from ~, ./ or ../. A web address has none.
FOLDERS = re.compile(r"""(?<![\w.:/~])(?:~|\.\.?)?/(?=\S)(?:[^\s,'"\[\]{}()=]*/)?""")
# A text that is a path as a whole, or an override whose value is one, quoted or not. A path may contain any character.
PATH = re.compile(r"""([~+]{0,2}[\w.@/-]*=)?(['"]?)((?:~|\.{0,2})/(?=\S).*)\2""", re.DOTALL)


def without_paths(node: Any) -> Any:
    """Return plain values with only the last part of each path, and text that can be encoded."""

    def shortened(text: str) -> str:
        if match := PATH.fullmatch(text):
            key, quote, path = match.groups()
            return printable(f"{key or ''}{quote}{PurePath(path).name}{quote}", "\n\r\t")
        return printable(FOLDERS.sub("", text), "\n\r\t")

    return each_text(node, shortened)
