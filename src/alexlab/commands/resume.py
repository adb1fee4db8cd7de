"""Whether training can go on from a checkpoint."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from alexlab.commands.plan import Plan
from alexlab.data.datamodule import ImageFolders
from alexlab.data.fingerprint import changed_splits
from alexlab.engine import checkpoint_io as checkpoint
from alexlab.engine import config as configs
from alexlab.engine import launcher as launch
from alexlab.engine import run_dir as rundir
from alexlab.engine.errors import UserError
from alexlab.engine.instantiate import network
from alexlab.models.introspection import heads_of
from alexlab.models.pretrained import load_but_head
from alexlab.tasks.classification import ImageClassifier
from alexlab.tasks.load import warn_of_changed_sources

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
    path = Path(named).expanduser()
    path = path.parent.resolve() / path.name  # a checkpoint that is a link lies where the link does
    if path.is_file() or path.suffix == ".ckpt":
        return path
    sweep = Path(config.run_dir).parent
    besides = sweep if sweep.parent.name == "multiruns" else None
    return rundir.ckpt_of(rundir.find_run(named, Path(config.paths.logs), ckpt, key, besides), ckpt)


def check_function(key: str, found: dict[str, Any], net: nn.Module, size: int, same_classes: bool) -> None:
    """Compare what the checkpoint's network and `net`, which has its weights, make of an image: strides, paddings and
    ways to normalize are in no weight's shape.

    Args:
        size: of the image in pixels.
        same_classes: whether the logits must agree, or only what goes into the last layer.

    Raises:
        UserError: they differ.
    """
    its = found["alexlab"]["config"]["model"]
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    try:
        theirs = _told(_rebuilt(found, on="meta"), image, same_classes)
    except Exception:  # it works with numbers as it is made, or keeps some that no checkpoint has
        try:
            theirs = _told(_rebuilt(found, on="cpu"), image, same_classes)
        except Exception as error:
            raise UserError(f"{key}: its network, model={its['name']}, cannot take {size} pixels ({error}).") from error
    ours = _told(net, image, same_classes)
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max())):
        raise UserError(
            f"{key}: its network, model={its['name']}, makes something else of an image with the same weights (they do "
            "not tell of strides, paddings or ways to normalize): give its model.net.*, which its run's config.yaml "
            "has."
        )


def _rebuilt(found: dict[str, Any], on: str) -> nn.Module:
    """The checkpoint's network with its weights; on "meta" without making others first."""
    with torch.device(on):
        net = network(found["alexlab"]["config"]["model"]["net"], len(found["alexlab"]["classes"]))
    state = {key.removeprefix("net."): value for key, value in found["state_dict"].items() if key.startswith("net.")}
    net.load_state_dict(state, assign=on == "meta")
    return net


@torch.no_grad()
def _told(net: nn.Module, image: Tensor, logits: bool) -> Tensor:
    """The logits of an image (1, 3, S, S), or what the last layers get of it."""
    given: list[Tensor] = []
    hooks = (
        [] if logits else [head.register_forward_pre_hook(lambda _, x: given.append(x[0])) for head in heads_of(net)]
    )
    training = net.training
    try:
        told = net.eval()(image).float()
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    return torch.cat([part.float().flatten() for part in given]) if given else told


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
        its = found["alexlab"]["config"]
        option = its.get("choices", {}).get("model")
        name, how = its["model"]["name"], f"model={option}"
        if option in ("torchvision", "timm") or option is None:
            how = f"model={option} model.name={name}" if option else f"the network of model.name={name}"
        raise UserError(f"init_from={path}: {error} Its run had {how}.") from error
    check_function(f"init_from={path}", found, net, config.data.image_size, same)
    theirs, ours = found["alexlab"]["config"]["model"], configs.told(config.model)
    words = [f"model.{key}={theirs[key]}".replace(" ", "") for key in ("mean", "std") if theirs[key] != ours[key]]
    if words:
        raise UserError(f"init_from={path}: its weights are used to other inputs: add {' '.join(words)}.")
    if launch.tells():
        warn_of_changed_sources(found, net, path)
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
    named = f"ckpt_path={path}" if config.resume.run is None else f"the run's {rundir.shown(path)}"
    found = checkpoint.load(path)
    checkpoint.load_net(model.net, found, path)
    if "optimizer_states" not in found:
        raise UserError(f"{named} holds weights alone, and training cannot go on from it: give last.ckpt.")
    checkpoint.check_classes(found, data.classes, data.root)
    check_function(named, found, model.net, config.data.image_size, same_classes=True)
    place = checkpoint.position_of(found)
    if place is None:
        raise UserError(
            f"{named} was written by an older version, and training cannot go on from it; a new run can start "
            "from its weights with init_from."
        )
    here, there = configs.flat(configs.told(config)), {**CAME_LATER, **configs.flat(found["alexlab"]["config"])}
    differ = [
        f"{key}={here.get(key)} (there {there.get(key)})"
        for key in sorted({*here, *there})
        if key.startswith(KEPT_ON_RESUME) and here.get(key) != there.get(key)
    ]
    if differ:
        raise UserError(
            f"{named} goes on with its own settings, and these differ: {', '.join(differ)}. Give the same "
            "ones, or start anew."
        )
    then, now = found["alexlab"]["dataset"], data.describe()
    changed = [name for name in changed_splits(then, now) if name in ("train", "val")]
    if changed:
        counts = ", ".join(f"{name} {now['images'].get(name)} (there {then['images'].get(name)})" for name in changed)
        raise UserError(
            f"{named} was trained on other images than those of {data.root}: {counts}, by the names of their "
            "files. Give the same images, or start anew."
        )
    epochs, steps = place["epochs"], found["global_step"]
    if place["steps_per_epoch"] != plan.steps_per_epoch:
        raise UserError(
            f"{named} has done {steps} steps in epochs of {place['steps_per_epoch']}, and an epoch has "
            f"{plan.steps_per_epoch} here, so that the schedule would not fit: give the same "
            "trainer.limit_train_batches and trainer.overfit_batches."
        )
    most = config.trainer.max_epochs
    if most is not None and 0 <= most < epochs:
        raise UserError(
            f"{named} has done {epochs} epochs, and trainer.max_epochs={most} would have ended before: give "
            f"{epochs} or more."
        )
    ended = config.resume.run is None or rundir.read_summary(Path(config.run_dir)).get("status") == "finished"
    if plan.steps <= steps and ended:  # else its test is still to be done
        raise UserError(
            f"{named} has done {epochs} epochs ({steps} steps), and this run would end after {plan.steps} "
            f"steps: give a trainer.max_epochs above {epochs}."
        )
