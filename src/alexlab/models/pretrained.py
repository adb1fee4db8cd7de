"""Networks of torchvision and timm by name, with a head of `num_classes` outputs; their published weights."""

import contextlib
import difflib
import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from alexlab.models.alexnet import AlexNet
from alexlab.models.introspection import first_convolution, heads_of

AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # extra heads of googlenet and inception_v3, used in training only


def torchvision_net(
    name: str, num_classes: int, pretrained: bool = False, in_channels: int = 3, **kwargs: Any
) -> nn.Module:
    """Build torchvision's network `name`. `pretrained` loads the ImageNet weights, except a head of another size.

    Raises:
        ValueError: the name is unknown, or the weights are not available.
    """
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise ValueError(_unknown("torchvision", name, names))
    if name in ("googlenet", "inception_v3"):
        kwargs.setdefault("aux_logits", False)
        kwargs.setdefault("init_weights", True)
        # the weights need inputs of -1 to 1: this converts ImageNet's scale, and takes RGB only
        kwargs.setdefault("transform_input", in_channels == 3)
    net = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **kwargs)
    inputs = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    half = kwargs.get("transform_input") is False and in_channels != 3
    # as timm's networks have; 0.5 for efficientnet_v2_l
    mean, std = ([0.5] * 3, [0.5] * 3) if half else (inputs.mean, inputs.std)
    net.pretrained_cfg = {"mean": mean, "std": std, "num_classes": 1000}
    if pretrained:
        load_but_head(net, torchvision_weights(name))
    change_channels(net, in_channels)
    return net


def change_channels(net: nn.Module, in_channels: int) -> None:
    """Change the first convolution from RGB to another number of channels, as timm does.

    For grey, the weights of red, green and blue are summed: the network computes what it computed of three equal
    channels. Otherwise the weights are repeated (R, G, B, R, ...) and scaled by 3 / in_channels.

    Raises:
        ValueError: the network has no such convolution.
    """
    if in_channels == 3:
        return
    layer = (first_convolution(net) or (None,))[0]
    if layer is None or layer.in_channels != 3 or layer.groups != 1:
        raise ValueError(f"model.in_channels={in_channels}: {type(net).__name__} has no first convolution of RGB.")
    weight = layer.weight.detach()
    repeated = weight.repeat(1, -(-in_channels // 3), 1, 1)[:, :in_channels] * (3 / in_channels)
    layer.weight = nn.Parameter(weight.sum(1, keepdim=True) if in_channels == 1 else repeated)
    layer.in_channels = in_channels


def torchvision_weights(name: str) -> dict[str, torch.Tensor]:
    """Load torchvision's ImageNet weights of a network. Raises ValueError if the file is not the published one."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    file = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    if file.is_file():  # torch checks the hash of a download, but not of a cached file
        check_hash(file, file.stem.rpartition("-")[2])
    try:
        return weights.get_state_dict(check_hash=True, progress=False, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"pretrained=true: the weights of {name} are not available ({error}). Connect to the network once, put "
            f"{weights.url} into {file.parent}, or set model.pretrained=false."
        ) from error


def check_hash(file: Path, published: str) -> None:
    """Raise ValueError if the file's SHA-256 does not begin with the digits `published`."""
    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    if not sha256.startswith(published):
        digits = min(16, len(published))
        raise ValueError(
            f"pretrained=true: {file} is not the published file: its SHA-256 begins with {sha256[:digits]}, not with "
            f"{published[:digits]}. Remove the file to download it again."
        )


def load_but_head(
    net: nn.Module, state: dict[str, torch.Tensor], keep_head: bool = True, num_classes: int | None = None
) -> bool:
    """Load `state` into `net`, and the last layer if `keep_head` is set and it fits. Return whether it was loaded.

    Raises:
        ValueError: the weights are another network's.
        UserError: the network has no such last layer.
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
    return not heads


# torchvision's AlexNet ("one weird trick", Krizhevsky 2014)
one_weird_trick = functools.partial(
    AlexNet, maps=(64, 192, 384, 256, 256), groups=1, padding=2, norm="none", dropout_before=True, init="torch"
)


def alexnet_owt(num_classes: int, pretrained: bool = False, dropout: float = 0.5, in_channels: int = 3) -> AlexNet:
    """Build torchvision's AlexNet. Raises ValueError if the weights are not available or do not fit."""
    net = one_weird_trick(num_classes, 3 if pretrained else in_channels, dropout=dropout)
    if pretrained:
        load_but_head(net, torchvision_weights("alexnet"))
        change_channels(net, in_channels)
    return net


def timm_net(
    name: str, num_classes: int, pretrained: bool = False, online: bool = True, in_channels: int = 3, **kwargs: Any
) -> nn.Module:
    """Build timm's network `name`, or one of the Hugging Face hub: "hf-hub:REPOSITORY".

    Args:
        online: ask the hub for files that are not cached.

    Raises:
        ValueError: timm is not installed, the name is unknown, or the weights are not available or not the published
            ones.
    """
    try:
        import timm
    except ImportError:
        raise ValueError("model=timm needs the extra: pip install 'alexlab[timm]'.") from None
    overlay: dict[str, Any] = {"in_chans": in_channels} if in_channels != 3 else {}
    if ":" in name:
        if not name.startswith(("hf-hub:", "hf_hub:")):
            raise ValueError(f"model.name={name}: an address must begin with hf-hub:.")
        repository = name.partition(":")[2]
        known = _cached(repository, "config.json") is not None
    else:
        if name.partition(".")[0] not in timm.list_models():
            raise ValueError(_unknown("timm", name, timm.list_models()))
        repository = (_call_timm(timm.get_pretrained_cfg, name) or timm.models.PretrainedCfg()).hf_hub_id or ""
        file = _cached(repository, "model.safetensors") or _cached(repository, "pytorch_model.bin")
        known = not pretrained or file is not None or not repository
        if pretrained and file is not None:
            if re.fullmatch("[0-9a-f]{64}", file.resolve().name):  # the cache names large files by their hash
                check_hash(file.resolve(), file.resolve().name)
            overlay["pretrained_cfg_overlay"] = {"file": str(file)}
    if not known and not online:
        raise ValueError(
            f"model.name={name}: its description is not in the hub's cache, and the config of a run fetches nothing. "
            f"Look at the network on the hub, and fetch it with train.py model=timm model.name={name} dry_run=true."
        )
    if not known:
        from huggingface_hub import HfApi

        try:  # if the hub does not answer, timm would try for a minute and print 20 lines
            HfApi().model_info(repository, timeout=10)
        except Exception as error:  # the hub's client raises many kinds
            raise _not_available(name, error) from error
    with _hub_offline() if known else contextlib.nullcontext():
        return _call_timm(timm.create_model, name, pretrained=pretrained, num_classes=num_classes, **overlay, **kwargs)


def _call_timm(function: Callable[..., Any], name: str, **kwargs: Any) -> Any:
    """Call a function of timm, and turn errors into a ValueError that says whether the internet could help."""
    try:
        return function(name, **kwargs)
    except OSError as error:  # from the hub's client
        raise _not_available(name, error) from error
    except Exception as error:
        raise ValueError(f"model.name={name}: {str(error).splitlines()[0]}") from error


def _not_available(name: str, error: Exception) -> ValueError:
    """Return the error for files that cannot be fetched: which file to put where, for a machine without a network."""
    import timm
    from huggingface_hub import constants, hf_hub_url

    published = None if ":" in name else timm.get_pretrained_cfg(name)
    repository = name.partition(":")[2] if published is None else published.hf_hub_id
    folder = Path(constants.HF_HUB_CACHE, f"models--{str(repository).replace('/', '--')}")
    if published is None:
        place = f"copy {folder.name} of a machine that has it into {folder.parent}, or choose another network"
    elif not repository:
        place = f"put {published.url} into {Path(torch.hub.get_dir(), 'checkpoints')}, or set model.pretrained=false"
    else:
        main = folder / "refs/main"  # names the snapshot, if a part of it was fetched
        file = folder / "snapshots" / (main.read_text() if main.is_file() else "main") / "model.safetensors"
        place = f"put {hf_hub_url(repository, file.name)} at {file}, or set model.pretrained=false"
    line = str(error).splitlines()[0]
    return ValueError(f"model.name={name}: its files are not available ({line}). Connect to the network once, {place}.")


@contextlib.contextmanager
def _hub_offline() -> Iterator[None]:
    """Use cached files of the hub without asking for newer ones, which would take as long as a download."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _cached(repository: str, name: str) -> Path | None:
    """Find a file of a model in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(repository, name) if repository else None
    return Path(file) if isinstance(file, str) else None


def _unknown(where: str, name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3)
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    return f"model.name={name}: {where} has no such network.{hint}"
