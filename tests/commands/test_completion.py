"""Completion in bash: what the documented line installs, asked as bash asks when Tab is pressed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, clean_env, command

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def asked(folder: Path, program: str, *lines: str) -> list[list[str]]:
    """Install the completion of `program` in a bash, and return what it suggests for each line that ends at the cursor.

    `python` and `alexlab` are programs in `folder`.
    """
    for name, text in (
        ("python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'),
        ("alexlab", f"#!{sys.executable}\nfrom alexlab.commands.cli import main\n\nmain()\n"),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    name = program.split()[0]
    documented = f'eval "$({program} -sc install=bash)"'
    assert f"`{documented}`" in (ROOT / "docs/usage.md").read_text()
    script = f"{documented} || exit\n"
    script += f"function=$(complete -p {name}); function=${{function#*-F }}; function=${{function% {name}}}\n"
    for line in lines:
        number = len(line.split()) - (not line.endswith(" "))
        script += f"COMP_LINE='{line}' COMP_POINT={len(line)} COMP_CWORD={number} COMPREPLY=()\n"
        script += '$function\necho "${COMPREPLY[@]}"\n'
    env = clean_env({"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"})
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return [line.split() for line in done.stdout.splitlines()]


def test_scripts(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("from pathlib import Path\n\nPath(__file__).with_name('ran').touch()\n")
    other = os.path.relpath(tmp_path / "other.py", ROOT)
    network, key, evaluation, _, data = asked(
        tmp_path, "python train.py", "python train.py model=alexnet_ca", "python train.py loss=focal optimizer.l",
        "python eval.py run=latest cro", f"python {other} ", "python train.py data=",
    )  # fmt: skip
    assert network == ["model=alexnet_caffe"]
    assert {"optimizer.lr=", "optimizer.layer_decay="} <= {*key}
    assert all(each.startswith("optimizer.l") for each in key)
    assert evaluation == ["crops="]
    assert "data=demo" in data
    assert "data=_base" not in data
    assert not (tmp_path / "ran").exists(), "a script of somebody else, which Hydra's function would run"


def test_the_console_command(tmp_path: Path) -> None:
    verbs, network, folder = asked(tmp_path, "alexlab", "alexlab p", "alexlab train model=alex", "alexlab predict to")
    assert verbs == ["predict", "prepare"]
    assert "model=alexnet" in network
    assert all(each.startswith("model=alex") for each in network)
    assert folder == ["topk="]


def test_another_shell_is_an_error() -> None:
    done = command("train.py", "-sc", "install=csh")
    assert (done.returncode, done.stderr) == (
        2, "error: -sc install=csh: write -sc install=bash, install=zsh or install=fish.\n",
    )  # fmt: skip
