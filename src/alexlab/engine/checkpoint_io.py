"""Checkpoints that a kill cannot break, and that load without running anything.

`checkpoints/SHA256SUMS` has each file's hash, as `sha256sum --check` reads it. While a file takes the place of another,
both hashes stand there: whichever of the two files a kill leaves, one line is its own.
"""

import hashlib
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import nn

from alexlab.engine.config import with_current_targets
from alexlab.engine.errors import UserError, naming

LAST, PREVIOUS, SUMS = "last.ckpt", "previous.ckpt", "SHA256SUMS"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, fsyncs and renames: a kill at any moment leaves the previous file whole. A last.ckpt
    that another takes the place of stays as previous.ckpt."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        beside.unlink(missing_ok=True)
        try:
            with naming(path), beside.open("xb") as file:
                _write(checkpoint, file)
            with beside.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            sums = read_sums(path.parent)
            kept = sums.get(path.name, [])
            after = {path.name: [digest]}
            if path.name == LAST and path.is_file():
                after[PREVIOUS] = kept
            both = {name: [*sums.get(name, []), *hashes] if hashes else [] for name, hashes in after.items()}
            write_sums(path.parent, {**sums, **both})
            if PREVIOUS in after:
                _keep(path, path.with_name(PREVIOUS))
            beside.replace(path)
            write_sums(path.parent, {**sums, **after})
            sync_folder(path.parent)
        finally:
            beside.unlink(missing_ok=True)


def _keep(path: Path, kept: Path) -> None:
    """Give a file a second name, in the place of what has that."""
    link = kept.with_name(f".{kept.name}.{os.getpid()}.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without links
        shutil.copyfile(path, link)
    link.replace(kept)


def read_sums(folder: Path) -> dict[str, list[str]]:
    """The hashes that each file of the folder may have, the newest last."""
    path = folder / SUMS
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        digest, _, name = line.partition("  ")
        found.setdefault(name, []).append(digest)
    return found


def write_sums(folder: Path, sums: dict[str, list[str]]) -> None:
    beside = folder / f".{SUMS}.{os.getpid()}.tmp"
    beside.unlink(missing_ok=True)
    with naming(folder / SUMS), beside.open("x") as file:
        file.writelines(f"{digest}  {name}\n" for name, hashes in sorted(sums.items()) for digest in hashes)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(folder / SUMS)


def sync_folder(folder: Path) -> None:
    """What was renamed in it is on the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def why_damaged(path: Path) -> str | None:
    """What is wrong with a checkpoint's file, or None: its hash must be one of SHA256SUMS, or, where that does not name
    it, all parts of its archive must have their own checksums."""
    hashes = read_sums(path.parent).get(path.name)
    try:
        if hashes:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            return None if digest in hashes else f"its SHA-256 is not the one of {SUMS}"
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
        return None if part is None else f"its part {part} is not as it was written"
    except (OSError, zipfile.BadZipFile) as error:
        return str(error)


def sweep(folder: Path) -> list[str]:
    """Remove what killed processes left of files that they wrote; the names."""
    left = sorted(path for path in folder.glob(".*.tmp") if path.is_file())
    for path in left:
        path.unlink()
    return [path.name for path in left]


def _write(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's archive hides why a file could not be written
        cause = error if isinstance(error, OSError) else error.__cause__ or error.__context__
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, file.name) from error
        raise


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint on the CPU, with weights_only=True.

    Raises:
        UserError: it is missing, or is not a checkpoint.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file: give a checkpoint, such as <run dir>/checkpoints/last.ckpt.")
    try:
        # mapped: who wants to know the classes alone does not read half a gigabyte; a newer file takes another's name
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {str(error).splitlines()[0][:150]}): "
            "it is damaged or of another kind; choose another with ckpt=PATH."
        ) from None
    if not isinstance(checkpoint, dict) or not {"state_dict", "alexlab"} <= set(checkpoint):
        raise UserError(f"{path} is not a checkpoint of this project: give one of a run's checkpoints/.")
    if "config" in checkpoint["alexlab"]:
        checkpoint["alexlab"]["config"] = with_current_targets(checkpoint["alexlab"]["config"])
    return checkpoint


def position_of(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """Return where in its run a last.ckpt was written, see `callbacks/checkpointing.py`; None for weights only."""
    older = checkpoint["alexlab"].get("place")
    return checkpoint.get("callbacks", {}).get("Checkpointing") or older


def load_net(net: nn.Module, checkpoint: dict[str, Any], path: Path) -> None:
    """Put a checkpoint's weights into `net`.

    Raises:
        UserError: they are another network's; says which keys or shapes differ.
    """
    state = {k.removeprefix("net."): v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")}
    own = net.state_dict()
    differ = [f"{k} is missing" for k in own if k not in state]
    differ += [f"{k} is not in this network" for k in state if k not in own]
    differ += [
        f"{k} has shape {tuple(state[k].shape)}, and {tuple(v.shape)} is needed"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    if differ:
        shown = "\n  ".join(differ[:5]) + (f"\n  ... ({len(differ) - 5} more)" if len(differ) > 5 else "")
        raise UserError(
            f"{path} holds the weights of another network:\n  {shown}\n"
            "Choose the model it was trained with (its run's config.yaml), or another checkpoint."
        )
    net.load_state_dict(state)


def check_classes(checkpoint: dict[str, Any], classes: Sequence[str], root: Path) -> None:
    """Raises UserError where the images' classes are not the checkpoint's, in its order."""
    trained = list(checkpoint["alexlab"]["classes"])
    if list(classes) != trained:
        raise UserError(
            f"{root} has other classes than the run: missing {_some(set(trained) - set(classes))}, "
            f"new {_some(set(classes) - set(trained))}. Take a folder with the run's classes."
        )


def _some(names: set[str]) -> str:
    shown = sorted(names)[:8]
    more = f", ... ({len(names) - 8} more)" if len(names) > 8 else ""
    return f"{', '.join(shown) or 'none'}{more}"
