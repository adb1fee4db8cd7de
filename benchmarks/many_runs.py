"""How long compare.py takes for many runs: directories as a training leaves them, each with settings of its own.

python benchmarks/many_runs.py [--runs 1000] [--rounds 5] [--keep FOLDER]

Beside it, in turn: the same configs read by yaml.safe_load alone, and as many of W&B's offline runs, made of one that
its client wrote: 200 rows of numbers each, some 90 kB, with a name, an id and a rate of its own each; with the best
epoch's numbers in the summary, as runs of this project have them, and without, so that the curves are read.
"""

import argparse
import json
import math
import os
import random
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from importlib.metadata import version
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("alexnet", "alexnet_bn", "alexnet_owt", "resnet18", "resnet50", "vit_small")
PLAIN = (
    "import sys, yaml, pathlib\nfor p in pathlib.Path(sys.argv[1]).glob('*/config.yaml'): yaml.safe_load(p.read_text())"
)


def make(folder: Path, count: int, steps: int = 400) -> None:
    """Run directories with the config of train.py, a summary, and 40 rows of curves."""
    composed = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--cfg", "job", "--resolve", "logger=none"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    config = yaml.safe_load(composed)
    draw = random.Random(0)
    for number in range(count):
        run = folder / f"2026-01-01_00-00-00_{number:04}"
        run.mkdir(parents=True)
        lr, model = 10 ** draw.uniform(-3, -1), draw.choice(MODELS)
        config["seed"], config["optimizer"]["lr"], config["model"]["name"] = number % 5, lr, model
        config["data"]["batch_size"] = draw.choice((64, 128, 256))
        config["label_smoothing"] = draw.choice((0.0, 0.1))
        config["run_dir"], config["overrides"] = str(run), [f"optimizer.lr={lr}", f"seed={number % 5}"]
        (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        top = 0.9 - 0.1 * abs(math.log10(lr) + 2) - 0.05 * MODELS.index(model) / 5 + draw.gauss(0, 0.01)
        rows, best = [], 0.0
        for step in range(steps // 40 - 1, steps, steps // 40):
            share = (step + 1) / steps
            acc = top * (1 - math.exp(-4 * share)) + draw.gauss(0, 0.004)
            best = max(best, acc)
            rows.append(
                f"{step},{step * 10 // steps},{3 * math.exp(-3 * share) + 0.1:.4f},{acc:.4f},{2.3 - 2 * acc:.4f}"
            )
        (run / "metrics.csv").write_text("step,epoch,train/loss_step,val/acc1,val/loss\n" + "\n".join(rows) + "\n")
        metrics = {"val/acc1": round(best, 4), "val/loss": round(2.3 - 2 * best, 4), "val/acc5": 1.0}
        summary = {
            "status": "finished", "seconds": draw.uniform(100, 300), "best": metrics, "last": metrics,
            "test": {"test/acc1": best, "test/loss": 1.0}, "images_per_second": draw.uniform(200, 900),
            "parameters": 10_000_000 * (1 + MODELS.index(model)), "steps_per_epoch": steps // 10, "world_size": 1,
            "git": {"commit": "0" * 40, "dirty": False}, "versions": {"torch": "2.15"},
        }  # fmt: skip
        (run / "summary.json").write_text(json.dumps(summary, indent=2))
        for name in ("checkpoints", "figures", "wandb/latest-run/files"):
            (run / name).mkdir(parents=True)


def make_boards(folder: Path, count: int, ours: bool) -> None:
    """Offline runs of W&B: the records of one, written again in LevelDB's log format for each."""
    import wandb

    from alexlab.analysis import wandb_files as boards

    folder.mkdir()
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    with wandb.init(
        mode="offline", dir=folder, project="p", settings=settings, config={"rate": 0.0, "model": "n"}
    ) as run:
        for step in range(200):
            row = {"trainer/global_step": step, "train/loss_step": 2 / (1 + step), "perf/images": 400.0 + step}
            run.log(row if step % 10 != 9 else {**row, "val/acc1": 1 - 1 / (1 + step), "val/loss": 1 / (1 + step)})
        if ours:
            run.summary.update({"status": "finished", "best": {"val/acc1": 0.995}, "last": {"val/acc1": 0.995}})
    (written,) = folder.glob("wandb/offline-run-*/*.wandb")
    kinds = {"run", "config", "summary", "history", "exit", "files", "environment", "telemetry", "header", "request"}
    records = list(boards.records(written, kinds))
    start = written.read_bytes()[: boards.FILE_HEAD]
    shutil.rmtree(folder / "wandb")
    for number in range(count):
        for record in records:
            if record.HasField("run"):
                record.run.run_id = record.run.display_name = f"{number:08}"
                for item in record.run.config.update:
                    item.value_json = str(number / count) if item.key == "rate" else item.value_json
        out = bytearray(start)
        for raw in (record.SerializeToString() for record in records):
            _append(out, raw)
        place = folder / f"offline-run-20260101_000000-{number:08}"
        place.mkdir(parents=True)
        (place / f"run-{number:08}.wandb").write_bytes(out)


def _append(out: bytearray, raw: bytes) -> None:
    """A record in blocks of 32 KiB, in pieces of (CRC, length, kind): whole 1, first 2, middle 3, last 4."""
    begun = False
    while True:
        left = 32768 - len(out) % 32768
        if left < 7:
            out += bytes(left)
            continue
        piece, raw = raw[: left - 7], raw[left - 7 :]
        kind = (3 if raw else 4) if begun else (2 if raw else 1)
        out += struct.pack("<IHB", zlib.crc32(bytes([kind]) + piece), len(piece), kind) + piece
        begun = True
        if not raw:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="make the runs here, leave them, and measure nothing")
    given = parser.parse_args()
    if given.keep is not None:
        make(given.keep, given.runs)
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "runs", given.runs)
        make_boards(Path(folder) / "ours", given.runs, ours=True)
        make_boards(Path(folder) / "theirs", given.runs, ours=False)
        words = [str(ROOT / "compare.py"), f"runs={folder}/runs"]
        commands = {
            "table": words,
            "where": [*words, "where=optimizer.lr>0.01 and model.name=alexnet"],
            "json": [*words, "format=json"],
            "html": [*words, "format=html", f"out={folder}/page.html", "most=100"],
            "W&B's, of ours": [str(ROOT / "compare.py"), f"runs={folder}/ours"],
            "W&B's, of others": [str(ROOT / "compare.py"), f"runs={folder}/theirs"],
            "table, one run": [str(ROOT / "compare.py"), f"runs={folder}/runs/2026-01-01_00-00-00_0000"],
            "yaml.safe_load": ["-c", PLAIN, f"{folder}/runs"],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(given.rounds + 1):  # the first round fills caches
            for name, command in commands.items():
                start = time.perf_counter()
                subprocess.run([sys.executable, *command], capture_output=True, check=True)
                if number:
                    times[name].append(time.perf_counter() - start)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    for name, seconds in times.items():
        print(f"{name:18} {statistics.median(seconds):.2f} s")
    about = {"runs": given.runs, "cores": os.cpu_count(), "python": sys.version.split()[0], "pyyaml": version("pyyaml"),
             "commit": git.stdout.strip()}  # fmt: skip
    print(json.dumps(about))


if __name__ == "__main__":
    main()
