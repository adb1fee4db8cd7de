"""Checkpoints are written completely or not at all, and reading one runs no code."""

import contextlib
import os
from pathlib import Path

import pytest
import torch

from alexlab.engine import checkpoint_io as checkpoint
from alexlab.engine.errors import UserError


def test_a_write_that_fails_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io, path = checkpoint.AtomicCheckpointIO(), tmp_path / "c/last.ckpt"
    io.save_checkpoint({"state_dict": {"a": torch.ones(3)}, "alexlab": {}}, path)
    before = path.read_bytes()

    def full(number: int) -> None:
        raise OSError(28, "No space left on device", "last.ckpt")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        io.save_checkpoint({"state_dict": {"a": torch.zeros(3)}, "alexlab": {}}, path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["SHA256SUMS", "last.ckpt"]
    assert checkpoint.damage_of(path) is None


def test_a_checkpoint_that_would_run_code_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": {}, "alexlab": Evil()}, tmp_path / "evil.ckpt")
    (tmp_path / "empty.ckpt").touch()
    with pytest.raises(UserError, match=r"empty.ckpt cannot be read as a checkpoint \(EOFError\). The file is damaged"):
        checkpoint.load(tmp_path / "empty.ckpt")
    with pytest.raises(UserError, match=r"evil.ckpt cannot be read as a checkpoint"):
        checkpoint.load(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.ckpt is not a file: give a checkpoint"):
        checkpoint.load(tmp_path / "none.ckpt")
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match=r"foreign.pt is not a checkpoint of this project"):
        checkpoint.load(tmp_path / "foreign.pt")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_reported_as_such() -> None:
    """torch reports "unexpected pos" instead."""
    file = Path("/dev/full").open("wb")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left on device") as raised:
        checkpoint.write_checkpoint({"state_dict": {"a": torch.zeros(1_000_000)}}, file)
    assert raised.value.filename == "/dev/full"
    with contextlib.suppress(OSError):
        file.close()
