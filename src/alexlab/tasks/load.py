"""A trained network for use elsewhere: `net, transform, classes = alexlab.load(run)`."""

from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor, nn

from alexlab.data import class_names as names
from alexlab.data import decode
from alexlab.data.transforms import SampleTransform
from alexlab.engine import checkpoint_io as checkpoint
from alexlab.engine import config as configs
from alexlab.engine import provenance
from alexlab.engine import run_dir as rundir
from alexlab.engine.errors import UserError
from alexlab.engine.instantiate import network
from alexlab.tasks.augment import BatchAugment

NEEDED = (
    "model.net", "model.name", "model.mean", "model.std", "data.root", "data.image_size", "data.num_workers",
    "data.val_fraction", "data.batch_size", "data.class_names", "augment.crop_ratio", "augment.crop",
    "trainer.precision", "trainer.accelerator", "trainer.limit_test_batches", "paths.logs", "compile", "seed",
    "monitor",
)  # fmt: skip
ABSENT = object()
NO_MATTER = ("pretrained", "dropout", "init", "num_classes")  # keys of a network that its weights' use does not follow


class EvalTransform:
    """An image, or the path of one -> float32 (3, S, S), cropped and normalized as in the run's own evaluation."""

    def __init__(self, image_size: int, crop_ratio: float, mean: list[float], std: list[float]) -> None:
        self.crop = SampleTransform(image_size, "center", crop_ratio=crop_ratio)
        self.normalize = BatchAugment(mean, std, num_classes=1).normalize

    def __call__(self, image: "Image.Image | str | Path") -> Tensor:
        """
        Raises:
            FileNotFoundError: there is no such file.
            UserError: it cannot be read as an image.
        """
        if isinstance(image, Image.Image):
            pixels = self.crop(decode.Picture(image))
        else:
            if not Path(image).exists():
                raise FileNotFoundError(f"{image} does not exist.")
            try:
                pixels = decode.read(str(image), self.crop)
            except decode.BrokenImageError as error:
                raise UserError(f"{error.reason}.") from None
        return self.normalize(pixels[None])[0]


class Trained(NamedTuple):
    """What is needed to use a network.

    Attributes:
        net: float (B, 3, S, S) -> logits (B, len(classes)); in eval mode.
        transform: of an image or its path.
        classes: the classes' readable names, in the order of the logits.
    """

    net: nn.Module
    transform: EvalTransform
    classes: list[str]


def config_of(run_dir: Path) -> DictConfig:
    """The run's own config; a checkpoint holds the weights, so that `network` fetches no others."""
    config = configs.load(run_dir / "config.yaml")
    lacking = [key for key in NEEDED if OmegaConf.select(config, key, default=ABSENT) is ABSENT]
    if lacking:
        raise UserError(f"{run_dir / 'config.yaml'} is not a run's config: it has no {', '.join(lacking)}.")
    config.model.pretrained = False
    return config


def load(
    run: "str | Path" = "latest",
    ckpt: str = "best",
    logs: "str | Path" = configs.ROOT / "logs",
    check_sources: bool = True,
) -> Trained:
    """The network of a run, rebuilt from the run's own config, on the CPU.

    Args:
        run: its directory or name, or "latest".
        ckpt: "best", "last" or a file.
        logs: where runs with a name lie.
        check_sources: print a warning if the network's source files have changed since the run.

    Raises:
        UserError: no such run or checkpoint, or one that does not fit the run's network.
    """
    run_dir = rundir.find_run(str(run), Path(logs), ckpt)
    config = config_of(run_dir)
    path = rundir.ckpt_of(run_dir, ckpt)
    found = checkpoint.load(path)
    net = network(config.model.net, len(found["alexlab"]["classes"]))
    checkpoint.load_net(net, found, path)
    check_own(found, config, path, run_dir)
    if check_sources:
        warn_of_changed_sources(found, net, path)
    m = config.model
    transform = EvalTransform(config.data.image_size, config.augment.crop_ratio, list(m.mean), list(m.std))
    return Trained(net.eval(), transform, readable_classes(found, config))


def check_own(found: dict[str, Any], config: DictConfig, path: Path, run_dir: Path) -> None:
    """Raises UserError where a checkpoint from elsewhere is of a network of other settings than those of the run."""
    if path.resolve().parent == run_dir.resolve() / "checkpoints":
        return
    theirs, ours = found["alexlab"]["config"]["model"], configs.told(config.model)
    differ = [f"model.{key}" for key in ("mean", "std") if theirs[key] != ours[key]]
    nets = [{key: value for key, value in m["net"].items() if key not in NO_MATTER} for m in (theirs, ours)]
    if nets[0] != nets[1]:
        differ.append("model.net")
    if differ:
        raise UserError(
            f"ckpt={path} is of a run with another {' and '.join(differ)}: give that run with run=PATH, or a "
            "checkpoint of this one."
        )


def warn_of_changed_sources(found: dict[str, Any], net: nn.Module, path: Path) -> None:
    """Print one warning if source files of a network have changed since its checkpoint was written.

    Its weights fit the changed network, so that nothing else would show it. Checkpoints without hashes of the source
    files, which older versions wrote, are not checked.

    Args:
        found: content of the checkpoint.
        net: the network, rebuilt from the code at hand.
        path: file of the checkpoint.
    """
    changed = provenance.changed_sources(found["alexlab"].get("sources"), net)
    if changed:
        run_dir = path.resolve().parent.parent
        restore = provenance.how_to_restore(
            provenance.read(run_dir), f"git apply {rundir.shown(run_dir / 'code.patch')}"
        )
        print(
            f"warning: {', '.join(changed)} changed since {rundir.shown(path)} was trained: the network may compute "
            f"something else than in training. {restore}",
            flush=True,
        )


def readable_classes(found: dict[str, Any], config: DictConfig) -> list[str]:
    """The classes' names for people that a checkpoint of a run with `config` holds."""
    kept = found["alexlab"].get("readable_classes")  # which older checkpoints lack
    return kept or names.readable(found["alexlab"]["classes"], config.data.class_names)
