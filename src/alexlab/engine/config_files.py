"""Find the yaml file that sets a key, so that messages can name it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from alexlab.engine.config import ROOT, Plain
from alexlab.engine.overrides import has


def find_file(key: str, folders: list[Path], config_name: str, choices: Plain) -> str | None:
    """Return the yaml file that sets the dotted `key`, or None if no file or several files set it.

    The files are read without resolving anything: the command's own file, the chosen option of each group, and the
    files that these list in their `defaults`. A path within the project's folder is relative to that folder.

    Args:
        folders: where Hydra finds configs, the first one first: conf/, then the folder of --config-dir.
        config_name: the command's file, such as "train".
        choices: the chosen option of each group, or a list of options; other groups have the defaults of the files.
    """
    options: Plain = {}
    files = list(_files(folders, config_name, "", options))
    for group, option in (options | choices).items():
        for name in option if isinstance(option, list) else [option]:
            files += _files(folders, f"{group}/{name}", group.replace("/", "."), {})
    paths = {path for path, package, content in files if _sets(content, package, key)}
    if len(paths) != 1:
        return None
    path = paths.pop()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _files(folders: list[Path], name: str, package: str, options: Plain) -> Iterator[tuple[Path, str, Plain]]:
    """Yield the config `name` ("data/folder") and those that it lists in `defaults`, each as (path, package, content).

    The keys of these configs are put below `package` ("" is the top). `options` gets the groups that `defaults` lists.
    """
    path = next((folder / f"{name}.yaml" for folder in folders if (folder / f"{name}.yaml").is_file()), None)
    if path is None:
        return
    text = path.read_text()
    content = yaml.safe_load(text)
    content = content if isinstance(content, dict) else {}
    if header := re.search(r"^#\s*@package\s+(\S+)", text, re.MULTILINE):
        package = {"_global_": "", "_group_": package}.get(header[1], header[1])
    entries = content.pop("defaults", None) or []
    yield path, package, content
    for entry in entries:
        if isinstance(entry, dict):
            options |= entry
        elif entry != "_self_":
            listed, _, below = str(entry).partition("@")
            parent = name.rpartition("/")[0]
            absolute = listed.lstrip("/") if listed.startswith("/") or not parent else f"{parent}/{listed}"
            group = listed.rpartition("/")[0].strip("/").replace("/", ".")
            yield from _files(folders, absolute, ".".join(filter(None, (package, group, below))), options)


def _sets(content: Any, package: str, key: str) -> bool:
    """Check whether a config that is put below `package` sets the key."""
    if package and not f"{key}.".startswith(f"{package}."):
        return False
    return package == key or has(content, key.removeprefix(f"{package}.") if package else key)
