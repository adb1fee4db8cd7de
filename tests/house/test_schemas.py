"""The JSON schemas of conf/: all shipped files are valid, and mistakes are not.

Only the files that docs/usage.md names are judged, and none that you add.
"""

import fnmatch
import json
import runpy
from typing import Any

import pytest
from conftest import ROOT, composed
from jsonschema import Draft202012Validator
from omegaconf import OmegaConf
from referencing import Registry
from referencing.jsonschema import DRAFT202012
from test_house import our_files

from alexlab.commands.cli import COMMANDS
from alexlab.engine.config import read
from alexlab.engine.errors import UserError
from alexlab.engine.schema import TrainConfig
from alexlab.engine.validation import validate

PROGRAM = runpy.run_path(str(ROOT / "docs/schemas.py"))
FOLDER = ROOT / ".vscode/schemas"
GLOBS = json.loads((ROOT / ".vscode/settings.json").read_text())["yaml.schemas"]
OWN = {f"conf/{name}.yaml" for name in (*COMMANDS, "allow", "data/_base", "augment/_base", "callbacks/_base")}
FILES = sorted({name for name in our_files() if name.startswith("conf/") and name.endswith(".yaml")} | OWN)
DESCRIBED = [name for name in FILES if not name.startswith("conf/hydra/") and name != "conf/sweep/wandb.yaml"]
EXPERIMENT = "conf/experiment/mine.yaml"


def schemas_for(name: str) -> list[str]:
    """Return the schemas that an editor uses for a yaml file."""
    lists = {schema: [globs] if isinstance(globs, str) else globs for schema, globs in GLOBS.items()}
    return [
        schema
        for schema, globs in lists.items()
        if any(fnmatch.fnmatch(name, glob) for glob in globs)
        and not any(fnmatch.fnmatch(name, glob[1:]) for glob in globs if glob[0] == "!")
    ]


def read_text(text: str) -> Any:
    return OmegaConf.to_container(OmegaConf.create(text), resolve=False)


def marked(name: str, content: Any) -> list[Any]:
    """Return what an editor marks in a yaml file of this name and content."""
    whole = DRAFT202012.create_resource(json.loads((FOLDER / "all.json").read_text()))
    (schema,) = schemas_for(name)
    validator = Draft202012Validator(json.loads((ROOT / schema).read_text()), registry=Registry([("all.json", whole)]))
    return list(validator.iter_errors(content))


def test_each_schema_has_its_files_and_the_keys_have_their_meaning() -> None:
    """`make lint` writes the schemas again."""
    written = PROGRAM["schemas"]()
    assert {f".vscode/schemas/{name}" for name in written} - {".vscode/schemas/all.json"} <= {*GLOBS}
    assert all((ROOT / schema).is_file() for schema in GLOBS)
    keys = json.loads(written["all.json"])["$defs"]["OptimizerConfig"]["properties"]
    assert keys["lr"]["description"].startswith("Learning rate at the global batch size")


@pytest.mark.parametrize("name", DESCRIBED)
def test_a_shipped_file_is_valid(name: str) -> None:
    assert marked(name, OmegaConf.to_container(OmegaConf.load(ROOT / name), resolve=False)) == []


def test_which_files_have_no_schema() -> None:
    assert len(DESCRIBED) > 80
    assert [name for name in FILES if not name.startswith("conf/hydra/") and not schemas_for(name)] == [
        "conf/sweep/wandb.yaml"
    ]


def test_options_that_take_no_further_keys_name_no_class() -> None:
    for group, names in PROGRAM["CLOSED"].items():
        assert not [name for name in names if "_target_" in read(ROOT / f"conf/{group}/{name}.yaml")]


@pytest.mark.parametrize(
    "setting",
    [
        "label_smothing: 0.1", "data: {bach_size: 3}", "model: {mena: auto}", "trainer: {max_epoch: 3}",
        "scheduler: {warmpu: 1}", "optimizer: {learning_rate: 0.1}", "callbacks: {early_stoping: 5}",
        "logger: {wandb: {prject: p}}", "resume: {rn: latest}", "mode: min", "metrics: {f1: true}",
        # known keys, and values that they do not take
        "seed: -1", "seed: one", "model: {mean: autoo}", "augment: {transforms: [flip]}", "on_nan: skipp",
        "data: {image_size: 4}", "trainer: {precision: 8}", "test: 1", "model: alexnet", "trainer: null",
    ],
)  # fmt: skip
def test_what_the_program_refuses_is_marked(setting: str) -> None:
    mistake, valid = read_text(setting), composed("data=folder", f"data.root={ROOT}", "logger=wandb")
    validate(TrainConfig, valid)
    with pytest.raises(UserError):
        validate(TrainConfig, OmegaConf.to_container(OmegaConf.merge(valid, mistake)))

    options = {"defaults": [{"override /data": "folder"}, {"override /scheduler": "cosine"}]}
    train = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/train.yaml"), resolve=False)
    assert isinstance(train, dict)
    for name, content in ((EXPERIMENT, options | mistake), ("conf/train.yaml", train | mistake)):
        assert len(marked(name, content)) == 1
    [(group, inner)] = mistake.items()
    if isinstance(inner, dict) and (ROOT / "conf" / group).is_dir():
        assert len(marked(f"conf/{group}/mine.yaml", inner)) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (EXPERIMENT, "{defaults: [override /model: alexnet, override /data: folder], seed: 3, optimizer: {lr: 0.1}}"),
        (EXPERIMENT, "{seed: '???', label_smoothing: '${my.x}', model: {mean: ['${my.m}', 0, 1], net: '${my.net}'}}"),
        (EXPERIMENT, "{my: {anything: 1}, hydra: {run: {dir: x}}, model: {net: {anything: [1]}}, optimizer: {eps: 1}}"),
        (EXPERIMENT, "{callbacks: {mine: {_target_: a.B, x: 1}}, metrics: {map: {_target_: a.B}}, loss: {gamma: 2}}"),
        # arguments of the class that an option chooses
        (EXPERIMENT, "{defaults: [override /data: table], data: {separator: ;}}"),
        (EXPERIMENT, "{defaults: [override /scheduler: mine], scheduler: {gamma: 5, steps: [1]}}"),
        (EXPERIMENT, "{defaults: [imagenet_alexnet], data: {separator: ;}}"),
        (EXPERIMENT, "{data: {_target_: mypkg.Mine, depth: 3}, scheduler: {_target_: mypkg.LR, gamma: 7}}"),
        ("conf/data/mine.yaml", "{defaults: [_base], _target_: mypkg.Mine, name: mine, depth: 3}"),
        ("conf/data/mine.yaml", "{defaults: [table], separator: ;}"),
        ("conf/model/mine.yaml", "{name: mine, mean: auto, std: auto, net: {_target_: mypkg.Net, depth: 3}}"),
        ("conf/trainer/mine.yaml", "{defaults: [ddp], max_epochs: 3}"),
        # begins with `# @package _global_`
        ("conf/task/mine.yaml", "{defaults: [override /loss: bce], task: {_target_: a.B}, data: {multilabel: true}}"),
        ("conf/sweep/mine.yaml", "{defaults: [none@sweep], hydra: {sweeper: {params: {seed: '1,2'}}}}"),
    ],
)
def test_what_you_may_write_is_not_marked(name: str, text: str) -> None:
    assert marked(name, read_text(text)) == []


def test_a_file_of_the_whole_config_is_checked_in_a_group_too() -> None:
    (error,) = marked("conf/task/mine.yaml", {"task": {"_target_": "a.B"}, "monitr": "val/map"})
    assert "'monitr' was unexpected" in error.message
