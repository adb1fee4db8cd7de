"""Ranks that something else than torchrun and srun starts, with RANK and WORLD_SIZE, as on machines of their own."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, SMALL_NET, clean_env, command, summary_of
from resuming import difference

from alexlab.engine.launcher import free_port
from alexlab.engine.ranks import raise_file_limit

BN = ["model=alexnet_bn", "model.name=alexnet_bn", "+model.net.hidden=[8,8]", "model.net.maps=[4,4,4,4,4]"]


def words_of(data: Path, *more: str) -> list[str]:
    images = ["data=folder", f"data.root={data}", "data.image_size=64", "data.batch_size=8", "data.num_workers=0"]
    short = [
        "trainer.accelerator=cpu",
        "trainer.max_epochs=2",
        "trainer.limit_train_batches=3",
        "checkpoint.every_n_steps=2",
    ]
    return ["train.py", *SMALL_NET, *images, *short, "logger=csv", "callbacks.figures=false", *more]


def ranks(
    *commands: list[str], kill_if: Callable[[], bool] = lambda: False, **env: str
) -> list[subprocess.CompletedProcess[str]]:
    """Run a command for each rank, all at the same time; kill them as soon as `kill_if` holds."""
    shared = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port(None)), **env}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    running = [
        subprocess.Popen([sys.executable, *words], env=clean_env({**shared, "RANK": str(rank)}), **pipes)
        for rank, words in enumerate(commands)
    ]
    try:
        while not kill_if() and any(process.poll() is None for process in running):
            time.sleep(0.05)
        for process in running if kill_if() else ():
            process.kill()
        printed = [process.communicate(timeout=200) for process in running]
    finally:
        for process in running:
            process.kill()
    return [
        subprocess.CompletedProcess(words, process.returncode, *texts)
        for words, process, texts in zip(commands, running, printed, strict=True)
    ]


@pytest.fixture(scope="module")
def straight(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run of two ranks that this project started."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    done = command(*words_of(shapes, "trainer=ddp_cpu", "trainer.devices=2", f"hydra.run.dir={folder}"))
    assert done.returncode == 0, done.stderr
    return folder


def test_a_killed_run_is_resumed_without_a_common_folder(shapes: Path, straight: Path, tmp_path: Path) -> None:
    """Only the machine of rank 0 has the run. It ends bit for bit as a run that was not killed."""
    own = [[f"hydra.run.dir={tmp_path / name / 'run'}", f"paths.logs={tmp_path / name}"] for name in ("n1", "n2")]
    last = tmp_path / "n1/run/checkpoints/last.ckpt"
    killed = ranks(*(words_of(shapes, *each) for each in own), kill_if=last.is_file)
    assert [done.returncode for done in killed] == [-9, -9], killed[0].stderr + killed[1].stderr
    assert not [*tmp_path.glob("n2/**/config.yaml")]
    resumed = ranks(*(words_of(shapes, *each, "resume=auto") for each in own))
    assert [done.returncode for done in resumed] == [0, 0], resumed[0].stderr + resumed[1].stderr
    assert ", resumed" in resumed[0].stdout
    assert not resumed[1].stdout, "only rank 0 prints"
    assert difference(straight, tmp_path / "n1/run") is None


def test_initial_weights_and_statistics_are_rank_0s(shapes: Path, tmp_path: Path) -> None:
    """With BatchNorm, whose statistics DDP does not send here; the file is on the machine of rank 0 alone."""
    source = command(*words_of(shapes, *BN, f"hydra.run.dir={tmp_path / 'source'}"))
    assert source.returncode == 0, source.stderr
    weights = tmp_path / "source/checkpoints/best.ckpt"
    frozen = [*BN, "optimizer.lr=1e-12", "trainer.max_epochs=1", "trainer.limit_train_batches=1", "model.net.dropout=0"]
    words = words_of(shapes, *frozen, f"init_from={weights}", f"hydra.run.dir={tmp_path / 'two'}")
    hidden = words_of(shapes, *frozen, f"init_from={tmp_path / 'none.ckpt'}", f"hydra.run.dir={tmp_path / 'two'}")
    refused = ranks(words, hidden)
    assert [done.returncode for done in refused] == [2, 2], "not the same command"
    both = ranks(words, words)
    assert [done.returncode for done in both] == [0, 0], both[0].stderr + both[1].stderr
    one = command(*words_of(shapes, *frozen, f"init_from={weights}", f"hydra.run.dir={tmp_path / 'one'}"))
    assert one.returncode == 0, one.stderr
    assert summary_of(tmp_path / "two")["best"]["val/acc1"] == summary_of(tmp_path / "one")["best"]["val/acc1"]


def test_different_settings_are_refused_before_a_file_is_touched(shapes: Path, tmp_path: Path) -> None:
    words = words_of(shapes, f"hydra.run.dir={tmp_path / 'run'}")
    first, second = ranks(words, [*words, "optimizer.lr=0.5"])
    assert (first.returncode, second.returncode) == (2, 2)
    assert "error: rank 1 on " in first.stderr
    assert "has other settings: optimizer.lr=0.5 (rank 0 on " in first.stderr
    assert "Start all ranks with the same command line and the same yaml files." in first.stderr
    assert second.stderr == ""
    assert not (tmp_path / "run").exists()


def test_a_machine_without_the_images_or_with_others_is_named(shapes: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(shapes, tmp_path / "images"))
    run = f"hydra.run.dir={tmp_path / 'run'}"
    first, second = ranks(words_of(shapes, run), words_of(tmp_path / "missing", run))
    assert (first.returncode, second.returncode) == (2, 2)
    assert first.stderr.startswith("error: rank 1 on ")
    assert f"`data.root={tmp_path / 'missing'}` does not exist" in first.stderr
    assert second.stderr == ""
    next((other / "train").glob("*/*.jpg")).unlink()
    first, second = ranks(words_of(shapes, run), words_of(other, run))
    assert (first.returncode, second.returncode) == (2, 2)
    assert f": the images in {other} are not those that rank 0 on " in first.stderr
    assert "Copy the same images to all machines." in first.stderr
    assert not (tmp_path / "run").exists()


def test_a_mistake_of_all_ranks_is_printed_once(shapes: Path, tmp_path: Path) -> None:
    words = words_of(shapes, f"hydra.run.dir={tmp_path / 'run'}", "optimizer.lr=-1")
    first, second = ranks(words, words)
    assert (first.returncode, second.returncode) == (2, 2)
    assert first.stderr == "error: `optimizer.lr=-1` must be above 0.\n"
    assert second.stderr == ""


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT are not set: set them for each process, or unset WORLD_"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "x"},
            "says that this is one of 2 processes, and MASTER_PORT are",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            "RANK=2 in the environment must be from 0 to WORLD_SIZE-1=1.",
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment must be a whole number."),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Start each with RANK=$OMPI_COMM_WORLD_RANK WORLD_SIZE=$OMPI_COMM_WORLD_SIZE"),
        ({"PMI_SIZE": "4"}, "mpirun has started 4 processes (PMI_SIZE), which do not know of each other."),
    ],
)
def test_an_environment_of_several_processes_is_understood_or_refused(
    env: dict[str, str], words: str, shapes: Path, tmp_path: Path
) -> None:
    done = command(*words_of(shapes, f"hydra.run.dir={tmp_path / 'run'}"), env=env)
    assert done.returncode == 2
    assert words in done.stderr
    assert not (tmp_path / "run").exists()


def test_more_files_may_be_opened(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Connections to each rank count too; the system's own limit is reported."""
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (100, 4000))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: set_to.append(limits))
    raise_file_limit(90)
    raise_file_limit(2000)
    assert capsys.readouterr().out == ""
    raise_file_limit(5000)
    assert set_to == [(2000, 4000), (4000, 4000)]
    printed = capsys.readouterr().out
    assert printed == "warning: this run may need 5000 open files, and 4000 are allowed: raise `ulimit -Hn`.\n"


def test_a_rank_that_does_not_come(shapes: Path, tmp_path: Path) -> None:
    port = str(free_port(None))
    env = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = words_of(shapes, f"hydra.run.dir={tmp_path / 'run'}", "trainer.timeout=0.05")
    alone = command(*words, env=env)
    assert alone.returncode == 1
    assert f"not all ranks came to 127.0.0.1:{port} within trainer.timeout=0.05 minutes." in alone.stderr
    lost = command(*words, env={**env, "RANK": "1"})
    assert lost.returncode == 1
    assert f"rank 0 is not at 127.0.0.1:{port} within trainer.timeout=0.05 minutes." in lost.stderr
    assert not (tmp_path / "run").exists()


def test_a_signal_while_ranks_meet_ends_the_wait(shapes: Path, tmp_path: Path) -> None:
    env = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port(None))}
    words = words_of(shapes, f"hydra.run.dir={tmp_path / 'run'}")
    process = subprocess.Popen([sys.executable, *words], env=clean_env(env), cwd=ROOT, stdout=-1, stderr=-1, text=True)
    while not listens(int(env["MASTER_PORT"])) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "Stopped by SIGTERM." in printed
    assert not (tmp_path / "run").exists()


def listens(port: int) -> bool:
    return any(each.laddr.port == port and each.status == "LISTEN" for each in psutil.net_connections("tcp"))


def test_devices_that_differ_are_refused(shapes: Path, tmp_path: Path) -> None:
    words = words_of(shapes, f"hydra.run.dir={tmp_path / 'run'}")
    slow = patched(words, "import torch; torch.cpu._is_avx512_bf16_supported = lambda: False")
    first, second = ranks(words, slow)
    if "bf16-mixed" not in first.stderr:
        pytest.skip("this CPU has no bf16 dot products, so that both ranks choose 32-true")
    assert (first.returncode, second.returncode) == (2, 2)
    assert "has other settings: precision=32-true (rank 0 on " in first.stderr
    assert "Set trainer.accelerator and trainer.precision" in first.stderr


def patched(words: list[str], code: str) -> list[str]:
    """Return the command with code that runs first."""
    return ["-c", f"{code}\nimport runpy, sys\nsys.argv = {words!r}\nrunpy.run_path('train.py', None, '__main__')"]


BUG = """
from alexlab.callbacks.progress import ProgressReporter
def fail(*_):
    raise RuntimeError("a bug of rank 1")
ProgressReporter.on_train_batch_end = fail
"""


COUNTING = """
import os, runpy, sys
from alexlab.data.fast import folder_cache
scan = folder_cache.scan
def counted(*args):
    with open({file!r}, "a") as file:
        file.write(os.environ["RANK"])
    return scan(*args)
folder_cache.scan = counted
sys.argv = {words!r}
runpy.run_path("train.py", run_name="__main__")
"""


def test_one_rank_of_a_machine_lists_a_large_folder(shapes: Path, tmp_path: Path) -> None:
    image = next((shapes / "train").rglob("*.jpg"))
    for split, count in (("train", 10_000), ("val", 4)):
        for number in range(count):
            link = tmp_path / "data" / split / "ab"[number % 2] / f"{number}.jpg"
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(image, link)
    for folder in (path for path in (tmp_path / "data").rglob("*") if path.is_dir()):
        os.utime(folder, (1e9, 1e9))  # a folder that has just changed may change again, and is not saved
    words = words_of(tmp_path / "data", "trainer.max_steps=1", f"paths.logs={tmp_path / 'logs'}", "test=false")
    code = COUNTING.format(file=str(tmp_path / "count"), words=[*words, f"hydra.run.dir={tmp_path / 'run'}"])
    for done in ranks(["-c", code], ["-c", code]):
        assert done.returncode == 0, done.stderr
    # val is small, so each rank lists it
    assert sorted((tmp_path / "count").read_text()) == ["0"] * 3 + ["1"]


def test_an_error_of_another_rank_is_not_run_again(shapes: Path, tmp_path: Path) -> None:
    """It would come again at the same step, for ever."""
    scontrol, asked = tmp_path / "bin/scontrol", tmp_path / "asked"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\ntouch {asked}\n")
    scontrol.chmod(0o755)
    words = words_of(shapes, f"hydra.run.dir={tmp_path / 'run'}", "resume=auto", "resume.requeue=true")
    path = f"{scontrol.parent}:{os.environ['PATH']}"
    first, second = ranks(words, patched(words, BUG), SLURM_JOB_ID="91", PATH=path)
    assert (first.returncode, second.returncode) == (1, 1)
    assert "another rank" in first.stderr
    assert "a bug of rank 1" in second.stderr
    assert not asked.exists()


def test_paths_of_a_run_are_kept_where_a_machine_has_no_other(shapes: Path, tmp_path: Path) -> None:
    """The images of the run, although the default folder of images differs between the machines."""
    folder = [f"hydra.run.dir={tmp_path / 'run'}"]
    own = [[f"paths.data={tmp_path / name}"] for name in ("d1", "d2")]
    first = ranks(*(words_of(shapes, *folder, *each, "trainer.max_epochs=1") for each in own))
    assert [done.returncode for done in first] == [0, 0], first[0].stderr + first[1].stderr
    again = ["train.py", f"resume={tmp_path / 'run'}", "trainer.max_epochs=2"]
    second = ranks(*([*again, *each] for each in own))
    assert [done.returncode for done in second] == [0, 0], second[0].stderr + second[1].stderr


def test_other_commands_need_no_srun(tmp_path: Path) -> None:
    env = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    done = command("compare", f"runs={tmp_path}", env=env)
    assert "srun" not in done.stderr
