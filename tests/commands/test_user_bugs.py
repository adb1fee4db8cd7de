"""A bug in a user's own code prints one short traceback, and train.log has the whole one."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, clean_env, summary_of

from alexlab.commands.build import try_net
from alexlab.engine.errors import UserError, short_traceback

BROKEN = """
from torch import nn


class Broken(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, x):
        x = self.pool(x)
        return self.head(x)

    def pool(self, x):
        if self.training:
            return polo(x)
        return x.mean((2, 3))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with a network whose forward has a typo that only training reaches."""
    project = tmp_path_factory.mktemp("fork")
    for part in ("conf", "src"):
        shutil.copytree(ROOT / part, project / part)
    shutil.copy(ROOT / "train.py", project)
    (project / "src/alexlab/models/broken.py").write_text(BROKEN)
    option = "name: broken\nmean: auto\nstd: auto\nnet: {_target_: alexlab.models.broken.Broken}\n"
    (project / "conf/model/broken.yaml").write_text(option)
    return project


@pytest.mark.parametrize("overrides", [["logger=wandb"], ["trainer=ddp_cpu"]], ids=str)
def test_a_bug_in_forward_prints_the_users_frames_once(
    overrides: list[str], project: Path, shapes: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "train.py", *TINY, "model=broken", "model.name=broken",
         "data=folder", f"data.root={shapes}", "data.batch_size=8", f"hydra.run.dir={tmp_path}/run", *overrides],
        cwd=project, env=clean_env({"PYTHONPATH": str(project / "src")}), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    screen = done.stdout + done.stderr
    assert len(done.stderr.splitlines()) <= 24, screen
    assert screen.count("Traceback (most recent call last)") == 1, screen
    assert "NameError: name 'polo' is not defined" in done.stderr
    lines = done.stderr[: done.stderr.index("NameError")].splitlines()
    assert lines[-1].strip(" ^") in ("return polo(x)", ""), screen
    for part in ("models/broken.py", "in forward", "in pool"):
        assert part in done.stderr
    for part in ("site-packages", "alexlab/commands", "alexlab/engine", "train.py"):
        assert part not in "".join(line for line in lines if line.lstrip().startswith("File")), screen
    log = (tmp_path / "run/train.log").read_text()
    assert log.count("Traceback (most recent call last)") == 1
    assert "pytorch_lightning" in log
    assert "NameError: name 'polo' is not defined" in log
    assert summary_of(tmp_path / "run")["status"] == "failed"


def test_a_bug_that_the_first_image_finds_is_not_a_users_mistake() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, undefined])  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(NameError) as caught:
        try_net(Net(), (32, 32), 10)
    printed = short_traceback(caught.value)
    assert "in forward" in printed
    assert "build.py" not in printed
    assert "module.py" not in printed


def test_what_a_network_cannot_do_is_answered_with_its_line_and_what_it_must_return() -> None:
    class Net(torch.nn.Module):
        def __init__(self, features: int) -> None:
            super().__init__()
            self.head = torch.nn.Linear(features, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x.mean((2, 3)))

    with pytest.raises(UserError, match=r"mat1 and mat2 shapes cannot be .* \(test_user_bugs.py, line \d+\)"):
        try_net(Net(4), (32, 32), 10)
    with pytest.raises(
        UserError, match=r"^Net must return logits \(B, 5\), one for each class. For one image it returns \(1, 10\)"
    ):
        try_net(Net(3), (32, 32), 5)


def test_a_long_traceback_is_cut_at_its_start() -> None:
    def inner() -> None:
        raise ValueError("\n".join(map(str, range(100))))

    def outer() -> None:
        inner()

    with pytest.raises(ValueError, match="99") as caught:
        outer()
    printed = short_traceback(caught.value, most=8).splitlines()
    assert len(printed) <= 8
    assert printed[:2] == ["Traceback (most recent call last):", "  ..."]
    assert any("in inner" in line for line in printed)
    assert "ValueError: 0" in printed
