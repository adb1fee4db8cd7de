"""The README's commands run, its links exist, and its network's two files are all that a network needs."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, command

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
COMMANDS = [line for kind, block in BLOCKS if kind in ("", "bash") for line in block.splitlines() if line.strip()]
NARROW = "++model.net.hidden=[64,48]"  # AlexNet's fully connected layers: 10 MB of weights instead of 244
SMALL = ["data.num_workers=0", "debug=fast", "callbacks.figures=false"]


def block_with(kind: str, text: str) -> str:
    (block,) = (block for its_kind, block in BLOCKS if its_kind == kind and text in block)
    return block


def test_every_command_is_known() -> None:
    assert COMMANDS
    assert {line.split()[0] for line in COMMANDS} <= {"make", "python", "alexlab"}


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make")])
def test_make_target_exists(line: str) -> None:
    done = subprocess.run([*shlex.split(line), "-n"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_commands_run_in_order(shapes: Path, tmp_path: Path) -> None:
    for line in (line for line in COMMANDS if not line.startswith("make")):
        words = shlex.split(line.replace("PATH", str(shapes)).replace("PREPARED", str(tmp_path / "prepared")))[1:]
        more = [] if words[0] == "dashboard" else [f"paths.logs={tmp_path}"]
        if words[0] == "train.py":
            more += [*SMALL, "data.batch_size=8", "data.image_size=64"]
            if not any(word.startswith("data=") for word in words):
                more += ["data=folder", f"data.root={shapes}"]
            if "model=torchvision" not in words:
                more.append(NARROW)
            if "trainer=ddp" in words:
                more += ["trainer.accelerator=cpu", "trainer.devices=2"]
            elif not {"resume=latest", "from_run=latest"} & {*words}:
                more.append("logger=csv")  # W&B takes a few seconds per run, and the first command has it
        elif words[0] == "benchmark":
            more += ["data.batch_size=8", "data.image_size=64", "seconds=0.2", NARROW]
        elif words[0] == "predict":
            more += ["num_workers=0"]
        done = command(*words, *more)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert len(list(tmp_path.glob("train/*runs/**/summary.json"))) >= 3
    assert list(tmp_path.glob("train/*runs/**/eval.json"))
    assert list(tmp_path.glob("train/*runs/**/predictions.csv"))
    assert list(tmp_path.glob("train/*runs/**/model.onnx"))
    assert list(tmp_path.glob("train/*runs/**/figures/neighbours.png"))
    more = ["data.batch_size=8", "data.image_size=64", "logger=csv", f"paths.logs={tmp_path}"]
    words = [*SMALL, NARROW, "data=folder", f"data.root={shapes}", *more]
    given = '"model=alexnet", "data=folder", "data.root=PATH", "trainer.max_epochs=3"'
    script = block_with("python", "alexlab.load").replace(given, f"*{words!r}")
    done = command("-c", script.replace("picture.jpg", str(next(shapes.glob("val/*/*.jpg")))))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] in {path.name for path in (shapes / "train").iterdir()}


def test_a_network_is_one_file_and_one_yaml(shapes: Path, tmp_path: Path) -> None:
    """The README's network and its yaml, in a copy of the project."""
    copy = tmp_path / "project"
    for name in ("conf", "src"):
        shutil.copytree(ROOT / name, copy / name)
    shutil.copy(ROOT / "train.py", copy)
    (copy / "conf/model/mynet.yaml").write_text(block_with("yaml", "mynet"))
    (copy / "src/alexlab/models/mynet.py").write_text(block_with("python", "class MyNet"))
    small = ["data.batch_size=8", "data.image_size=64", *SMALL, "logger=csv", f"hydra.run.dir={tmp_path}/run"]
    done = command(
        str(copy / "train.py"),
        "model=mynet",
        "data=folder",
        f"data.root={shapes}",
        *small,
        env={"PYTHONPATH": os.fspath(copy / "src")},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "finished"


def test_links_exist() -> None:
    pages = ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120
