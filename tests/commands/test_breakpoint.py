"""breakpoint() in a training step, at a real terminal."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY, clean_env, summary_of, tiny_train

TASK = """
from alexlab.tasks.classification import ImageClassifier


class Stopping(ImageClassifier):
    def training_step(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == (0, 1):
            breakpoint()
        return super().training_step(batch, batch_idx)
"""
CTRL_C = "\x03"
PROMPT = "(Pdb) "


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "mypkg").mkdir()
    (tmp_path / "mypkg/tasks.py").write_text(TASK)
    return tmp_path


def train_at_terminal(
    shapes: Path, folder: Path, typed: list[str], *words: str, ranks: int = 0, **env: str
) -> tuple[int, str]:
    """Train with `Stopping`, type the next text at each prompt; return the exit code and what the terminal showed."""
    ours, theirs = pty.openpty()
    before = folder / "before.py"
    before.write_text(f"import sys\nsys.path.insert(1, {str(folder)!r})\n")
    screen, keys, end = "", iter(typed), time.monotonic() + 60
    prompts = 0

    def answer(pid: int) -> None:
        nonlocal screen, prompts
        while select.select([ours], [], [], 0)[0]:
            screen += os.read(ours, 65536).decode()
        if screen.count(PROMPT) > prompts and screen.endswith(PROMPT):
            prompts = screen.count(PROMPT)
            os.write(ours, next(keys, "q\n").encode())
        if pid and time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)

    words = ("task._target_=mypkg.tasks.Stopping", "test=false", *words)
    env = {"TERM": "xterm", "COLUMNS": "100", "OMP_NUM_THREADS": "1", **env}
    more = {"watch": answer, "before": before, "ranks": ranks, "terminal": os.ttyname(theirs)}
    done = tiny_train(shapes, folder / "run", *words, env=env, **more)
    answer(0)  # the rest
    os.close(ours)
    os.close(theirs)
    return done.returncode, re.sub(r"\x1b\[\?2004[hl]\r?", "", screen).replace(
        "\r\n", "\n"
    )  # readline's marks of a paste


@pytest.mark.parametrize("progress", ["auto", "plain", "none"])
def test_a_value_is_printed_ctrl_c_returns_to_the_prompt_and_the_run_continues(
    progress: str, shapes: Path, package: Path
) -> None:
    typed = ["p batch.images.shape\n", CTRL_C, "p batch_idx\n", "c\n"]
    code, screen = train_at_terminal(shapes, package, typed, f"callbacks.progress={progress}", "trainer.max_epochs=2")
    assert code == 0, screen
    before, prompt, after = screen.partition(PROMPT)
    assert "mypkg/tasks.py" in before.splitlines()[-2], "the debugger stops in the user's code"
    assert before.splitlines()[-1].startswith("-> "), "and nothing hides where"
    answers = "p batch.images.shape\ntorch.Size([8, 3, 64, 64])\n(Pdb) --KeyboardInterrupt--\n(Pdb) p batch_idx\n1\n"
    assert (prompt + after).replace("^C", "").startswith(f"(Pdb) {answers}(Pdb) c\n"), screen
    assert ("Epoch 0/1" in before, "Epoch 1/1" in after) == (progress == "auto", False)
    assert before.rfind("\x1b[?25l") <= before.rfind("\x1b[?25h"), "the cursor is shown"
    assert ("epoch 2/2 |" in after) == (progress != "none")
    assert summary_of(package / "run")["status"] == "finished"


def test_q_ends_the_run_with_one_line(shapes: Path, package: Path) -> None:
    code, screen = train_at_terminal(shapes, package, ["q\n"])
    why = "error: the debugger ended the run: q was entered, or standard input is not a terminal (remove breakpoint())."
    assert (code, screen.partition(PROMPT)[2]) == (2, f"q\n{why}\n")
    assert summary_of(package / "run")["status"] == "failed"


def test_from_python_the_debuggers_end_is_a_user_error(shapes: Path, package: Path) -> None:
    words = [*TINY, "task._target_=mypkg.tasks.Stopping", "data=folder", f"data.root={shapes}", "data.batch_size=8"]
    words += ["trainer.max_epochs=1", f"hydra.run.dir={package / 'run'}", f"paths.logs={package}"]
    program = f"""
import alexlab
from alexlab.engine.errors import UserError
try:
    alexlab.train(*{words})
except UserError as error:
    print("caught:", error)
"""
    env = clean_env({"PYTHONPATH": os.pathsep.join([str(package), *filter(None, sys.path)])})
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert "caught: the debugger ended the run: q was entered, or standard input is not a terminal" in done.stdout, done


def test_the_bar_stays_if_breakpoints_are_switched_off(shapes: Path, package: Path) -> None:
    code, screen = train_at_terminal(shapes, package, [], PYTHONBREAKPOINT="0")
    assert (code, PROMPT in screen, "2/2" in screen, "epoch 1/1 |" in screen) == (0, False, True, False), screen


def test_several_ranks_have_no_prompt(shapes: Path, package: Path) -> None:
    code, screen = train_at_terminal(shapes, package, [], "trainer=ddp_cpu", "trainer.devices=2", ranks=2)
    why = "error: breakpoint() works in a run with one process only: set trainer.devices=1."
    assert (code, PROMPT in screen, screen.splitlines()[-1].removeprefix("\x1b[?25h")) == (2, False, why), screen
