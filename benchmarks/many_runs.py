"""How long `alexlab compare` takes for many run directories, each with other settings.

python benchmarks/many_runs.py [--runs 1000] [--rounds 5] [--keep FOLDER]

The commands take turns with yaml.safe_load, which only reads the same configs.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("alexnet", "alexnet_bn", "alexnet_owt", "resnet18", "resnet50", "vit_small")
PLAIN = (
    "import sys, yaml, pathlib\nfor p in pathlib.Path(sys.argv[1]).glob('*/config.yaml'): yaml.safe_load(p.read_text())"
)


def make(folder: Path, count: int, steps: int = 400) -> None:
    """Write run directories with the config of train.py, a summary, and 40 rows of curves."""
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
            progress = (step + 1) / steps
            acc = top * (1 - math.exp(-4 * progress)) + draw.gauss(0, 0.004)
            best = max(best, acc)
            rows.append(
                f"{step},{step * 10 // steps},{3 * math.exp(-3 * progress) + 0.1:.4f},{acc:.4f},{2.3 - 2 * acc:.4f}"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="only write the runs, into this folder")
    args = parser.parse_args()
    if args.keep is not None:
        make(args.keep, args.runs)
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), args.runs)
        compare = ["-m", "alexlab", "compare", f"runs={folder}"]
        commands = {
            "table": compare,
            "where": [*compare, "where=optimizer.lr>0.01 and model.name=alexnet"],
            "csv": [*compare, "format=csv"],
            "json": [*compare, "format=json"],
            "html": [*compare, "format=html", f"out={folder}/page.html", "most=100"],
            "table, one run": ["-m", "alexlab", "compare", f"runs={folder}/2026-01-01_00-00-00_0000"],
            "yaml.safe_load": ["-c", PLAIN, folder],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(args.rounds + 1):  # the first round fills caches
            for name, command in commands.items():
                start = time.perf_counter()
                subprocess.run([sys.executable, *command], capture_output=True, check=True)
                if number:
                    times[name].append(time.perf_counter() - start)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    for name, seconds in times.items():
        print(f"{name:18} {statistics.median(seconds):.2f} s")
    about = {
        "runs": args.runs, "cores": os.cpu_count(), "python": sys.version.split()[0],
        "pyyaml": version("pyyaml"), "pandas": version("pandas"), "commit": git.stdout.strip(),
    }  # fmt: skip
    print(json.dumps(about))


if __name__ == "__main__":
    main()
