"""Whether training can go on from a checkpoint."""

import contextlib
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from alexlab import checkpoint, launch, rundir
from alexlab import config as configs
from alexlab.classifier import ImageClassifier
from alexlab.data.datamodule import ImageFolders
from alexlab.errors import UserError
from alexlab.instantiate import build
from alexlab.models.parts import head_of
from alexlab.models.zoo import load_but_head
from alexlab.plan import Plan

# settings that a checkpoint's optimizer, schedule and order of images go on with, whatever the config says
KEPT_ON_RESUME = (
    "optimizer.", "scheduler.", "seed", "data.batch_size", "data.val_fraction", "data.test_fraction", "ema.",
    "trainer.accumulate_grad_batches", "model.mean", "model.std", "finetune.",
)  # fmt: skip

# keys that older checkpoints lack, with what was done then
CAME_LATER = {
    "optimizer.bias_lr_factor": 1.0, "finetune.freeze_epochs": 0, "finetune.backbone_lr_factor": 1.0,
}  # fmt: skip


def find_ckpt(config: DictConfig, key: str, ckpt: str) -> Path:
    """What `key` means: a file, or the checkpoint of a run given by its directory or name, or "latest", which is none
    of the same sweep's: all its jobs start from the same one."""
    named = config[key]
    path = Path(named).expanduser().resolve()
    if path.is_file() or path.suffix == ".ckpt":
        return path
    sweep = Path(config.run_dir).parent
    besides = sweep if sweep.parent.name == "multiruns" else None
    return rundir.ckpt_of(rundir.find_run(named, Path(config.paths.logs), ckpt, key, besides), ckpt)


def check_layers(key: str, found: dict[str, Any], net: nn.Module) -> None:
    """Compare what no weight's shape tells: strides, paddings, how layers normalize; all but the head and dropout.

    Raises:
        UserError: the checkpoint's network has other layers.
    """
    its = found["alexlab"]["config"]["model"]
    settings = OmegaConf.create({**its["net"], **({"pretrained": False} if "pretrained" in its["net"] else {})})
    classes = len(found["alexlab"]["classes"])
    try:
        with torch.device("meta"):  # without memory for weights
            theirs = build(settings, num_classes=classes)
    except (UserError, RuntimeError, NotImplementedError):  # it works with numbers as it is made
        theirs = build(settings, num_classes=classes)
    pairs = itertools.zip_longest(_layers(theirs), _layers(net))
    differ = next((pair for pair in pairs if pair[0] != pair[1]), None)
    if differ is not None:
        raise UserError(
            f"{key}: its network has {differ[0]} where this one has {differ[1]}: give its model={its['name']} and its "
            "model.net.*, which its run's config.yaml has."
        )


def _layers(net: nn.Module) -> list[str]:
    head = None
    with contextlib.suppress(UserError):
        head = head_of(net)
    parts = [part for part in net.modules() if not any(True for _ in part.children())]
    return [repr(part) for part in parts if part is not head and not isinstance(part, nn.Dropout | nn.Identity)]


def start_from(config: DictConfig, net: nn.Module, classes: Sequence[str]) -> None:
    """Give `net` the weights of `init_from`, but for the head where the classes are others.

    Raises:
        UserError: no such run or checkpoint, another network's, or weights that know other inputs.
    """
    if config.ckpt_path is not None:
        if launch.tells():
            print(
                f"note: ckpt_path={config.ckpt_path} has the weights to go on with: init_from is not read.", flush=True
            )
        return
    path = find_ckpt(config, "init_from", "best")
    config.init_from = str(path)
    found = checkpoint.load(path)
    state = {key.removeprefix("net."): value for key, value in found["state_dict"].items() if key.startswith("net.")}
    same = list(found["alexlab"]["classes"]) == list(classes)
    try:
        load_but_head(net, state, keep_head=same, num_classes=len(classes))
    except ValueError as error:
        its = found["alexlab"]["config"]["model"]["name"]
        raise UserError(f"init_from={path}: {error} Its run had model.name={its}.") from error
    check_layers(f"init_from={path}", found, net)
    theirs, ours = found["alexlab"]["config"]["model"], configs.plain(config.model)
    words = [f"model.{key}={theirs[key]}".replace(" ", "") for key in ("mean", "std") if theirs[key] != ours[key]]
    if words:
        raise UserError(f"init_from={path}: its weights are used to other inputs: add {' '.join(words)}.")
    if launch.tells():
        new = "" if same else "; the last layer is new, as the classes are others"
        print(f"weights of {rundir.shown(path)}{new}", flush=True)


def best_beside(config: DictConfig) -> Path | None:
    """The best.ckpt that lies beside `ckpt_path` and is of the same run, so that its score goes on."""
    if config.ckpt_path is None:
        return None
    path = Path(config.ckpt_path).with_name("best.ckpt")
    if not path.is_file():
        return None
    last, best = (checkpoint.load(each)["alexlab"] for each in (Path(config.ckpt_path), path))
    same = last.get("best") and last["best"] == best.get("best") and last["config"]["monitor"] == config.monitor
    return path if same else None


def take_best_along(config: DictConfig) -> None:
    """Copy the best weights before `ckpt_path` into the run's directory, or say that they are not known."""
    path = best_beside(config)
    if path is not None:
        folder = Path(config.run_dir, "checkpoints")
        folder.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / ".best.ckpt.tmp")
        (folder / ".best.ckpt.tmp").replace(folder / "best.ckpt")
    elif config.ckpt_path is not None:
        print(
            f"note: no best.ckpt by {config.monitor} of that very moment lies beside {config.ckpt_path}: `best` counts "
            "from here on.",
            flush=True,
        )


def check_ckpt(config: DictConfig, data: ImageFolders, model: ImageClassifier, plan: Plan) -> None:
    """Whether training can go on from `ckpt_path`.

    Raises:
        UserError: another network, other classes or images, weights alone, the middle of an epoch, nothing left to
            train, or settings that the checkpoint's optimizer and schedule would not take over.
    """
    path = Path(config.ckpt_path)
    found = checkpoint.load(path)
    checkpoint.load_net(model.net, found, path)
    check_layers(f"ckpt_path={path}", found, model.net)
    if "optimizer_states" not in found:
        raise UserError(f"ckpt_path={path} holds weights alone, and training cannot go on from it: give last.ckpt.")
    checkpoint.check_classes(found, data.classes, data.root)
    if not found["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"]:
        raise UserError(
            f"ckpt_path={path} was saved in the middle of epoch {found['epoch'] + 1}, where trainer.max_steps ended "
            "the run, and training goes on from whole epochs alone: end a run with trainer.max_epochs, or start anew."
        )
    here, there = configs.flat(configs.plain(config)), {**CAME_LATER, **configs.flat(found["alexlab"]["config"])}
    differ = [
        f"{key}={here.get(key)} (there {there.get(key)})"
        for key in sorted({*here, *there})
        if key.startswith(KEPT_ON_RESUME) and here.get(key) != there.get(key)
    ]
    if differ:
        raise UserError(
            f"ckpt_path={path} goes on with its own settings, and these differ: {', '.join(differ)}. Give the same "
            "ones, or start anew without ckpt_path."
        )
    then, now = found["alexlab"]["dataset"], data.describe()
    changed = [name for name in ("train", "val") if then["fingerprint"].get(name) != now["fingerprint"].get(name)]
    if changed:
        counts = ", ".join(f"{name} {now['images'].get(name)} (there {then['images'].get(name)})" for name in changed)
        raise UserError(
            f"ckpt_path={path} was trained on other images than those of {data.root}: {counts}, by the names of their "
            "files. Give the same images, or start anew without ckpt_path."
        )
    epochs, steps = found["epoch"] + 1, found["global_step"]
    if steps != epochs * plan.steps_per_epoch:
        raise UserError(
            f"ckpt_path={path} has done {steps} steps in {epochs} epochs, and an epoch has {plan.steps_per_epoch} "
            "here, so that the schedule would not fit: give the same trainer.limit_train_batches and "
            "trainer.overfit_batches."
        )
    if plan.steps <= steps:
        raise UserError(
            f"ckpt_path={path} has done {epochs} epochs ({steps} steps), and this run would end after {plan.steps} "
            f"steps: give a trainer.max_epochs above {epochs}."
        )
