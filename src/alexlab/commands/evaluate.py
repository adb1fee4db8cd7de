"""Test a run, on the run's test images or another folder, for `python eval.py`."""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torchvision.transforms.v2.functional import ten_crop

from alexlab.analysis.calibration import (
    Calibration,
    Outputs,
    calibration_error,
    fit_temperature,
    measure_calibration,
)
from alexlab.analysis.intervals import NOISE, accuracy_interval, mcnemar
from alexlab.analysis.runs import Row, read_metrics, recorded_mode, steps_per_epoch
from alexlab.callbacks.media import Media, Mistake
from alexlab.commands.build import build_data, build_task, plain_trainer
from alexlab.data.datamodule import ImageFolders
from alexlab.data.fingerprint import changed_splits
from alexlab.data.sources import Data, need_index
from alexlab.engine import checkpoint_io, mirror
from alexlab.engine import config as configs
from alexlab.engine import run_dir as run_dirs
from alexlab.engine.devices import Devices, choose_precision, find_devices
from alexlab.engine.errors import UserError, counted
from alexlab.engine.files import atomic_write
from alexlab.engine.memory import keep_memory
from alexlab.engine.metrics import is_always_one
from alexlab.engine.schema import DataConfig, EvalConfig, FiguresConfig, TrainConfig, fields_of
from alexlab.engine.targets import Trusted
from alexlab.engine.text import printable
from alexlab.engine.validation import validate_saved
from alexlab.tasks.base import BaseTask, RunModule
from alexlab.tasks.load import check_classes, check_own, load_task, readable_classes, warn_of_changed_sources

TEMPERATURE = "temperature.json"
SHOWN_CAMS = 8
MOST_RANKS = 65_536  # the largest world_size that is accepted from a summary.json
DOWNLOADING = ("alexlab.data.huggingface.", "alexlab.data.torchvision_sets.")


class Tested(NamedTuple):
    """A run that was tested again."""

    config: TrainConfig
    data: Data
    task: RunModule
    checkpoint: Path
    precision: str
    device: str
    metrics: dict[str, float]
    images: int  # how many were tested


class Prediction(NamedTuple):
    """What a network says of an image: indices of classes, and the probability of the predicted one."""

    target: int
    predicted: int
    confidence: float


class Predictions(Callback):
    """Keep the prediction of each tested image."""

    def __init__(self, keep_logits: bool = False) -> None:
        # path, relative to the folder of the images, and prediction; a table may list an image several times
        self.rows: list[tuple[str, Prediction]] = []
        self.fingerprint: str | None = None  # of the images
        self.keep_logits = keep_logits
        self.logits: list[Tensor] = []  # float32 (B, C) of each batch, on the CPU

    def on_test_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.keys = iter(getattr(trainer.test_dataloaders, "batch_sampler", ()))

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: Any, logits: Any, batch: Any, *_: Any) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if logits is None or not pl_module.one_class_per_image or data.test_split not in data.splits:
            next(self.keys, None)
            return
        index = data.splits[data.test_split]
        paths = [path for i, _ in next(self.keys) if (path := index.path(i)) not in batch.skipped]
        if self.keep_logits:
            self.logits.append(logits.float().cpu())
        confidence, predicted = logits.float().softmax(1).max(1)
        columns = (batch.targets.tolist(), predicted.tolist(), confidence.tolist())
        for path, *row in zip(paths, *columns, strict=True):
            name = str(Path(path).relative_to(data.root)) if Path(path).is_relative_to(data.root) else path
            self.rows.append((name, Prediction(*row)))
        self.fingerprint = index.fingerprint

    @property
    def outputs(self) -> Outputs:
        return Outputs(torch.cat(self.logits), torch.tensor([each.target for _, each in self.rows]))

    @property
    def hits(self) -> int:
        return sum(each.predicted == each.target for _, each in self.rows)

    def right(self, names: Sequence[str]) -> dict[tuple[str, str, int], bool]:
        """Return whether each prediction is right, by (path, class, occurrence); `names` are those of the classes."""
        seen: Counter[str] = Counter()
        found = {}
        for path, each in self.rows:
            seen[path] += 1
            found[path, names[each.target], seen[path]] = each.predicted == each.target
        return found


def evaluate(config: EvalConfig) -> float:
    """Test a run; print and write the metrics. Returns the top-1 accuracy, or what the run's `monitor` measures."""
    mirror.download_named(config.paths, config.run, config.ckpt)
    logs = config.paths.local
    run_dir = run_dirs.find_run(config.run, logs, config.ckpt)
    ckpt = config.ckpt if config.ckpt in ("best", "last") else "best"  # a file is the run's own
    mirror.download_named(config.paths, config.against, config.ckpt)
    second = run_dirs.find_run(config.against, logs, ckpt, "against") if config.against is not None else None
    predictions = Predictions(keep_logits=config.report)
    with tempfile.TemporaryDirectory() as folder:
        media = Media(Path(folder), weights=run_dirs.ckpt_of(run_dir, config.ckpt).name)
        callbacks = [predictions, media] if config.report else [predictions]
        tested = score(config, run_dir, config.crops, config.split, callbacks)
        drawn = {path.stem: path.read_bytes() for path in media.written}
    names = tested.data.readable_classes
    per_class: dict[str, Any] = {
        name: dict(zip(names, values, strict=True)) for name, values in tested.task.per_class.items()
    }
    if tested.task.confusion_matrix is not None:
        matrix = tested.task.confusion_matrix.double()
        accuracies = [float(hits / n) if n else None for hits, n in zip(matrix.diag(), matrix.sum(1), strict=True)]
        per_class["acc1"] = dict(zip(names, accuracies, strict=True))
    end = f"_{config.crops}crops" if config.crops > 1 else ""
    out = f"eval{'-val' if config.split == 'val' else ''}{end.replace('_', '-')}.json"
    metrics = {f"{key}{end}": value for key, value in tested.metrics.items()}
    result: dict[str, Any] = {
        "checkpoint": str(tested.checkpoint),
        "sha256": hash_of(tested.checkpoint),
        "split": tested.data.test_split,
        "images": tested.images,
        "crops": config.crops,
        "root": str(tested.data.root),
        "precision": tested.precision,
        "skipped_images": list(tested.task.skipped),
        **metrics,
        **{f"per_class_{name}": values for name, values in per_class.items()},
    }
    if predictions.rows:
        result[f"acc1_interval{end}"] = accuracy_interval(predictions.hits, len(predictions.rows))
        write_predictions((run_dir / out).with_suffix(".csv"), predictions, names)
    run_dirs.write_json(run_dir / out, result)  # whatever the comparison and the report meet

    print_metrics(run_dir, tested, result, config.crops)

    # what takes longer
    about, problem = {}, None
    if second is not None:
        try:
            about = compare_with(config, tested, predictions, run_dir, second, ckpt)
        except Exception as error:  # after the report, which does not need the other run
            problem = error
    report = None
    if predictions.rows and config.report:
        report = (run_dir / out.replace("eval", "report")).with_suffix(".html")
        outputs = predictions.outputs
        calibration = calibrate(config, run_dir, tested, predictions, outputs)
        facts = {f"against {run_dirs.name_of(Path(about['run']))}": described_rival(about)} if about else {}
        result |= write_report(report, tested, outputs, calibration, media.mistakes, drawn, config.crops, facts)
    run_dirs.write_json(run_dir / out, result | ({"against": about} if about else {}))
    if report is not None and calibration is not None:
        print(f"calibration error {calibration.error:.4f}; with a temperature: {described(calibration)}")
    written = [run_dir / out, *([report] if report is not None else [])]
    further = [(run_dir / out).with_suffix(".csv"), run_dir / TEMPERATURE]
    print(f"written to {' and '.join(map(run_dirs.shown, written))}", flush=True)
    if second is not None and about:
        print(f"against {run_dirs.shown(second)}: {described_rival(about)}.", flush=True)
    mirror.upload(config.paths, run_dir, [*written, *further])
    if problem is not None:
        raise problem
    return tested.metrics.get("acc1", tested.metrics.get(tested.config.monitor.removeprefix("val/"), math.nan))


def print_metrics(run_dir: Path, tested: Tested, result: dict[str, Any], crops: int) -> None:
    """Print the metrics of a tested run, of which `result` is the content of eval.json."""
    end = f"_{crops}crops" if crops > 1 else ""
    print(f"run: {run_dirs.shown(run_dir)} ({run_dirs.read_summary(run_dir).get('status', 'running or killed')})")
    each = {1: "", 2: ", each and its mirror image", 10: ", ten crops each"}[crops]
    print(f"{counted(tested.images, 'image')} of {result['split']}, {tested.checkpoint.name}{each}")
    for name, value in tested.metrics.items():
        if not is_always_one(name, [value], len(tested.data.readable_classes)):
            interval = result.get(f"acc1_interval{end}") if name == "acc1" else None
            text = f"   (95 %: {interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
            print(f"  {name + end:20} {value:.4f}{text}")
    if skipped := result["skipped_images"]:
        print(printable(f"skipped {counted(len(skipped), 'broken image')}: {', '.join(skipped[:5])}"), flush=True)


def calibrate(
    config: EvalConfig, run_dir: Path, tested: Tested, predictions: Predictions, outputs: Outputs
) -> Calibration | None:
    """Fit a temperature on the run's val images, keep it in the run, and measure it on the tested images.

    For another folder of images see `kept_calibration`.
    """
    if config.data.root is not None:
        return kept_calibration(run_dir, tested, predictions, outputs)
    split, fitted = tested.data.test_split, outputs
    if split != "val":
        of_val = Predictions(keep_logits=True)
        with contextlib.redirect_stdout(io.StringIO()):  # the notes about the images are printed already
            score(config, run_dir, config.crops, "val", [of_val])
        fitted = of_val.outputs
    temperature = fit_temperature(fitted)
    if config.crops == 1:
        entry = {hash_of(tested.checkpoint): {"temperature": temperature, "images": len(fitted.targets)}}
        run_dirs.write_json(run_dir / TEMPERATURE, {**kept_temperatures(run_dir), **entry})
    return measure_calibration(outputs, temperature, split == "val")


def kept_calibration(run_dir: Path, tested: Tested, predictions: Predictions, outputs: Outputs) -> Calibration | None:
    """Measure the temperature that the run has kept for this checkpoint; None without one."""
    temperature = kept_temperature(run_dir, tested.checkpoint)
    if temperature is None:
        return None
    fingerprint = checkpoint_io.load(tested.checkpoint)["alexlab"]["dataset"].get("fingerprint")
    of_val = fingerprint.get("val") if isinstance(fingerprint, dict) else None
    return measure_calibration(outputs, temperature, predictions.fingerprint == of_val)


def described(calibration: Calibration) -> str:
    """Return the calibration error with the temperature, as a text."""
    return f"{calibration.error_calibrated:.4f} (temperature {calibration.temperature:.3f}, {calibration.source})"


def hash_of(checkpoint: Path) -> str:
    """Return the SHA-256 of a checkpoint: the one in SHA256SUMS, if that lists the file."""
    listed = checkpoint_io.read_sums(checkpoint.parent).get(checkpoint.name)
    if listed:
        return listed[-1]
    with checkpoint.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kept_temperatures(run_dir: Path) -> dict[str, Any]:
    """Return the content of temperature.json: {SHA-256: {"temperature": ...}}, {} if it cannot be read."""
    try:
        kept = json.loads((run_dir / TEMPERATURE).read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def kept_temperature(run_dir: Path, checkpoint: Path) -> float | None:
    """Return the temperature that `calibrate` has kept for this checkpoint; None without one."""
    entry = kept_temperatures(run_dir).get(hash_of(checkpoint))
    value = entry.get("temperature") if isinstance(entry, dict) else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) and value > 0 else None


def write_report(
    path: Path,
    tested: Tested,
    outputs: Outputs,
    calibration: Calibration | None,
    mistakes: Sequence[Mistake],
    drawn: dict[str, bytes],
    crops: int,
    more: dict[str, str],
) -> dict[str, Any]:
    """Write the page about a tested run, with `more` facts; return the table of classes and the like for eval.json."""
    from alexlab.analysis import cam, plots, report  # imports Matplotlib, which takes half a second

    run_dir, names, notes = path.parent, tested.data.readable_classes, []
    of = f"{tested.data.test_split}, {tested.checkpoint.name}"
    table, confused = report.class_table(outputs, names), report.confusions(outputs, names)
    hits = (outputs.logits.argmax(1) == outputs.targets).tolist()
    figures = {name: report.as_png(figure) for name, figure in report.figures(outputs, names, calibration, of)}
    rows: list[Row] = []
    try:
        rows = read_metrics(run_dir / "metrics.csv")
    except UserError as error:
        notes.append(f"no curves: {error}")
    summary, monitor = run_dirs.read_summary(run_dir), tested.config.monitor
    curves = plots.curves(rows, monitor, steps_per_epoch(summary, rows), recorded_mode(summary, monitor))
    net: Any = tested.task.net.net if isinstance(tested.task.net, Crops) else tested.task.net
    if mistakes and crops != 10:  # whose images are larger than what the network sees
        shown = mistakes[:SHOWN_CAMS]
        captions = [(f"{m.confidence:.0%} {names[m.top5[0][0]]}", f"is {names[m.truth]}") for m in shown]
        classes, title = [m.top5[0][0] for m in shown], f"{of}: Grad-CAM of the predicted class"
        try:
            picture = cam.picture(
                net.eval(), tested.task.augment.normalize, [m.image for m in shown], classes, captions, title
            )
            figures["grad_cam"] = report.as_png(picture)
        except UserError as error:
            notes.append(str(error))
    pictures = {"curves": report.as_png(curves)} if curves is not None else {}
    pictures |= drawn | figures
    facts: dict[str, Any] = {
        "run": run_dir,
        "status": summary.get("status", "running or killed"),
        "weights": tested.checkpoint.name,
        "images": f"{tested.images:,} of {tested.data.test_split}, {tested.data.root}",
        "crops per image": crops,
        **{key: f"{v:.4f}" for key, v in tested.metrics.items() if not is_always_one(key, [v], len(names))},
        "acc1, 95 % interval": "{:.4f} to {:.4f}".format(*accuracy_interval(sum(hits), len(outputs.targets))),
        "calibration error (ECE)": f"{calibration.error if calibration else calibration_error(outputs):.4f}",
    }
    if calibration is not None:
        facts["with a temperature"] = described(calibration)
    facts |= more
    title = f"{run_dirs.name_of(run_dir)}: {tested.config.model.name} on {tested.config.data.name}"
    config = tested.config.model_dump(exclude_unset=True)
    page = report.page(title, facts, table, confused, pictures, config, notes)
    with atomic_write(path, "x", encoding="utf-8") as file:
        file.write(page)
    per_class = json.loads(table.to_json(orient="index"))
    return {
        "classes": per_class,
        "confusions": confused,
        "calibration": None if calibration is None else calibration._asdict(),
    }


def write_predictions(path: Path, predictions: Predictions, names: Sequence[str]) -> None:
    """Write a line for each image: path, class, predicted class, and the probability of the latter."""
    with atomic_write(path, "x", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "class", "predicted", "probability"])
        for name, each in predictions.rows:
            writer.writerow([name, names[each.target], names[each.predicted], f"{each.confidence:.6g}"])


def compare_with(
    config: EvalConfig, tested: Tested, predictions: Predictions, run_dir: Path, folder: Path, ckpt: str
) -> dict[str, Any]:
    """Test a second run on the same images; return the entry `against` of eval.json.

    Raises:
        UserError: the runs have no predictions of one class per image, or other images.
    """
    rival = Predictions()
    second = score(config.model_copy(update={"ckpt": ckpt}), folder, config.crops, config.split, [rival])
    names = run_dirs.shown(run_dir), run_dirs.shown(folder)
    for name, each in zip(names, (predictions, rival), strict=True):
        if not each.rows:
            raise UserError(
                f"`against={config.against}` needs images of one class each, whose paths are known, and {name} has "
                "none: remove against."
            )
    a, b = predictions.right(tested.data.readable_classes), rival.right(second.data.readable_classes)
    if a.keys() != b.keys() or predictions.fingerprint != rival.fingerprint:
        raise UserError(
            f"`against={config.against}`: {names[0]} was tested on {counted(len(a), 'image')} and {names[1]} on "
            f"{len(b):,}, which are not the same: test both on one folder with data.root=PATH."
        )
    only = [sum(x[key] and not y[key] for key in x) for x, y in ((a, b), (b, a))]
    p, acc1 = mcnemar(*only), rival.hits / len(b)
    return {"run": str(folder), "acc1": acc1, "only_this": only[0], "only_other": only[1], "p": p}


def described_rival(about: dict[str, Any]) -> str:
    """Return the entry `against` of eval.json as a text."""
    noise = ", within noise" if about["p"] > NOISE else ""
    only = f"only this run is right on {counted(about['only_this'], 'image')}, only the other one on"
    return f"acc1 {about['acc1']:.4f}; {only} {about['only_other']:,}: p={about['p']:.2g} (McNemar){noise}"


def score(
    config: EvalConfig | FiguresConfig,
    run_dir: Path,
    crops: int = 1,
    split: str | None = None,
    callbacks: Sequence[pl.Callback] = (),
) -> Tested:
    """Rebuild a run from the saved config, and test it as `config` asks."""
    # the run's config, images and network
    run_config = config_for_test(config, run_dir)
    path = run_dirs.ckpt_of(run_dir, config.ckpt)
    checkpoint = checkpoint_io.load(path)
    devices = find_devices(run_config.trainer)
    if devices.kind == "cpu":
        keep_memory()
    precision = choose_precision(run_config.trainer.precision, devices.kind)
    run_dirs.quiet_libraries()
    data = read_images(config.data.root is None, run_config, checkpoint, devices, run_dir, config.allow)
    pl.seed_everything(run_config.seed, verbose=False)
    task = build_task(run_config, data, devices.kind, trusted=config.allow)
    load_task(task, checkpoint, path)
    check_own(checkpoint, run_config, task.net, path, run_dir, config.allow)
    warn_of_changed_sources(checkpoint, task.net, path)

    # the test
    if run_config.compile:
        task.net.compile()
    if split == "test" and data.test_split == "val":
        raise UserError(f"`split=test`: {data.root} has no test images. Use split=val.")
    if split is not None and data.splits and split not in data.splits:
        raise UserError(
            f"`split={split}`: {data.root} has no {split} images to test, only {' and '.join(data.splits)}: "
            "remove split, or give another folder with data.root=PATH."
        )
    data.chosen_split = split
    if crops > 1:
        use_crops(task, data, crops)
    trainer = plain_trainer(
        devices.kind, precision, callbacks, limit_test_batches=run_config.trainer.limit_test_batches
    )
    tested = trainer.test(task, datamodule=data, verbose=False)[0]
    metrics = {key.removeprefix("test/"): float(value) for key, value in tested.items()}
    images = data.images[data.test_split]
    if isinstance(task, BaseTask):
        images = int((task.sums["test"].past + task.sums["test"].window)[-1])
    return Tested(run_config, data, task, path, str(precision), devices.kind, metrics, images)


def config_for_test(config: EvalConfig | FiguresConfig, run_dir: Path) -> TrainConfig:
    """Return the run's own config, with the settings of the command line, for a test in one process."""
    path = run_dir / "config.yaml"
    plain = configs.load(path)
    validate_saved(plain, path)
    data, trainer = plain["data"], plain["trainer"]
    plain["paths"]["logs"] = str(config.paths.local)  # where the index of a folder is cached
    plain |= {"init_from": None, "ckpt_path": None}
    if config.compile is not None:
        plain["compile"] = config.compile

    # the images
    if config.data.root is not None:
        data = plain["data"] = {key: value for key, value in data.items() if key in fields_of(DataConfig)}
        data |= {"_target_": None, "demo_seed": None, "idx": None}
        if configs.is_address(config.data.root):
            images = "alexlab.data.fast.remote.PreparedImages"
            data |= {"_target_": images, "root": config.data.root, "disk_cache": f"{config.paths.data}/cache"}
        else:
            data["root"] = str(Path(config.data.root).expanduser().resolve())
    elif "disk_cache" in data:
        data["disk_cache"] = f"{config.paths.data}/cache"
    only_read(data, config.paths.data)
    data |= {key: value for key, value in config.data.model_dump().items() if value is not None and key != "root"}
    data |= {"cache": None, "num_classes": None}  # each image is read once

    # one device
    trainer |= {key: value for key, value in config.trainer.model_dump().items() if value is not None}
    trainer |= {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    if trainer.get("limit_test_batches") in (0, 0.0):  # the training skipped the test; this command asks for it
        trainer["limit_test_batches"] = None
    return validate_saved(plain, path)


def only_read(data: dict[str, Any], folder: str) -> dict[str, Any]:
    """Change and return the settings `data` of a run so that reading the images downloads nothing, and writes the demo
    and Fashion-MNIST only below `folder` (paths.data), not at any path that a run names."""
    if "download" in data or str(data.get("_target_")).startswith(DOWNLOADING):
        data["download"] = False
    if not Path(data["root"] or "/").resolve().is_relative_to(Path(folder).resolve()):
        data |= {"demo_seed": None, "idx": None}
    return data


def read_images(
    is_own: bool,
    run_config: TrainConfig,
    checkpoint: dict[str, Any],
    devices: Devices,
    run_dir: Path,
    trusted: Trusted = (),
) -> Data:
    """Read the run's own images, in the batches of the run's own test, or a folder that the command line names."""
    data = build_data(run_config, devices, trusted=trusted)
    dataset = checkpoint["alexlab"]["dataset"]
    if is_own:
        data.read()
    elif run_config.data.multilabel:
        raise UserError(f"{data.root}: a folder has one class per image, and the run any number: remove data.root.")
    else:
        read_other_folder(need_index(data, "eval"), dataset, tuple(checkpoint["alexlab"]["classes"]))
    check_classes(checkpoint, data.classes, data.root)
    data.readable_classes = readable_classes(checkpoint, run_config)
    if run_config.trainer.limit_test_batches is None:  # the same batches, so that sums are rounded in the same way
        ranks = run_dirs.read_summary(run_dir).get("world_size", 1)
        data.world_size = ranks if isinstance(ranks, int) and 1 <= ranks <= MOST_RANKS else 1
    if is_own:
        check_images(dataset, data)
    for line in data.notes():
        print(printable(f"note: {line}"))
    return data


def read_other_folder(data: ImageFolders, dataset: dict[str, Any], classes: tuple[str, ...]) -> None:
    """Read a folder that the command line names: the run's own split if it holds the run's images, else all images."""
    if (how := split_by(data)) is not None:
        with contextlib.suppress(UserError):  # a different folder may have too few images for a split
            if not changed_splits(dataset, data.read().describe()):
                return
        data.splits = {}
        print(
            f"note: the run's images were split by {how}, and {data.root} has different images: all of "
            "them are tested, so they must not include training images."
        )
    data.read_for_evaluation(classes)


def split_by(data: Data) -> str | None:
    """Return the setting that splits the images at random, if any."""
    return next((f"data.{key}" for key in ("val_fraction", "folds") if getattr(data, key, None) is not None), None)


def check_images(dataset: dict[str, Any], data: Data) -> None:
    """Print a note if the run's own folder has changed; raise UserError if training images would be tested now."""
    changed = changed_splits(dataset, data.describe())
    how = split_by(data)
    if how is not None and (data.test_split in changed or (changed and how == "data.val_fraction")):
        raise UserError(
            f"The images in {data.root} are not those of the training, so {how} splits them differently "
            "and training images would be tested: restore the images, or choose another folder with data.root=PATH."
        )
    if changed:
        print(f"note: the files of {', '.join(changed)} in {data.root} are not those of the training any more.")


class Crops(torch.nn.Module):
    """A network that averages over crops of each image. `cut`: images (B, C, H, W) -> several (B, C, H', W')."""

    def __init__(self, net: torch.nn.Module, cut: Callable[[Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        self.net, self.cut = net, cut

    def forward(self, images: Tensor) -> Tensor:
        """Compute the log of the crops' mean probability: float (B, C, H, W) -> (B, num_classes)."""
        logs = torch.stack([self.net(crop.contiguous()).float().log_softmax(1) for crop in self.cut(images)])
        return logs.logsumexp(0) - math.log(len(logs))  # log(mean(exp)) would be -inf if all are small


def use_crops(task: RunModule, data: Data, number: int) -> None:
    """Test the images and their mirror images, or ten crops as Krizhevsky et al. 2012: of the image_size / crop_ratio
    pixels (224 of 256) four corners, the center, and these five mirrored."""
    if not task.one_class_per_image:
        raise UserError(
            f"`crops={number}` averages the probabilities of classes of which each image has one, and "
            f"{type(task).__name__} has other targets: use crops=1."
        )
    if number == 2:
        task.net = Crops(task.net, lambda images: (images, images.flip(-1)))
        return
    data = need_index(data, "eval crops=10")
    one = data.transforms["test"]
    if one.covered == one.size:
        raise UserError(
            f"`crops=10` needs pixels around the {one.image_size} that the network sees, and the run's "
            f"augment.crop_ratio={one.crop_ratio} leaves none: use crops=1 or 2."
        )
    whole = dataclasses.replace(one, image_size=one.covered, crop_ratio=1.0)
    data.transforms["val"] = data.transforms["test"] = whole
    task.net = Crops(task.net, lambda images: ten_crop(images, list(one.size)))
