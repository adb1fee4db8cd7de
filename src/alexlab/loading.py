"""A trained network for use elsewhere: `net, transform, classes = alexlab.load(run)`."""

from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from alexlab import checkpoint, rundir
from alexlab import config as configs
from alexlab.data import decode, names
from alexlab.data.transforms import SampleTransform
from alexlab.instantiate import build


class EvalTransform:
    """An image, or the path of one -> float32 (3, S, S), cropped and normalized as in the run's own evaluation."""

    def __init__(self, image_size: int, crop_ratio: float, mean: list[float], std: list[float]) -> None:
        self.crop = SampleTransform(image_size, "center", crop_ratio=crop_ratio)
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))

    def __call__(self, image: "Image.Image | str | Path") -> Tensor:
        """
        Raises:
            BrokenImageError: the file cannot be read as an image.
        """
        if isinstance(image, Image.Image):
            return self.normalize(self.crop(image))
        with decode.open_image(str(image)) as opened:
            try:
                return self.normalize(self.crop(opened))
            except decode.BROKEN as error:
                raise decode.broken(str(image), error) from None

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 (..., 3, H, W) -> float32, (pixel / 255 - mean) / std."""
        return (pixels.float() / 255 - self.mean) / self.std


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


def load(run: "str | Path" = "latest", ckpt: str = "best", logs: "str | Path" = configs.ROOT / "logs") -> Trained:
    """The network of a run, rebuilt from the run's own config, on the CPU.

    Args:
        run: its directory or name, or "latest".
        ckpt: "best", "last" or a file.
        logs: where runs with a name lie.

    Raises:
        UserError: no such run or checkpoint, or one that does not fit the run's network.
    """
    run_dir = rundir.find_run(str(run), Path(logs), ckpt)
    config = configs.load(run_dir / "config.yaml")
    path = run_dir / "checkpoints" / f"{ckpt}.ckpt" if ckpt in ("best", "last") else Path(ckpt)
    found = checkpoint.load(path)
    folders = found["alexlab"]["classes"]
    if "pretrained" in config.model.net:
        config.model.net.pretrained = False  # the checkpoint holds the weights
    net = build(config.model.net, num_classes=len(folders))
    checkpoint.load_net(net, found, path)
    m = config.model
    transform = EvalTransform(config.data.image_size, config.augment.crop_ratio, list(m.mean), list(m.std))
    return Trained(net.eval(), transform, names.readable(folders, config.data.class_names))
