"""The rules that a composed config must keep, checked together and told together. Light: no heavy import."""

import itertools
import os
import re
from collections.abc import Callable
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from alexlab.errors import UserError

Rule = tuple[str, Callable[[Any], bool]]  # in words, and as a test
Plain = dict[str, Any]


def shown(value: Any) -> str:
    """As it stands in a yaml or on the command line."""
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else "null" if value is None else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(words: str, test: Callable[[float], bool]) -> Rule:
    return words, lambda v: _is_number(v) and test(v)


def _whole(words: str, least: int, most: float = float("inf")) -> Rule:
    return words, lambda v: isinstance(v, int) and not isinstance(v, bool) and least <= v <= most


def _or_null(rule: Rule) -> Rule:
    return f"{rule[0]}, or null", lambda v: v is None or rule[1](v)


def _or_auto(rule: Rule) -> Rule:
    return f"{rule[0]}, or auto", lambda v: v == "auto" or rule[1](v)


def _one_of(*options: Any) -> Rule:
    return f"one of {', '.join(dict.fromkeys(map(shown, options)))}", lambda v: any(
        v == o and type(v) is type(o) for o in options
    )


def _numbers(words: str, count: int | None, test: Callable[[list[float]], bool]) -> Rule:
    def holds(value: Any) -> bool:
        return isinstance(value, list) and count in (None, len(value)) and all(map(_is_number, value)) and test(value)

    return words, holds


SWITCH: Rule = ("true or false", lambda v: isinstance(v, bool))
TEXT: Rule = ("a text", lambda v: isinstance(v, str) and v != "")
SHARE = _number("a number from 0 to 1", lambda v: 0 <= v <= 1)
BELOW_1 = _number("a number from 0 to below 1", lambda v: 0 <= v < 1)
INSIDE_0_1 = _number("a number above 0 and below 1", lambda v: 0 < v < 1)
ABOVE_0 = _number("a number above 0", lambda v: 0 < v < float("inf"))
FROM_0 = _number("a number, at least 0", lambda v: 0 <= v < float("inf"))
COUNT = _whole("a whole number, at least 1", 1)
FROM_0_WHOLE = _whole("a whole number, at least 0", 0)
METRIC = _one_of("val/loss", "val/acc1", "val/acc5")
PRECISIONS = ("auto", "32", "32-true", "bf16", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true", 32, 64, 16)
LIMIT: Rule = (
    "a share from 0.0 to 1.0, or a whole number of batches, or null",
    lambda v: v is None or (_is_number(v) and v >= 0 and (isinstance(v, int) or v <= 1)),
)
TRAIN_LIMIT: Rule = (
    "a share above 0.0 up to 1.0, or a whole number of batches above 0, or null",
    lambda v: v is None or (_is_number(v) and v > 0 and (isinstance(v, int) or v <= 1)),
)
SIZES: Rule = (
    "pairs of the epoch from which on, growing from 1, and pixels, at least 8: [[1, 128], [31, 176]]",
    lambda v: (
        isinstance(v, list) and len(v) > 0
        and all(isinstance(pair, list) and len(pair) == 2 and all(COUNT[1](n) for n in pair) for pair in v)
        and v[0][0] == 1 and all(a[0] < b[0] for a, b in itertools.pairwise(v)) and min(n for _, n in v) >= 8
    ),
)  # fmt: skip
DEVICES: Rule = (
    "auto, a whole number above 0, or a list of different GPU numbers",
    lambda v: (
        len(v) > 0 and all(FROM_0_WHOLE[1](n) for n in v) and len(set(v)) == len(v)
        if isinstance(v, list)
        else v == "auto" or COUNT[1](v)
    ),
)  # fmt: skip

RULES: dict[str, Rule] = {
    "seed": _whole("a whole number from 0 to 4294967295", 0, 2**32 - 1),
    "label_smoothing": BELOW_1,
    "compile": SWITCH,
    "test": SWITCH,
    "dry_run": SWITCH,
    "monitor": METRIC,
    "ckpt_path": _or_null(TEXT),
    "init_from": _or_null(TEXT),
    "ema.decay": _or_null(INSIDE_0_1),
    "sweep.keep_going": SWITCH,
    "model.mean": _or_auto(_numbers("three numbers, one for each of red, green and blue", 3, lambda v: True)),
    "model.std": _or_auto(
        _numbers("three numbers above 0, one for each of red, green and blue", 3, lambda v: min(v) > 0)
    ),
    "model.pretrained": SWITCH,
    "model.bias_lr_factor": ABOVE_0,
    "model.net._target_": TEXT,
    "finetune.freeze_epochs": FROM_0_WHOLE,
    "finetune.backbone_lr_factor": ABOVE_0,
    "data.root": ("the folder of the images with data.root=PATH", lambda v: isinstance(v, str) and v != ""),
    "data.demo_seed": _or_null(FROM_0_WHOLE),
    "data.idx": _or_null(TEXT),
    "data.batch_size": COUNT,
    "data.image_size": _whole("a whole number of pixels, at least 8", 8),
    "data.num_workers": _or_null(FROM_0_WHOLE),
    "data.num_classes": _or_null(_whole("a whole number, at least 2", 2)),
    "data.val_fraction": _or_null(INSIDE_0_1),
    "data.test_fraction": BELOW_1,
    "data.on_error": _one_of("raise", "skip"),
    "data.crop_on": _one_of("auto", "cpu", "device"),
    "data.cache": _or_null(_one_of("ram", "device")),
    "data.class_names": _or_null(TEXT),
    "callbacks.progress": _one_of("auto", "rich", "plain", "none"),
    "callbacks.lr_monitor": SWITCH,
    "callbacks.figures": SWITCH,
    "callbacks.model_summary": _whole("a depth: a whole number, at least 0", 0),
    "callbacks.device_stats": SWITCH,
    "callbacks.early_stopping": _or_null(_whole("a whole number of validations, at least 1", 1)),
    "augment.crop": _one_of("random_resized", "random", "center"),
    "augment.scale": _numbers(
        "two shares of the area, least and largest, above 0 and at most 1", 2, lambda v: 0 < v[0] <= v[1] <= 1
    ),
    "augment.ratio": _numbers("two aspects, least and largest, above 0", 2, lambda v: 0 < v[0] <= v[1]),
    "augment.crop_ratio": _number("a number above 0, at most 1", lambda v: 0 < v <= 1),
    "augment.flip": SHARE,
    "augment.policy": _one_of("none", "trivial", "rand"),
    "augment.policy_ops": COUNT,
    "augment.policy_magnitude": _whole("a whole number from 0 to 30", 0, 30),
    "augment.pca": FROM_0,
    "augment.pca_by": _one_of("eigenvalues", "deviations"),
    "augment.sizes": _or_null(SIZES),
    "augment.erase": SHARE,
    "augment.mixup": FROM_0,
    "augment.cutmix": FROM_0,
    "optimizer._target_": TEXT,
    "optimizer.lr": ABOVE_0,
    "optimizer.weight_decay": FROM_0,
    "optimizer.momentum": BELOW_1,
    "optimizer.nesterov": SWITCH,
    "optimizer.betas": _numbers("two numbers from 0 to below 1", 2, lambda v: all(0 <= b < 1 for b in v)),
    "optimizer.decay_norm_and_bias": SWITCH,
    "optimizer.bias_lr_factor": ABOVE_0,
    "optimizer.fused": _one_of("auto", True, False),
    "optimizer.lr_reference_batch": _or_null(COUNT),
    "scheduler.name": _one_of("constant", "cosine", "linear", "multistep", "plateau", "step"),
    "scheduler.warmup": FROM_0,
    "scheduler.unit": _one_of("epoch", "step"),
    "scheduler.step_size": ABOVE_0,
    "scheduler.milestones": _numbers(
        "growing numbers above 0", None, lambda v: v == sorted(v) and min(v, default=1) > 0
    ),
    "scheduler.gamma": _number("a number above 0, at most 1", lambda v: 0 < v <= 1),
    "scheduler.factor": INSIDE_0_1,
    "scheduler.patience": FROM_0_WHOLE,
    "scheduler.min_lr": FROM_0,
    "scheduler.min_factor": SHARE,
    "scheduler.monitor": METRIC,
    "logger.wandb.mode": _one_of("auto", "online", "offline", "disabled"),
    "logger.wandb.project": TEXT,
    "logger.wandb.entity": _or_null(TEXT),
    "logger.wandb.name": _or_null(TEXT),
    "logger.wandb.group": _or_null(TEXT),
    "logger.wandb.notes": _or_null(TEXT),
    "logger.wandb.tags": ("a list of texts", lambda v: isinstance(v, list) and all(isinstance(tag, str) for tag in v)),
    "logger.wandb.log_model": SWITCH,
    "logger.wandb.init_timeout": ABOVE_0,
    "trainer.accelerator": _one_of("auto", "cpu", "gpu", "cuda", "mps"),
    "trainer.devices": DEVICES,
    "trainer.num_nodes": COUNT,
    "trainer.strategy": _one_of("auto", "ddp", "fsdp"),
    "trainer.precision": _one_of(*PRECISIONS),
    "trainer.max_epochs": _or_null(COUNT),
    "trainer.max_steps": ("a whole number above 0, or -1 for no limit", lambda v: v == -1 or COUNT[1](v)),
    "trainer.accumulate_grad_batches": COUNT,
    "trainer.gradient_clip_val": _or_null(ABOVE_0),
    "trainer.limit_train_batches": TRAIN_LIMIT,
    "trainer.limit_val_batches": LIMIT,
    "trainer.limit_test_batches": LIMIT,
    "trainer.overfit_batches": (LIMIT[0].removesuffix(", or null"), lambda v: v is not None and LIMIT[1](v)),
    "trainer.log_every_n_steps": COUNT,
    "trainer.check_val_every_n_epoch": COUNT,
    "trainer.num_sanity_val_steps": _whole("a whole number, at least -1", -1),
    "trainer.detect_anomaly": SWITCH,
    "trainer.profiler": _one_of(None, "simple", "advanced", "pytorch"),
    "trainer.deterministic": _one_of(True, False, "warn"),
    "trainer.channels_last": _one_of("auto", True, False),
    "trainer.tf32": SWITCH,
    "trainer.cudnn_benchmark": SWITCH,
    "trainer.timeout": ABOVE_0,
    "trainer.master_port": _or_null(_whole("a port from 1 to 65535", 1, 65535)),
}

EVAL_RULES: dict[str, Rule] = {
    "run": ("a run's directory with run=PATH, or run=latest", lambda v: isinstance(v, str) and v != ""),
    "ckpt": TEXT,
    "crops": _one_of(1, 10),
    "data.root": _or_null(TEXT),
    "data.num_workers": RULES["data.num_workers"],
    "data.on_error": _or_null(RULES["data.on_error"]),
    "compile": _or_null(RULES["compile"]),
    "trainer.accelerator": _or_null(RULES["trainer.accelerator"]),
    "trainer.precision": _or_null(RULES["trainer.precision"]),
}
PREDICT_RULES: dict[str, Rule] = {
    "run": EVAL_RULES["run"],
    "images": ("an image, a folder or a glob with images=PATH", TEXT[1]),
    "ckpt": TEXT,
    "topk": COUNT,
    "out": _or_null(TEXT),
    "batch_size": COUNT,
    "num_workers": RULES["data.num_workers"],
}
FIGURES_RULES: dict[str, Rule] = {
    **{key: rule for key, rule in EVAL_RULES.items() if key != "crops"},
    "among": FROM_0_WHOLE,
}
EXPORT_RULES: dict[str, Rule] = {
    "run": EVAL_RULES["run"],
    "format": _one_of("onnx", "torch_export"),
    "ckpt": TEXT,
    "out": _or_null(TEXT),
    "images": _or_null(TEXT),
    "tolerance": ABOVE_0,
}
PREPARE_RULES: dict[str, Rule] = {
    "seed": RULES["seed"],
    **{f"data.{key}": RULES[f"data.{key}"] for key in ("root", "val_fraction", "test_fraction", "class_names")},
    "out": ("a new folder with out=PATH", TEXT[1]),
    "format": _one_of("jpeg", "raw"),
    "short_side": _whole("a whole number of pixels, at least 8", 8),
    "square": SWITCH,
    "quality": _whole("a whole number from 1 to 100", 1, 100),
    "shard_mb": ABOVE_0,
    "num_workers": _or_null(COUNT),
}
BENCHMARK_RULES: dict[str, Rule] = {"seconds": ABOVE_0, "format": _one_of("table", "json")}
COMPARE_RULES: dict[str, Rule] = {"sort": TEXT, "most": COUNT}

_ABSENT = object()


def check(config: DictConfig, rules: dict[str, Rule] = RULES) -> None:
    """Raises UserError with every value that breaks one of `rules`, one a line."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    wrong = []
    groups = dict.fromkeys(key[: m.start()] for key in rules for m in re.finditer(r"\.", key))
    for group in groups:
        value = _at(plain, group)
        if value is not _ABSENT and not isinstance(value, dict):
            first = next(key for key in rules if key.startswith(f"{group}."))
            off = "; logger=csv is without W&B" if group == "logger.wandb" else ""
            wrong.append(f"{group}={shown(value)}: it holds keys, and one of them must be set, such as {first}{off}.")
    for key, (words, test) in rules.items():
        value = _at(plain, key)
        if value is _ABSENT:
            continue
        if value == "???" or (value is None and rules is RULES and key == "data.root"):
            wrong.append(f"{key} is missing: give {words}.")
        elif not test(value):
            wrong.append(f"{key}={shown(value)}: must be {words}.")
    if rules is RULES and not wrong:  # rules on several values, which must each be right by itself
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
    if plain["optimizer"].get("nesterov") and not plain["optimizer"].get("momentum"):
        wrong.append("optimizer.nesterov=true needs optimizer.momentum above 0.")
    return wrong


# groups whose every key is read here; others pass unknown ones on, to the optimizer, Lightning or a network
CLOSED = ("augment", "data", "ema", "finetune", "scheduler", "sweep")


def _words(plain: Plain) -> list[str]:
    """What is wrong with the command line's words though the config that they make is in order."""
    wrong = []
    given = {word.lstrip("+").partition("=")[0]: word for word in plain.get("overrides") or []}  # the last one counts
    for key, word in given.items():
        value = word.partition("=")[2]
        if key in ("run_dir", "overrides", "choices"):
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
    """ "min" for a loss, "max" for an accuracy."""
    return "min" if metric.endswith("loss") else "max"
