"""The README's commands run, its links lead somewhere, and its network's two files are all that a network needs."""

import json
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
NARROW = "++model.net.hidden=[64,48]"  # AlexNet's fully connected layers: 244 MB of weights become 10
SMALL = ["data.num_workers=0", "debug=fast", "callbacks.figures=false"]


def test_every_command_is_known() -> None:
    assert COMMANDS
    assert {line.split()[0] for line in COMMANDS} <= {"make", "python", "source"}


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make")])
def test_make_target(line: str) -> None:
    words = re.findall(r"""(?:[^\s"]|"[^"]*")+""", line)
    done = subprocess.run(
        [word.replace('"', "") for word in [*words, "-n"]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_python_commands_run_in_order(shapes: Path, tmp_path: Path) -> None:
    for line in (line for line in COMMANDS if line.startswith("python")):
        words = shlex.split(line.replace("PATH", str(shapes)).replace("PREPARED", str(tmp_path / "prepared")))[1:]
        logs = [f"paths.logs={tmp_path}"]
        more: list[str] = []
        if words[0] == "train.py" and "--help" not in words:
            more = [*SMALL, *logs, "data.batch_size=8", "data.image_size=64"]
            if not any(word.startswith("data=") for word in words):
                more += ["data=folder", f"data.root={shapes}"]
            if "model=torchvision" not in words:
                more.append(NARROW)
            if "trainer=ddp" in words:
                more += ["trainer.accelerator=cpu", "trainer.devices=2"]
        elif words[0] == "benchmark.py":
            more = [*logs, "data.batch_size=8", "data.image_size=64", "seconds=0.2", NARROW]
        elif words[0] != "dashboard.py" and "--help" not in words:
            more = [*logs, *(["num_workers=0"] if words[0] == "predict.py" else [])]
        done = command(*words, *more)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert len(list(tmp_path.glob("train/*runs/**/summary.json"))) >= 3
    assert list(tmp_path.glob("train/*runs/**/eval.json"))
    assert list(tmp_path.glob("train/*runs/**/predictions.csv"))
    assert list(tmp_path.glob("train/*runs/**/model.onnx"))
    assert list(tmp_path.glob("train/*runs/**/figures/neighbours.png"))
    (script,) = (block for kind, block in BLOCKS if kind == "python" and "alexlab.load" in block)
    script = script.replace('load("latest")', f'load("latest", logs={str(tmp_path)!r})')
    done = command("-c", script.replace("picture.jpg", str(next(shapes.glob("val/*/*.jpg")))))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in {path.name for path in (shapes / "train").iterdir()}


def test_own_network_is_one_file_and_one_yaml(shapes: Path, tmp_path: Path) -> None:
    """The README's yaml and a network beside it, in a copy of the project."""
    copy = tmp_path / "project"
    for name in ("conf", "src"):
        shutil.copytree(ROOT / name, copy / name)
    shutil.copy(ROOT / "train.py", copy)
    (own,) = (block for kind, block in BLOCKS if kind == "yaml")
    (copy / "conf/model/mynet.yaml").write_text(own)
    (net,) = (block for kind, block in BLOCKS if kind == "python" and "class MyNet" in block)
    (copy / "src/alexlab/models/mynet.py").write_text(net)
    done = command(
        str(copy / "train.py"), "model=mynet", "data=folder", f"data.root={shapes}", "data.batch_size=8",
        "data.image_size=64", *SMALL, "logger=csv", f"hydra.run.dir={tmp_path}/run",
        env={"PYTHONPATH": str(copy / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "finished"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    assert len(README.splitlines()) <= 120
