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
NAMELESS = {"model", "model.name", "data.root", "trainer", "trainer.devices", "trainer.accelerator", "debug", "monitor"}


def readable(config: DictConfig) -> str:
    """A name of what the command line changed: alexnet_bn-lr0.05-s1 for `model=alexnet_bn optimizer.lr=0.05 seed=1`."""
    plain = configs.told(config)
    parts = [str(plain["model"]["name"])]
    for word in plain.get("overrides") or []:
        key, _, value = str(word).lstrip("+").partition("=")
        group, _, leaf = key.rpartition(".")
        if key.startswith("~"):
            parts.append(f"no_{key[1:].rpartition('.')[2]}")
        elif key == "data" and value == "folder":
            parts.append(PurePath(str(plain["data"]["root"])).name)
        elif key in NAMELESS or {key, key.split(".")[0]} & IGNORED:
            continue
        elif key in plain.get("choices", {}) or (not group and key in ("experiment", "sweep")):
            parts.append(value)
        else:
            parts.append(f"{leaf}" if value == "true" else f"{SHORT.get(key, leaf)}{value}")
    name = "-".join(re.sub(r"[^\w.+]+", "_", part).strip("_") for part in parts if part)
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


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


def without_paths(node: Any) -> Any:
    """Plain values, of paths in them the last part alone."""
    if isinstance(node, dict):
        return {key: without_paths(value) for key, value in node.items()}
    if isinstance(node, list):
        return [without_paths(value) for value in node]
    if not isinstance(node, str):
        return node
    key, sign, value = node.partition("=") if re.match(r"[~+\w./@]+=", node) else ("", "", node)
    if PurePath(value).is_absolute() or re.match(r"[A-Za-z]:\\|~/|\.\.?/", value):
        value = PurePath(value.replace("\\", "/")).name
    return f"{key}{sign}{value}"


def tags_for(config: DictConfig) -> list[str]:
    """Of W&B: the network, the images, the recipe."""
    data = PurePath(str(config.data.root)).name if config.data.name == "folder" else config.data.name
    found = [config.model.name, data, (config.get("choices") or {}).get("experiment")]
    return list(dict.fromkeys(shown(tag) for tag in found if tag))
