"""Networks of torchvision and timm by name, with a head for the classes at hand."""

import contextlib
import difflib
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from alexlab.models.alexnet import AlexNet
from alexlab.models.introspection import heads_of

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
    inputs = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    net.pretrained_cfg = {
        "mean": inputs.mean,
        "std": inputs.std,
    }  # as timm's networks tell; efficientnet_v2_l's are 0.5
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
        return weights.get_state_dict(check_hash=True, progress=False, weights_only=True)
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


def load_but_head(
    net: nn.Module, state: dict[str, torch.Tensor], keep_head: bool = True, num_classes: int | None = None
) -> None:
    """Load `state`, leaving out the last layer where its number of classes differs, and nothing else.

    Args:
        keep_head: load the last layer too, where it fits.
        num_classes: what the last layer must give, where the network may be anybody's.

    Raises:
        ValueError: the weights are another network's.
        UserError: there is no such last layer.
    """
    own = net.state_dict()
    layers = heads_of(net, num_classes)
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


def timm_net(name: str, num_classes: int, pretrained: bool = False, online: bool = True, **kwargs: Any) -> nn.Module:
    """timm's network `name`, or one of the hub's: "hf-hub:REPOSITORY".

    Args:
        online: ask the hub for what does not lie in its cache.

    Raises:
        ValueError: timm is not installed, no such network, or weights that cannot be had or are not what was published.
    """
    try:
        import timm
    except ImportError:
        raise ValueError("model=timm needs the extra: pip install 'alexlab[timm]'.") from None
    if ":" not in name and name.partition(".")[0] not in timm.list_models():  # "hf-hub:..." is the hub's to know
        raise ValueError(_unknown("timm", name, timm.list_models()))
    overlay: dict[str, Any] = {}
    if ":" in name and not name.startswith(("hf-hub:", "hf_hub:")):
        raise ValueError(f"model.name={name}: an address must begin with hf-hub:.")
    if ":" in name:
        repository = name.partition(":")[2]
        known = _cached(repository, "config.json") is not None
    else:
        repository = (_timms_word(timm.get_pretrained_cfg, name) or timm.models.PretrainedCfg()).hf_hub_id or ""
        file = _cached(repository, "model.safetensors") or _cached(repository, "pytorch_model.bin")
        known = not pretrained or file is not None or not repository
        if pretrained and file is not None:
            if re.fullmatch("[0-9a-f]{64}", file.resolve().name):  # large files, where the file system knows links
                check_hash(file.resolve(), file.resolve().name)
            overlay = {"pretrained_cfg_overlay": {"file": str(file)}}
    if not known and not online:
        raise ValueError(
            f"model.name={name}: the hub's description of it is not in its cache, and a run's own config fetches "
            f"nothing: look at it there, and get it with train.py model=timm model.name={name} dry_run=true."
        )
    if not known:
        _reach_hub(name, repository)
    with _hub_left_alone() if known else contextlib.nullcontext():
        return _timms_word(timm.create_model, name, pretrained=pretrained, num_classes=num_classes, **overlay, **kwargs)


def _timms_word(asked: Callable[..., Any], name: str, **more: Any) -> Any:
    """What timm answers; its refusal as a ValueError, which says whether the network could help."""
    try:
        return asked(name, **more)
    except OSError as error:  # of the hub's client
        raise _not_to_be_had(name, error) from error
    except Exception as error:
        raise ValueError(f"model.name={name}: {str(error).splitlines()[0]}") from error


def _not_to_be_had(name: str, error: Exception) -> ValueError:
    away = "take another network" if ":" in name else "set model.pretrained=false"
    return ValueError(
        f"model.name={name}: what the hub has of it cannot be had ({str(error).splitlines()[0]}). Connect to the "
        f"network once, or {away}."
    )


def _reach_hub(name: str, repository: str) -> None:
    """Raises ValueError at once where the hub does not answer: its client would try for a minute, in twenty lines."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(repository, timeout=10)
    except Exception as error:  # whatever the hub's client raises
        raise _not_to_be_had(name, error) from error


@contextlib.contextmanager
def _hub_left_alone() -> Iterator[None]:
    """The hub is not asked whether what lies in its cache is still the newest, which would take as long."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _cached(repository: str, name: str) -> Path | None:
    """A file of a model in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(repository, name) if repository else None
    return Path(file) if isinstance(file, str) else None


def _unknown(where: str, name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    return f"model.name={name}: {where} has no such network.{hint}"
