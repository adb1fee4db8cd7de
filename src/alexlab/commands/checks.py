"""Check whether training can continue from a checkpoint: settings, images and steps."""

from pathlib import Path
from typing import Any

from torch import nn

from alexlab.commands.plan import Plan, total_steps
from alexlab.data.fingerprint import changed_splits
from alexlab.data.sources import Data
from alexlab.engine import checkpoint_io
from alexlab.engine.config import flat
from alexlab.engine.errors import UserError, counted
from alexlab.engine.overrides import shown
from alexlab.engine.resume import FIXED
from alexlab.engine.run_dir import read_summary
from alexlab.engine.run_dir import shown as shown_path
from alexlab.engine.schema import TrainConfig
from alexlab.engine.targets import Trusted
from alexlab.tasks import optimizers
from alexlab.tasks.load import check_classes, check_fits, load_net

# keys that older checkpoints and users' own yaml may lack, with their defaults
ADDED_LATER: dict[str, Any] = {"optimizer.bias_lr_factor": 1.0, "data.sampler": "shuffle"}
ADDED_LATER |= {"finetune.freeze_epochs": 0, "finetune.backbone_lr_factor": 1.0}


def check_ckpt(path: Path, config: TrainConfig, net: nn.Module, data: Data, plan: Plan, trusted: Trusted = ()) -> int:
    """Check that training can continue from checkpoint `path`, load the weights into `net`; return the steps done.

    Raises:
        UserError: the checkpoint does not fit network, classes, images or settings; or it cannot be continued.
    """
    resumes, run_dir = config.resume.run is not None, Path(config.run_dir)
    named = f"the run's {shown_path(path)}" if resumes else f"ckpt_path={path}"
    checkpoint = checkpoint_io.load(path)
    load_net(net, checkpoint, path)
    position = checkpoint_io.position_of(checkpoint)
    if position is None:
        raise UserError(
            f"{named} has weights only, and training cannot continue from it: give a last.ckpt, or start a new run "
            "from the weights with init_from."
        )
    check_classes(checkpoint, data.classes, data.root)
    check_fits(named, checkpoint, net, config, True, trusted)
    check_settings(named, config.model_dump(exclude_unset=True), checkpoint["alexlab"]["config"], plan)

    changed = changed_splits(checkpoint["alexlab"]["dataset"], data.describe())
    if changed := [name for name in changed if name in ("train", "val")]:
        raise UserError(
            f"{named} was trained on different images from those of {data.root}: names or sizes of the files of "
            f"{' and '.join(changed)} differ. Give the same images, or start a new run."
        )

    epochs, done = position["epochs"], checkpoint["global_step"]
    if position["steps_per_epoch"] != plan.steps_per_epoch:
        raise UserError(
            f"{named} has done {counted(done, 'step')} in epochs of {counted(position['steps_per_epoch'], 'step')}. An "
            f"epoch has {plan.steps_per_epoch} now, which does not fit the schedule: set the same "
            "trainer.limit_train_batches and trainer.overfit_batches."
        )
    # the test of a run that was stopped may still be missing
    may_end = resumes and read_summary(run_dir).get("status") != "finished"
    if plan.steps < done or (plan.steps == done and not may_end):
        raise UserError(
            f"{named} has done {counted(epochs, 'epoch')} ({counted(done, 'step')}), and this run would end after "
            f"{counted(plan.steps, 'step')}: set a trainer.max_epochs above {epochs}."
        )
    return done


def check_settings(named: str, config: dict[str, Any], saved: dict[str, Any], plan: Plan) -> None:
    """Raise UserError if settings on which the checkpoint's state depends differ from those of `config`."""
    now, then = ({**ADDED_LATER, **flat(each)} for each in (config, saved))
    differ = [
        f"{key}={shown(now.get(key))} (the checkpoint has {shown(then.get(key))})"
        for key in sorted({*now, *then})
        # `check_fits` compares model.mean and model.std, which may be "auto"
        if FIXED.fullmatch(key) and not key.startswith("model.") and now.get(key) != then.get(key)
    ]
    if differ:
        raise UserError(
            f"{named} was trained with different settings: {', '.join(differ)}. Give the same ones, or start a new run."
        )
    if config["scheduler"].get("_target_"):
        before = total_steps(
            plan.steps_per_epoch, saved["trainer"].get("max_epochs", 10), saved["trainer"].get("max_steps", -1)
        )
        lengths, old = (
            # the schedule was built before, so it is trusted
            optimizers.lengths(config["scheduler"], steps, plan.steps_per_epoch, None)
            for steps in (plan.steps, before)
        )
        if lengths != old:
            counts = ", ".join(f"{key}={old[key]} (now {value})" for key, value in lengths.items())
            raise UserError(
                f"{named} was trained for {before} steps, from which its schedule follows: {counts}. Set max_epochs "
                "and max_steps as before, or start a new run with init_from. Named schedules can be prolonged."
            )
