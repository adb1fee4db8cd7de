"""The typed config: every shipped yaml is valid and comes back unchanged, and each mistake is one sentence."""

import copy
import functools
import inspect
import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from annotated_types import Ge
from conftest import ROOT, composed
from omegaconf import OmegaConf
from pydantic import ValidationError

from alexlab.commands.cli import COMMANDS
from alexlab.engine import schema, validation
from alexlab.engine.config import flat
from alexlab.engine.errors import UserError
from alexlab.engine.overrides import put
from alexlab.engine.schema import Group, TrainConfig, describe, fields_of, group_in, key, mode_of
from alexlab.engine.validation import check, validate

CONF = ROOT / "conf"
MODELS = {name: command.model for name, command in COMMANDS.items()}
# what the user of a command must give
NEEDED = {
    "eval": "run=latest",
    "predict": "run=latest images=a.jpg",
    "figures": "run=latest",
    "export": "run=latest format=onnx",
    "prepare": "data.root=images out=prepared",
}
compose = functools.cache(composed)  # the results are not changed


def of_command(name: str) -> dict[str, Any]:
    return compose(*NEEDED.get(name, "").split(), command=name)


@pytest.fixture(scope="module")
def default() -> dict[str, Any]:
    return compose()


def changed(plain: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy with other values of dotted keys."""
    plain = copy.deepcopy(plain)
    for name, value in changes.items():
        put(plain, name, value)
    return plain


def as_yaml(value: Any) -> str:
    """Return a value as a line of yaml has it."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def mistakes(plain: dict[str, Any], model: type[Group] = TrainConfig, **more: Any) -> list[str]:
    """Return the sentences with which `validate` refuses a config; none if it is valid."""
    config, sentences = check(model, plain, **more)
    assert (config is None) == bool(sentences)
    return sentences


def of_types(value: Any) -> Any:
    """Return a structure in which 1, 1.0 and True differ."""
    if isinstance(value, dict):
        return {name: of_types(item) for name, item in value.items()}
    if isinstance(value, list):
        return [of_types(item) for item in value]
    return type(value).__name__, value


def comes_back_unchanged(model: type[Group], plain: dict[str, Any]) -> bool:
    return of_types(validate(model, plain).model_dump(exclude_unset=True)) == of_types(plain)


def cases(text: str) -> list[Any]:
    """Read a table: each case is a line of `key=yaml` words, and an indented sentence."""
    found = re.findall(r"^(\S.*)\n((?: +.*\n)+)", text, re.MULTILINE)
    return [pytest.param(line, " ".join(sentence.split()), id=line[:40]) for line, sentence in found]


def changes_of(line: str) -> dict[str, Any]:
    return {name: yaml.safe_load(value) for name, value in (word.split("=", 1) for word in line.split())}


# -- What is shipped


@pytest.mark.parametrize("name", MODELS)
def test_every_command_is_valid_and_comes_back_unchanged(name: str) -> None:
    assert comes_back_unchanged(MODELS[name], of_command(name))
    assert {path.stem for path in CONF.glob("*.yaml")} == {*MODELS, "allow"}


def choices() -> list[str]:
    """Return overrides that choose each option once: recipes one by one, options of other groups several at once."""
    options: dict[str, list[str]] = {}
    for path in sorted(CONF.glob("*/*.yaml")):
        name = f"{path.parent.name}={path.stem}"
        if name not in ("hydra=default", "sweep=wandb", "dashboard=default") and not path.stem.startswith("_"):
            options.setdefault(path.parent.name, []).append(name)
    recipes = [name for group in ("experiment", "debug", "sweep") for name in options.pop(group)]
    needed = {"data=table": " data.file=x", "data=huggingface": " data.path=x", "data=torchvision": " data.name=MNIST"}
    options["data"] = [name + needed.get(name, "") for name in options["data"]]
    return [*recipes, *(" ".join(filter(None, names)) for names in itertools.zip_longest(*options.values()))]


@pytest.mark.parametrize("options", [*choices(), "logger=[wandb,tensorboard]"])
def test_every_option_is_valid_and_comes_back_unchanged(options: str, tmp_path: Path) -> None:
    (tmp_path / "prepared.json").touch()  # for data=prepared
    teacher = ["task.teacher=latest"] if "task=distillation" in options else []
    assert comes_back_unchanged(TrainConfig, compose(*options.split(), f"data.root={tmp_path}", *teacher))


def test_every_key_of_conf_is_declared_and_described() -> None:
    for name, model in MODELS.items():
        described = describe(model)
        open_nodes = ("model.net.", "dashboard.sections.", "choices.", "loss.", "task.", "metrics.")
        assert {each for each in flat(of_command(name)) if not each.startswith(open_nodes)} <= set(described)
        for each, text in described.items():
            assert text.endswith("."), each
            assert "\n" not in text, each


@pytest.mark.parametrize(
    ("model", "option", "not_shipped"),
    [
        (schema.AugmentConfig, "augment=none", ""),
        (schema.CallbacksConfig, "callbacks=default", ""),
        (
            schema.TrainerConfig,
            "trainer=auto",
            "min_epochs min_steps max_time gradient_clip_algorithm val_check_interval inference_mode sync_batchnorm",
        ),
    ],
)
def test_defaults_are_those_of_the_shipped_option(model: type[Group], option: str, not_shipped: str) -> None:
    shipped = compose(option)[option.partition("=")[0]]
    declared = {name: field.default for name, field in fields_of(model).items() if name not in not_shipped.split()}
    assert of_types(declared) == of_types(shipped)


def test_defaults_of_single_keys_are_those_of_train_yaml(default: dict[str, Any]) -> None:
    for name, field in fields_of(TrainConfig).items():
        group = group_in(field)
        if name in ("ema", "finetune", "resume", "checkpoint"):
            assert group is not None
            assert of_types(group().model_dump()) == of_types(default[name]), name
        elif name in default and name not in validation.FILLED_IN and group is None and not field.is_required():
            assert of_types(field.default) == of_types(default[name]), name


def test_a_short_option_of_a_user_is_completed_with_defaults(default: dict[str, Any]) -> None:
    short = default | {
        "data": {"name": "mine", "root": "/", "batch_size": 4, "image_size": 64},
        "augment": {"crop": "random"},
        "optimizer": {"_target_": "torch.optim.Adam", "lr": 1},
        "scheduler": {"name": "cosine"},
        "trainer": {},
        "callbacks": {},
    }
    for group in ("ema", "finetune", "resume", "checkpoint", "sweep"):
        del short[group]
    config = validate(TrainConfig, short)
    assert (config.data.max_bad, config.scheduler.unit, config.trainer.max_epochs) == (100, "epoch", 10)
    assert (config.ema.decay, config.checkpoint.every_minutes, config.sweep.pruner) == (None, 15, "none")
    assert config.optimizer.model_dump(exclude_unset=True) == {"_target_": "torch.optim.Adam", "lr": 1}


# -- Values are not converted


@pytest.mark.parametrize(
    ("group", "values"),
    [
        ("trainer", "limit_val_batches: 1, limit_train_batches: 1.0, limit_test_batches: 0, overfit_batches: 2"),
        ("trainer", "devices: [0, 2], precision: 32, timeout: 1, gradient_clip_val: 1, deterministic: warn"),
        ("trainer", "devices: 2, precision: '32', timeout: 0.5, max_time: '00:12:00:00', profiler: simple"),
        ("trainer", "devices: auto, precision: bf16-mixed, master_port: 29500, channels_last: false"),
        ("trainer", "max_epochs: null, max_steps: 5, val_check_interval: 0.25, deterministic: true"),
        ("optimizer", "lr: 1, weight_decay: 0, momentum: 0, fused: true, amsgrad: true, my_list: [1, 1.0]"),
        ("optimizer", "lr: 1.0e-4, betas: [0, 0.999], fused: auto, nested: {a: [true, null, 1]}"),
        ("scheduler", "warmup: 5, milestones: [30, 60.5], name: multistep, gamma: 1"),
        ("scheduler", "warmup: 0.5, milestones: [], name: multistep"),
        ("augment", "scale: [1, 1.0], sizes: [[1, 128], [31, 176]], mixup: 1, flip: 0"),
        ("model", "mean: auto, std: [1, 1.0, 0.5], net: {_target_: a.B, depth: 2, act: {slope: 0}}"),
        ("callbacks", "timer: {_target_: a.B, n: 1, x: 1.0}, early_stopping: 1, model_summary: 2"),
        ("logger", "tensorboard: {}, wandb: null, mlflow: {}, mine: {_target_: a.B, n: 1, x: 1.0, none: null}"),
        ("sweep", "pruner: median, startup_trials: 5, warmup_epochs: 2"),
        ("my", "loss: {_target_: a.B}, 3: [null, 1, 1.0, true], text: '???x'"),
    ],
)
def test_values_keep_their_types(group: str, values: str, default: dict[str, Any]) -> None:
    assert comes_back_unchanged(
        TrainConfig, default | {group: default.get(group, {}) | yaml.safe_load(f"{{{values}}}")}
    )


def test_a_schedule_with_a_target_takes_any_further_key(default: dict[str, Any]) -> None:
    """Also those that are keys of the curves by name, with any value."""
    own = yaml.safe_load("{_target_: a.B, interval: step, gamma: [2, 1.0], unit: 3, warmup: x, deep: {name: [null]}}")
    for scheduler in (own, {"_target_": "a.B", "monitor": "val/loss"}):
        assert comes_back_unchanged(TrainConfig, default | {"scheduler": scheduler})
    config = validate(TrainConfig, default | {"scheduler": own})
    assert (config.scheduler.target, config.scheduler.name, config.scheduler.monitor) == ("a.B", None, None)


def test_a_config_is_frozen(default: dict[str, Any]) -> None:
    config = validate(TrainConfig, default)
    with pytest.raises(ValidationError, match="frozen"):
        config.trainer.max_epochs = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


# -- Keys that do not exist


OWN_CALLBACK = "A callback of your own must be a mapping with a _target_."
AUGMENT = "crop, scale, ratio, sizes, crop_ratio, flip, policy, policy_ops, policy_magnitude, pca, pca_by, erase"


@pytest.mark.parametrize(
    ("name", "value", "answer"),
    [
        ("label_smothing", 0.1, "Did you mean `label_smoothing`?"),
        ("data.bach_size", 3, "Did you mean `data.batch_size`?"),
        ("scheduler.min_factr", 1, "Did you mean `scheduler.min_factor`?"),
        ("data.size", 64, "Did you mean `data.image_size`?"),
        ("epochs", 3, "Did you mean `trainer.max_epochs`?"),
        ("trainer.lr", 1, "Did you mean `optimizer.lr`?"),
        ("finetune.decay", 1, "Did you mean `ema.decay`?"),
        ("batch_sz", 64, "Did you mean `data.batch_size`?"),
        ("model.dropout", 0.5, "Did you mean `model.net.dropout`?"),
        ("optimizer.wd", 0.1, "Did you mean `optimizer.weight_decay`?"),
        ("callbacks.mine", {"a": 1}, OWN_CALLBACK),
        ("callbacks.mine", {"_target_": 3}, OWN_CALLBACK),
        ("logger.mine", None, OWN_CALLBACK.replace("callback", "logger")),
        ("logger.mlflo", {"uri": "x"}, "Did you mean `logger.mlflow`?"),
        ("logger.tensorboard._target_", "a.B", "logger.tensorboard has no keys."),
        ("data.target", "a.B", "Did you mean `data._target_`?"),
        ("model.loss", "focal", "Did you mean `loss`?"),
        ("augment.custom", [1, None], f"augment has {AUGMENT}, mixup, cutmix, transforms, batch."),
        ("foo", 1, "Keys of your own belong in the section my, as +my.foo=VALUE."),
    ],
)
def test_an_unknown_key_is_an_error_with_the_nearest_key(
    name: str, value: Any, answer: str, default: dict[str, Any]
) -> None:
    setting = f"`{name}`" if isinstance(value, dict) else f"`{name}={as_yaml(value)}`"
    assert mistakes(changed(default, {name: value})) == [f"{setting}: there is no such key. {answer}"]


def test_names_that_are_no_text_or_have_dots(default: dict[str, Any]) -> None:
    assert mistakes(default | {3: 4, "optimizer.lr": 0.1}) == [
        "`3=4`: there is no such key. Keys of your own belong in the section my, as +my.3=VALUE.",
        "`optimizer.lr=0.1`: there is no such key. Nest it in yaml: optimizer: {lr: 0.1}.",
    ]


@pytest.mark.parametrize(("group", "yaml_of"), [("experiment", ""), ("debug", ""), ("sweep", "hydra.")])
def test_a_recipe_without_its_first_line_is_an_error(group: str, yaml_of: str, default: dict[str, Any]) -> None:
    plain = changed(default, {f"{group}.{yaml_of}seed": 1, "choices": {group: "mine"}})
    sentence = f"`{group}=mine`: its yaml must begin with `# @package _global_`, or its keys have no effect."
    assert mistakes(plain) == [sentence]


def test_unknown_keys_of_other_commands_are_errors() -> None:
    assert mistakes(of_command("eval") | {"foo": 1, "crop": 10}, schema.EvalConfig) == [
        (
            "`foo=1`: there is no such key. The config has command, paths, allow, run, ckpt, data, compile, trainer, "
            "split, crops, against, report."
        ),
        "`crop=10`: there is no such key. Did you mean `crops`?",
    ]


def test_an_optimizer_with_learning_rate_instead_of_lr_is_one_mistake(default: dict[str, Any]) -> None:
    plain = default | {"optimizer": {"_target_": "torch.optim.SGD", "learning_rate": 0.1}}
    assert mistakes(plain) == ["`optimizer.learning_rate=0.1`: there is no such key. Did you mean `optimizer.lr`?"]
    plain = default | {"optimizer": {"_target_": "torch.optim.SGD", "lr_": 0.1}}
    assert mistakes(plain | {"choices": {"optimizer": "mine"}}) == [
        "`optimizer.lr` is missing: give it with optimizer.lr=VALUE."
    ]


# -- Missing keys and groups


@pytest.mark.parametrize("group", ["model", "data", "augment", "optimizer", "scheduler", "trainer", "logger"])
def test_a_group_that_is_missing_is_named_with_an_option(group: str, default: dict[str, Any]) -> None:
    for plain in ({name: value for name, value in default.items() if name != group}, default | {group: None}):
        [sentence] = mistakes(plain)
        start, _, option = sentence.removesuffix(".").partition(f"such as {group}=")
        assert start == f"`{group}` is missing: choose an option by its name, "
        assert (CONF / group / f"{option}.yaml").is_file()


@pytest.mark.parametrize(
    ("name", "overrides", "sentence"),
    [
        ("train", "data=folder", "`data.root` is missing: give the folder of the images with data.root=PATH."),
        ("train", "data.root=null", "`data.root` is missing: give the folder of the images with data.root=PATH."),
        ("eval", "", "`run` is missing: give a run's directory with run=PATH, or run=latest."),
        ("predict", "run=x", "`images` is missing: give an image, a folder or a glob with images=PATH."),
        ("export", "run=x", "`format` is missing: give format=onnx, format=torch_export or format=hub."),
    ],
)
def test_what_a_command_needs_is_asked_for(name: str, overrides: str, sentence: str) -> None:
    assert mistakes(compose(*overrides.split(), command=name), MODELS[name]) == [sentence]


def test_keys_that_a_yaml_of_an_option_must_have(default: dict[str, Any]) -> None:
    net = {"_target_": "a.B", "depth": "???"}
    plain = default | {"model": {"net": net}, "scheduler": {"unit": "step"}, "choices": {"model": "mine"}}
    assert mistakes(plain) == [
        "`model.net.depth` is missing: give it with model.net.depth=VALUE.",
        "`model.name` is missing: give it with model.name=VALUE.",
        "`model.mean` is missing: give it with model.mean=VALUE.",
        "`model.std` is missing: give it with model.std=VALUE.",
    ]


# -- Values


SIZES = "pairs of a first epoch, from 1 on, and at least 8 pixels, as [[1, 128], [31, 176]]"
A_RUN = "a run or a local file, no web address; for a run in a bucket, give the name, and paths.logs=s3://BUCKET/PATH"
BATCHES = "a fraction above 0.0 and at most 1.0, or a whole number of batches of at least 1"
DEVICES = "auto, a whole number above 0, or a list of different GPU numbers"


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("data.batch_size", 0, "at least 1"),
        ("data.batch_size", "32", "a whole number"),
        ("data.num_workers", True, "a whole number"),
        ("data.image_size", 7, "at least 8"),
        ("data.image_size", [64, 7], "a whole number or [height, width] of at least 8 each"),
        ("data.image_size", [64, 64.0], "a whole number or [height, width] of at least 8 each"),
        ("data.val_fraction", 1.0, "below 1"),
        ("data.cache", "disk", "device"),
        ("data.crop_on", True, "auto, cpu or device"),
        ("seed", 2**32, "at most 4294967295"),
        ("compile", 1, "true or false"),
        ("monitor", "acc1", "a metric of the validation, such as val/acc1 or val/loss"),
        ("optimizer.lr", -1.5, "above 0"),
        ("optimizer.lr", "fast", "a number"),
        ("optimizer.betas", [0.9, 1.0], "two or three numbers from 0 to below 1"),
        ("optimizer.fused", "yes", "auto or true or false"),
        ("scheduler.milestones", [2, 2], "growing numbers above 0"),
        ("augment.scale", [0.5, 0.2], "a min and a max fraction of the area, above 0 and at most 1"),
        ("augment.sizes", [[2, 128]], SIZES),
        ("augment.sizes", [[1, 128], [1, 64]], SIZES),
        ("model.mean", [], "auto or one number for each channel"),
        ("model.std", [0.5, 0, 0.5], "auto or one number above 0 for each channel"),
        ("model.net", "resnet18", "a mapping with a _target_, which names a class"),
        ("trainer.devices", [0, 0], DEVICES),
        ("trainer.devices", 0, DEVICES),
        ("trainer.max_steps", 0, "a whole number of at least 1, or -1 for no limit"),
        ("trainer.max_time", 216000, 'a text "DAYS:HOURS:MINUTES:SECONDS", in quotes'),
        ("trainer.limit_train_batches", 0, BATCHES),
        ("trainer.overfit_batches", None, "a fraction from 0.0 to 1.0, or a whole number of batches"),
        ("logger.wandb.tags", ["a", 1], "a text of 1 to 64 letters in entry 1"),
        ("logger.wandb.tags", ["a" * 65], "a text of 1 to 64 letters in entry 0"),
        ("paths.logs", "gs://b/x", "a folder, or s3://BUCKET/PATH"),
        ("paths.logs", "s3:/b/x", "a folder, or s3://BUCKET/PATH"),
        ("paths.scratch", "s3://b/x", "a folder of this machine, no address"),
        ("ckpt_path", "https://x/y.ckpt", A_RUN),
        ("from_wandb", "a/b", "ENTITY/PROJECT/RUN, where RUN is the last part of the address of the run's page"),
        ("ema", 0.99, "a group of keys: decay"),
    ],
)
def test_a_wrong_value_is_shown_with_its_rule(name: str, value: Any, rule: str, default: dict[str, Any]) -> None:
    assert mistakes(changed(default, {name: value})) == [f"`{name}={as_yaml(value)}` must be {rule}."]


def test_names_are_as_long_as_wandb_accepts(default: dict[str, Any]) -> None:
    assert not mistakes(changed(default, {"logger.wandb.name": "n" * 128, "logger.wandb.tags": ["t" * 64]}))
    rule = "must be a text of 1 to 128 letters"
    assert mistakes(changed(default, {"logger.wandb.group": "g" * 129})) == [f"`logger.wandb.group` {rule}."]


def test_a_text_must_not_be_empty_and_a_number_must_be_finite(default: dict[str, Any]) -> None:
    assert mistakes(changed(default, {"data.name": "", "optimizer.lr": float("nan")})) == [
        "`data.name=` must be a text that is not empty.",
        "`optimizer.lr=nan` must be a finite number.",
    ]


def test_a_group_that_is_a_text_names_the_override_of_a_recipe(default: dict[str, Any]) -> None:
    [sentence] = mistakes(default | {"scheduler": "cosine"})
    assert sentence.startswith("`scheduler=cosine` must be a group of keys: name, _target_, interval, unit, ")
    assert sentence.endswith(" A recipe chooses an option with `override /scheduler: cosine`.")


@pytest.mark.parametrize(
    ("command", "name", "value", "rule"),
    [
        ("eval", "crops", True, "1, 2 or 10"),
        ("export", "format", "tflite", "onnx, torch_export or hub"),
        ("compare", "runs", 3, "a text that is not empty or a list that is not empty"),
        ("dashboard", "project", "a/b", "a name without spaces around it and without / \\ # ? % :"),
        ("dashboard", "swept", [], "a list of settings, such as [optimizer.lr]"),
        ("dashboard", "dashboard.sections", [], "sections by name, each with panels"),
    ],
)
def test_a_wrong_value_of_other_commands(command: str, name: str, value: Any, rule: str) -> None:
    plain = changed(of_command(command), {name: value})
    assert mistakes(plain, MODELS[command]) == [f"`{name}={as_yaml(value)}` must be {rule}."]


def test_a_single_mistake_is_reported_without_a_heading(default: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^`data\.batch_size=0` must be at least 1\.$"):
        validate(TrainConfig, changed(default, {"data.batch_size": 0}))


def test_all_mistakes_are_reported_at_once(default: dict[str, Any]) -> None:
    changes = {"optimizer.lr": -1, "data.root": "???", "data.bach_size": 3, "seed": "x", "lable_smoothing": 0.1}
    with pytest.raises(UserError) as error:
        validate(TrainConfig, changed(default, changes))
    assert str(error.value).split("\n  ") == [
        "5 values of the config are wrong:",
        "`data.root` is missing: give the folder of the images with data.root=PATH.",
        "`data.bach_size=3`: there is no such key. Did you mean `data.batch_size`?",
        "`optimizer.lr=-1` must be above 0.",
        "`seed=x` must be a whole number.",
        "`lable_smoothing=0.1`: there is no such key. Did you mean `label_smoothing`?",
    ]


class Inner(Group):
    depth: int = key("Depth.")


class OwnConfig(Group):
    """Keys as a user may declare them."""

    rate: Annotated[float, Ge(0.5)] | None = key("Rate.", None)
    pair: tuple[int, int] = key("Pair.", (1, 2))
    inner: Inner | None = key("Inner.", None)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rate": 0.1}, "`rate=0.1` must be at least 0.5."),
        ({"pair": [1]}, "`pair=[1]` must be a valid tuple."),
        ({"inner": {}}, "`inner.depth` is missing: give it with inner.depth=VALUE."),
        ({"inner": 1}, "`inner=1` must be a group of keys: depth."),
        ({"rat": 1}, "`rat=1`: there is no such key. Did you mean `rate`?"),
    ],
)
def test_keys_that_a_user_declares_get_sentences_too(values: dict[str, Any], sentence: str) -> None:
    assert mistakes(values, OwnConfig) == [sentence]


@pytest.mark.parametrize("value", ["@@://", -(10**9), -0.5, [None], [{"a": 1}], {}, {"a": {"b": 1}}, True, None])
def test_no_value_of_any_key_leads_to_a_foreign_message(value: Any, default: dict[str, Any]) -> None:
    foreign = ("Input should", "pydantic", "[type=", "https://errors", "Extra inputs")
    for name in describe(TrainConfig):
        for sentence in mistakes(changed(default, {name: value})):
            assert "`" in sentence, sentence
            assert sentence.endswith((".", "?")), sentence
            assert not any(text in sentence for text in foreign), sentence


# -- Values that are wrong together, and overrides


def test_what_does_not_work_with_fsdp(default: dict[str, Any]) -> None:
    sharded = changed(default, {"trainer.strategy": "fsdp"})
    assert mistakes(sharded) == []
    values = {"ema.decay": 0.9, "finetune.freeze_epochs": 2, "trainer.gradient_clip_algorithm": "value"}
    values |= {"on_nan": "skip", "callbacks.grad_norm": True, "optimizer.layer_decay": 0.75}
    for name, value in values.items():
        assert mistakes(changed(default, {name: value})) == []
        fix = "with FSDP, which shards the weights: reset them to the defaults of conf/, or use trainer=ddp."
        assert mistakes(changed(sharded, {name: value})) == [f"`{name}` {fix}"]


WRONG_TOGETHER = """
trainer.max_epochs=null
  `trainer.max_epochs=null` and `trainer.max_steps=-1`: the run would never end. Set one of them.
model.pretrained=true model.name=mine
  `model.pretrained=true`: mine has no published weights. Use model=alexnet_owt, torchvision or timm, or start from a
  run's weights with init_from=RUN.
callbacks.early_stopping=2 trainer.limit_val_batches=0
  `callbacks.early_stopping=2` needs validation, and trainer.limit_val_batches=0 turns it off.
scheduler.name=plateau scheduler.monitor=val/loss trainer.limit_val_batches=0.0
  `scheduler=plateau` needs validation, and trainer.limit_val_batches=0 turns it off.
scheduler={"_target_":a.B,"monitor":val/loss} trainer.limit_val_batches=0
  `scheduler=a.B` needs validation, and trainer.limit_val_batches=0 turns it off.
scheduler={"_target_":a.B,"monitor":val/loss,"interval":step}
  `scheduler.interval=step` with scheduler.monitor: metrics come with validations, so use interval=epoch.
scheduler.name=cosine scheduler._target_=mypkg.Mine
  `scheduler._target_` replaces scheduler=cosine, whose keys it does not have: write
  ~scheduler '+scheduler={_target_: mypkg.Mine}', with its settings in the braces.
scheduler.name=cosine scheduler.interval=step
  `scheduler.interval` is for a _target_: scheduler=cosine has scheduler.unit.
scheduler.name=plateau
  `scheduler.monitor` is missing: scheduler=plateau needs a metric, such as `monitor: ${monitor}`.
data.root=/nowhere data.demo_seed=null
  `data.root=/nowhere` does not exist: give the folder of the images with data.root=PATH.
resume.requeue=true resume.run=latest
  `resume.requeue=true` needs resume=auto, with which the requeued job resumes its run.
model.mean=[0.5,0.5]
  `model.mean=[0.5, 0.5]`: give a list with one number for each channel of model.in_channels=3.
model.in_channels=1 model.std=[0.5,0.5]
  `model.std=[0.5, 0.5]`: give a list with one number for each channel of model.in_channels=1.
model.in_channels=5 model.mean=auto model.std=[1,1,1,1,1]
  `model.mean=auto`: give a list with one number for each channel of model.in_channels=5.
model.in_channels=1 augment.pca=0.1
  `augment.pca=0.1` is noise of RGB, and model.in_channels=1: set augment.pca=0.
model.in_channels=4 augment.policy=rand
  `augment.policy=rand` changes colours of RGB, and model.in_channels=4: set augment.policy=none.
data.image_size=[64,96] augment.sizes=[[1,64]]
  `augment.sizes` are sides of squares, and data.image_size=[64, 96]: leave one of them out.
overrides=[run_dir=/x]
  `run_dir=/x` is filled in: choose a run directory with hydra.run.dir=PATH.
overrides=["choices={}"]
  `choices={}` is filled in: remove it.
scheduler={"unit":step}
  `scheduler.name` is missing: give the name of a schedule, or a class as scheduler._target_.
model.net.num_classes=7
  `model.net.num_classes=7`: the network gets the number of classes from the images: remove the key. data.num_classes=N
  checks the number.
overrides=[model.name=resnet18] choices.model=alexnet
  `model.name=resnet18` would rename model=alexnet without changing the network. For the network of that name use
  model=torchvision model.name=resnet18, or model=timm model.name=resnet18.
"""


@pytest.mark.parametrize(("line", "sentence"), cases(WRONG_TOGETHER))
def test_values_that_do_not_fit_together_are_refused(line: str, sentence: str, default: dict[str, Any]) -> None:
    assert mistakes(changed(default, changes_of(line))) == [sentence]


@pytest.mark.parametrize(
    "line",
    [
        "trainer.max_epochs=null trainer.max_steps=5",
        "model.pretrained=true init_from=latest",
        "data.image_size=[64,96] model.in_channels=1 model.mean=[0.5]",
        "model.in_channels=4 model.std=auto model.mean=[0.1,0.2,0.3,0.4]",
        "model.in_channels=5 model.mean=[0,0,0,0,0] model.std=[1,1,1,1,1]",
        "model.pretrained=true model.net.pretrained=true",
        "callbacks.early_stopping=2 trainer.limit_val_batches=null",
        "data.root=/nowhere",
        "data.root=/nowhere data.demo_seed=null data.idx=auto",
        "data.root=/ data.demo_seed=null",
        "resume.requeue=true resume.run=auto",
        "overrides=[model.name=alexnet] choices.model=alexnet",
        "overrides=[model.name=resnet18] model.net.name=resnet18",
    ],
)
def test_values_that_fit_together_are_accepted(line: str, default: dict[str, Any]) -> None:
    assert mistakes(changed(default, changes_of(line))) == []


def test_a_home_directory_is_expanded(default: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    plain = changed(default, {"data.root": "~/images", "data.demo_seed": None})
    [sentence] = mistakes(plain)
    assert sentence.startswith(f"`data.root={tmp_path}/images` does not exist")
    (tmp_path / "images").mkdir()
    assert mistakes(plain) == []


def test_benchmark_does_not_repeat_a_run() -> None:
    sentence = "`from_run=latest` is for train only: give the settings of that run instead."
    assert mistakes(compose("from_run=latest", command="benchmark"), schema.BenchmarkConfig) == [sentence]


def test_filled_in_keys_of_other_commands_are_refused() -> None:
    [sentence] = mistakes(of_command("eval") | {"overrides": ["run_dir=/x"]}, schema.EvalConfig)
    assert sentence.startswith("`run_dir=/x` is filled in")


# -- Removed keys, Lightning's arguments


@pytest.mark.parametrize("replaced", validation.REPLACED)
def test_a_replaced_key_or_value_says_what_to_use(replaced: str, default: dict[str, Any]) -> None:
    name, _, value = replaced.partition("=")
    [sentence] = mistakes(changed(default, {name: value or True}))
    assert sentence == f"`{name}={value or 'true'}` {validation.REPLACED[replaced]}"


def test_keys_of_trainer_are_arguments_of_lightning_or_our_own() -> None:
    import pytorch_lightning as pl

    parameters = inspect.signature(pl.Trainer.__init__).parameters
    fields = fields_of(schema.TrainerConfig)
    own = {"channels_last", "tf32", "cudnn_benchmark", "timeout", "master_port", "grad_compression"}
    own |= {"lr_find", "batch_size_find"}
    assert set(fields) - own <= set(parameters)
    assert set(schema.OWN_TRAINER_KEYS) == own | {"strategy", "precision"}
    shipped: Any = OmegaConf.to_container(OmegaConf.load(CONF / "trainer/auto.yaml"))
    for name in set(fields) - set(shipped):  # what no yaml sets must not change Lightning's default
        assert fields[name].default == parameters[name].default, name


def test_every_synonym_names_a_key() -> None:
    assert set(validation.SYNONYMS.values()) <= set(describe(TrainConfig))
    assert not set(validation.SYNONYMS) & set(fields_of(TrainConfig)) - {"checkpoint"}


def test_mode_of_a_metric() -> None:
    assert [mode_of(metric) for metric in ("val/loss", "val/acc1", "val/acc5")] == ["min", "max", "max"]


# -- The file of a mistake


def test_a_mistake_in_a_yaml_names_the_file_and_one_in_an_override_does_not(default: dict[str, Any]) -> None:
    changes = {"data.bach_size": 3, "data.batch_size": 0, "data.root": "???", "overrides": ["data.batch_size=0"]}
    assert mistakes(changed(default, changes), file_of=lambda key: f"conf/{key}.yaml") == [
        "`data.root` is missing: give the folder of the images with data.root=PATH.",
        "`data.bach_size=3`: there is no such key. Did you mean `data.batch_size`? (conf/data.bach_size.yaml)",
        "`data.batch_size=0` must be at least 1.",
    ]


# -- For --help


def test_descriptions_list_options() -> None:
    described = describe(TrainConfig)
    assert described["data.batch_size"] == "Images per step, all devices together."
    assert described["augment.crop"] == "How training images are cropped (random_resized, random, center, none)."
    assert described["trainer.channels_last"] == "Memory format channels_last; auto is on for GPUs."
    assert described["optimizer._target_"] == "The optimizer's class."
    assert described["logger.wandb"] == "Weights & Biases; null is off."


def test_the_schema_imports_no_heavy_library() -> None:
    code = (
        "import sys, alexlab.engine.validation\n"
        "heavy = {'torch', 'pytorch_lightning', 'numpy', 'wandb', 'omegaconf', 'hydra'} & set(sys.modules)\n"
        "sys.exit(f'heavy: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
