"""Check whether training can continue from a checkpoint: settings, images and steps."""

from pathlib import Path
from typing import Any

from torch import nn

from alexlab.commands.plan import Plan, total_steps
from alexlab.data.fingerprint import changed_splits
from alexlab.engine import checkpoint_io
from alexlab.engine.config import flat
from alexlab.engine.errors import UserError
from alexlab.engine.overrides import shown
from alexlab.engine.resume import FIXED
from alexlab.engine.run_dir import shown as shown_path
from alexlab.engine.targets import Trusted
from alexlab.tasks import optimizers
from alexlab.tasks.load import check_classes, check_function, input_statistics, load_net

# keys that older checkpoints and users' own yaml may lack, with their defaults
ADDED_LATER: dict[str, Any] = {"optimizer.bias_lr_factor": 1.0, "data.sampler": "shuffle"}
ADDED_LATER |= {"finetune.freeze_epochs": 0, "finetune.backbone_lr_factor": 1.0}


def check_ckpt(
    path: Path,
    config: dict[str, Any],
    net: nn.Module,
    dataset: dict[str, Any],
    classes: list[str],
    plan: Plan,
    resumes: bool,
    finished: bool,
    trusted: Trusted = (),
) -> int:
    """Check that training can continue from the checkpoint `path`, load its weights into `net`, and return its steps.

    Args:
        config: plain values.
        dataset: as `ImageFolders.describe` returns.
        resumes: it is the run's own checkpoint (`resume=`), and not the start of a new run (`ckpt_path=`).
        finished: the run of the checkpoint is complete; otherwise its test may still be missing.
        trusted: packages that the checkpoint's config may name.

    Raises:
        UserError: the checkpoint does not fit network, classes, images or settings; or it cannot be continued.
    """
    named = f"the run's {shown_path(path)}" if resumes else f"ckpt_path={path}"
    root, most = config["data"]["root"], config["trainer"]["max_epochs"]
    checkpoint = checkpoint_io.load(path)
    load_net(net, checkpoint, path)
    if "optimizer_states" not in checkpoint:
        raise UserError(f"{named} has weights only, and training cannot continue from it: give a last.ckpt.")
    check_classes(checkpoint, classes, root)
    check_function(named, checkpoint, net, config["data"]["image_size"], True, trusted)
    position = checkpoint_io.position_of(checkpoint)
    if position is None:
        raise UserError(
            f"{named} was written by an older version, and training cannot continue from it; a new run can start from "
            "its weights with init_from."
        )

    saved = checkpoint["alexlab"]["config"]
    now, then = ({**ADDED_LATER, **flat(each)} for each in (config, saved))
    for flat_config, model in ((now, config["model"]), (then, saved["model"])):  # either config may have "auto"
        flat_config["model.mean"], flat_config["model.std"] = input_statistics(model, trusted)
    differ = [
        f"{key}={shown(now.get(key))} (the checkpoint has {shown(then.get(key))})"
        for key in sorted({*now, *then})
        if FIXED.fullmatch(key) and now.get(key) != then.get(key)
    ]
    if differ:
        raise UserError(
            f"{named} was trained with different settings: {', '.join(differ)}. Give the same ones, or start a new run."
        )

    before = checkpoint["alexlab"]["dataset"]
    changed = [name for name in changed_splits(before, dataset) if name in ("train", "val")]
    if changed:
        now, then = dataset["images"], before["images"]
        counts = ", ".join(f"{name} {now.get(name)} (the checkpoint has {then.get(name)})" for name in changed)
        raise UserError(
            f"{named} was trained on different images from those of {root}: {counts}; names or sizes of the files "
            "differ. Give the same images, or start a new run."
        )

    epochs, done = position["epochs"], checkpoint["global_step"]
    if position["steps_per_epoch"] != plan.steps_per_epoch:
        raise UserError(
            f"{named} has done {done} steps in epochs of {position['steps_per_epoch']} steps. An epoch has "
            f"{plan.steps_per_epoch} now, which does not fit its schedule: set the same trainer.limit_train_batches "
            "and trainer.overfit_batches."
        )
    if config["scheduler"].get("_target_"):  # built before
        ends = saved["trainer"].get("max_epochs", 10), saved["trainer"].get("max_steps", -1)
        before = total_steps(plan.steps_per_epoch, *ends)
        both = plan.steps, before
        now, then = (optimizers.lengths(config["scheduler"], steps, plan.steps_per_epoch, None) for steps in both)
        if now != then:
            counts = ", ".join(f"{key}={then[key]} (now {now[key]})" for key in now)
            raise UserError(
                f"{named} was trained for {before} steps, from which its schedule follows: {counts}. Set max_epochs "
                "and max_steps as before, or start a new run with init_from. Named schedules can be prolonged."
            )
    if most is not None and 0 <= most < epochs:
        raise UserError(
            f"{named} has done {epochs} epochs, and trainer.max_epochs={most} would have stopped before: set "
            f"{epochs} or more."
        )
    if plan.steps <= done and (finished or not resumes):
        raise UserError(
            f"{named} has done {epochs} epochs ({done} steps), and this run would end after {plan.steps} steps: set a "
            f"trainer.max_epochs above {epochs}."
        )
    return done
