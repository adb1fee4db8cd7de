"""An optimizer and a schedule of one's own, outside of the repository, as docs/extending.md shows them."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, command, summary_of, tiny_train

PAGE = (ROOT / "docs/extending.md").read_text()
# kills the process once, after three steps
KILLER = """
import os, signal
from pytorch_lightning import Callback

class Killer(Callback):
    def __init__(self, marker):
        self.marker = marker

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 3 and not os.path.exists(self.marker):
            open(self.marker, "x").close()
            os.kill(os.getpid(), signal.SIGKILL)
"""


def files_of(section: str) -> dict[str, str]:
    """Return the files of a section of the page by their paths."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```", text, re.M | re.S)
    return dict(blocks)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mypkg/ and MYCONF/ with the files of both sections; path.py puts the folder on Python's path."""
    folder = tmp_path_factory.mktemp("own")
    sections = files_of("Optimizer"), files_of("Scheduler")
    assert [len(files) for files in sections] == [2, 3]
    parts = [files.pop("mypkg/parts.py") for files in sections]
    assert all(len(text.strip().splitlines()) <= 25 for text in [*parts, *sections[0].values(), *sections[1].values()])
    for name, text in {"mypkg/parts.py": "\n\n".join([*parts, KILLER]), **sections[0], **sections[1]}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "path.py").write_text(f"import sys\nsys.path.append({str(folder)!r})\n")
    return folder


WORDS = ["optimizer=mine", "scheduler=mine", "trainer.max_epochs=2", "trainer.limit_train_batches=4"]
WORDS += ["trainer.log_every_n_steps=1", "checkpoint.every_n_steps=1"]


def train(project: Path, shapes: Path, run_dir: Path, *words: str) -> Any:
    own = ["--config-dir", str(project / "MYCONF")]
    return tiny_train(shapes, run_dir, *own, *WORDS, *words, before=project / "path.py")


def test_own_parts_train_and_resume_after_a_kill(project: Path, shapes: Path, tmp_path: Path) -> None:
    straight, run_dir, path = tmp_path / "straight", tmp_path / "run", project / "path.py"
    done = train(project, shapes, straight)
    assert done.returncode == 0, done.stderr

    # the learning rates are those of the formula
    with (straight / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["lr/decay"]]
    factors = [min((n + 1) / 2, (2 / (n + 1)) ** 0.5) * min(1, (8 - n) / 3) for n in range(8)]
    assert [float(row["lr/decay"]) for row in rows] == pytest.approx([1e-4 * factor for factor in factors])

    done = train(project, shapes, run_dir, f"+callbacks.kill={{_target_: mypkg.parts.Killer, marker: {tmp_path}/x}}")
    assert done.returncode == -9
    done = command("train.py", f"resume={run_dir}", before=path)  # a config of a run does not run what it names
    assert done.returncode == 2
    assert "If you trust this run and mypkg, add allow=[mypkg]" in done.stderr
    done = command("train.py", f"resume={run_dir}", "allow=[mypkg]", before=path)
    assert done.returncode == 0, done.stderr
    a, b = (torch.load(path / "checkpoints/last.ckpt", weights_only=True) for path in (straight, run_dir))
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert str(a[part]) == str(b[part])
    assert all(torch.equal(value, b["state_dict"][key]) for key, value in a["state_dict"].items())
    assert summary_of(straight)["last"] == summary_of(run_dir)["last"]

    # what reads runs needs neither the class nor a name of the schedule
    assert command("eval.py", f"run={run_dir}").returncode == 0
    table = command("compare", f"runs=[{straight},{run_dir}]", "format=csv")
    assert table.returncode == 0, table.stderr


def test_a_dry_run_names_own_parts(project: Path, shapes: Path, tmp_path: Path) -> None:
    words = ["model=timm", "model.name=test_vit", "data.image_size=160", "+optimizer.layer_decay=0.75", "dry_run=true"]
    done = train(project, shapes, tmp_path / "run", *words)
    assert done.returncode == 0, done.stderr
    assert "SignSGD, InverseRoot" in done.stdout
    assert "4 per epoch, 8 in total" in done.stdout


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["+scheduler.coldown=3"], "`scheduler.coldown=3`: mypkg.parts.InverseRoot has no argument of this name. Did"),
        (
            ["+scheduler.monitor=val/loss", "scheduler.interval=epoch"],
            "`scheduler.monitor=val/loss` has no effect: mypkg.parts.InverseRoot reads",
        ),
        (["scheduler.interval=steps"], "`scheduler.interval=steps` must be epoch or step."),
        (["+optimizer.momentum=0.9"], "mypkg.parts.SignSGD does not take these settings: optimizer.momentum=0.9. Rem"),
        (["+optimizer.layer_decay=2"], "`optimizer.layer_decay=2` must be at most 1."),
        (
            ["scheduler._target_=mypkg.parts.Killer"],
            "`scheduler.cooldown=3`: mypkg.parts.Killer has no argument of this",
        ),
    ],
    ids=lambda value: value[0].split(".")[1] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_error_before_the_run_exists(
    words: list[str], why: str, project: Path, shapes: Path, tmp_path: Path
) -> None:
    done = train(project, shapes, tmp_path / "run", *words)
    assert done.returncode == 2, done.stderr
    assert why in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
