"""Networks of torchvision and timm by name, with a head for the classes at hand."""

import difflib
import hashlib
import re
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from alexlab.models.alexnet import AlexNet
from alexlab.models.parts import head_of

AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads of googlenet and inception_v3 that train alone


def torchvision_net(name: str, num_classes: int, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """torchvision's network `name`; with `pretrained` all weights but those of a head of another size.

    Raises:
        ValueError: no such network, or weights that cannot be had.
    """
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise ValueError(_unknown("torchvision", name, names))
    if name in ("googlenet", "inception_v3"):
        kwargs.setdefault("aux_logits", False)
        kwargs.setdefault("init_weights", True)
        kwargs.setdefault("transform_input", True)  # their weights were trained on -1 to 1; they take ImageNet's scale
    net = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **kwargs)
    if pretrained:
        load_but_head(net, torchvision_weights(name))
    return net


def torchvision_weights(name: str) -> dict[str, torch.Tensor]:
    """torchvision's ImageNet weights of a network, their file's hash checked.

    Raises:
        ValueError: they cannot be had, or are not what was published.
    """
    weights = torchvision.models.get_model_weights(name).DEFAULT
    file = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    if file.is_file():  # torch checks the hash of what it downloads, and of nothing that lies there
        check_hash(file, file.stem.rpartition("-")[2])
    try:
        return weights.get_state_dict(check_hash=True, progress=False)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"pretrained=true: the weights of {name} cannot be had ({error}). Connect once, put {file.name} into "
            f"{file.parent}, or model.pretrained=false."
        ) from error


def check_hash(file: Path, published: str) -> None:
    """Raises ValueError where the file's SHA-256 does not begin with `published`, some or all of its digits."""
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if not found.startswith(published):
        digits = min(16, len(published))
        raise ValueError(
            f"pretrained=true: {file} is not what was published: its SHA-256 begins with {found[:digits]}, not with "
            f"{published[:digits]}. Remove it, so that it is downloaded anew."
        )


def load_but_head(net: nn.Module, state: dict[str, torch.Tensor], keep_head: bool = True) -> None:
    """Load `state`, leaving out the last layer where its number of classes differs, and nothing else.

    Args:
        keep_head: load the last layer too, where it fits.

    Raises:
        ValueError: the weights are another network's.
    """
    own = net.state_dict()
    several = getattr(net, "get_classifier", lambda: None)()
    layers = several if isinstance(several, tuple) else (head_of(net),)
    heads = {
        f"{name}.{key}" for name, part in net.named_modules() if part in layers for key, _ in part.named_parameters()
    }
    if keep_head and all(key in state and state[key].shape == own[key].shape for key in heads):
        heads = set()
    known = {key: value for key, value in state.items() if not key.startswith(AUXILIARY)}
    wrong = [key for key in own if key not in heads and (key not in known or known[key].shape != own[key].shape)]
    wrong += [key for key in known if key not in own]
    if wrong:
        raise ValueError(f"the weights are another network's: {', '.join(wrong[:6])} do not fit.")
    net.load_state_dict({key: value for key, value in known.items() if key not in heads}, strict=False)


def alexnet_owt(num_classes: int, pretrained: bool = False, dropout: float = 0.5, in_channels: int = 3) -> AlexNet:
    """torchvision's AlexNet ("one weird trick", Krizhevsky 2014): 64-192-384-256-256, no normalization.

    Raises:
        ValueError: weights that cannot be had, or are of three channels.
    """
    net = AlexNet(
        num_classes, in_channels, maps=(64, 192, 384, 256, 256), groups=1, padding=2, norm="none", dropout=dropout,
        dropout_before=True, init="torch",
    )  # fmt: skip
    if pretrained:
        if in_channels != 3:
            raise ValueError(f"pretrained=true: the weights are of RGB images, and in_channels={in_channels}.")
        load_but_head(net, torchvision_weights("alexnet"))
    return net


def timm_net(name: str, num_classes: int, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's network `name`.

    Raises:
        ValueError: timm is not installed, no such network, or weights that cannot be had or are not what was published.
    """
    try:
        import timm
    except ImportError:
        raise ValueError("model=timm needs the extra: pip install 'alexlab[timm]'.") from None
    if ":" not in name and name.partition(".")[0] not in timm.list_models():  # "hf-hub:..." is the hub's to know
        raise ValueError(_unknown("timm", name, timm.list_models()))
    if not pretrained:
        return timm.create_model(name, num_classes=num_classes, **kwargs)
    try:
        net = timm.create_model(name, pretrained=True, num_classes=num_classes, **kwargs)
    except Exception as error:  # whatever the hub's client raises
        raise ValueError(
            f"pretrained=true: the weights of {name} cannot be had ({str(error).splitlines()[0]}). Connect to the "
            "network once, or set model.pretrained=false."
        ) from error
    _check_hub_files(getattr(net, "pretrained_cfg", {}).get("hf_hub_id"))
    return net


def _check_hub_files(repository: str | None) -> None:
    """The hub's cache names large files by their SHA-256, which its client never checks; where the file system knows no
    links, they lie under their own names and cannot be checked."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("model.safetensors", "pytorch_model.bin"):
        file = try_to_load_from_cache(repository, name) if repository else None
        if isinstance(file, str) and re.fullmatch("[0-9a-f]{64}", Path(file).resolve().name):
            check_hash(Path(file).resolve(), Path(file).resolve().name)


def _unknown(where: str, name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    return f"model.name={name}: {where} has no such network.{hint}"
