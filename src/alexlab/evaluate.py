"""Evaluate a run on its own test images or another folder: the task of eval.py."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from alexlab import checkpoint, run, rundir
from alexlab import config as configs
from alexlab.errors import UserError
from alexlab.memory import keep_memory
from alexlab.trainer import find_devices


def find_run(named: str, logs: Path) -> Path:
    """A run's directory, or the newest for "latest".

    Raises:
        UserError: there is none.
    """
    if named == "latest":
        paths = [path for path in (logs / "train").glob("*runs/**/config.yaml") if "wandb" not in path.parts]
        found = sorted(paths, key=lambda path: path.stat().st_mtime)
        if not found:
            raise UserError(f"run=latest: there is no run below {logs / 'train'} yet: train one with python train.py.")
        return found[-1].parent
    path = Path(named).expanduser().resolve()
    if not (path / "config.yaml").is_file():
        raise UserError(f"run={named} is not a run's directory (it holds no config.yaml): give one, or latest.")
    return path


def evaluate(config: DictConfig) -> float:
    """Rebuild the run from its own config, test it, print and write the numbers. Returns top-1."""
    run_dir = find_run(str(config.run), Path(config.paths.logs))
    its = configs.load(run_dir / "config.yaml")
    if config.data.root is not None:
        its.data.root = str(Path(config.data.root).expanduser().resolve())
        its.data.demo_seed = None
    if config.data.num_workers is not None:
        its.data.num_workers = config.data.num_workers
    its.trainer.accelerator = config.trainer.accelerator or its.trainer.accelerator
    its.trainer.precision = config.trainer.precision or its.trainer.precision
    its.trainer.devices, its.trainer.num_nodes, its.trainer.strategy = 1, 1, "auto"
    its.data.num_classes = None
    path = run_dir / "checkpoints" / f"{config.ckpt}.ckpt" if config.ckpt in ("best", "last") else Path(config.ckpt)
    found = checkpoint.load(path)
    devices = find_devices(its)
    if devices.kind == "cpu":
        keep_memory()
    its.model.pretrained = False
    if "pretrained" in its.model.net:
        its.model.net.pretrained = False  # the checkpoint holds the weights
    data = run.build_data(its, devices).read()
    trained = found["alexlab"]["classes"]
    if list(data.classes) != trained:
        raise UserError(
            f"{data.root} has other classes than the run: missing {sorted(set(trained) - set(data.classes))[:8]}, "
            f"new {sorted(set(data.classes) - set(trained))[:8]}. Evaluate on a folder with the run's classes."
        )
    pl.seed_everything(its.seed, verbose=False)
    model = run.build_model(its, data)
    checkpoint.load_net(model.net, found, path)
    trainer = pl.Trainer(
        accelerator={"cuda": "gpu"}.get(devices.kind, devices.kind), devices=1, logger=False,
        precision=run.choose_precision(its.trainer.precision, devices.kind), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_test_batches=its.trainer.limit_test_batches,
        use_distributed_sampler=False, inference_mode=True,
    )  # fmt: skip
    tested = trainer.test(model, datamodule=data, verbose=False)[0]
    matrix = model.confusion_matrix.double()
    share = (matrix.diag() / matrix.sum(1).clamp(min=1)).tolist()
    result: dict[str, Any] = {
        "checkpoint": str(path),
        "split": data.test_split,
        "images": int(matrix.sum()),
        "root": str(data.root),
        **{key.removeprefix("test/"): float(value) for key, value in tested.items()},
        "per_class_acc1": dict(zip(data.readable_classes, share, strict=True)),
    }
    rundir.write_json(run_dir / "eval.json", result)
    table = Table(title=f"{result['images']} images of {data.test_split}, {path.name} of {run_dir.name}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for key in ("loss", "acc1", "acc5"):
        table.add_row(key, f"{result[key]:.4f}")
    for name, value in list(result["per_class_acc1"].items())[:20]:
        table.add_row(f"acc1 of {name}", f"{value:.4f}")
    Console().print(table)
    print(f"written to {run_dir / 'eval.json'}", flush=True)
    return float(result["acc1"])
