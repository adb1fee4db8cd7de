"""W&B's artifacts of a run: what it was trained on (no image), its code, its best checkpoint."""

import json
import re
from pathlib import Path, PurePath
from typing import Any

import wandb

from alexlab.engine import secrecy

MOST_CLASSES = 10_000  # whose names are told
CODE = "alexlab-code"


def dataset(data: dict[str, Any], described: dict[str, Any], classes: list[str]) -> wandb.Artifact:
    """The fingerprint, number of images and classes of the images, and no folder of this machine: the same bytes for
    the same images, so that all runs on them are of one version.

    Args:
        data: the config's.
        described: as `ImageFolders.describe` does.
    """
    name = PurePath(str(data["root"])).name if data["name"] in ("folder", "prepared") else str(data["name"])
    told = {key: described[key] for key in ("fingerprint", "images", "num_classes")}
    made = wandb.Artifact(f"dataset-{_letters(name)}", type="dataset", metadata=secrecy.hidden(told))
    _add_json(made, "dataset.json", {**told, "classes": classes[:MOST_CLASSES]})
    return made


def code(run_dir: Path) -> tuple[wandb.Artifact, list[str]] | None:
    """code.json and code.patch with the aliases of the artifact, or None where a run's code is not known. Runs of the
    same code are of one version."""
    told = json.loads((run_dir / "code.json").read_text()) if (run_dir / "code.json").is_file() else {}
    if not told.get("commit"):
        return None
    made = wandb.Artifact(CODE, type="code", metadata=told)
    _add_json(made, "code.json", told)
    if (run_dir / "code.patch").is_file():
        made.add_file(str(run_dir / "code.patch"))
    return made, ["latest", alias(told)]


def alias(told: dict[str, Any]) -> str:
    """Of the version of `CODE` that holds this state; one whose differences are not known is not the clean one."""
    unknown = told.get("patch_sha256") is None and (told.get("left_out") or told.get("dirty"))
    known = [str(told[key])[:12] for key in ("commit", "patch_sha256") if told.get(key)]
    return "-".join([*known, "unknown"] if unknown else known)


def checkpoint(run_id: str, path: Path, metadata: dict[str, Any]) -> wandb.Artifact:
    made = wandb.Artifact(f"model-{run_id}", type="model", metadata=secrecy.hidden(metadata))
    made.add_file(str(path))
    return made


def _add_json(artifact: wandb.Artifact, name: str, values: dict[str, Any]) -> None:
    with artifact.new_file(name, mode="w") as file:
        file.write(json.dumps(secrecy.hidden(values), indent=2, sort_keys=True) + "\n")


def _letters(name: str) -> str:
    """What W&B takes for a name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:100] or "images"
