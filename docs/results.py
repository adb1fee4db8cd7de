"""Train what the tables of docs/results.md need, and write them: make results ARGS="NAME ... [photos=FOLDER]".

Without names all studies are run, and `imagenet` is worked out. A study's runs are in
logs/train/multiruns/results-NAME. After an interruption the same command continues: jobs that are finished are not
trained again, and the one that was stopped is resumed. A table is between `<!-- results NAME -->` and `<!-- end -->`,
and no number in it is typed by hand.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from alexlab.analysis.compare import Group, as_text, cell, grouped, ranked, sureness
from alexlab.analysis.runs import find, read
from alexlab.engine.settings import REPETITIONS
from alexlab.models.introspection import macs

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "logs/train"
PAGE = Path(__file__).with_name("results.md")


@dataclass(frozen=True)
class Study:
    """Runs that a table compares.

    Attributes:
        base: overrides of all runs.
        variants: further overrides of each sweep, the reference first.
        shown: metrics that are columns; the first one has the interval and the test.
        tested: words of eval.py, which tests each run, and the metrics of its eval*.json that are columns too.
        compared: whether the runs are of one task, so that they have intervals and tests.
    """

    base: str
    variants: tuple[str, ...] = ("",)
    shown: tuple[str, ...] = ("val/acc1", "last/val/acc1", "val/loss")
    tested: tuple[str, str, tuple[str, ...]] | None = None
    compared: bool = True

    @property
    def needs_photos(self) -> bool:
        return "PHOTOS" in " ".join([self.base, *self.variants])


SMALL = "data.image_size=64 logger=csv callbacks.figures=false"
PHOTOS = f"data=folder data.root=PHOTOS {SMALL} data.batch_size=32 trainer.max_epochs=12 seed=0,1,2"
# runs that others start from, with init_from=NAME
SOURCES = {
    "SHAPES": f"model=alexnet_bn {SMALL}",
    "CLOTHES": f"model=alexnet_bn data=fashion_mnist {SMALL} data.batch_size=256 trainer.max_epochs=3",
}
FINETUNE = "experiment=finetune model.pretrained=false"
RATES = "optimizer.lr=0.01,0.003,0.03,0.1"
OFF = ("model.net.norm=none", "model.net.pool=2", "model.net.dropout=0.0")  # LRN, overlapping pooling, dropout
FASHION = f"data=fashion_mnist {SMALL} trainer.max_epochs=6"
# the network of experiment=fashion_mnist at 64 pixels, where the last maps have one pixel
SMALL_NET = (
    "model=alexnet_bn model.in_channels=1 model.net.map_size=1 model.net.hidden=[1024,1024] data.batch_size=256 "
    "augment.scale=[0.8,1.0] augment.ratio=[0.9,1.1111] augment.crop_ratio=1.0 optimizer.lr=0.03 test=false"
)
ALL_PHOTOS = "data=folder data.root=PHOTOS"
CLOTHES_64 = "data=fashion_mnist data.image_size=64 trainer.max_epochs=2"
TEN = "data.batch_size=32 trainer.max_epochs=10"
PAPER = "experiment=imagenet_alexnet"
MODERN = "experiment=imagenet_alexnet_modern compile=false ema.decay=0.99"
MIRRORED = ("split=val crops=2", "eval-val-2crops.json", ("acc1_2crops",))
STUDIES = {
    "defaults": Study(
        "seed=0",
        ("", ALL_PHOTOS, f"{ALL_PHOTOS} trainer=ddp trainer.devices=2"),
        ("val/acc1", "last/val/acc1", "val/loss", "test/acc1", "seconds", "images_per_second"),
        compared=False,
    ),
    "rates": Study(f"model=alexnet_bn {PHOTOS} {RATES}"),
    "rates-shapes": Study(f"model=alexnet_bn {SMALL} data.batch_size=32 trainer.max_epochs=10 seed=0,1,2 {RATES}"),
    "rates-fashion": Study(
        f"model=alexnet_bn data=fashion_mnist {SMALL} data.batch_size=32 trainer.max_epochs=3 test=false {RATES}",
        shown=("val/acc1", "val/loss"),
    ),
    "rates-modern": Study(
        f"experiment=imagenet_alexnet_modern {PHOTOS} augment.sizes=null compile=false ema.decay=0.9 "
        f"optimizer.lr_reference_batch=null scheduler.warmup=1 {RATES}"
    ),
    "paper-photos": Study(f"model=alexnet {PHOTOS} optimizer.lr=0.003 augment.pca=0.1", ("", *OFF, "augment.pca=0.0")),
    "paper-fashion": Study(
        f"model=alexnet {FASHION} seed=0,1,2 optimizer.lr=0.01 test=false", ("", *OFF), ("val/acc1", "val/loss")
    ),
    "finetune": Study(
        f"model=alexnet_bn {PHOTOS}",
        ("", f"{FINETUNE} init_from=SHAPES", f"{FINETUNE} init_from=CLOTHES", "init_from=CLOTHES"),
    ),
    "recipes": Study(
        "logger=csv seed=0",
        (
            f"{PAPER} {CLOTHES_64} scheduler.milestones=[1]",
            f"{PAPER} data=demo {TEN} scheduler.milestones=[6,8,9]",
            f"{PAPER} {ALL_PHOTOS} {TEN} scheduler.milestones=[6,8,9]",
            f"{MODERN} {CLOTHES_64} data.batch_size=256 augment.sizes=[[1,64]] scheduler.warmup=0.2",
            f"{MODERN} data=demo {TEN} augment.sizes=[[1,64],[6,80]] scheduler.warmup=1",
            f"{MODERN} {ALL_PHOTOS} {TEN} augment.sizes=[[1,128],[5,176],[8,224]] scheduler.warmup=1",
        ),
        ("val/acc1", "last/val/acc1", "val/loss", "test/acc1"),
        compared=False,
    ),
    "fashion": Study(  # the test images are read once, by the finished runs
        "experiment=fashion_mnist logger=csv callbacks.figures=false test=false seed=0,1,2",
        shown=("val/acc1", "last/val/acc1", "val/loss"),
        tested=("split=test crops=2", "eval-2crops.json", ("acc1_2crops",)),
    ),
    "fashion-steps": Study(
        f"{SMALL_NET} {FASHION} seed=0,1",
        (
            "",
            "model.net.norm_hidden=false",
            "label_smoothing=0.1",
            "augment.mixup=0.2",
            "augment.erase=0.25",
            "ema.decay=0.99",
            "trainer.max_epochs=12",
        ),
        ("val/acc1", "val/loss"),
        MIRRORED,
    ),
}


IMAGES = 1_281_167  # training images of ImageNet-1k
CORES = 8  # per GPU
# images per second and core, without a policy and with augment=strong's: `input.py` in benchmarks/results.md, first run
FROM_FOLDERS = {False: 2162 / 2, True: 1634 / 2}


def main() -> None:
    named = [word for word in sys.argv[1:] if "=" not in word]
    settings = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
    if unknown := [*({*named} - {*STUDIES, "imagenet"}), *({*settings} - {"photos"})]:
        sys.exit(f"{', '.join(unknown)}: unknown. Choose from {', '.join(STUDIES)}, imagenet, and photos=FOLDER.")
    for name in named or (*STUDIES, "imagenet"):
        if name == "imagenet":
            write(name, costs())
            continue
        study = STUDIES[name]
        if study.needs_photos and "photos" not in settings:
            print(f"{name}: skipped, because it needs photos=FOLDER, with train/ and val/.")
            continue
        train(name, study, settings.get("photos", ""))
        test(name, study)
        write(name, table(name, study))


def train(name: str, study: Study, photos: str) -> None:
    """Run the sweeps of a study, and the runs that they start from, without the jobs that are finished."""
    values = {"PHOTOS": os.path.abspath(photos), **{source: place(source) for source in SOURCES}}  # noqa: PTH100

    def run(words: str, *more: str) -> None:
        pairs = [word.partition("=") for word in words.split()]
        given = [key + equals + values.get(value, value) for key, equals, value in pairs]
        subprocess.run([sys.executable, "train.py", *given, *more, "resume=auto"], cwd=ROOT, check=True)

    for source, words in SOURCES.items():
        if any(variant.endswith(f"init_from={source}") for variant in study.variants):
            run(words, f"hydra.run.dir={place(source)}")
    for number, variant in enumerate(study.variants):
        run(f"-m {study.base} {variant}", f"hydra.sweep.dir={LOGS}/multiruns/results-{name}/{number}")


def place(source: str) -> str:
    """Return the run directory of a source."""
    return str(LOGS / f"runs/results-{source.lower()}")


def test(name: str, study: Study) -> None:
    """Test the runs of a study that are not yet tested."""
    if study.tested is not None:
        for run in read(find([str(LOGS / f"multiruns/results-{name}")], LOGS)[0])[0]:
            if not (run.path / study.tested[1]).exists():
                command = [sys.executable, "eval.py", f"run={run.path}", *study.tested[0].split()]
                subprocess.run(command, cwd=ROOT, check=True)


def tested(study: Study, group: Group) -> list[str]:
    """Return mean±deviation of the metrics of `study.tested`."""
    _, file, metrics = study.tested or ("", "", ())
    found = [json.loads((run.path / file).read_text()) for run in group.runs if metrics]
    columns = [[each[key] for each in found] for key in metrics]
    return [f"{fmean(column):.4f}" + (f"±{stdev(column):.4f}" if len(column) > 1 else "") for column in columns]


def table(name: str, study: Study) -> list[str]:
    """Return the lines of a study's table: the reference, or the best one of a single sweep, first."""
    runs, _ = read(find([str(LOGS / f"multiruns/results-{name}")], LOGS)[0])
    metric, variants = study.shown[0], study.variants
    groups = ranked(grouped(runs), metric)
    if len(variants) > 1:  # the reference first
        groups.sort(key=variant_of)
    more = sureness(groups, metric) if study.compared else {}
    heads = ["", "runs", metric, *more, *study.shown[1:], *(study.tested[2] if study.tested else ())]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for number, group in enumerate(groups):
        settings = {key: value for key, value in group.settings.items() if key not in REPETITIONS}
        values = [cell(group, metric), *(column[number] for column in more.values())]
        values += [cell(group, key) for key in study.shown[1:]] + tested(study, group)
        label = as_text(settings) if len(variants) == 1 else variants[variant_of(group)]
        lines.append(f"| {f'`{label}`' if label else 'the command'} | {len(group.runs)} | {' | '.join(values)} |")
    commits = sorted({str(run.facts["commit"])[:7] for run in runs})
    seconds = sum(run.metrics.get("seconds", 0) for run in runs)
    reference = variants[0] if study.compared else ""
    command = f"`python train.py -m {study.base} {reference}".strip() + "`"
    more_words = ", and with each of these overrides added" if len(variants) > 1 else ""
    about = f"{len(runs)} runs, commit {', '.join(commits)}, {seconds / 60:.0f} minutes."
    return [f"{command}{more_words}:", "", *lines, "", about]


def variant_of(group: Group) -> int:
    return int(group.runs[0].path.parent.name)


def costs() -> list[str]:
    """Return a table of what the recipes for ImageNet take, worked out from counts and the loader's measured rate."""
    heads = ["recipe", "GPUs", "images per step and GPU", "steps", "FLOPs", "memory per GPU", "hours of loading"]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for recipe in ("imagenet_alexnet", "imagenet_alexnet_modern"):
        with initialize_config_dir(str(ROOT / "conf"), version_base=None):
            config = compose("train", [f"experiment={recipe}"])
        net = instantiate(config.model.net, num_classes=1000)
        parameters = sum(each.numel() for each in net.parameters())
        epochs, batch = config.trainer.max_epochs, config.data.batch_size
        stages = [*(config.augment.sizes or [[1, config.data.image_size]]), [epochs + 1, 0]]
        lengths = {size: later[0] - first for (first, size), later in pairwise(stages)}  # epochs of each size
        largest = max(lengths)
        # forward, and twice as much backward; a multiply-accumulate is two operations
        operations = IMAGES * sum(6 * macs(net, (3, size, size)) * epochs for size, epochs in lengths.items())
        per_image = (kept(net, 8, largest) - kept(net, 4, largest)) / 4
        # weights, gradients, momentum and the average in 4 bytes, a copy of the weights in 2
        fixed = parameters * (4 * (3 + (config.ema.decay is not None)) + 2)
        for gpus in (1, 8):
            memory = fixed + per_image * batch / gpus
            seconds = IMAGES * epochs / (FROM_FOLDERS[config.augment.policy != "none"] * CORES * gpus)
            steps = IMAGES // batch * epochs
            values = [gpus, batch // gpus, f"{steps:,}", f"{operations:.1e}", f"{memory / 1e9:.1f} GB"]
            lines.append(f"| `{recipe}` | {' | '.join(map(str, values))} | {seconds / 3600:.1f} |")
    return lines


def kept(net: nn.Module, batch: int, size: int) -> int:
    """Count the bytes that the forward pass in bf16 keeps for the backward pass."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        net.train()(torch.zeros(batch, 3, size, size)).float().log_softmax(1).sum()
    return sum(each.nbytes() for each in storages.values())


def write(name: str, lines: list[str]) -> None:
    """Replace the table of a study."""
    mark = f"<!-- results {name} -->"
    text, count = re.subn(
        f"{re.escape(mark)}\n.*?<!-- end -->",
        lambda _: "\n".join([mark, *lines, "<!-- end -->"]),
        PAGE.read_text(),
        flags=re.DOTALL,
    )
    if count != 1:
        sys.exit(f"{PAGE} must have `{mark}` and `<!-- end -->` once.")
    PAGE.write_text(text)
    print(f"{PAGE}: the table {name} is written.")


if __name__ == "__main__":
    main()
