"""Whether training can go on from a checkpoint."""

from pathlib import Path

from omegaconf import DictConfig

from alexlab import checkpoint
from alexlab import config as configs
from alexlab.classifier import ImageClassifier
from alexlab.data.datamodule import ImageFolders
from alexlab.errors import UserError

# settings that a checkpoint's optimizer, schedule and order of images go on with, whatever the config says
KEPT_ON_RESUME = ("optimizer.", "scheduler.", "seed", "data.batch_size", "trainer.accumulate_grad_batches", "ema.")


def check_ckpt(config: DictConfig, data: ImageFolders, model: ImageClassifier) -> None:
    """Whether training can go on from `ckpt_path`.

    Raises:
        UserError: another network, other classes, weights alone, the middle of an epoch, or settings that the
            checkpoint's optimizer would not take over.
    """
    path = Path(config.ckpt_path)
    found = checkpoint.load(path)
    checkpoint.load_net(model.net, found, path)
    if "optimizer_states" not in found:
        raise UserError(f"ckpt_path={path} holds weights alone, and training cannot go on from it: give last.ckpt.")
    checkpoint.check_classes(found, data.classes, data.root)
    if not found["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"]:
        raise UserError(
            f"ckpt_path={path} was saved in the middle of epoch {found['epoch'] + 1}, and training goes on from whole "
            "epochs alone: give a checkpoint of trainer.max_epochs instead of trainer.max_steps, or start anew."
        )
    here, there = configs.flat(configs.plain(config)), configs.flat(found["alexlab"]["config"])
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
