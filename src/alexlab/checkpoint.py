"""Checkpoints that a kill cannot break, and that load without running anything."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import nn

from alexlab.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, fsyncs and renames: a kill at any moment leaves the previous file whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with beside.open("wb") as file:
                _write(checkpoint, file)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


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
    return checkpoint


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
