"""ASHA of Ray Tune over train.py: python examples/ray_tune.py data=folder data.root=PATH trainer.max_epochs=20

Needs the extra `ray`. Each trial is a run of train.py with values of SPACE and the overrides of the command line. ASHA
compares the trials after each validation, and stops the worse ones by SIGTERM: they write a checkpoint and end.
"""

import csv
import subprocess
import sys
import time
from pathlib import Path

from ray import tune
from ray.tune.schedulers import ASHAScheduler

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "logs/train/multiruns"
METRIC, TRIALS = "val/acc1", 12
SPACE = {"optimizer.lr": tune.loguniform(1e-3, 1e-1), "optimizer.weight_decay": tune.loguniform(1e-5, 1e-2)}
RESOURCES = {"cpu": 1, "gpu": 0}  # of a trial


def trial(values: dict[str, float], overrides: list[str]) -> None:
    """Start train.py, and report each validation in its metrics.csv to Ray Tune."""
    context, reported = tune.get_context(), 0
    run_dir = RUNS / context.get_experiment_name() / context.get_trial_id()
    words = [*(f"{key}={value}" for key, value in values.items()), "logger=csv", f"hydra.run.dir={run_dir}", *overrides]
    with subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT) as run:
        try:
            running = True
            while running:
                time.sleep(0.5)
                running = run.poll() is None  # before the last look at the file
                for score in validations(run_dir / "metrics.csv")[reported:]:
                    reported += 1
                    tune.report({METRIC: score, "validation": reported})  # exits if ASHA stops the trial
        finally:
            run.terminate()
    if run.returncode:
        raise RuntimeError(f"train.py exited with {run.returncode}: see {run_dir}/train.log")


def validations(file: Path) -> list[float]:
    with file.open() if file.exists() else open("/dev/null") as rows:
        return [float(row[METRIC]) for row in csv.DictReader(rows) if row.get(METRIC)]


if __name__ == "__main__":
    name = time.strftime("ray-%Y-%m-%d_%H-%M-%S")
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, overrides=sys.argv[1:]), RESOURCES),
        param_space=SPACE,
        tune_config=tune.TuneConfig(num_samples=TRIALS, scheduler=ASHAScheduler("validation", METRIC, "max")),
        run_config=tune.RunConfig(name, storage_path=str(ROOT / "logs/ray")),
    )
    best = tuner.fit().get_best_result(METRIC, "max")
    print(f"best: {METRIC} {best.metrics[METRIC]:.4f} with {best.config}\nalexlab compare runs={RUNS / name}")
