"""Load the trained network of a run, `net, transform, classes = alexlab.load(run)`, and check that weights fit."""

import contextlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from alexlab.data import class_names as names
from alexlab.data import decode
from alexlab.data.transforms import SampleTransform, height_width
from alexlab.engine import checkpoint_io, launcher, provenance
from alexlab.engine import config as configs
from alexlab.engine import run_dir as rundir
from alexlab.engine.errors import UserError
from alexlab.engine.run_dir import ckpt_of, find_run
from alexlab.engine.schema import TrainConfig
from alexlab.engine.targets import Trusted, build_network, check_targets
from alexlab.engine.validation import validate_saved
from alexlab.models.introspection import heads_of, normalization
from alexlab.models.pretrained import load_but_head
from alexlab.tasks import hub
from alexlab.tasks.augment import BatchAugment


class EvalTransform:
    """Convert an image, or the path of one, to float32 (C, H, W), cropped and normalized as in the run's evaluation.

    `image_size` is (H, W) in pixels, or one number for both. `crop_ratio` is that divided by the size that the resized
    image covers. `mean` and `std` have a number for each channel.
    """

    def __init__(self, image_size: int | Sequence[int], crop_ratio: float, mean: list[float], std: list[float]) -> None:
        self.crop = SampleTransform(image_size, "center", crop_ratio=crop_ratio, channels=len(mean))
        self.normalize = BatchAugment(mean, std, num_classes=1).normalize

    def __call__(self, image: Image.Image | str | Path) -> Tensor:
        """Raises FileNotFoundError, or UserError if the file cannot be read as an image."""
        if isinstance(image, Image.Image):
            return self.normalize(self.crop(decode.Picture(image))[None])[0]
        if not Path(image).exists():
            raise FileNotFoundError(f"{image} does not exist.")
        try:
            return self.normalize(decode.read(str(image), self.crop)[None])[0]
        except decode.BrokenImageError as error:
            raise UserError(f"{error.reason}.") from None


class Trained(NamedTuple):
    """A trained network, and what is needed to use it."""

    net: nn.Module  #: float (B, C, H, W) -> logits (B, len(classes)); in eval mode, on the CPU
    transform: EvalTransform  #: an image or a path -> the network's input
    classes: list[str]  #: readable names, in the order of the logits


def load(
    run: str | Path = "latest",
    ckpt: str = "best",
    logs: str | Path = configs.ROOT / "logs",
    check_sources: bool = True,
    allow: Sequence[str] | None = (),
) -> Trained:
    """Rebuild the network of a run from the run's own config, on the CPU.

    Args:
        run: a run's directory or name, or "latest"; or a folder of `alexlab export format=hub`, or hub:USER/NAME.
        ckpt: "best", "last" or a file.
        logs: the folder in which runs are looked up by name.
        check_sources: print a warning if the network's source files have changed since the run.
        allow: packages of your own that the run's config may name, besides those of conf/allow.yaml.

    Raises:
        UserError: the run or the checkpoint does not exist, or the checkpoint does not fit the run's network.
    """
    allow = None if allow is None else (*allow, *((configs.read(configs.CONF / "allow.yaml") or {}).get("allow") or ()))
    if (folder := hub.folder_of(str(run))) is not None:
        return load_folder(folder, allow)
    run_dir = find_run(str(run), Path(logs), ckpt)
    config = config_of(run_dir)
    path = ckpt_of(run_dir, ckpt)
    checkpoint = checkpoint_io.load(path)
    net = build_network(config.model.net, len(checkpoint["alexlab"]["classes"]), trusted=allow)
    load_net(net, checkpoint, path)
    check_own(checkpoint, config, net, path, run_dir, allow)
    if check_sources:
        warn_of_changed_sources(checkpoint, net, path)
    mean, std = statistics_of(config, net)
    transform = EvalTransform(config.data.image_size, config.augment.crop_ratio, mean, std)
    return Trained(net.eval(), transform, readable_classes(checkpoint, config))


def load_folder(folder: Path, allow: Trusted = ()) -> Trained:
    """Load a network that `hub.save` wrote. Raises UserError if config and weights do not fit."""
    about: Any = hub.read_config(folder)
    try:
        net = build_network(about["net"], len(about["classes"]), trusted=allow)
        net.load_state_dict(checkpoint_io.load_plain(folder / hub.WEIGHTS) or {})
        size = (about["height"], about["width"])
        transform = EvalTransform(size, about["crop_ratio"], about["mean"], about["std"])
    except (KeyError, TypeError, RuntimeError, OSError) as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(f"{folder} is not a network of this project: {why}.") from None
    return Trained(net.eval(), transform, about["classes"])


def config_of(run_dir: Path) -> TrainConfig:
    """Read the config of a trained run. Raises UserError if config.yaml is not the config of a run."""
    path = run_dir / "config.yaml"
    return validate_saved(configs.load(path), path)


def statistics_of(config: TrainConfig, net: nn.Module) -> tuple[list[float], list[float]]:
    """Return mean and std of each channel of a network's inputs on a 0-1 scale."""
    return normalization(net, config.model.mean, config.model.std, config.model.in_channels)


def readable_classes(checkpoint: dict[str, Any], config: TrainConfig) -> list[str]:
    """Return the readable class names of the checkpoint of a run with this config."""
    saved = checkpoint["alexlab"].get("readable_classes")  # older checkpoints lack them
    return saved or names.readable(checkpoint["alexlab"]["classes"], config.data.class_names)


# -- weights into a network


def trained_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the network's weights in a checkpoint."""
    saved = checkpoint["state_dict"]
    return {key.removeprefix("net."): value for key, value in saved.items() if key.startswith("net.")}


def load_net(net: nn.Module, checkpoint: dict[str, Any], path: Path) -> None:
    """Load all weights of a checkpoint into `net`. Raises UserError, with the keys or shapes that differ."""
    try:
        net.load_state_dict(trained_weights(checkpoint))
    except RuntimeError as error:
        lines = "\n".join(line[:200] for line in str(error).splitlines()[1:6])  # possibly of hundreds
        raise UserError(
            f"{path} holds the weights of another network:\n{lines}\n"
            "Choose the model of the checkpoint (see the config.yaml of its run), or another checkpoint."
        ) from None


def load_task(task: nn.Module, checkpoint: dict[str, Any], path: Path) -> None:
    """Load `task.net`, and what else of the task a checkpoint has, such as the parameters of a loss.

    Raises:
        UserError: the checkpoint is of another network, or lacks some of the rest.
    """
    net: Any = task.net
    load_net(net, checkpoint, path)
    rest = {key: value for key, value in checkpoint["state_dict"].items() if not key.startswith("net.")}
    missing = [key for key in task.load_state_dict(rest, strict=False).missing_keys if not key.startswith("net.")]
    if missing:
        raise UserError(f"{path} lacks weights of the task: {', '.join(missing[:5])}. Choose one of this task.")


def load_initial_weights(
    net: nn.Module, path: Path, classes: Sequence[str], config: TrainConfig, trusted: Trusted = ()
) -> bool:
    """Load the weights of the checkpoint `init_from` into `net`, without the last layer if the classes differ.

    Of a file of weights alone, without classes and config, only names and shapes can be checked. `classes` and `config`
    are those of the new run. Return whether the last layer keeps the random weights.

    Raises:
        UserError: the checkpoint does not exist, has the weights of another network, or expects different inputs.
    """
    weights, same, whose = checkpoint_io.load_plain(path), True, ""
    checkpoint = checkpoint_io.load(path) if weights is None else None
    if weights is not None and path.name == hub.WEIGHTS and (about := hub.read_config(path.parent)) is not None:
        checkpoint = hub.as_checkpoint(about, weights)
    if checkpoint is not None:
        weights, same = trained_weights(checkpoint), list(checkpoint["alexlab"]["classes"]) == list(classes)
        whose = f" The run of the checkpoint has model.name={checkpoint['alexlab']['config']['model']['name']}."
    try:
        is_whole = load_but_head(net, weights or {}, keep_head=same, num_classes=len(classes))
    except ValueError as error:
        raise UserError(f"`init_from={path}`: {error}{whose}") from error
    if checkpoint is not None:
        warn_of_changed_sources(checkpoint, net, path)
        check_fits(f"init_from={path}", checkpoint, net, config, same, trusted)
    return not is_whole


# -- whether a checkpoint fits


def check_classes(checkpoint: dict[str, Any], classes: Sequence[str], root: Path) -> None:
    """Raise UserError if the images in `root` do not have the classes of the checkpoint in the same order."""
    trained = list(checkpoint["alexlab"]["classes"])
    if list(classes) != trained:
        missing, new = sorted({*trained} - {*classes}), sorted({*classes} - {*trained})
        raise UserError(
            f"{root} and the run have different classes: missing {', '.join(missing[:8]) or 'none'}, new "
            f"{', '.join(new[:8]) or 'none'}. Choose a folder with the classes of the run."
        )


def check_own(
    checkpoint: dict[str, Any], config: TrainConfig, net: nn.Module, path: Path, run_dir: Path, trusted: Trusted = ()
) -> None:
    """Raise UserError if a checkpoint is from another run, whose network or inputs are not those of this run."""
    if path.resolve().parent != run_dir.resolve() / "checkpoints":
        check_fits(f"ckpt={path}", checkpoint, net, config, True, trusted)


def warn_of_changed_sources(checkpoint: dict[str, Any], net: nn.Module, path: Path) -> None:
    """Print a warning if source files of a network have changed since the checkpoint at `path` was written.

    The weights may still fit, so nothing else would show the change. Checkpoints of older versions have no hashes of
    source files, and are not checked.
    """
    changed = provenance.changed_sources(checkpoint["alexlab"].get("sources"), net)
    if changed and launcher.prints():
        run_dir = path.resolve().parent.parent
        patch = rundir.shown(run_dir / "code.patch")
        restore = provenance.how_to_restore(provenance.read(run_dir), shlex.join(["git", "apply", patch]))
        print(
            f"warning: {', '.join(changed)} changed since {rundir.shown(path)} was trained: the network may compute "
            f"something else than in training. {restore}",
            flush=True,
        )


def check_fits(
    key: str, checkpoint: dict[str, Any], net: nn.Module, config: TrainConfig, same_classes: bool, trusted: Trusted = ()
) -> None:
    """Raise UserError if the checkpoint's network and `net`, which has the same weights, differ on an image, or in the
    mean and std of their inputs.

    The shapes of weights cannot show that strides, paddings or kinds of normalization differ.

    Args:
        key: the override that names the checkpoint, for messages: "init_from=PATH".
        same_classes: compare the logits; otherwise the inputs of the last layer.
    """
    model, size = checkpoint["alexlab"]["config"]["model"], config.data.image_size
    check_targets(model["net"], trusted)
    shape = model.get("in_channels", 3), *height_width(size)
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    try:
        their_net = rebuild(checkpoint, trusted)
        theirs = _outputs(their_net, image, same_classes)
    except Exception as error:  # of the user's code
        raise UserError(
            f"{key}: the network of the checkpoint, {model['name']}, cannot take images of {size} pixels ({error})."
        ) from error
    ours = _outputs(net, image, same_classes)
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max())):
        raise UserError(
            f"{key}: the network of the checkpoint, {model['name']}, gives different outputs with the same weights "
            "(strides, paddings or normalization layers may differ): use the model.net.* settings in the config.yaml "
            "of that run."
        )
    check_statistics(key, saved_statistics(checkpoint, their_net), statistics_of(config, net))


def saved_statistics(checkpoint: dict[str, Any], net: nn.Module) -> tuple[list[float], list[float]]:
    """Return mean and std of the inputs that a checkpoint's network was trained with."""
    model = checkpoint["alexlab"]["config"]["model"]
    return normalization(net, model["mean"], model["std"], model.get("in_channels", 3))


def check_statistics(key: str, theirs: Sequence[list[float]], ours: Sequence[list[float]]) -> None:
    """Raise UserError if a network was trained with another (mean, std) than this run uses."""
    if list(theirs) != list(ours):
        mean, std = (str(values).replace(" ", "") for values in theirs)
        raise UserError(
            f"{key} was trained with another normalization of the inputs: add model.mean={mean} model.std={std}, or "
            "choose another checkpoint."
        )


def rebuild(checkpoint: dict[str, Any], trusted: Trusted = ()) -> nn.Module:
    """Build the network of a checkpoint, with the trained weights."""
    settings, num_classes = checkpoint["alexlab"]["config"]["model"]["net"], len(checkpoint["alexlab"]["classes"])
    net = build_network(settings, num_classes, trusted=trusted)
    net.load_state_dict(trained_weights(checkpoint))
    return net


@torch.no_grad()
def _outputs(net: nn.Module, image: Tensor, logits: bool) -> Tensor:
    """Return the logits of an image (1, C, H, W), or the inputs of the last layer or layers."""
    inputs: list[Tensor] = []
    training = net.training
    with contextlib.ExitStack() as stack:
        stack.callback(net.train, training)
        for head in [] if logits else heads_of(net):
            hook = head.register_forward_pre_hook(lambda _, args: inputs.append(args[0].float().flatten()))
            stack.callback(hook.remove)
        outputs = net.eval()(image).float()
    return torch.cat(inputs) if inputs else outputs
