"""Load a trained network from its run, `net, transform, classes = alexlab.load(run)`, and check that weights fit."""

import contextlib
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
from alexlab.tasks.augment import BatchAugment

# network settings that do not change trained outputs, or that the shapes of the weights show
TRAINING_ONLY = ("pretrained", "dropout", "init", "num_classes", "in_channels")


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

    net: nn.Module  # float (B, C, H, W) -> logits (B, len(classes)); in eval mode, on the CPU
    transform: EvalTransform  # turns an image or its path into the network's input
    classes: list[str]  # readable names, in the order of the logits


def load(
    run: str | Path = "latest",
    ckpt: str = "best",
    logs: str | Path = configs.ROOT / "logs",
    check_sources: bool = True,
    allow: Sequence[str] | None = (),
) -> Trained:
    """Rebuild the network of a run from the run's own config, on the CPU.

    Args:
        run: a run's directory or name, or "latest".
        ckpt: "best", "last" or a file.
        logs: the folder in which runs are looked up by name.
        check_sources: print a warning if the network's source files have changed since the run.
        allow: packages of your own that the run's config may name, besides those of conf/allow.yaml.

    Raises:
        UserError: the run or the checkpoint does not exist, or the checkpoint does not fit the run's network.
    """
    allow = None if allow is None else (*allow, *((configs.read(configs.CONF / "allow.yaml") or {}).get("allow") or ()))
    run_dir = find_run(str(run), Path(logs), ckpt)
    config = config_of(run_dir)
    path = ckpt_of(run_dir, ckpt)
    checkpoint = checkpoint_io.load(path)
    net = build_network(config.model.net, len(checkpoint["alexlab"]["classes"]), trusted=allow)
    load_net(net, checkpoint, path)
    check_own(checkpoint, config, path, run_dir, allow)
    if check_sources:
        warn_of_changed_sources(checkpoint, net, path)
    mean, std = normalization(net, config.model.mean, config.model.std, config.model.in_channels)
    transform = EvalTransform(config.data.image_size, config.augment.crop_ratio, mean, std)
    return Trained(net.eval(), transform, readable_classes(checkpoint, config))


def config_of(run_dir: Path) -> TrainConfig:
    """Read the config of a trained run. Raises UserError if config.yaml is not the config of a run."""
    path = run_dir / "config.yaml"
    return validate_saved(configs.load(path), path)


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
    state, own = trained_weights(checkpoint), net.state_dict()
    differ = [f"{key} is missing" for key in own if key not in state]
    differ += [f"{key} is not in this network" for key in state if key not in own]
    shapes = [(key, tuple(state[key].shape), tuple(own[key].shape)) for key in own if key in state]
    differ += [f"{key} has shape {saved}, and {new} is needed" for key, saved, new in shapes if saved != new]
    if differ:
        lines = "\n  ".join(differ[:5]) + (f"\n  ... ({len(differ) - 5} more)" if len(differ) > 5 else "")
        raise UserError(
            f"{path} holds the weights of another network:\n  {lines}\n"
            "Choose the model of the checkpoint (see the config.yaml of its run), or another checkpoint."
        )
    net.load_state_dict(state)


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
    net: nn.Module,
    path: Path,
    classes: Sequence[str],
    image_size: int | Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    trusted: Trusted = (),
) -> bool:
    """Load the weights of the checkpoint `init_from` into `net`, without the last layer if the classes differ.

    Of a file of weights alone, without classes and config, only names and shapes can be checked.

    Args:
        classes: class folders of the new run, in the order of its logits.
        image_size, mean, std: of the new run's inputs.
        trusted: packages that the checkpoint's config may name.

    Returns:
        True if the last layer keeps the random weights.

    Raises:
        UserError: the checkpoint does not exist, has the weights of another network, or expects different inputs.
    """
    if (weights := checkpoint_io.load_plain(path)) is not None:
        try:
            return not load_but_head(net, weights, num_classes=len(classes))
        except ValueError as error:
            raise UserError(f"`init_from={path}`: {error}") from error
    checkpoint = checkpoint_io.load(path)
    same = list(checkpoint["alexlab"]["classes"]) == list(classes)
    try:
        load_but_head(net, trained_weights(checkpoint), keep_head=same, num_classes=len(classes))
    except ValueError as error:
        config = checkpoint["alexlab"]["config"]
        option, name = config.get("choices", {}).get("model"), config["model"]["name"]
        named = f" model.name={name}" if option in ("torchvision", "timm") else ""
        model = f"model={option}{named}" if option else f"model.name={name}"
        raise UserError(f"init_from={path}: {error} The run of the checkpoint has {model}.") from error
    warn_of_changed_sources(checkpoint, net, path)
    check_function(f"init_from={path}", checkpoint, net, image_size, same, trusted)
    wanted = dict(
        zip(("mean", "std"), input_statistics(checkpoint["alexlab"]["config"]["model"], trusted), strict=True)
    )
    differ = [key for key, value in (("mean", mean), ("std", std)) if wanted[key] != list(value)]
    if differ:
        fix = " ".join(f"model.{key}={wanted[key]}".replace(" ", "") for key in differ)
        raise UserError(f"`init_from={path}` was trained with another normalization of the inputs: add {fix}.")
    return not same


# -- whether a checkpoint fits


def check_classes(checkpoint: dict[str, Any], classes: Sequence[str], root: Path) -> None:
    """Raise UserError if the images in `root` do not have the classes of the checkpoint in the same order."""

    def some(names: set[str]) -> str:
        more = f", ... ({len(names) - 8} more)" if len(names) > 8 else ""
        return f"{', '.join(sorted(names)[:8]) or 'none'}{more}"

    trained = list(checkpoint["alexlab"]["classes"])
    if list(classes) != trained:
        missing, new = some({*trained} - {*classes}), some({*classes} - {*trained})
        raise UserError(
            f"{root} and the run have different classes: missing {missing}, new {new}. Choose a folder with the "
            "classes of the run."
        )


def check_own(
    checkpoint: dict[str, Any], config: TrainConfig, path: Path, run_dir: Path, trusted: Trusted = ()
) -> None:
    """Raise UserError if a checkpoint is from another run whose network has different settings."""
    if path.resolve().parent == run_dir.resolve() / "checkpoints":
        return
    theirs, ours = checkpoint["alexlab"]["config"]["model"], config.model.model_dump(exclude_unset=True)
    statistics = zip(("mean", "std"), *(input_statistics(model, trusted) for model in (theirs, ours)), strict=True)
    differ = [f"model.{key}" for key, their_value, our_value in statistics if their_value != our_value]
    nets = [{key: value for key, value in m["net"].items() if key not in TRAINING_ONLY} for m in (theirs, ours)]
    if nets[0] != nets[1]:
        differ.append("model.net")
    if differ:
        raise UserError(
            f"`ckpt={path}` is from a run with another {' and '.join(differ)}: give that run with run=PATH, or a "
            "checkpoint of this run."
        )


def warn_of_changed_sources(checkpoint: dict[str, Any], net: nn.Module, path: Path) -> None:
    """Print a warning if source files of a network have changed since the checkpoint at `path` was written.

    The weights may still fit, so nothing else would show the change. Checkpoints of older versions have no hashes of
    source files, and are not checked.
    """
    changed = provenance.changed_sources(checkpoint["alexlab"].get("sources"), net)
    if changed and launcher.prints():
        run_dir = path.resolve().parent.parent
        patch = rundir.shown(run_dir / "code.patch")
        restore = provenance.how_to_restore(provenance.read(run_dir), f"git apply {patch}")
        print(
            f"warning: {', '.join(changed)} changed since {rundir.shown(path)} was trained: the network may compute "
            f"something else than in training. {restore}",
            flush=True,
        )


def check_function(
    key: str,
    checkpoint: dict[str, Any],
    net: nn.Module,
    image_size: int | Sequence[int],
    same_classes: bool,
    trusted: Trusted = (),
) -> None:
    """Raise UserError if the checkpoint's network and `net`, which has the same weights, differ on an image.

    The shapes of weights cannot show that strides, paddings or kinds of normalization differ.

    Args:
        key: the override that names the checkpoint, for messages: "init_from=PATH".
        same_classes: compare the logits; otherwise the inputs of the last layer.
    """
    model = checkpoint["alexlab"]["config"]["model"]
    check_targets(model["net"], trusted)
    name, shape = model["name"], (model.get("in_channels", 3), *height_width(image_size))
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    try:
        theirs = _outputs(_rebuild(checkpoint, "meta", trusted), image, same_classes)
    except Exception:  # the constructor computes with values, or the network has tensors that are not in checkpoints
        try:
            theirs = _outputs(_rebuild(checkpoint, "cpu", trusted), image, same_classes)
        except Exception as error:
            raise UserError(
                f"{key}: the network of the checkpoint, {name}, cannot take images of {image_size} pixels ({error})."
            ) from error
    ours = _outputs(net, image, same_classes)
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max())):
        raise UserError(
            f"{key}: the network of the checkpoint, {name}, gives different outputs with the same weights (strides, "
            "paddings or normalization layers may differ): use the model.net.* settings in the config.yaml of that run."
        )


def _rebuild(checkpoint: dict[str, Any], device: str, trusted: Trusted) -> nn.Module:
    """Build a checkpoint's network with its weights. On "meta", no random weights are created first."""
    with torch.device(device):
        settings, num_classes = checkpoint["alexlab"]["config"]["model"]["net"], len(checkpoint["alexlab"]["classes"])
        net = build_network(settings, num_classes, trusted=trusted)
    net.load_state_dict(trained_weights(checkpoint), assign=device == "meta")
    return net


def load_from_checkpoint(
    path: Path, trusted: Trusted = ()
) -> tuple[nn.Module, list[str], tuple[list[float], list[float]]]:
    """Return the network of a checkpoint alone, in eval mode, its class folders, and mean and std of its inputs."""
    checkpoint = checkpoint_io.load(path)
    net = _rebuild(checkpoint, "cpu", trusted)
    statistics = input_statistics(checkpoint["alexlab"]["config"]["model"], trusted)
    return net.eval(), list(checkpoint["alexlab"]["classes"]), statistics


def input_statistics(model: dict[str, Any], trusted: Trusted = ()) -> tuple[list[float], list[float]]:
    """Return mean and std of each channel of a network's inputs on a 0-1 scale, from a config's `model` settings."""
    statistics = model["mean"], model["std"], model.get("in_channels", 3)
    if "auto" not in statistics:
        return normalization(nn.Identity(), *statistics)
    try:
        with torch.device("meta"):  # builds no weights
            net = build_network(model["net"], 2, trusted=trusted)
    except Exception:  # the constructor computes with values
        net = build_network(model["net"], 2, trusted=trusted)
    return normalization(net, *statistics)


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
