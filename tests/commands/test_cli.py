"""The commands' wrapper."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, clean_env, command, summary_of


def test_works_from_any_directory(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "train.py"), "--cfg", "job", "--resolve"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"root: {ROOT}/data/demo" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_lists_each_group_with_its_options_and_each_key() -> None:
    done = command("train.py", "--help")
    assert done.returncode == 0
    own = {path.name: path for path in (ROOT / "conf").iterdir() if path.is_dir()}
    for folder in (path for name, path in own.items() if name not in ("hydra", "paths", "dashboard")):
        options = ", ".join(sorted(path.stem for path in folder.glob("[!_]*.yaml")))
        assert f"  {folder.name:11} {options}\n" in done.stdout, folder.name
    for key in ("max_epochs:", "batch_size:", "lr:", "seed: 0", "--multirun"):
        assert key in done.stdout
    assert "crop_ratio: 0.875" in command("train.py", "--help", "augment=paper").stdout
    for sister in ("eval", "compare", "predict", "export"):  # has no groups: its keys with what they mean
        told = command(f"{sister}.py", "--help").stdout
        assert re.search(r"^(ckpt|runs): .* # .+$", told, re.M)
        assert not re.search("multirun|Groups|hydra:|filled in", told)


def test_ctrl_c_ends_the_imports_at_once() -> None:
    """torch's C code swallows KeyboardInterrupt where it imports numpy."""
    code = """
import gc, os, signal
from alexlab.engine.process import importing
before = signal.getsignal(signal.SIGINT)
with importing():
    assert not gc.isenabled()
assert gc.isenabled()
assert gc.get_freeze_count() > 0
assert signal.getsignal(signal.SIGINT) is before
with importing():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        print("swallowed")
print("went on")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted.\n")


def test_a_run_goes_on_when_nobody_reads_what_it_says(shapes: Path, tmp_path: Path) -> None:
    words = [sys.executable, "train.py", *TINY, "data=folder", f"data.root={shapes}", "debug=fast"]
    run = subprocess.Popen(
        [*words, f"hydra.run.dir={tmp_path}/run"], cwd=ROOT, env=clean_env(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert run.stdout is not None
    assert run.stderr is not None
    assert run.stdout.readline().startswith("run directory: ")
    run.stdout.close()
    told = "note: nobody reads the output any more; the run goes on, see its train.log.\n"
    assert (run.stderr.read(), run.wait(240)) == (told, 0)
    assert summary_of(tmp_path / "run")["status"] == "finished"


LEAVING = """import atexit, sys, threading
if "torch" in sys.argv:
    import torch
from alexlab.engine.process import (leave, nothing_follows)
atexit.register(lambda: print("at exit"))
ending = threading.Event()
threading.Thread(target=lambda: (ending.wait(), print("thread"))).start()
def main():
    if nothing_follows(sys._getframe(1)):
        print("leaving")
        ending.set()
        leave(7)
main()
print("went on")
ending.set()
"""


def test_a_script_leaves_torch_behind_where_nothing_follows(tmp_path: Path) -> None:
    """Threads and what was registered for the end come first; a profiler gets its script back."""
    script = tmp_path / "script.py"
    script.write_text(LEAVING)

    def said(*words: str) -> tuple[int, list[str]]:
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
        assert done.stderr == ""
        return done.returncode, done.stdout.splitlines()[:3]

    assert said(str(script), "torch") == (7, ["leaving", "thread", "at exit"])
    assert said(str(script)) == (0, ["went on", "thread", "at exit"])
    assert said("-m", "cProfile", "-o", str(tmp_path / "profile"), str(script), "torch")[1][0] == "went on"
    assert (tmp_path / "profile").is_file()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train.py", "optimizer.lrr=1"], "optimizer.lrr: there is no such key. Did you mean optimizer.lr?"),
        (["train.py", "batch_size=1"], "batch_size: there is no such key. Did you mean data.batch_size?"),
        (["train.py", "modle=alexnet"], "modle: there is no such key. Did you mean model?"),
        (["train.py", "trainer=dpp"], "trainer=dpp: there is no such option. Did you mean trainer=ddp?"),
        (["eval.py", "run=x", "checkpoint=best"], "checkpoint: there is no such key."),
        (["compare.py", "srot=val/loss"], "srot: there is no such key. Did you mean sort?"),
        (
            ["train.py", "~optimizer.momentun"],
            "optimizer.momentun: there is no such key. Did you mean ~optimizer.momentum?",
        ),
        (["train.py", "~qq.zz"], "qq.zz: there is no such key. `python train.py --cfg job` lists all."),
        (["dashboard.py", "~dashboard.sections.picture"], "key. Did you mean ~dashboard.sections.pictures?"),
        (["train.py", "logger=null"], "logger=null: choose an option by its name: all, csv, none, tensorboard, wandb."),
        (
            ["eval.py", "run=x", "trainer=cpu"],
            "trainer is no group of eval.py: set one of its keys, ",
        ),
        (["train.py", "optimizer.lr=0.1="], "optimizer.lr=0.1="),
        (["train.py", "optimizer.lr=[1"], "optimizer.lr=[1: cannot be read as key=value (no viable alternative"),
        (["eval.py"], "run is missing: give a run's directory with run=PATH, or run=latest."),
        (["eval.py", "run=latest", "data.num_workers=-1"], "data.num_workers=-1: must be a whole number, at least 0"),
        (["compare.py", "most=0"], "most=0: must be a whole number, at least 1, or null."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_words_that_are_not_understood(words: list[str], told: str) -> None:
    done = command(*words)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 14


def test_a_pipe_that_is_closed_early() -> None:
    """`| head -1`, of which Python would say that the pipe is broken."""
    for script in ("train.py", "eval.py"):
        process = subprocess.Popen(
            [sys.executable, script, "--help"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.close()
        _, errors = process.communicate(timeout=60)
        assert errors == b""
