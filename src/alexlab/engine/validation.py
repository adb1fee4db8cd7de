"""Check a composed config against the schema. Each mistake becomes one sentence, and all are reported together."""

import difflib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from alexlab.engine import config as configs
from alexlab.engine import schema
from alexlab.engine.config import CONF, is_address, value_at
from alexlab.engine.errors import UserError
from alexlab.engine.overrides import shown
from alexlab.engine.schema import DataConfig, Group, OpenGroup, Plain, TrainConfig, describe, fields_of, group_in
from alexlab.engine.settings import overridden_keys

# -- Names that users try

# Our keys, and what other programs call them.
NAMES_ELSEWHERE = {
    "ckpt_path": "checkpoint",
    "data.batch_size": "batch_size bs",
    "data.image_size": "img_size input_size size",
    "data.num_workers": "workers",
    "data.root": "data_dir data_path",
    "model.in_channels": "in_chans channels num_channels",
    "model.name": "arch",
    "optimizer._target_": "opt",
    "optimizer.lr": "learning_rate lr",
    "optimizer.weight_decay": "wd",
    "resume.run": "resume_from",
    "trainer.devices": "gpus num_gpus",
    "trainer.max_epochs": "epoch epochs num_epochs",
    "trainer.precision": "amp",
}
SYNONYMS = {name: key for key, names in NAMES_ELSEWHERE.items() for name in names.split()}

# Keys, and values as "key=value", that were removed or renamed: the rest of the message after the key.
REPLACED = {
    "also": "was removed: names of metrics are not checked any more, so leave it out.",
    "on_nan=rollback": "was removed: use on_nan=skip, or on_nan=stop and resume the run with a smaller learning rate.",
    "data.cache=ram": "was removed: prepare pixels with `alexlab prepare format=raw`, which are faster.",
    "run_dir": "is filled in: choose a run directory with hydra.run.dir=PATH.",
    "mode": "was removed: it follows from monitor, min for a loss and max for an accuracy.",
    # arguments of Lightning's Trainer
    "trainer.benchmark": "is named trainer.cudnn_benchmark.",
    "trainer.callbacks": "is not available: a callback is an entry of callbacks with a _target_.",
    "trainer.enable_checkpointing": "is not available: a run always writes checkpoints, see checkpoint.every_minutes.",
    "trainer.enable_model_summary": "is not available: callbacks.model_summary=1 prints the table of layers.",
    "trainer.enable_progress_bar": "is not available: choose with callbacks.progress=rich, plain or none.",
    "trainer.fast_dev_run": "is not available: debug=fast runs two batches of each split.",
    "trainer.logger": "is not available: choose loggers with logger=csv, wandb, tensorboard, mlflow or all.",
}

# What pydantic says, and what a message says instead.
PYDANTICS = {
    "Input should be ": "",
    "Value error, ": "",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "above",
    "less than": "below",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "a text",
    "a valid boolean": "true or false",
    "a valid list": "a list",
    "a valid dictionary": "a mapping",
}

FILLED_IN = ("run_dir", "repeats", "overrides", "choices")
RECIPES = ("experiment", "debug")  # groups whose options change the whole config
NEAR, NEARER = 0.7, 0.8  # similarity (difflib) from which a key is suggested: within the group, elsewhere


# -- Validation

M = TypeVar("M", bound=Group)
KeyPath = tuple[Any, ...]  # ("optimizer", "lr")


def validate(model: type[M], plain: Plain, file_of: Callable[[str], str | None] = lambda key: None) -> M:
    """Check a composed config and return it as a frozen model.

    A UserError has all mistakes, one per line, each with key, value, rule and fix.

    Args:
        plain: the config as plain values, with `???` for what is missing.
        file_of: returns the yaml file that sets a key, or None if that is not known.
    """
    config, mistakes = check(model, plain, file_of)
    if config is None:
        raise UserError(listed(mistakes))
    return config


def listed(mistakes: list[str]) -> str:
    """Return one message with all mistakes."""
    several = f"{len(mistakes)} values of the config are wrong:\n  " if len(mistakes) > 1 else ""
    return several + "\n  ".join(mistakes)


def check(
    model: type[M], plain: Plain, file_of: Callable[[str], str | None] = lambda key: None
) -> tuple[M | None, list[str]]:
    """Return a composed config as a frozen model, or None and all mistakes. See `validate`."""
    missing = {path: _missing(model, plain, path) for path, value in _walk(plain) if value == "???"}
    # keys that a group takes only with a class, and names of other programs for our keys, such as learning_rate
    further: list[KeyPath] = []
    for name in ("data", "optimizer", "scheduler"):
        group, node = group_at(model, (name,)), plain.get(name)
        if group is not None and issubclass(group, OpenGroup) and isinstance(node, dict):
            names = SYNONYMS if name == "optimizer" else () if node.get("_target_") else node
            further += [(name, key) for key in node if key in names and key not in fields_of(group)]
    config, errors = None, list[Any]({"type": "unknown", "loc": path} for path in further)
    try:
        config = model.model_validate(_without_missing(plain))
    except ValidationError as error:
        errors += error.errors(include_url=False, include_context=False, include_input=False)
    by_path, wrong = dict[KeyPath, list[Any]](), dict[KeyPath, str]()
    for name in ("loss", "task"):
        if value_at(plain, ("choices", name)) and isinstance(plain.get(name), dict) and "_target_" not in plain[name]:
            option = value_at(plain, ("choices", name))
            wrong[name, "_target_"] = (
                f"`{name}={option}`: its yaml has no _target_ at the top: write `_target_: mypkg.MyClass`, and the "
                "arguments of the class below it, none of them indented."
            )
    for each in errors:
        by_path.setdefault(_path_of_key(model, each["loc"]), []).append(each)
    for path, about in by_path.items():
        if about[0]["type"] != "missing":
            wrong[path] = _wrong(model, plain, path, about)
        elif not any(f"Did you mean `{_name(path)}`?" in text for text in wrong.values()):
            missing.setdefault(path, _missing(model, plain, path))
    overridden = overridden_keys(plain) - {*RECIPES}
    unknown_file = {path for path in wrong if _name(path) in overridden or "." in str(path[-1])}
    files = {path: None if path in unknown_file else file_of(_name(path)) for path in wrong}
    lines = [*missing.values(), *(f"{text} ({files[path]})" if files[path] else text for path, text in wrong.items())]
    if isinstance(config, schema.CommandConfig) and not lines:  # these checks need values that are valid by themselves
        lines = [*_wrong_overrides(config), *(_wrong_together(config) if isinstance(config, TrainConfig) else ())]
    return (None if lines else config), lines


def validate_saved(plain: Plain, path: Path) -> TrainConfig:
    """Return a run's config.yaml as a frozen model, without a check whether the run could start on this machine."""
    try:
        return TrainConfig.model_validate(plain)
    except ValidationError as error:
        key = _name(_path_of_key(TrainConfig, error.errors(include_url=False)[0]["loc"]))
        raise UserError(f"{path} is not a run's config: `{key}` cannot be read.") from None


def _wrong_together(config: TrainConfig) -> Iterator[str]:
    """Find values that are valid by themselves but not together."""
    trainer, model, scheduler, optimizer = config.trainer, config.model, config.scheduler, config.optimizer
    if trainer.max_epochs is None and trainer.max_steps == -1:
        yield "`trainer.max_epochs=null` and `trainer.max_steps=-1`: the run would never end. Set one of them."
    sharded = {  # with FSDP no device has a whole weight or gradient
        "ema.decay": config.ema.decay is not None,
        "finetune.freeze_epochs": config.finetune.freeze_epochs > 0,
        "trainer.gradient_clip_algorithm": trainer.gradient_clip_algorithm == "value",
        "on_nan": config.on_nan != "stop",
        "optimizer.layer_decay": optimizer.layer_decay is not None,
        "callbacks.grad_norm": config.callbacks.grad_norm,
    }
    if trainer.strategy == "fsdp" and any(sharded.values()):
        keys = ", ".join(f"`{key}`" for key, is_set in sharded.items() if is_set)
        yield f"{keys} with FSDP, which shards the weights: reset them to the defaults of conf/, or use trainer=ddp."
    channels, augment, size = model.in_channels, config.augment, config.data.image_size
    for name, numbers in (("mean", model.mean), ("std", model.std)):
        count = 3 if numbers == "auto" else len(numbers)
        if count != channels and not (count == 3 and channels in (1, 4)):  # RGB's are converted, see `normalization`
            rule = f"give a list with one number for each channel of model.in_channels={channels}"
            yield f"`model.{name}={shown(numbers)}`: {rule}."
        if numbers != "auto" and max(numbers) > 1:
            rule = "the net gets (pixel / 255 - mean) / std, so give numbers from 0 to 1: divide these by 255"
            yield f"`model.{name}={shown(numbers)}`: {rule}."
    if augment.pca and channels != 3:
        yield f"`augment.pca={augment.pca}` is noise of RGB, and model.in_channels={channels}: set augment.pca=0."
    if augment.policy != "none" and channels != 3:
        setting = f"`augment.policy={augment.policy}` changes colours of RGB"
        yield f"{setting}, and model.in_channels={channels}: set augment.policy=none."
    if augment.crop == "none" and not augment.transforms:
        yield "`augment.crop=none` needs augment.transforms that return data.image_size pixels: add them, or crop."
    if augment.transforms and str(trainer.precision) in ("16-true", "bf16-true", "64-true", "64"):
        yield (
            f"`augment.transforms` do not work with trainer.precision={trainer.precision}, which changes the type of "
            "numbers that all threads draw: use 32-true, bf16-mixed or 16-mixed."
        )
    if augment.sizes and isinstance(size, list):
        yield f"`augment.sizes` are sides of squares, and data.image_size={shown(size)}: leave one of them out."
    if "num_classes" in model.net:
        yield (
            f"`model.net.num_classes={model.net['num_classes']}`: the network gets the number of classes from the "
            "images: remove the key. data.num_classes=N checks the number."
        )
    if model.pretrained and "pretrained" not in model.net and config.init_from is None and config.ckpt_path is None:
        yield (
            f"`model.pretrained=true`: {model.name} has no published weights. Use model=alexnet_owt, torchvision or "
            "timm, or start from a run's weights with init_from=RUN."
        )
    early = config.callbacks.early_stopping
    reads_metric = scheduler.name == "plateau" or (scheduler.target is not None and scheduler.monitor is not None)
    waiting = {f"scheduler={scheduler.name or scheduler.target}": reads_metric}
    waiting[f"callbacks.early_stopping={early}"] = early is not None
    for setting, waits in waiting.items() if trainer.limit_val_batches == 0 else ():
        if waits:
            yield f"`{setting}` needs validation, and trainer.limit_val_batches=0 turns it off."
    if scheduler.name is None and scheduler.target is None:
        yield "`scheduler.name` is missing: give the name of a schedule, or a class as scheduler._target_."
    if scheduler.name == "plateau" and scheduler.monitor is None:
        yield "`scheduler.monitor` is missing: scheduler=plateau needs a metric, such as `monitor: ${monitor}`."
    if scheduler.interval == "step" and scheduler.monitor is not None:
        yield "`scheduler.interval=step` with scheduler.monitor: metrics come with validations, so use interval=epoch."
    more = scheduler.model_extra or {}
    if scheduler.target and {"name", "unit"} <= more.keys():  # the keys of a schedule by name
        yield (
            f"`scheduler._target_` replaces scheduler={more['name']}, whose keys it does not have: write ~scheduler "
            f"'+scheduler={{_target_: {scheduler.target}}}', with its settings in the braces."
        )
    if scheduler.name and "interval" in scheduler.model_fields_set:
        yield f"`scheduler.interval` is for a _target_: scheduler={scheduler.name} has scheduler.unit."
    if config.data.target is None:  # other classes check their files themselves
        yield from _wrong_folder(config.data)
    of_another_run = config.from_run or config.from_wandb or config.resume.run not in (None, "auto")
    yield from () if of_another_run else _wrong_folds(config.data)
    if config.resume.requeue and config.resume.run != "auto":
        yield "`resume.requeue=true` needs resume=auto, with which the requeued job resumes its run."
    for name, run in {"from_run": config.from_run, "from_wandb": config.from_wandb}.items():
        if run is not None and isinstance(config, schema.BenchmarkConfig):
            yield f"`{name}={run}` is for train only: give the settings of that run instead."


def _wrong_folds(data: schema.DataConfig) -> Iterator[str]:
    folds, fold = data.folds, data.fold
    if folds is None and fold is not None:
        yield f"`data.fold={fold}` needs the number of folds: add data.folds=5, for example."
    if folds is not None and fold is None:
        yield f"`data.folds={folds}` needs the fold to validate on: add data.fold=0, or -m sweep=folds for all folds."
    if folds is not None and fold is not None and fold >= folds:
        yield f"`data.fold={fold}` must be from 0 to {folds - 1}, because data.folds={folds}."
    if folds is not None and data.val_fraction is not None:
        yield (
            f"`data.folds={folds}` and `data.val_fraction={data.val_fraction}` both choose the validation images: "
            "remove one of them."
        )


def _wrong_folder(data: DataConfig) -> Iterator[str]:
    if data.root is None:
        yield "`data.root` is missing: give the folder of the images with data.root=PATH."
        return
    if is_address(data.root):
        if data.target is None:
            yield f"`data.root={data.root}` is an address: of a bucket, only data=prepared reads images."
        return
    root = os.path.expanduser(data.root)  # noqa: PTH111
    created = data.demo_seed is not None or data.idx is not None  # on first use
    if not created and not os.path.exists(root):  # noqa: PTH110
        yield f"`data.root={root}` does not exist: give the folder of the images with data.root=PATH."


def _wrong_overrides(config: schema.CommandConfig) -> Iterator[str]:
    """Find overrides that would have no effect, or another effect than they seem to have."""
    last = {word.lstrip("+").partition("=")[0]: word for word in config.overrides}
    for name in FILLED_IN:
        if name in last:
            yield f"`{last[name]}` {REPLACED.get(name, 'is filled in: remove it.')}"
    if not isinstance(config, TrainConfig):
        return
    name, is_named = config.scheduler.name, config.scheduler.target is None
    known = keys_of_schedule({"name": name}) if name and is_named else ()
    for key in [
        key for key in last if known and key.startswith("scheduler.") and key[len("scheduler.") :] not in known
    ]:
        yield f"`{last[key]}` has no effect with scheduler.name={name}, which has {', '.join(known)}."
    word, option = last.get("model.name", ""), config.choices.get("model")
    if word and "name" not in config.model.net and word.partition("=")[2] != option:
        yield (
            f"`{word}` would rename model={option} without changing the network. For the network of that name use "
            f"model=torchvision {word}, or model=timm {word}."
        )


# -- One mistake as a sentence


def _missing(model: type[Group], plain: Plain, path: KeyPath) -> str:
    """Return the message for a key that is absent or `???`."""
    field, name = _field_at(model, path), _name(path)
    hints = _hints(field)
    if "option" in hints:
        return f"`{name}` is missing: choose an option by its name, such as {name}={hints['option']}."
    if "give" in hints:
        return f"`{name}` is missing: give {hints['give']}."
    return f"`{name}` is missing: give it with {name}=VALUE."


def _wrong(model: type[Group], plain: Plain, path: KeyPath, errors: list[Any]) -> str:
    """Return the message for a wrong value: what it must be, in the words of a `Rule` or of pydantic."""
    field, name, value = _field_at(model, path), _name(path), value_at(plain, path)
    setting = _setting(path, value)
    if replaced := REPLACED.get(name) or REPLACED.get(f"{name}={shown(value)}"):
        return f"{setting} {replaced}"
    if field is None:
        return _unknown(model, plain, path)
    if value is None and {"give", "option"} & _hints(field).keys():
        return _missing(model, plain, path)
    if (group := group_in(field)) is not None:
        option = _hints(field).get("option")
        hint = f" A recipe chooses an option with `override /{name}: {option}`." if option else ""
        return f"{setting} must be a group of keys: {', '.join(fields_of(group)) or '{}'}.{hint}"
    errors = [each for each in errors if each["type"].startswith(("greater", "less", "finite"))] or errors
    texts = [each["msg"].replace("'", "") if each["type"] == "literal_error" else each["msg"] for each in errors]
    rules = list(dict.fromkeys(map(_rule, texts)))
    rules = [rule for rule in rules if rule != "a whole number" or "a number" not in rules]
    entry = next((f" in entry {part}" for part in errors[0]["loc"][len(path) :] if isinstance(part, int)), "")
    fix = f": write {name}=[{shown(value)}]" if rules == ["a list"] and isinstance(value, str | int | float) else ""
    return f"{setting} must be {' or '.join(rules)}{entry}{fix}."


def _rule(message: str) -> str:
    """Turn a message of pydantic, "Input should be a valid integer", into the end of "must be ..."."""
    for theirs, ours in PYDANTICS.items():
        message = message.replace(theirs, ours)
    return message


def _unknown(model: type[Group], plain: Plain, path: KeyPath) -> str:
    """Return the message for an unknown key: which key is meant, or which keys exist."""
    value, above, name = value_at(plain, path), path[:-1], str(path[-1])
    text = f"{_setting(path, value)}: there is no such key."
    if "." in name:
        return f"{text} Nest it in yaml: {name.replace('.', ': {')}: {shown(value)}{'}' * name.count('.')}."
    if "choices" in fields_of(model) and (path[0] in RECIPES or path == ("sweep", "hydra")):
        option = shown(value_at(plain, ("choices", path[0])) or "NAME")
        return f"`{path[0]}={option}`: its yaml must begin with `# @package _global_`, or its keys have no effect."
    if above in (("callbacks",), ("metrics",), ("logger",)) and name == "_target_":
        return f"{text} Put it below a name of your choice: `mine: {{_target_: {shown(value)}}}`."
    if (near := nearest(model, plain, path)) not in (None, _name(path)):
        return f"{text} Did you mean `{near}`?"
    if above in (("callbacks",), ("metrics",), ("logger",)):
        return f"{text} A {path[0].removesuffix('s')} of your own must be a mapping with a _target_."
    if not above and "my" in fields_of(model):
        return f"{text} Keys of your own belong in the section my, as +my.{name}=VALUE."
    known = [key for key in fields_of(group_at(model, above) or model) if key not in FILLED_IN]
    return f"{text} {_name(above) or 'The config'} has {', '.join(known) or 'no keys'}."


def nearest(model: type[Group], plain: Plain, path: KeyPath) -> str | None:
    """Return the key that is probably meant: a synonym, the same name in another group, or a similar name."""
    name, above, net = str(path[-1]), _name(path[:-1]), value_at(plain, ("model", "net"))
    keys = [key for key in describe(model) if key not in FILLED_IN]
    keys += [f"model.net.{key}" for key in net] if isinstance(net, dict) and "model" in model.model_fields else []
    if SYNONYMS.get(name) in keys:
        return SYNONYMS[name]
    keys.sort(key=lambda key: key.startswith("model.training."))  # last: optimizer.lr is what people mean by lr
    by_leaf = {key.rpartition(".")[2]: key for key in reversed(keys) if not key.endswith("_target_")}
    siblings = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == above}
    group = plain.get(path[0])
    if isinstance(group, dict) and "_target_" in group and len(path) == 2:  # the keys of the option alone
        by_leaf, siblings = {}, siblings | {key: f"{above}.{key}" for key in group}
    if len(longer := [key for leaf, key in siblings.items() if leaf.startswith(f"{name}_")]) == 1:  # batch: batch_size
        return longer[0]
    for known, least in ((siblings, NEAR), (by_leaf, NEARER)):
        if near := difflib.get_close_matches(name, known, 1, least):
            return known[near[0]]
    return None


def _setting(path: KeyPath, value: Any) -> str:
    """Return `key=value` for a message, or `key` alone if the value is a mapping or long."""
    text = shown(value)
    return f"`{_name(path)}`" if isinstance(value, dict) or len(text) > 80 else f"`{_name(path)}={text}`"


# -- Paths into models and into plain configs


def _name(path: KeyPath) -> str:
    return ".".join(map(str, path))


def group_at(model: type[Group], path: KeyPath) -> type[Group] | None:
    field = _field_at(model, path) if path else None
    return group_in(field) if field is not None else None if path else model


def _field_at(model: type[Group], path: KeyPath) -> FieldInfo | None:
    group = group_at(model, path[:-1])
    return fields_of(group).get(path[-1]) if group is not None else None


def takes_text(model: type[Group], key: str) -> set[type]:
    """Return what `schema.takes_text` does for a key, also for Hydra's."""
    if key in schema.OTHER_TEXTS:
        return schema.OTHER_TEXTS[key]
    field = _field_at(model, tuple(key.split(".")))
    return schema.takes_text(field.annotation) if field is not None else set()


def keys_of_schedule(scheduler: Plain) -> Any:
    """Return the keys that a schedule by `name` reads, or those that the schema has for a class."""
    path = CONF / f"scheduler/{scheduler.get('name')}.yaml"
    return configs.read(path) if "_target_" not in scheduler and path.is_file() else ("interval", "monitor")


def reset(model: type[Group], plain: Plain, key: str) -> None:
    """Set a key that `~key` has deleted to the default of the schema; open groups stay without it."""
    *above, name = path = tuple(key.split("."))
    group, field, node = group_at(model, tuple(above)), _field_at(model, path), value_at(plain, above)
    if group is None or field is None or field.is_required() or issubclass(group, OpenGroup):
        return
    if isinstance(node, dict) and name not in node:
        default = field.get_default(call_default_factory=True)
        node[name] = default.model_dump() if isinstance(default, Group) else default


def _hints(field: FieldInfo | None) -> dict[str, Any]:
    """Return the hints for a missing key, "give" or "option", which `schema.key` has stored."""
    extra = field.json_schema_extra if field is not None else None
    return extra if isinstance(extra, dict) else {}


def _path_of_key(model: type[Group], location: KeyPath) -> KeyPath:
    """Return the key of an error of pydantic, whose location may go deeper, into lists and unions."""
    length = 1
    while length < len(location) and group_at(model, location[:length]) is not None:
        length += 1
    return location[:length]


def _walk(node: Plain, above: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield each value that is not a mapping, with the path of the key."""
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _walk(value, (*above, name))
        else:
            yield (*above, name), value


def _without_missing(node: Plain) -> Plain:
    """Return a copy without the keys whose value is `???`."""
    kept = {name: value for name, value in node.items() if value != "???"}
    return {name: _without_missing(value) if isinstance(value, dict) else value for name, value in kept.items()}
