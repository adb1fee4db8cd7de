"""Two processes: the same weights as one, exact evaluation, one directory, and the same config on all."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import ROOT, SMALL_NET, clean_env, command, summary_of, tiny_train
from resuming import difference
from test_faults import kill_when

from alexlab.engine.launcher import free_port

EXACT = ["model=alexnet", "model.name=alexnet", "model.net.dropout=0", "+model.net.hidden=[64,48]", "augment=none"]
EXACT += ["trainer.precision=32-true", "test=false", "trainer.limit_train_batches=1.0", "trainer.log_every_n_steps=1"]
EXACT += ["trainer.accumulate_grad_batches=2"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PRINTED: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("batch", [8, 5])
def test_two_processes_end_with_the_weights_of_one(batch: int, shapes: Path, tmp_path: Path) -> None:
    """The same global batch, also if it does not divide; accumulated over two. Validation of 21 images leaves one rank
    short."""
    words = [*EXACT, f"data.batch_size={batch}", "augment.pca=0.1", "augment.erase=0.5"]
    one = tiny_train(shapes, tmp_path / "one", *words)
    two = tiny_train(shapes, tmp_path / "two", *words, "trainer=ddp", "trainer.devices=2")
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=0, atol=1e-5)
    first, second = summary_of(tmp_path / "one"), summary_of(tmp_path / "two")
    assert (first["world_size"], second["world_size"]) == (1, 2)
    assert second["last"]["val/acc1"] == pytest.approx(first["last"]["val/acc1"], abs=1e-9)
    assert second["last"]["val/loss"] == pytest.approx(first["last"]["val/loss"], abs=1e-4)
    assert len(list(tmp_path.glob("two/checkpoints/*.ckpt"))) == 2
    assert len(list(tmp_path.glob("two/*.log"))) == 1


def test_a_rank_without_images_and_broken_ones_on_both(shapes: Path, tmp_path: Path) -> None:
    """One val image for two ranks, with BatchNorm; broken training images are skipped, and listed from all ranks."""
    root = tmp_path / "data"
    shutil.copytree(shapes / "train", root / "train")
    (root / "val/ring").mkdir(parents=True)
    shutil.copy(shapes / "val/ring/0000.jpg", root / "val/ring")
    broken = sorted((root / "train").glob("*/0003.jpg"))[:6]
    for path in broken:
        path.write_bytes(path.read_bytes()[:200])
    words = ["data.on_error=skip", "trainer.precision=32-true", "trainer.limit_train_batches=1.0", "data.num_workers=1"]
    done = tiny_train(root, tmp_path / "run", *TWO, *words)
    assert done.returncode == 0, done.stderr
    summary = summary_of(tmp_path / "run")
    assert sorted(summary["skipped_images"]) == [str(path) for path in broken]
    assert "skipped 6 broken images: " in done.stdout
    alone = command("eval.py", f"run={tmp_path / 'run'}", "ckpt=last", f"paths.logs={tmp_path}")
    assert alone.returncode == 0, alone.stderr
    result = json.loads((tmp_path / "run/eval.json").read_text())
    assert result["images"] == 1
    assert result["loss"] == pytest.approx(summary["last"]["val/loss"], rel=1e-4)


def together(commands: list[tuple[list[str], dict[str, str]]]) -> list[str]:
    """Run commands at the same time; returns what each printed."""
    running = [
        subprocess.Popen([sys.executable, *words], cwd=ROOT, env=clean_env(env), **PRINTED) for words, env in commands
    ]
    try:
        printed = [process.communicate(timeout=200)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * len(running), "\n".join(printed)
    return printed


def small_job(shapes: Path, logs: Path) -> list[str]:
    data = ["data=folder", f"data.root={shapes}", "data.image_size=64", "data.batch_size=8", "data.num_workers=0"]
    return ["train.py", *SMALL_NET, *data, "logger=csv", *TWO, "debug=fast", f"paths.logs={logs}"]


def test_two_machines_of_torchrun_share_one_directory(shapes: Path, tmp_path: Path) -> None:
    """Two agents on loopback, as on two machines."""
    port = free_port(None)
    meet = ["--rdzv-backend", "c10d", "--rdzv-id", "x", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    agent = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--local-addr", "127.0.0.1"]
    agent += meet
    job = [*small_job(shapes, tmp_path), "trainer.devices=1", "trainer.num_nodes=2"]
    together([([*agent, "--node-rank", str(node), *job], {}) for node in range(2)])
    (folder,) = (tmp_path / "train" / "runs").iterdir()
    assert (summary_of(folder)["status"], summary_of(folder)["world_size"]) == ("finished", 2)


NODE = {"SLURM_NODEID": "0", "SLURM_NODELIST": "localhost", "SLURM_JOB_NAME": "train", "SLURM_NNODES": "1"}


def test_ranks_of_slurm_share_one_directory(shapes: Path, tmp_path: Path) -> None:
    """srun starts them, and each knows only its own number."""
    shared = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "3", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", **NODE}
    shared |= {"SLURM_JOB_NUM_NODES": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port(None))}
    job = small_job(shapes, tmp_path)
    first, second = together([(job, {**shared, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}) for rank in "01"])
    assert "run directory: " in first
    assert second.strip() == "", "only rank 0 prints"
    (folder,) = (tmp_path / "train" / "runs").iterdir()
    assert folder.name == "slurm-77.3"
    assert (summary_of(folder)["status"], summary_of(folder)["world_size"]) == ("finished", 2)


def test_ranks_with_different_configs_are_stopped(shapes: Path, tmp_path: Path) -> None:
    job = f"exec {sys.executable} {' '.join(small_job(shapes, tmp_path))} optimizer.lr=0.0$((RANK+1))"
    done = command(*TORCHRUN, "--no-python", "bash", "-c", job)
    assert done.returncode != 0
    assert "has other settings: optimizer.lr=0.02 (rank 0 on " in done.stderr
    assert not [*tmp_path.glob("train/runs/*")]


def test_a_rank_that_fails_ends_the_run_as_failed(shapes: Path, tmp_path: Path) -> None:
    shutil.copytree(shapes, tmp_path / "data")
    (tmp_path / "data/train/arrow/0000.jpg").write_bytes(b"broken")
    words = ["trainer=ddp_cpu", "trainer.limit_train_batches=1.0", "augment=none", "data.num_workers=1"]
    done = tiny_train(tmp_path / "data", tmp_path / "run", *words)
    assert done.returncode == 2
    assert "0000.jpg cannot be read as an image" in done.stderr
    assert len(done.stderr.splitlines()) == 1, "once, without a traceback"
    assert summary_of(tmp_path / "run")["status"] == "failed"


def test_a_sweep_under_torchrun_is_refused(shapes: Path, tmp_path: Path) -> None:
    rank = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    done = command(*small_job(shapes, tmp_path), "-m", "seed=0,1", env=rank)
    assert done.returncode == 2
    assert "error: A sweep starts the ranks of each of its jobs itself: run it without torchrun or srun." in done.stderr
    assert not (tmp_path / "train").exists()


FSDP_TWICE = """
import os, torch, torch.distributed as dist
from conftest import config_of as compose
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from alexlab.commands.build import _strategy
from alexlab.engine.devices import Devices

made = FSDP.__init__
FSDP.__init__ = lambda self, *a, device_id=None, **k: made(self, *a, device_id=torch.device("cpu"), **k)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))

dist.init_process_group("gloo")
outer = nn.Module()
outer.net = Net()
outer.forward = lambda x: outer.net(x)
strategy = _strategy(compose("trainer.strategy=fsdp", "trainer.precision=bf16-mixed"), Devices("cuda", 2, 1), Net)
strategy.parallel_devices = [torch.device("cpu")] * 2
for stage in range(3):  # fit, validation of the last weights, test: Lightning wraps the network again for each
    model = strategy._setup_model(outer)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.ones(2, 3, 8, 8)).sum().backward()
    assert outer.net.bn.running_mean.dtype == torch.float32
    if stage == 0:
        norm = model.clip_grad_norm_(1e-6)
        assert norm > 1e-6
        assert sum(float(p.grad.square().sum()) for p in model.parameters() if p.numel()) ** 0.5 <= 1.001e-6
print("done", flush=True)
os._exit(0)  # gloo's threads may still free the backward's works, which aborts a Python that is ending (torch 2.15)
"""


def test_fsdp_finds_its_network_again_in_each_stage(tmp_path: Path) -> None:
    """On CPUs, where Lightning refuses to run it; its wrapping is the real one."""
    script = tmp_path / "twice.py"
    script.write_text(FSDP_TWICE)
    done = command(*TORCHRUN, str(script), env={"PYTHONPATH": str(ROOT / "tests")})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 2


def test_batchnorm_and_averaged_weights_resume_exactly(shapes: Path, tmp_path: Path) -> None:
    """At the end of an epoch and within one. Each rank has statistics of its own, and averages of them."""
    words = [*TWO, "ema.decay=0.9", "scheduler=constant", "test=false", "trainer.precision=32-true"]
    words += ["trainer.limit_train_batches=null", "trainer.max_epochs=3"]
    assert tiny_train(shapes, tmp_path / "straight", *words).returncode == 0
    straight = weights(tmp_path / "straight")
    for end in ("trainer.max_epochs=2", "trainer.max_steps=7"):
        first, more = tmp_path / f"first-{end}", tmp_path / f"more-{end}"
        assert tiny_train(shapes, first, *words, end).returncode == 0
        done = tiny_train(shapes, more, *words, f"ckpt_path={first / 'checkpoints/last.ckpt'}")
        assert done.returncode == 0, done.stderr
        assert all(torch.equal(value, straight[key]) for key, value in weights(more).items())


def test_slurm_is_asked_for_the_job_again(shapes: Path, tmp_path: Path) -> None:
    """SIGUSR1 comes before the time is up; the job that comes again finds its directory by its number."""
    asked = tmp_path / "asked"
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    env = {"SLURM_JOB_ID": "91", "SLURM_NTASKS": "1", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    words = [*small_job(shapes, tmp_path), "trainer.max_epochs=60", "resume=auto", "resume.requeue=true"]
    folder = tmp_path / "train/runs/slurm-91.0"

    def due() -> bool:
        return (folder / "metrics.csv").is_file()

    done = command(*words, env=env, watch=kill_when(due, signal.SIGUSR1))
    assert done.returncode == 128 + signal.SIGUSR1, done.stderr
    assert "SLURM queued job 91 again." in done.stdout
    assert asked.read_text() == "requeue 91\n"
    assert summary_of(folder)["status"] == "preempted"
    step = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    done = command(*words, "trainer.max_epochs=1", env=env)
    assert done.returncode == 0, done.stderr
    assert ", resumed" in done.stdout
    assert summary_of(folder)["status"] == "finished"
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] >= step
    done = command(*words[:-2], "resume.requeue=true", env=env)
    assert done.returncode == 2
    assert "`resume.requeue=true` needs resume=auto, with which the requeued job resumes its run." in done.stderr


def test_torchrun_starts_again_from_the_newest_checkpoint(shapes: Path, tmp_path: Path) -> None:
    """After one rank was killed with -9."""
    run_dir = tmp_path / "run"
    job = [*small_job(shapes, tmp_path), "trainer.max_epochs=3", "trainer.limit_train_batches=null"]
    words = [*job, "checkpoint.every_n_steps=1", "resume=auto", f"hydra.run.dir={run_dir}"]
    # torchrun's number of devices; the command line has none
    alone = [word for word in job if word not in TWO] + ["trainer.accelerator=cpu", "checkpoint.every_n_steps=1"]
    straight = command(*TORCHRUN, *alone)
    assert straight.returncode == 0, straight.stderr
    assert straight.stdout.count("epoch 1/3") == 1
    (folder,) = (tmp_path / "train/runs").iterdir()
    assert summary_of(folder)["world_size"] == 2
    killed: list[int] = []

    def watch(pid: int) -> None:
        ranks = [p for p in psutil.Process(pid).children(recursive=True) if "train.py" in " ".join(p.cmdline())]
        if not killed and len(ranks) == 2 and (run_dir / "checkpoints/last.ckpt").is_file():
            killed.append(ranks[1].pid)
            ranks[1].kill()

    env = clean_env()
    restarting = [sys.executable, *TORCHRUN, "--max-restarts", "1", *words]
    process = subprocess.Popen(restarting, cwd=ROOT, env=env, **PRINTED)
    while process.poll() is None and not killed:
        with contextlib.suppress(psutil.NoSuchProcess):
            watch(process.pid)
    printed = process.communicate(timeout=200)[0]
    assert killed
    assert process.returncode == 0, printed
    assert ", resumed" in printed
    assert difference(folder, run_dir) is None
