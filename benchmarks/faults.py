"""The same faults, once with Lightning as used in its tutorials (stock.py), once with alexlab ("ours").

python benchmarks/faults.py [--only NAME ...] [--times 40]

kill_writing: kill -9 while a checkpoint is written, TMPDIR on another file system: how many files are damaged
bits:         flipped bits in a checkpoint: how many are noticed when it is read
nan:          a learning rate of 1e30: how the run ends, and whether its checkpoints have finite weights
sigterm:      SIGTERM in the second epoch: exit code, and how many trained steps the checkpoint has
rank:         kill -9 of one of two ranks: seconds until no process is left, and the exit code
files:        files and folders of tests/commands/test_bad_inputs.py: how many give the right pixels or a message
wandb:        a W&B server that hangs from the first metrics on: how many seconds longer a run takes

Needs Linux, and for `files` about 2 GB of memory.
"""

import csv
import hashlib
import io
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from common import ROOT, options
from PIL import Image
from pytorch_lightning.plugins import TorchCheckpointIO
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

sys.path.extend(str(ROOT / "tests" / name) for name in ("", "commands", "data"))
import test_bad_inputs as inputs
from conftest import SMALL_NET, clean_env
from wandb_server import wandb_server

from alexlab.data.demo import write_demo
from alexlab.engine import checkpoint_io as checkpoint

HERE = Path(__file__).resolve().parent
Row = tuple[str, ...]  # fault, Lightning's result, ours
LONGEST = 150  # seconds to wait for a run


def stock_command(root: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, str(HERE / "stock.py"), str(root), str(out), *more]


def our_command(root: Path, out: Path, *more: str) -> list[str]:
    data = ["data=folder", f"data.root={root}", "data.image_size=64", "data.batch_size=8"]
    other = ["logger=csv", "trainer.accelerator=cpu", "callbacks.figures=false", "test=false", f"hydra.run.dir={out}"]
    return [sys.executable, str(ROOT / "train.py"), *SMALL_NET, *data, *other, *more]


def run(command: list[str], watch: Callable[[int], bool] | None = None, env: dict[str, str] | None = None) -> Any:
    """Return the exit code (None after LONGEST), the seconds since `watch` was true (or the start), and the output."""
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=clean_env(env), **pipes)
    began = time.monotonic()
    while watch is not None and process.poll() is None and time.monotonic() - began < LONGEST:
        if watch(process.pid):
            began = time.monotonic()
            break
        time.sleep(0.01)
    try:
        printed = process.communicate(timeout=LONGEST)[0]
    except subprocess.TimeoutExpired:
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()
        return None, LONGEST, process.communicate()[0]
    return process.returncode, time.monotonic() - began, printed


# -- checkpoints


def kill_writing(root: Path, folder: Path, times: int) -> list[Row]:
    os.environ["TMPDIR"] = "/dev/shm"
    tempfile.tempdir = None
    damaged = []
    for name, io_plugin in (("stock", TorchCheckpointIO()), ("ours", checkpoint.AtomicCheckpointIO())):
        path, draw, count = folder / name / "last.ckpt", random.Random(0), 0
        path.parent.mkdir()
        for _ in range(times):
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                for n in range(10_000):
                    state = {"n": torch.full((20_000,), n), "pad": b"x" * 8_000_000, "state_dict": {}}
                    io_plugin.save_checkpoint(state, path)
                    os.write(writing, b"x")
            os.close(writing)
            os.read(reading, 1)
            time.sleep(draw.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reading)
            count += checkpoint.damage_of(path) is not None
        damaged.append(f"{count} of {times}")
    return [("kill -9 while a checkpoint is written: the only file is damaged", damaged[0], damaged[1])]


def bits(root: Path, folder: Path, times: int) -> list[Row]:
    path, draw = folder / "last.ckpt", random.Random(0)
    weights = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    checkpoint.AtomicCheckpointIO().save_checkpoint({"weights": weights, "state_dict": {}, "alexlab": {}}, path)
    whole = path.read_bytes()
    noticed = [0, 0]
    for _ in range(5 * times):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            torch.load(path, weights_only=True)
        except Exception:
            noticed[0] += 1
        noticed[1] += checkpoint.damage_of(path) is not None
    return [("flipped bits in a checkpoint that are noticed", *(f"{n} of {5 * times}" for n in noticed))]


# -- runs


def finite(folder: Path) -> str:
    paths = sorted(folder.rglob("*.ckpt"))
    states = [torch.load(path, weights_only=False)["state_dict"].values() for path in paths]
    bad = [state for state in states if not all(bool(value.float().isfinite().all()) for value in state)]
    return f"{len(bad)} of {len(paths)} checkpoints contain nan"


def nan(root: Path, folder: Path, times: int) -> list[Row]:
    code, _, _ = run(stock_command(root, folder / "stock", "--lr", "1e30"))
    ours, _, _ = run(our_command(root, folder / "ours", "optimizer.lr=1e30", "scheduler.warmup=0"))
    ends = [f"exit code {c}, {finite(folder / n)}" for c, n in ((code, "stock"), (ours, "ours"))]
    return [("a loss that is NaN", *ends)]


def step_of(folder: Path) -> int:
    paths = list(folder.rglob("last.ckpt"))
    return max((torch.load(path, weights_only=False)["global_step"] for path in paths), default=0)


def logged(folder: Path) -> int:
    """Count the training steps in metrics.csv."""
    steps = set()
    for path in folder.rglob("metrics.csv"):
        with path.open() as file:
            steps |= {row["step"] for row in csv.DictReader(file) if row.get("loss") or row.get("train/loss_step")}
    return len(steps)


def sigterm(root: Path, folder: Path, times: int) -> list[Row]:
    """Send SIGTERM once some lines are logged, which stock.py's logger writes only at the end of each epoch."""
    results = []
    for name, command in (
        ("stock", stock_command(root, folder / "stock", "--epochs", "500")),
        ("ours", our_command(root, folder / "ours", "trainer.max_epochs=500", "trainer.log_every_n_steps=1")),
    ):

        def strike(pid: int, name: str = name) -> bool:
            if logged(folder / name) < 8 or not list((folder / name).rglob("last.ckpt")):
                return False
            time.sleep(0.3)
            os.kill(pid, signal.SIGTERM)
            return True

        code, seconds, _ = run(command, strike)
        kept, done = step_of(folder / name), logged(folder / name)
        results.append(f"exit code {code} after {seconds:.1f} s, {kept} of {done} logged steps kept")
    return [("SIGTERM within an epoch", *results)]


def rank(root: Path, folder: Path, times: int) -> list[Row]:
    results = []
    stock = stock_command(root, folder / "stock", "--epochs", "1000", "--devices", "2")
    ours = our_command(root, folder / "ours", "trainer.max_epochs=1000", "trainer=ddp_cpu", "trainer.devices=2")
    for name, command, of in (("stock", stock, "stock.py"), ("ours", ours, "alexlab.commands.worker")):
        started: list[psutil.Process] = []

        def strike(pid: int, name: str = name, of: str = of, started: list[psutil.Process] = started) -> bool:
            if not list((folder / name).rglob("last.ckpt")):
                return False
            started += psutil.Process(pid).children(recursive=True)
            ranks = [p for p in started if of in " ".join(p.cmdline()) and "LOCAL_RANK" in p.environ()]
            next(p for p in ranks if p.environ()["LOCAL_RANK"] == "1").kill()
            return True

        code, seconds, printed = run(command, strike)
        left = sum(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in started)
        ended = f"exit code {code} after {seconds:.1f} s" if code is not None else f"still there after {LONGEST} s"
        results.append(f"{ended}, {left} processes left, {len(printed.splitlines())} lines printed")
    return [("kill -9 of one of two ranks", *results)]


def wandb(root: Path, folder: Path, times: int) -> list[Row]:
    more = []
    for name, command in (
        ("stock", lambda out, on: stock_command(root, out, "--epochs", "2", *(["--wandb"] if on else []))),
        ("ours", lambda out, on: [*our_command(root, out, "trainer.max_epochs=2"), *(["logger=wandb"] if on else [])]),
    ):
        alone = run(command(folder / name / "without", False))[1]
        with wandb_server() as server:
            server.fault, server.faulty_from = "hang", "history"
            code, seconds, _ = run(command(folder / name / "with", True), env=server.env())
        more.append(f"exit code {code}, {seconds - alone:.0f} s more" if code is not None else f"over {LONGEST} s more")
    return [("W&B's server hangs on the way", *more)]


# -- inputs


def in_child(what: Callable[[], str], nobody: bool = False) -> str:
    """Call `what` in a child process, as it may hang, and return the result or the error.

    Args:
        nobody: without root's rights.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if nobody and os.geteuid() == 0:
                os.setuid(65534)
            answer = what()
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    answer = os.read(reading, 65536).decode() if select.select([reading], [], [], 30)[0] else "it hangs"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    return answer


def digest(pixels: Any) -> str:
    return hashlib.sha256(np.asarray(pixels).tobytes()).hexdigest()


def files(root: Path, folder: Path, times: int) -> list[Row]:
    """Count the files that give the pixels that test_bad_inputs.py expects, or an error with the path; and the folders
    that give the expected number of images, or an error that says what is wrong, within 30 seconds."""
    hits, table = [0, 0], inputs.table("file")
    for n, (kind, make) in enumerate(inputs.FILES.items()):
        path = folder / f"{n}/a/x.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(make())

        def ours(path: Path = path) -> str:
            try:
                return digest(inputs.pixels_of(path))
            except OSError:  # with its name
                return str(inputs.decode.read(str(path), inputs.SampleTransform(32)))

        stock = in_child(lambda path=path: digest(ImageFolder(str(path.parent.parent))[0][0]))  # type: ignore[misc]
        for side, said in enumerate((stock, in_child(ours))):
            if table[kind].startswith("error: "):
                hits[side] += str(path) in said
            else:
                right = inputs.RIGHT.get(kind, lambda raw: np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")))
                hits[side] += said == digest(right(path.read_bytes()))
    stock_hits, our_hits = (f"{n} of {len(table)}" for n in hits)
    return [("files whose pixels are right, or that are named", stock_hits, our_hits), folders()]


def seen_by_stock(root: Path) -> str:
    steps = v2.Compose([v2.Resize((32, 32)), v2.PILToTensor()])
    parts = [DataLoader(ImageFolder(str(root / split), steps), 1) for split in ("train", "val")]
    return str(sum(1 for part in parts for _ in part))


def seen_by_ours(root: Path) -> str:
    data = inputs.data_of(root, timeout=30.0).read()
    for _ in data.train_dataloader():
        pass
    return f"{sum(data.images.values())} {data.notes()}"


def folders() -> Row:
    hits, table = [0, 0], inputs.table("in the folder")
    for kind, (change, count) in inputs.FOLDERS.items():
        outcome = table[kind]
        with tempfile.TemporaryDirectory(dir="/tmp") as name:
            root = Path(name)
            root.chmod(0o755)
            inputs.images(root, *(f"{s}/{c}/{n}.jpg" for s in ("train", "val") for c in ("cat", "dog") for n in (1, 2)))
            change(root)
            for side, look in enumerate((seen_by_stock, seen_by_ours)):
                said = in_child(lambda look=look, root=root: look(root), nobody=True)  # type: ignore[misc]
                if "error" in outcome:
                    hits[side] += name in said
                else:
                    hits[side] += said.split()[0] == str(count) and outcome.partition("warning: ")[2] in said
    stock_hits, our_hits = (f"{n} of {len(table)}" for n in hits)
    what = "folders that are read right, with a warning of what is ignored, or refused with the reason"
    return (what, stock_hits, our_hits)


ALL = {each.__name__: each for each in (kill_writing, bits, nan, sigterm, rank, files, wandb)}


def main() -> None:
    args = options(__doc__, only=list(ALL), times=40)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name, "shapes")
        write_demo(root, per_class={"train": 8, "val": 2, "test": 1})
        for fault in args.only:
            folder = Path(name, fault)
            folder.mkdir()
            for what, stock, ours in ALL[fault](root, folder, args.times):
                print(f"{what}\n    Lightning: {stock}\n    ours:      {ours}", flush=True)


if __name__ == "__main__":
    main()
