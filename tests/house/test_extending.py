"""Each section of docs/extending.md is complete: its files, in an empty folder, are enough for its commands."""

from pathlib import Path

import pytest
from forks import EXTENDING, Fork, blocks_of

SECTIONS = {name: blocks for name, blocks in blocks_of(EXTENDING).items() if blocks}


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_is_complete(name: str, tmp_path: Path) -> None:
    fork = Fork(tmp_path)
    commands = fork.write(SECTIONS[name])
    assert commands, "a section has a command"
    for number, words in enumerate(commands):
        more = ["trainer.max_epochs=1"] if words[0] == "train.py" else []
        words = [word.replace("run=latest", f"run={tmp_path / 'run0'}") for word in words]
        run = fork.train if words[0] == "train.py" else fork.run
        first = f"run{number}" if words[0] == "train.py" else words[0]
        done = run(first, *words[1:], *more)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("name", SECTIONS)
def test_what_a_user_writes_is_short(name: str) -> None:
    texts = [text for kind, text in SECTIONS[name] if kind in ("python", "yaml") and text.startswith("# ")]
    lines = [line for text in texts for line in text.splitlines()[1:] if line.strip()]
    is_module = name in ("Any LightningModule", "Pretraining without labels")
    assert len(lines) <= (60 if is_module else 35), f"{len(lines)} lines"
