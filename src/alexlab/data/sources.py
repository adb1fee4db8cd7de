"""Build the datamodule from the keys of conf/data: of a folder, or of the class that `_target_` names."""

import inspect
from functools import partial
from typing import Any

import pytorch_lightning as pl

from alexlab.data.datamodule import ImageFolders
from alexlab.data.items import ItemData
from alexlab.data.own_module import OwnDataModule
from alexlab.engine import targets
from alexlab.engine.errors import UserError, did_you_mean
from alexlab.engine.schema import DataConfig, fields_of

Data = ImageFolders | OwnDataModule
# keys of conf/data that only our own loader follows
WITHOUT_EFFECT = ("sampler", "folds", "fold", "val_fraction", "test_fraction", "on_error", "cache")


def build_data(config: DataConfig, facts: dict[str, Any], trusted: targets.Trusted = ()) -> Data:
    """Build the datamodule; `read()` then finds the images.

    A class derived from `ImageFolders` gets all arguments. Any other class gets the keys that only its option has; and
    of the keys of `DataConfig` and of `facts`, those that the constructor names.

    Args:
        facts: the arguments of `ImageFolders` that are not keys of conf/data.
        trusted: packages that the config may name, see `targets`.

    Raises:
        UserError: the class does not exist, is not allowed, or refuses the keys.
    """
    keys, source = config.model_dump(), config.target
    ours = {key: keys[key] for key in fields_of(DataConfig) if key != "_target_"}
    of_folder = {key: ours[key] for key in ours if key in inspect.signature(ImageFolders).parameters}
    if source is None:
        return ImageFolders(**of_folder, **facts)
    of_folder["root"] = ours["root"] or source
    settings = {key: value for key, value in keys.items() if key not in ours and key not in facts}
    if trusted is not None and source.startswith("alexlab.data."):  # a run's config may name these as data only
        trusted = (*trusted, "alexlab.data")
    target, names = targets.locate(source, trusted), targets.names_of(source, trusted)
    is_folder = inspect.isclass(target) and issubclass(target, ImageFolders)
    for key in settings:
        if key[0] != "_" and key not in names and (is_folder or not targets.takes(target, key)):
            hint = did_you_mean(key, [*ours, *names], "`data.{}`")
            raise UserError(f"`data.{key}={settings[key]}`: there is no such key, and {source} does not take it.{hint}")
    if is_folder:
        named = {key: value for key, value in ours.items() if key in inspect.signature(target).parameters}
        return targets.build(settings, trusted, **{**named, **of_folder}, **facts)
    known = {**ours, **facts}
    if inspect.isclass(target) and issubclass(target, pl.LightningDataModule):
        accepted = inspect.signature(target).parameters
        for key in WITHOUT_EFFECT:
            if ours[key] != DataConfig.model_fields[key].default and key not in accepted:
                raise UserError(
                    f"`data.{key}={ours[key]}` has no effect on the batches of {source}, a LightningDataModule whose "
                    f"constructor does not name {key}: remove it."
                )
        shares = {"batch_size": config.batch_size // facts["world_size"]}
        module = targets.build(settings, trusted, {**known, **shares})
        of_module = {key: of_folder[key] for key in ("root", "batch_size", "num_classes", "class_names")}
        return OwnDataModule(module, source, **of_module, world_size=facts["world_size"])
    by_split = "split" in inspect.signature(target).parameters
    if by_split and "split" in settings:
        raise UserError(
            f"`data.split={settings['split']}` has no effect, because {source} is built once for each split: remove it."
        )
    make = partial(targets.build, settings, trusted, known)
    return ItemData(make, by_split, source, **of_folder, **facts)


def need_index(data: Data, command: str) -> ImageFolders:
    """Raise UserError if a command that reads single images gets a LightningDataModule."""
    if isinstance(data, OwnDataModule):
        raise UserError(f"`alexlab {command}` reads single images, which {data.source} does not give by index.")
    return data
