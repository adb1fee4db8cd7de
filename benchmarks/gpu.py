"""What a GPU does: tests, AlexNet's steps, whole trainings, LRN, 16-mixed, exact resume, memory. See gpu.sh.

benchmarks/gpu.sh [--minutes 8]

The parts run in the order of their worth, until the time is over. The table in benchmarks/results.md, between the two
comments that name this script, is written anew. On a CPU each part runs in a small form, to show that it works, and
the table says that nothing was measured.
"""

import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import ROOT, options
from torch import nn

GPU = torch.cuda.is_available()
KIND = "cuda" if GPU else "cpu"
SIDE = 224 if GPU else 64
BATCHES = (128, 256, 512, 1024) if GPU else (8,)
STEPS, ROUNDS = (10, 3) if GPU else (1, 1)
LOADER = ("numpy", "simplejpeg", "PIL", "torchvision", "pytorch_lightning", "hydra", "torchmetrics", "psutil")
MARK = "<!-- gpu.sh -->"


class SkippedError(Exception):
    """A part cannot run; the text says why."""


def need(*packages: str) -> None:
    """Raise SkippedError if a package is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise SkippedError(f"needs {', '.join(missing)}")


def run(words: list[str], seconds: float) -> str:
    """Run `python WORDS`, and return what it prints; raise SkippedError with the end of its output if it fails."""
    try:
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise SkippedError(f"took more than {seconds:.0f} s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise SkippedError(f"FAILED: {lines[-1] if lines else done.returncode}")
    return done.stdout


# -- pure torch


def networks() -> dict[str, Callable[[], nn.Module]]:
    from alexlab.models.alexnet import AlexNet

    bn: dict[str, Any] = {"norm": "bn", "normed": (1, 2, 3, 4, 5), "norm_hidden": True, "dropout": 0.2}
    found: dict[str, Callable[[], nn.Module]] = {"alexnet": AlexNet, "alexnet_bn": lambda: AlexNet(**bn)}
    if importlib.util.find_spec("torchvision"):
        from torchvision.models import alexnet

        found["torchvision's alexnet"] = alexnet
    return found


def step_rate(make: Callable[[], nn.Module], form: str, batch: int) -> tuple[float, float]:
    """Return images per second of forward, backward and SGD, and the peak memory in GiB."""
    torch.manual_seed(0)
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    layout = torch.channels_last if "channels-last" in form else torch.contiguous_format
    net: Any = make().to(KIND).to(memory_format=layout)
    if "compiled" in form:
        net.compile()
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, fused=True)
    images = torch.randn(batch, 3, SIDE, SIDE, device=KIND).contiguous(memory_format=layout)
    targets = torch.randint(0, 1000, (batch,), device=KIND)

    def step() -> None:
        with torch.autocast(KIND, torch.bfloat16, enabled="bf16" in form):
            loss = F.cross_entropy(net(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    rates = []
    for number in range(ROUNDS + 1):  # the first one warms up, and compiles
        wait()
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        wait()
        if number:
            rates.append(STEPS * batch / (time.perf_counter() - start))
    return statistics.median(rates), (torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0)


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"


def steps(left: Callable[[], float]) -> list[str]:
    forms = ["fp32", "bf16", "bf16, channels-last", *(["bf16, channels-last, compiled"] if GPU else [])]
    rows = ["| network | form | " + " | ".join(f"batch {batch}" for batch in BATCHES) + " |"]
    rows.append("|---" * (2 + len(BATCHES)) + "|")
    for name, make in networks().items():
        for form in forms:
            cells = []
            for batch in BATCHES:
                if left() < 60:
                    cells.append("no time")
                    continue
                try:
                    rate, memory = step_rate(make, form, batch)
                    cells.append(f"{rate:,.0f} images/s, {memory:.1f} GiB")
                except torch.OutOfMemoryError:
                    cells.append("does not fit")
                except Exception as error:  # such as a compiler that is missing
                    cells.append(f"FAILED: {first_line(error)}")
            rows.append(f"| {name} | {form} | {' | '.join(cells)} |")
    return [
        *rows,
        "",
        f"Forward, backward and SGD on images in the device's memory, {SIDE} pixels, medians of {ROUNDS}.",
    ]


def normalization(left: Callable[[], float]) -> list[str]:
    lines = run(["benchmarks/lrn.py", *(["--batch", "256"] if GPU else ["--batch", "1", "--rounds", "1"])], left())
    return ["```", *lines.strip().splitlines()[:-1], "```", "", "The aim is 1.5 times torch's."]


# -- the package


def tests(left: Callable[[], float]) -> list[str]:
    need("pytest", *LOADER)
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/tasks", "tests/data", "-k", "cuda"]
    return [run(words, min(left(), 240)).strip().splitlines()[-1]]


def small_run(folder: Path, name: str, *words: str) -> list[str]:
    base = ["train.py", "data=demo", "model=alexnet_bn", "model.net.hidden=[256,256]", "logger=csv"]
    base += ["callbacks.figures=false", "trainer.max_epochs=2", "trainer.limit_train_batches=10", "test=false"]
    return [*base, "trainer.log_every_n_steps=1", f"paths.logs={folder}", f"hydra.run.dir={folder}/{name}", *words]


def resume(left: Callable[[], float]) -> list[str]:
    """Train at once, and in two parts; compare all numbers that both logged."""
    need(*LOADER)
    lines = []
    for deterministic in ("true", "false"):
        with tempfile.TemporaryDirectory() as temporary:
            folder, more = Path(temporary), f"trainer.deterministic={deterministic}"
            if deterministic == "true":
                os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
            else:
                os.environ.pop("CUBLAS_WORKSPACE_CONFIG")
            run(small_run(folder, "whole", more), left())
            run(small_run(folder, "parts", more, "trainer.max_epochs=1"), left())
            run(["train.py", f"resume={folder}/parts", "trainer.max_epochs=2"], left())
            words = ["-m", "alexlab", "compare", f"runs=[{folder}/whole,{folder}/parts]", "equal=true"]
            done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
            equal = (done.stdout or done.stderr).strip().replace(str(folder), "")
            wrong = "FAILED: " if done.returncode and deterministic == "true" else ""
            lines.append(f"- deterministic={deterministic}: {wrong}{equal}")
    return lines


def mixed(left: Callable[[], float]) -> list[str]:
    """Train with each precision that the device has."""
    need(*LOADER)
    lines = []
    for precision in ("16-mixed", "bf16-mixed", "32") if GPU else ("bf16-mixed",):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            run(small_run(folder, "run", f"trainer.precision={precision}", "trainer.gradient_clip_val=1"), left())
            summary = json.loads((folder / "run/summary.json").read_text())
            lines.append(f"- {precision}: train/loss {summary['last']['train/loss']:.3f}, {summary['status']}")
    return lines


def end_to_end(left: Callable[[], float]) -> list[str]:
    """Train from a folder, prepared JPEGs, prepared pixels and the device's memory, on drawn photographs."""
    need(*LOADER)
    from PIL import Image

    with tempfile.TemporaryDirectory() as temporary:
        for split, count in (("train", 256 if GPU else 32), ("val", 8)):
            for i in range(count):
                path = Path(temporary, split, "ab"[i % 2], f"{i}.jpg")
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.manual_seed(i)
                noise = F.interpolate(torch.rand(1, 3, 24, 32), (375, 500), mode="bicubic").clamp(0, 1)[0]
                Image.fromarray((noise * 255).byte().permute(1, 2, 0).numpy()).save(path, quality=90)
        words = ["benchmarks/end_to_end.py", temporary, "--rounds", "1", "--seconds", "6" if GPU else "1"]
        words += [] if GPU else ["--batch", "8"]
        aims = "The aims: 50,000 images/s on an H100 from pixels, and 90 % of the device alone."
        return ["```", *run(words, left()).strip().splitlines(), "```", "", aims]


def timm_script(left: Callable[[], float]) -> list[str]:
    """timm's train.py, which its package does not have: TIMM_TRAIN=path of it."""
    need("timm", "torchvision")
    script = os.environ.get("TIMM_TRAIN")
    if script is None or not Path(script).is_file():
        raise SkippedError("needs timm's train.py: TIMM_TRAIN=PATH")
    words = [script, "--dataset", "torch/fake", "--model", "resnet18", "--epochs", "1", "--amp", "-b", "256"]
    lines = run([*words, "--device", KIND], min(left(), 90)).splitlines()
    return [line for line in lines if "Train:" in line][-1:]


PARTS: dict[str, Callable[[Callable[[], float]], list[str]]] = {
    "AlexNet's step": steps,
    "LRN, torch's and ours": normalization,
    "End to end": end_to_end,
    "Exact resume": resume,
    "Precisions": mixed,
    "Tests": tests,
    "timm's training script": timm_script,
}


def main() -> None:
    args = options(__doc__, minutes=8.0)
    start = time.monotonic()

    def left() -> float:
        return 60 * args.minutes - (time.monotonic() - start)

    name = torch.cuda.get_device_name() if GPU else "a CPU"
    commit = "unknown"
    if shutil.which("git"):
        words = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    about = f"{name}, torch {torch.__version__}, commit {commit}, {time.strftime('%Y-%m-%d')}"
    print(about, flush=True)
    text: list[str] = [f"Measured on {about}.", ""]
    failed = False
    for title, part in PARTS.items():
        began = time.monotonic()
        try:
            lines = part(left) if left() > 10 else ["Skipped: no time was left."]
        except SkippedError as error:
            lines = [f"Skipped: {error}."]
        except Exception as error:  # the remaining parts continue
            lines = [f"FAILED: {first_line(error)}"]
        failed = failed or any("FAILED" in line for line in lines)
        print(f"\n{title} ({time.monotonic() - began:.0f} s)", *lines, sep="\n", flush=True)
        text += [f"### {title}", "", *lines, ""]
        if GPU:
            write("\n".join(text))
    if not GPU:
        write("Not yet measured: there was no GPU. The script ran on a CPU, which only shows that it works.\n")
    sys.exit(failed)


def write(text: str) -> None:
    """Replace what is between the two marks in results.md."""
    file = ROOT / "benchmarks/results.md"
    before, marks, after = re.split(f"({MARK}\n.*?{MARK}\n)", file.read_text(), maxsplit=1, flags=re.DOTALL)
    assert marks
    file.write_text(f"{before}{MARK}\n{text}{MARK}\n{after}")


if __name__ == "__main__":
    main()
