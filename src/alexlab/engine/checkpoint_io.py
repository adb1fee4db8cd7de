"""Read and write checkpoints. A killed process leaves no damaged checkpoint, and reading one runs no code.

`checkpoints/SHA256SUMS` holds the hash of each file, in the format of `sha256sum --check`. While a file is replaced, it
holds the hashes of the old and the new file, so that one line matches whichever of the two a kill leaves.
"""

import hashlib
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from pytorch_lightning.plugins.io import TorchCheckpointIO

from alexlab.engine.config import FORMER_NAMES, with_current_targets
from alexlab.engine.errors import UserError
from alexlab.engine.files import atomic_write, name_in_errors, sync_folder
from alexlab.engine.ranks import Ranks
from alexlab.engine.text import is_text

BEST, LAST, PREVIOUS, SUMS = "best.ckpt", "last.ckpt", "previous.ckpt", "SHA256SUMS"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint writer, with a temporary file, fsync and rename. A last.ckpt that is replaced becomes
    previous.ckpt. Rank 0 reads for all ranks."""

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        self.after: Callable[[Path], None] | None = None  # called with each file that was written

    def load_checkpoint(self, path: Any, *args: Any, **settings: Any) -> dict[str, Any]:
        def read() -> dict[str, Any]:
            return with_current_name(super(AtomicCheckpointIO, self).load_checkpoint(path, *args, **settings))

        return share(read, self.ranks)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp_path = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        tmp_path.unlink(missing_ok=True)
        try:
            with name_in_errors(path), tmp_path.open("xb") as file:
                write_checkpoint(checkpoint, file)
            with tmp_path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            sums = read_sums(path.parent)
            after = {path.name: [digest]}
            if path.name == LAST and path.is_file():
                after[PREVIOUS] = sums.get(LAST, [])
            both = {name: [*sums.get(name, []), *hashes] if hashes else [] for name, hashes in after.items()}
            write_sums(path.parent, {**sums, **both})
            if PREVIOUS in after:
                link(path, path.with_name(PREVIOUS))
            tmp_path.replace(path)
            write_sums(path.parent, {**sums, **after})
            sync_folder(path.parent)
        finally:
            tmp_path.unlink(missing_ok=True)
        if self.after is not None:
            self.after(path)


def with_current_name(checkpoint: Any) -> Any:
    """Move what this project adds to a checkpoint from a former name of the package to the current one."""
    for name in FORMER_NAMES:
        if isinstance(checkpoint, dict) and name in checkpoint:
            checkpoint["alexlab"] = checkpoint.pop(name)
    return checkpoint


def share(read: Callable[[], dict[str, Any]], ranks: Ranks) -> dict[str, Any]:
    """Return the checkpoint that `read` returns on rank 0, on all ranks. Their process group must exist."""
    if ranks.size == 1:
        return read()
    box = [read() if ranks.rank == 0 else {}]
    dist.broadcast_object_list(box, 0, group=ranks.gloo, device=torch.device("cpu"))
    return box[0]


def write_checkpoint(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    """Save a checkpoint into an open file, and wait until it is on the disk.

    A file that cannot be written raises OSError, with the reason that torch's own error lacks.
    """
    try:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__ or error.__context__
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, file.name) from error
        raise


def link(path: Path, name: Path) -> None:
    """Give a file a second name, which replaces a file of that name."""
    tmp_path = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    tmp_path.unlink(missing_ok=True)
    try:
        os.link(path, tmp_path)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, tmp_path)
    tmp_path.replace(name)


def read_sums(folder: Path) -> dict[str, list[str]]:
    """Read the hashes that each file of a folder may have, the newest last."""
    path = folder / SUMS
    return sums_of(path.read_text()) if path.is_file() else {}


def sums_of(text: str) -> dict[str, list[str]]:
    """Return the hashes in the content of SHA256SUMS."""
    hashes: dict[str, list[str]] = {}
    for line in text.splitlines():
        digest, _, name = line.partition("  ")
        hashes.setdefault(name, []).append(digest)
    return hashes


def text_of(sums: dict[str, list[str]]) -> str:
    """Return the content of SHA256SUMS."""
    return "".join(f"{digest}  {name}\n" for name, hashes in sorted(sums.items()) for digest in hashes)


def write_sums(folder: Path, sums: dict[str, list[str]]) -> None:
    """Replace the hashes of a folder."""
    with atomic_write(folder / SUMS, "x", sync=True) as file:
        file.write(text_of(sums))


def not_kept(folder: Path, keep: str) -> tuple[list[str], str | None]:
    """Return the checkpoints of a finished run that are not needed any more, and why others stay, if they do.

    A checkpoint is needed while the one that is kept is damaged, or is a link, which may lead to it.

    Args:
        keep: "best": best.ckpt alone; "last": also last.ckpt, with which the run can be resumed; "all": all.
    """
    has_best = (folder / BEST).is_file()  # otherwise nothing was validated
    names = {"best": [LAST, PREVIOUS] if has_best else [PREVIOUS], "last": [PREVIOUS], "all": []}[keep]
    names = [name for name in names if (folder / name).is_file()]
    if not names:
        return [], None
    kept = folder / (BEST if keep == "best" and has_best else LAST)
    if folder.is_symlink() or kept.is_symlink() or any((folder / name).is_symlink() for name in names):
        return [], "it has links"
    why = damage_of(kept) if kept.is_file() else "it does not exist"
    return (names, None) if why is None else ([], f"{kept.name} is damaged ({why})")


def remove(folder: Path, names: list[str]) -> None:
    """Delete checkpoints, and their lines in SHA256SUMS."""
    if names:
        write_sums(folder, {name: hashes for name, hashes in read_sums(folder).items() if name not in names})
    for name in names:
        (folder / name).unlink()


def damage_of(path: Path) -> str | None:
    """Return what is wrong with a checkpoint file, or None if it is undamaged.

    The hash of the file must be in SHA256SUMS. If that does not list the file, the checksums in the archive must match.
    """
    hashes = read_sums(path.parent).get(path.name)
    try:
        if hashes:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            return None if digest in hashes else f"the SHA-256 is not the one in {SUMS}"
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
        return None if part is None else f"the part {part} does not match the checksum"
    except (OSError, zipfile.BadZipFile) as error:
        return str(error)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint on the CPU, with `weights_only=True`; UserError if it is not one of this project."""
    checkpoint = _read(path)
    if not isinstance(checkpoint, dict) or not {"state_dict", "alexlab"} <= set(checkpoint):
        raise UserError(f"{path} is not a checkpoint of this project: give one from the checkpoints/ of a run.")
    checkpoint["alexlab"] = with_current_targets(checkpoint["alexlab"])
    return checkpoint


def load_plain(path: Path) -> dict[str, torch.Tensor] | None:
    """Read a file of weights alone, as torchvision and timm publish them; None if it is a checkpoint of this project.

    The weights may be below "state_dict" or "model", and their names may begin with "module.", as those of DDP do.

    Raises:
        UserError: the file is neither.
    """
    weights = _read(path)
    if isinstance(weights, dict) and "alexlab" in weights:
        return None
    for key in ("state_dict", "model"):
        weights = weights[key] if isinstance(weights, dict) and isinstance(weights.get(key), dict) else weights
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"{path} is neither a checkpoint of this project nor a state dict: give a file of weights.")
    return {str(key).removeprefix("module."): value for key, value in weights.items()}


def _read(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path} is not a file: give a checkpoint, such as <run dir>/checkpoints/last.ckpt.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load as read_weights

            return read_weights(path.read_bytes())
        # mmap: half a gigabyte of weights is not read if only the class names are needed
        maps = is_text(str(path)) and zipfile.is_zipfile(path)
        with path.open("rb") as file:
            loaded = torch.load(path if maps else file, map_location="cpu", weights_only=True, mmap=maps)
            return with_current_name(loaded)
    except ImportError:
        raise UserError(f"{path} needs safetensors, which the extra timm has: pip install 'alexlab[timm]'.") from None
    except Exception as error:
        why = f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(": ")[:150]
        raise UserError(
            f"{path} cannot be read as a checkpoint ({why}). The "
            "file is damaged or of another kind: choose another one with ckpt=PATH."
        ) from None


def position_of(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """Return at which point of the run a last.ckpt was written, see `callbacks/checkpointing.py`; else None."""
    return checkpoint.get("callbacks", {}).get("Checkpointing") or checkpoint["alexlab"].get("place")  # the older form
