"""The rules that a composed config must keep, checked together and told together. Light: no heavy import."""

import os
import re
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from alexlab.engine import secrecy
from alexlab.engine.errors import UserError
from alexlab.engine.kinds import (
    ABOVE_0,
    BELOW_1,
    BOARD_RUN,
    COUNT,
    DEVICES,
    FROM_0,
    FROM_0_WHOLE,
    INSIDE_0_1,
    LETTERS,
    LIMIT,
    METRIC,
    NAME,
    PATH,
    PRECISIONS,
    SHARE,
    SIZES,
    SWITCH,
    TEXT,
    TEXTS,
    TRAIN_LIMIT,
    Rule,
    number,
    numbers,
    one_of,
    or_auto,
    or_null,
    shown,
    whole,
)
from alexlab.engine.metrics import lower_is_better

Plain = dict[str, Any]

RULES: dict[str, Rule] = {
    "seed": whole("a whole number from 0 to 4294967295", 0, 2**32 - 1),
    "label_smoothing": BELOW_1,
    "compile": SWITCH,
    "test": SWITCH,
    "dry_run": SWITCH,
    "monitor": METRIC,
    "on_nan": one_of("stop", "skip"),
    "ckpt_path": or_null(PATH),
    "resume.run": or_null(PATH),
    "resume.allow_changes": SWITCH,
    "resume.requeue": SWITCH,
    "checkpoint.every_n_steps": or_null(COUNT),
    "checkpoint.every_minutes": or_null(ABOVE_0),
    "init_from": or_null(PATH),
    "from_run": or_null(PATH),
    "from_wandb": or_null(BOARD_RUN),
    "repeats": or_null(TEXT),
    "ema.decay": or_null(INSIDE_0_1),
    "sweep.keep_going": SWITCH,
    "sweep.pruner": one_of("median", "hyperband", "none"),
    "sweep.startup_trials": FROM_0_WHOLE,
    "sweep.warmup_epochs": FROM_0_WHOLE,
    "model.mean": or_auto(numbers("three numbers, one for each of red, green and blue", 3, lambda v: True)),
    "model.std": or_auto(
        numbers("three numbers above 0, one for each of red, green and blue", 3, lambda v: min(v) > 0)
    ),
    "model.pretrained": SWITCH,
    "model.bias_lr_factor": ABOVE_0,
    "model.net._target_": TEXT,
    "finetune.freeze_epochs": FROM_0_WHOLE,
    "finetune.backbone_lr_factor": ABOVE_0,
    "data.root": ("the folder of the images with data.root=PATH", lambda v: isinstance(v, str) and v != ""),
    "data.demo_seed": or_null(FROM_0_WHOLE),
    "data.idx": or_null(TEXT),
    "data.batch_size": COUNT,
    "data.image_size": whole("a whole number of pixels, at least 8", 8),
    "data.num_workers": or_null(FROM_0_WHOLE),
    "data.num_classes": or_null(whole("a whole number, at least 2", 2)),
    "data.val_fraction": or_null(INSIDE_0_1),
    "data.test_fraction": BELOW_1,
    "data.on_error": one_of("raise", "skip"),
    "data.max_bad": or_null(FROM_0_WHOLE),
    "data.crop_on": one_of("auto", "cpu", "device"),
    "data.cache": or_null(
        ("device (ram was removed: pixels from prepare.py format=raw are faster)", lambda v: v == "device")
    ),
    "data.class_names": or_null(TEXT),
    "callbacks.progress": one_of("auto", "rich", "plain", "none"),
    "callbacks.lr_monitor": SWITCH,
    "callbacks.figures": SWITCH,
    "callbacks.model_summary": whole("a depth: a whole number, at least 0", 0),
    "callbacks.device_stats": SWITCH,
    "callbacks.grad_norm": SWITCH,
    "callbacks.early_stopping": or_null(whole("a whole number of validations, at least 1", 1)),
    "augment.crop": one_of("random_resized", "random", "center"),
    "augment.scale": numbers(
        "two shares of the area, least and largest, above 0 and at most 1", 2, lambda v: 0 < v[0] <= v[1] <= 1
    ),
    "augment.ratio": numbers("two aspects, least and largest, above 0", 2, lambda v: 0 < v[0] <= v[1]),
    "augment.crop_ratio": number("a number above 0, at most 1", lambda v: 0 < v <= 1),
    "augment.flip": SHARE,
    "augment.policy": one_of("none", "trivial", "rand"),
    "augment.policy_ops": COUNT,
    "augment.policy_magnitude": whole("a whole number from 0 to 30", 0, 30),
    "augment.pca": FROM_0,
    "augment.pca_by": one_of("eigenvalues", "deviations"),
    "augment.sizes": or_null(SIZES),
    "augment.erase": SHARE,
    "augment.mixup": FROM_0,
    "augment.cutmix": FROM_0,
    "optimizer._target_": TEXT,
    "optimizer.lr": ABOVE_0,
    "optimizer.weight_decay": FROM_0,
    "optimizer.momentum": BELOW_1,
    "optimizer.nesterov": SWITCH,
    "optimizer.betas": numbers("two numbers from 0 to below 1", 2, lambda v: all(0 <= b < 1 for b in v)),
    "optimizer.decay_norm_and_bias": SWITCH,
    "optimizer.bias_lr_factor": ABOVE_0,
    "optimizer.fused": one_of("auto", True, False),
    "optimizer.lr_reference_batch": or_null(COUNT),
    "scheduler.name": one_of("constant", "cosine", "linear", "multistep", "plateau", "step"),
    "scheduler.warmup": FROM_0,
    "scheduler.unit": one_of("epoch", "step"),
    "scheduler.step_size": ABOVE_0,
    "scheduler.milestones": numbers(
        "growing numbers above 0", None, lambda v: v == sorted(v) and min(v, default=1) > 0
    ),
    "scheduler.gamma": number("a number above 0, at most 1", lambda v: 0 < v <= 1),
    "scheduler.factor": INSIDE_0_1,
    "scheduler.patience": FROM_0_WHOLE,
    "scheduler.min_lr": FROM_0,
    "scheduler.min_factor": SHARE,
    "scheduler.monitor": METRIC,
    "logger.wandb.mode": one_of("auto", "online", "offline", "disabled"),
    "logger.wandb.project": TEXT,
    "logger.wandb.entity": or_null(TEXT),
    "logger.wandb.name": or_null(TEXT),
    "logger.wandb.group": or_null(TEXT),
    "logger.wandb.notes": or_null(TEXT),
    "logger.wandb.tags": TEXTS,
    "logger.wandb.log_model": SWITCH,
    "logger.wandb.log_code": SWITCH,
    "logger.wandb.init_timeout": ABOVE_0,
    "trainer.accelerator": one_of("auto", "cpu", "gpu", "cuda", "mps"),
    "trainer.devices": DEVICES,
    "trainer.num_nodes": COUNT,
    "trainer.strategy": one_of("auto", "ddp", "fsdp"),
    "trainer.precision": one_of(*PRECISIONS),
    "trainer.max_epochs": or_null(COUNT),
    "trainer.max_steps": ("a whole number above 0, or -1 for no limit", lambda v: v == -1 or COUNT[1](v)),
    "trainer.accumulate_grad_batches": COUNT,
    "trainer.gradient_clip_val": or_null(ABOVE_0),
    "trainer.limit_train_batches": TRAIN_LIMIT,
    "trainer.limit_val_batches": LIMIT,
    "trainer.limit_test_batches": LIMIT,
    "trainer.overfit_batches": (LIMIT[0].removesuffix(", or null"), lambda v: v is not None and LIMIT[1](v)),
    "trainer.log_every_n_steps": COUNT,
    "trainer.check_val_every_n_epoch": COUNT,
    "trainer.num_sanity_val_steps": whole("a whole number, at least -1", -1),
    "trainer.detect_anomaly": SWITCH,
    "trainer.profiler": one_of(None, "simple", "advanced", "pytorch"),
    "trainer.deterministic": one_of(True, False, "warn"),
    "trainer.channels_last": one_of("auto", True, False),
    "trainer.tf32": SWITCH,
    "trainer.cudnn_benchmark": SWITCH,
    "trainer.timeout": ABOVE_0,
    "trainer.master_port": or_null(whole("a port from 1 to 65535", 1, 65535)),
}

EVAL_RULES: dict[str, Rule] = {
    "run": ("a run's directory with run=PATH, or run=latest", PATH[1]),
    "ckpt": PATH,
    "crops": one_of(1, 10),
    "data.root": or_null(TEXT),
    "data.num_workers": RULES["data.num_workers"],
    "data.on_error": or_null(RULES["data.on_error"]),
    "compile": or_null(RULES["compile"]),
    "trainer.accelerator": or_null(RULES["trainer.accelerator"]),
    "trainer.precision": or_null(RULES["trainer.precision"]),
}
PREDICT_RULES: dict[str, Rule] = {
    "run": EVAL_RULES["run"],
    "images": ("an image, a folder or a glob with images=PATH", TEXT[1]),
    "ckpt": PATH,
    "topk": COUNT,
    "out": or_null(TEXT),
    "batch_size": COUNT,
    "num_workers": RULES["data.num_workers"],
}
FIGURES_RULES: dict[str, Rule] = {
    **{key: rule for key, rule in EVAL_RULES.items() if key != "crops"},
    "among": FROM_0_WHOLE,
}
EXPORT_RULES: dict[str, Rule] = {
    "run": EVAL_RULES["run"],
    "format": one_of("onnx", "torch_export"),
    "ckpt": PATH,
    "out": or_null(TEXT),
    "images": or_null(TEXT),
    "tolerance": ABOVE_0,
}
PREPARE_RULES: dict[str, Rule] = {
    "seed": RULES["seed"],
    **{f"data.{key}": RULES[f"data.{key}"] for key in ("root", "val_fraction", "test_fraction", "class_names")},
    "out": ("a new folder with out=PATH", TEXT[1]),
    "format": one_of("jpeg", "raw"),
    "short_side": whole("a whole number of pixels, at least 8", 8),
    "square": SWITCH,
    "quality": whole("a whole number from 1 to 100", 1, 100),
    "shard_mb": ABOVE_0,
    "num_workers": or_null(COUNT),
}
BENCHMARK_RULES: dict[str, Rule] = {"seconds": ABOVE_0, "format": one_of("table", "json")}
COMPARE_RULES: dict[str, Rule] = {
    "sort": or_null(TEXT), "most": or_null(COUNT), "where": or_null(TEXT), "seeds": one_of("group", "each"),
    "format": one_of("table", "markdown", "csv", "json", "html"), "out": or_null(TEXT), "equal": SWITCH,
}  # fmt: skip
DASHBOARD_RULES: dict[str, Rule] = {
    "entity": or_null(NAME), "project": NAME, "name": LETTERS, "dry_run": SWITCH, "metric": TEXT, "x": TEXT,
    "swept": ("a list of settings, such as [optimizer.lr]", lambda v: TEXTS[1](v) and len(v) > 0),
    "timeout": COUNT,
    "dashboard.max_runs": COUNT,
    "dashboard.sections": ("sections by their names, each with panels", lambda v: isinstance(v, dict) and len(v) > 0),
}  # fmt: skip

NEEDED = ("model.name", "model.mean", "model.std", "model.net")  # which a model's yaml must have
# no training goes without one of each; and such a one
GROUPS = {"model": "alexnet", "data": "folder", "augment": "basic", "optimizer": "sgd", "scheduler": "cosine",
          "trainer": "auto"}  # fmt: skip
_ABSENT = object()


def check(config: DictConfig, rules: dict[str, Rule] = RULES) -> None:
    """Raises UserError with every value that breaks one of `rules`, one a line."""
    if rules is RULES and (group := next((group for group in GROUPS if not config.get(group)), None)):  # ~scheduler
        raise UserError(f"{group} is missing: choose an option by its name, as {group}={GROUPS[group]}; see --help.")
    plain: Any = OmegaConf.to_container(config, resolve=True)
    secret = secrecy.mistakes(plain)
    if secret:  # before anything that shows values
        raise UserError("\n  ".join(secret))
    repeats = rules is RULES and (plain.get("from_run") or plain.get("from_wandb"))  # whose config is checked later
    wrong = []
    if repeats and plain.get("task") != "train":
        wrong.append(f"{repeats}: from_run and from_wandb are for train.py alone: give its settings instead.")
    groups = dict.fromkeys(key[: m.start()] for key in rules for m in re.finditer(r"\.", key))
    for group in groups:
        value = _at(plain, group)
        if value is not _ABSENT and not isinstance(value, dict):
            first = next(key for key in rules if key.startswith(f"{group}."))
            off = "; logger=csv is without W&B" if group == "logger.wandb" else ""
            wrong.append(f"{group}={shown(value)}: it holds keys, and one of them must be set, such as {first}{off}.")
    for key, (words, test) in rules.items():
        value = _at(plain, key)
        if value is _ABSENT or (value == "???" and repeats):
            continue
        if value == "???" or (value is None and rules is RULES and key == "data.root"):
            wrong.append(f"{key} is missing: give {words}.")
        elif not test(value):
            wrong.append(f"{key}={shown(value)}: must be {words}.")
    for key in (key for key in NEEDED if rules is RULES and _at(plain, key) is _ABSENT):
        option = plain.get("choices", {}).get("model", "NAME")
        wrong.append(f"{key} is missing: conf/model/{option}.yaml must have it, as conf/model/alexnet.yaml has.")
    if rules is RULES and not wrong and not repeats:  # rules on several values, which must each be right by itself
        wrong = _together(plain) + _words(plain)
    if wrong:
        raise UserError(
            wrong[0] if len(wrong) == 1 else f"{len(wrong)} values of the config are wrong:\n  " + "\n  ".join(wrong)
        )


def _together(plain: Plain) -> list[str]:
    wrong = []
    t = plain["trainer"]
    if t["max_epochs"] is None and t["max_steps"] == -1:
        wrong.append("trainer.max_epochs=null and trainer.max_steps=-1: the run would never end; set one of them.")
    if t["strategy"] == "fsdp" and plain["ema"]["decay"] is not None:
        wrong.append(
            f"ema.decay={plain['ema']['decay']} cannot average sharded weights: trainer=ddp, or ema.decay=null."
        )
    own = plain["model"].get("pretrained") and "pretrained" not in plain["model"]["net"]
    if own and plain["init_from"] is None and plain["ckpt_path"] is None:
        wrong.append(
            f"model.pretrained=true: {plain['model']['name']} has no published weights here: take model=alexnet_owt, "
            "torchvision or timm, or a run's weights with init_from=RUN."
        )
    if t["strategy"] == "fsdp" and plain["finetune"]["freeze_epochs"]:
        wrong.append("finetune.freeze_epochs: FSDP shards weights that learn and others alike: take trainer=ddp.")
    if t["strategy"] == "fsdp" and t.get("gradient_clip_algorithm") == "value":
        wrong.append("trainer.gradient_clip_algorithm=value: sharded gradients are clipped by their norm alone.")
    if t["strategy"] == "fsdp" and plain["on_nan"] != "stop":
        wrong.append(f"on_nan={plain['on_nan']} needs whole weights on each device: trainer=ddp, or on_nan=stop.")
    if t["strategy"] == "fsdp" and plain["callbacks"].get("grad_norm"):
        wrong.append("callbacks.grad_norm=true: of sharded gradients each device has a part: trainer=ddp, or false.")
    waits = {
        "callbacks.early_stopping": plain["callbacks"]["early_stopping"] is not None,
        "scheduler=plateau": plain["scheduler"]["name"] == "plateau",
    }
    for key, needs in waits.items():
        if needs and t["limit_val_batches"] in (0, 0.0) and t["limit_val_batches"] is not None:
            wrong.append(f"{key} needs validation, and trainer.limit_val_batches=0 switches it off.")
    root = os.path.expanduser(plain["data"]["root"])  # noqa: PTH111
    made = plain["data"]["demo_seed"] is not None or plain["data"].get("idx") is not None
    if not made and not os.path.exists(root):  # noqa: PTH110
        wrong.append(f"{root} does not exist: give the folder of the images with data.root=PATH.")
    elif plain["data"]["name"] == "prepared" and not os.path.exists(f"{root}/prepared.json"):  # noqa: PTH110
        wrong.append(f"{root} holds no prepared.json: python prepare.py data.root=IMAGES out={root} makes or ends it.")
    if plain["resume"]["requeue"] and plain["resume"]["run"] != "auto":
        wrong.append("resume.requeue=true: the job that comes again goes on only with resume=auto.")
    if plain["optimizer"].get("nesterov") and not plain["optimizer"].get("momentum"):
        wrong.append("optimizer.nesterov=true needs optimizer.momentum above 0.")
    return wrong


# groups whose every key is read here; others pass unknown ones on, to the optimizer, Lightning or a network
CLOSED = ("augment", "checkpoint", "data", "ema", "finetune", "resume", "scheduler", "sweep")


def _words(plain: Plain) -> list[str]:
    """What is wrong with the command line's words though the config that they make is in order."""
    wrong = []
    given = {word.lstrip("+").partition("=")[0]: word for word in plain.get("overrides") or []}  # the last one counts
    for key, word in given.items():
        value = word.partition("=")[2]
        if key in ("run_dir", "repeats", "overrides", "choices"):
            wrong.append(f"{word}: {key} is filled in; a run's directory is chosen with hydra.run.dir=PATH.")
        if word.startswith("+") and key not in RULES and (key.split(".")[0] in CLOSED or "." not in key):
            wrong.append(f"{word}: nobody reads {key}; without the + the nearest key is told.")
        if key == "model.net.num_classes":
            wrong.append(f"{word}: the data has the number of classes; data.num_classes={value} refuses any other.")
        if key == "model.name" and "name" not in plain["model"]["net"] and value != plain["choices"].get("model"):
            wrong.append(
                f"{word}: model={plain['choices'].get('model')} would be called so, and stay what it is; for that "
                f"network say model=torchvision {word}, or model=timm {word}."
            )
    return wrong


def _at(plain: Plain, key: str) -> Any:
    value: Any = plain
    for part in key.split("."):
        value = value.get(part, _ABSENT) if isinstance(value, dict) else _ABSENT
    return value


def mode_of(metric: str) -> Literal["min", "max"]:
    """Return "min" for a metric that is better low, such as a loss, and "max" for an accuracy."""
    return "min" if lower_is_better(metric) else "max"
