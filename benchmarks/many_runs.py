"""How long `alexlab compare` takes for many run directories, each with other settings.

python benchmarks/many_runs.py [--runs 1000] [--rounds 5] [--keep FOLDER]

The commands take turns with yaml.safe_load, which only reads the same configs.
"""

import json
import math
import os
import random
import statistics
import tempfile
from functools import partial
from pathlib import Path

import yaml
from common import ROOT, about, in_turn, options, run
from startup import seconds

MODELS = ("alexnet", "alexnet_bn", "alexnet_owt", "resnet18", "resnet50", "vit_small")
PLAIN = (
    "import sys, yaml, pathlib\nfor p in pathlib.Path(sys.argv[1]).glob('*/config.yaml'): yaml.safe_load(p.read_text())"
)


def make(folder: Path, count: int, steps: int = 400) -> None:
    """Write run directories with the config of train.py, a summary, and 40 rows of curves."""
    config = yaml.safe_load(run([str(ROOT / "train.py"), "--cfg", "job", "--resolve", "logger=none"]))
    draw = random.Random(0)
    for number in range(count):
        run_dir = folder / f"2026-01-01_00-00-00_{number:04}"
        run_dir.mkdir(parents=True)
        lr, model = 10 ** draw.uniform(-3, -1), draw.choice(MODELS)
        config["seed"], config["optimizer"]["lr"], config["model"]["name"] = number % 5, lr, model
        config["data"]["batch_size"] = draw.choice((64, 128, 256))
        config["label_smoothing"] = draw.choice((0.0, 0.1))
        config["run_dir"], config["overrides"] = str(run_dir), [f"optimizer.lr={lr}", f"seed={number % 5}"]
        (run_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        top = 0.9 - 0.1 * abs(math.log10(lr) + 2) - 0.05 * MODELS.index(model) / 5 + draw.gauss(0, 0.01)
        rows, best = [], 0.0
        for step in range(steps // 40 - 1, steps, steps // 40):
            progress = (step + 1) / steps
            acc = top * (1 - math.exp(-4 * progress)) + draw.gauss(0, 0.004)
            best = max(best, acc)
            rows.append(
                f"{step},{step * 10 // steps},{3 * math.exp(-3 * progress) + 0.1:.4f},{acc:.4f},{2.3 - 2 * acc:.4f}"
            )
        (run_dir / "metrics.csv").write_text("step,epoch,train/loss_step,val/acc1,val/loss\n" + "\n".join(rows) + "\n")
        metrics = {"val/acc1": round(best, 4), "val/loss": round(2.3 - 2 * best, 4), "val/acc5": 1.0}
        summary = {
            "status": "finished", "seconds": draw.uniform(100, 300), "best": metrics, "last": metrics,
            "test": {"test/acc1": best, "test/loss": 1.0}, "images_per_second": draw.uniform(200, 900),
            "parameters": 10_000_000 * (1 + MODELS.index(model)), "steps_per_epoch": steps // 10, "world_size": 1,
            "git": {"commit": "0" * 40, "dirty": False}, "versions": {"torch": "2.15"},
        }  # fmt: skip
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=2))
        for name in ("checkpoints", "figures", "wandb/latest-run/files"):
            (run_dir / name).mkdir(parents=True)


def main() -> None:
    args = options(__doc__, runs=1000, rounds=5, keep="")
    if args.keep:  # only write the runs, into this folder
        make(Path(args.keep), args.runs)
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
        measures = {name: partial(seconds, words, folder) for name, words in commands.items()}
        times = in_turn(args.rounds, measures, warm_up=True)
    for name, values in times.items():
        print(f"{name:18} {statistics.median(values):.2f} s")
    print(about("pyyaml", "pandas", runs=args.runs, cores=os.cpu_count()))


if __name__ == "__main__":
    main()
