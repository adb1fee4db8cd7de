"""What a run is called, and what others are told of its config: nothing of this machine's folders."""

import re
from pathlib import PurePath
from typing import Any

from omegaconf import DictConfig

from alexlab import config as configs
from alexlab.compare.settings import IGNORED
from alexlab.kinds import shown
from alexlab.rundir import name_of

LONGEST = 80  # letters of a name
SHORT = {"seed": "s", "trainer.max_epochs": "ep", "data.batch_size": "bs", "optimizer.weight_decay": "wd",
         "label_smoothing": "smooth", "data.image_size": "px"}  # fmt: skip
# told by another part of the name, or no setting of what is learned
NAMELESS = {"model", "model.name", "trainer", "trainer.devices", "trainer.accelerator", "monitor",
            "sweep"}  # fmt: skip


def readable(config: DictConfig, without: str | None = None) -> str:
    """A name of what the command line changed: alexnet_bn-lr0.05-s1 for `model=alexnet_bn optimizer.lr=0.05 seed=1`.

    Args:
        without: a key that is left out, such as "seed" for the name of runs that differ in it alone.
    """
    plain = configs.told(config)
    parts = [str(plain["model"]["name"])]
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
            parts.append(leaf if value == "true" else f"{SHORT.get(key, leaf)}{_short(PurePath(value).name)}")
    name = "-".join(re.sub(r"[^\w.+-]+", "_", part).strip("_") for part in parts if part)
    # the last words tell the jobs of a sweep apart
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 31]}…{name[-30:]}"


def _short(value: str) -> str:
    """Five places of a number, as a sweep may have drawn it, written in one way; a whole number as it is."""
    try:
        return value if value.isdigit() else f"{float(value):.5g}"
    except ValueError:
        return value


def for_others(config: DictConfig) -> dict[str, Any]:
    """The config as plain values, without secrets; of a folder or file of this machine its name alone.

    `run` is the run's name in `logs/`, by which compare.py, eval.py and the like take it. `floats` are the keys of
    1.0 and the like: W&B makes it 1, and of a limit one is a share and the other a number of batches.
    """
    plain = configs.told(config)
    run_dir = str(plain.pop("run_dir"))
    plain.pop("paths", None)
    floats = [key for key, value in configs.flat(plain).items() if isinstance(value, float) and value.is_integer()]
    return {**without_paths(plain), "run": name_of(PurePath(run_dir)), "floats": floats}


# the folders of a path that is absolute, of home (~) or of here (./, ../), with or without a drive; not of an address
FOLDERS = re.compile(
    r"""(?:file://|(?<![\w.:/\\~])(?:[A-Za-z]:(?=[\\/]))?)(?:~|\.\.?)?[\\/](?=\S)(?:[^\s,'"\[\]{}()=]*[\\/])?"""
)


# a path from one of them, and nothing else; quoted as a word of the command line may be
WHOLE = re.compile(r"""([~+]{0,2}[\w.@/-]*=)?(['"]?)((?:file://|[A-Za-z]:)?(?:~\w*|\.{0,2})[\\/].*)\2""", re.DOTALL)


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
