"""What a config may name as `_target_`, and what it may not."""

import functools
import inspect
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.optim
import timm.scheduler
import torch
from conftest import ROOT, command, tiny_train
from torchvision.transforms import v2

import alexlab
from alexlab.engine import config as configs
from alexlab.engine import overrides, targets
from alexlab.engine.errors import UserError
from alexlab.engine.targets import build, build_network, check_targets, without_weights
from alexlab.models.alexnet import AlexNet


def test_networks_optimizers_and_layers_are_allowed() -> None:
    assert targets.locate("alexlab.models.alexnet.AlexNet") is AlexNet
    assert targets.locate("torchvision.models.resnet18").__name__ == "resnet18"
    for name in timm.list_models():
        entry = timm.model_entrypoint(name)
        assert targets.locate(f"{entry.__module__}.{entry.__qualname__}") is entry
    for name in ("Linear", "Conv2d", "TransformerEncoderLayer", "Sequential", "Module"):
        assert targets.locate(f"torch.nn.{name}") is getattr(torch.nn, name)
    for name in ("Adafactor", "AdamW", "SGD", "NAdam"):
        assert targets.locate(f"torch.optim.{name}") is getattr(torch.optim, name)


@pytest.mark.parametrize(
    ("package", "kinds"),
    [
        (torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler),
        (timm.scheduler, timm.scheduler.scheduler.Scheduler),
        (timm.optim, torch.optim.Optimizer),
    ],
    ids=["torch.optim.lr_scheduler", "timm.scheduler", "timm.optim"],
)
def test_schedules_and_optimizers_are_allowed_and_nothing_else_of_their_packages(package: Any, kinds: type) -> None:
    allowed = 0
    for name, value in vars(package).items():
        if name.startswith("_"):
            continue
        target = f"{package.__name__}.{name}"
        if isinstance(value, type) and issubclass(value, (kinds, torch.optim.Optimizer)):
            assert targets.locate(target) is value
            allowed += 1
        else:
            with pytest.raises(UserError, match=r"is not allowed|and a class or a function is needed"):
                targets.locate(target)
    assert allowed >= 7


V2 = "torchvision.transforms.v2"


def test_transforms_of_torchvision_are_allowed() -> None:
    classes = [name for name, value in vars(v2).items() if inspect.isclass(value) and issubclass(value, v2.Transform)]
    assert {"ColorJitter", "Compose", "Lambda", "RandAugment", "RandomResizedCrop"} < set(classes)
    for name in classes:
        assert targets.locate(f"{V2}.{name}") is getattr(v2, name)
    grey = {"_target_": f"{V2}.Grayscale", "num_output_channels": 3}
    node: dict[str, object] = {"_target_": f"{V2}.RandomApply", "p": 1.0, "transforms": [grey]}
    assert build(node)(torch.zeros(3, 4, 4)).shape == (3, 4, 4)
    node = {"_target_": f"{V2}.Lambda", "lambd": {"_target_": "torch.nn.functional.relu", "_partial_": True}}
    assert torch.equal(build(node)(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))


@pytest.mark.parametrize(
    ("node", "why"),
    [
        ({"_target_": f"{V2}.Lambda", "lambd": {"_target_": "os.system", "_partial_": True}}, "os.system is not"),
        ({"_target_": f"{V2}.functional.invert", "_partial_": True}, "of torchvision, only networks for"),
        ({"_target_": f"{V2}.InterpolationMode"}, "is not allowed (it is defined in torchvision.transforms"),
        ({"_target_": f"{V2}._misc.Lambda"}, "names that begin with _ are private"),
        ({"_target_": "torchvision.transforms.v1.Lambda"}, "is not allowed"),
    ],
)  # fmt: skip
def test_other_transforms_of_a_run_are_refused(node: dict[str, object], why: str) -> None:
    with pytest.raises(UserError) as error:
        build(node)
    assert why in str(error.value)


NOT_LISTED = r"is not allowed.*must be from alexlab\.models, .*targets\.py holds the list"
NO_PART = r"_target_=.* (is not allowed|and a class or a function is needed)"


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.hub.load",
        "torch.nnx.Linear",  # begins with an allowed name, but is another module
        "alexlab.models.pretrained.torch.hub.load",  # something else that an allowed module imports
        "alexlab.models.pretrained.torch.load",
        "torch.nn.modules.module.functools.partial",
        "pytorch_lightning.callbacks.model_checkpoint.os.system",
        "alexlab.engine.launcher.spawn",
        "alexlab.tasks.classification.ImageClassifier.load_from_checkpoint",  # inherited, and loads any file
        "alexlab.tasks.load.checkpoint_io.torch.load",
    ],
)
def test_targets_that_are_not_listed_are_refused(target: str) -> None:
    with pytest.raises(UserError, match=NOT_LISTED):
        targets.locate(target)


@pytest.mark.parametrize(
    "target",
    [
        "alexlab.tasks.optimizers.build_own_scheduler",  # builds what it is given, and trusts what it is told to trust
        "alexlab.tasks.optimizers.OptimizerSettings",
        "alexlab.tasks.metrics.build_metrics",
        "alexlab.tasks.base.RunInfo",
    ],
)
def test_of_tasks_only_modules_are_allowed(target: str) -> None:
    with pytest.raises(UserError, match=r"is not allowed: of alexlab.tasks, only tasks and losses are"):
        targets.locate(target)
    assert targets.locate("alexlab.tasks.losses.Focal").__name__ == "Focal"
    with pytest.raises(UserError, match=NOT_LISTED):  # as data._target_ only: it downloads
        targets.locate("alexlab.data.huggingface.HuggingFaceSet")


@pytest.mark.parametrize(
    "target",
    [
        "timm.models._helpers.load_state_dict",  # loads any pickle, with weights_only=False
        "torchvision.models.resnet.ResNet18_Weights.get_state_dict",  # downloads from any address that it gets as self
        "torchvision.models._api.Weights",
        "torch.nn.utils.clip_grad_norm_",
        "timm.models.load_checkpoint",
        "pytorch_lightning.callbacks.model_checkpoint.warning_cache.warn",
    ],
)
def test_of_libraries_only_parts_of_networks_are_allowed(target: str) -> None:
    with pytest.raises(UserError, match=NO_PART):
        targets.locate(target)


def test_no_target_loads_a_pickle(tmp_path: Path) -> None:
    """What such a target would do, and once did."""

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "ran"),)

    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    loads = {"checkpoint_path": str(tmp_path / "evil.pth"), "weights_only": False, "use_ema": False}
    weights = {"_target_": "torchvision.models._api.Weights", "transforms": None, "meta": {}}
    by_url = {"self": {**weights, "url": f"file://{tmp_path}/evil.pth"}}
    for target, settings in (
        ("timm.models._helpers.load_state_dict", loads),
        ("torchvision.models.resnet.ResNet18_Weights.get_state_dict", by_url),
    ):
        with pytest.raises(UserError, match="is not allowed"):
            build({"_target_": target, **settings})
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def a_run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("targets") / "run"
    done = tiny_train(shapes, run_dir)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("model.net", "os.system"),
        ("model.net", "timm.models._helpers.load_state_dict"),
        ("optimizer", "torch.hub.load"),
        ("scheduler", "mypkg.Schedule"),
        ("scheduler", "timm.scheduler.create_scheduler"),
        ("callbacks.mine", "subprocess.call"),
        ("logger.mine", "subprocess.call"),
        ("logger.csv", "pytorch_lightning.loggers.CSVLogger"),
    ],
)
def test_a_run_of_somebody_else_runs_nothing(key: str, target: str, a_run: Path, shapes: Path, tmp_path: Path) -> None:
    """Whatever the config names, and whichever command reads it."""
    run_dir = shutil.copytree(a_run, tmp_path / "run")
    config = configs.read(run_dir / "config.yaml")
    if key == "scheduler":  # a named schedule has keys that no class takes
        config["scheduler"] = {}
    overrides.put(config, f"{key}._target_", target)
    configs.save(config, run_dir / "config.yaml")
    image = next((shapes / "val").rglob("*.jpg"))
    commands = [["train.py", f"resume={run_dir}", "trainer.max_epochs=2"]]
    if key == "model.net":
        run = f"run={run_dir}"
        commands += [["eval.py", run], ["predict", run, f"images={image}"], ["figures", run]]
        commands += [["export", run, "format=torch_export"]]
    for words in commands:
        done = command(*words)
        assert done.returncode == 2, words
        assert f"_target_={target} is not allowed" in done.stderr, words
    if key == "model.net":
        with pytest.raises(UserError, match="is not allowed"):
            alexlab.load(run_dir)


def test_text_is_not_resolved_as_a_reference(tmp_path: Path) -> None:
    """Hydra's instantiate reached targets this way that nothing had checked, at any depth of escapes."""
    path, copied = tmp_path / "config.yaml", tmp_path / "copied"
    node = f"${{oc.create:{{_target_: shutil.copy, _args_: [{__file__}, {copied}]}}}}"
    for slashes in range(8):
        text = "\\" * slashes + node
        settings = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.Identity", "x": text}]}
        build(settings)
        path.write_text(json.dumps({"model": {"net": settings}}))
        build(configs.load(path)["model"]["net"])
    assert not copied.exists()


def test_a_run_of_somebody_else_fetches_nothing() -> None:
    """At any depth of the network's settings."""
    weights = {"pretrained": True, "checkpoint_path": "/x.pth"}
    inner = {"_target_": "timm.create_model", "model_name": "resnet10t", **weights}
    cleaned = without_weights({"_target_": "torch.nn.Sequential", "_args_": [inner, {"_target_": "torch.nn.Identity"}]})
    assert cleaned["_args_"][0]["pretrained"] is False
    assert cleaned["_args_"][0]["checkpoint_path"] == ""
    assert isinstance(build(cleaned)[0], torch.nn.Module)


@pytest.mark.parametrize("target", ["alexlab.callbacks.none.Mine", "torch.nn.functional.relux"])
def test_a_target_of_ones_own_command_line_is_checked_before_a_run_directory_exists(
    target: str, shapes: Path, tmp_path: Path
) -> None:
    done = tiny_train(shapes, tmp_path / "run", f"+callbacks.mine={{_target_: {target}}}")
    assert done.returncode == 2, done.stdout
    assert f"_target_={target}" in done.stderr
    assert not (tmp_path / "run").exists()


def test_targets_are_checked_at_any_depth_of_a_config() -> None:
    check_targets({"callbacks": {"early stopping": None, "mine": [{"_target_": "torch.nn.Identity", "a-b": {"c": 1}}]}})
    with pytest.raises(UserError, match=r"_target_=os.system is not allowed"):
        check_targets({"callbacks": {"mine": [{"_target_": "torch.nn.Identity", "x": [{"_target_": "os.system"}]}]}})
    with pytest.raises(UserError, match=r"a key below a _target_ is 'a b'"):
        check_targets({"loss": {"_target_": "torch.nn.Identity", "x": [{"a b": 1}]}})


PRETRAINED = "alexlab.models.pretrained"
LAYER = {"_target_": "torch.nn.Identity"}
# torch.fx writes names into a program as they are
EVIL = 'a", getattr(__import__("os"), "system")("touch {ran}") or "'


def traced(parts: dict[str, object], names: str = "_args_") -> dict[str, object]:
    """A network whose construction traces a module with such parts."""
    inner = {
        "_target_": "torchvision.models._utils.IntermediateLayerGetter",
        "_args_": [{"_target_": "torch.nn.ModuleDict", names: [parts]}, {"z": "z"}],
    }
    graph = {"_target_": "timm.models._features_fx.GraphExtractNet", "_partial_": True, "_args_": [inner, {"z": "z"}]}
    return {"_target_": "torchvision.models.resnet18", "norm_layer": graph}


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (traced({"a": LAYER, EVIL: LAYER, "z": LAYER}), "names that begin with _ are private to their package"),
        ({"_target_": "timm.models.FeatureGraphNet"}, "only networks for classification, layers"),
        ({"_target_": "torch.nn.ModuleDict", "_args_": [{EVIL: LAYER}]}, "a key below a _target_ is 'a"),
        ({"_target_": "torchvision.models.resnet18", "norm_layer": {"_target_": "torch.nn.ModuleDict",
          "_args_": [[[EVIL, LAYER]]]}}, "torch.nn.ModuleDict: a submodule is named 'a"),
        ({"_target_": f"{PRETRAINED}.torchvision_weights"}, "the return type is not a network"),
        ({"_target_": f"{PRETRAINED}.load_but_head"}, "the return type is not a network"),
        ({"_target_": "timm.create_model", "_args_": ["hf-hub:evil/net"]}, "use model=timm model.name=hf-hub:evil/net"),
        ({"_target_": "timm.create_model", "model_name": "local-dir:/x"}, "is an address"),
        ({"_target_": f"{PRETRAINED}.timm_net", "name": "local-dir:/x"}, "an address must begin with hf-hub:"),
        ({"_target_": f"{PRETRAINED}.timm_net", "name": "hf-hub:evil/net"}, "the config of a run fetches nothing"),
        ({"_target_": "torchvision.models.resnet18", "_args_": ["DEFAULT"]}, "takes 0 of the 1 _args_ by position"),
        ({"_target_": "torch.nn.Identity..x"}, "must be a dotted path, such as torch.nn.Linear"),
        ({"_target_": "torch.nn.Identity", "_recursive_": False}, "_recursive_=False is Hydra's and is not"),
        ({"_target_": "torch.nn.Identity", "inner": {**LAYER, "_partial_": "false"}}, "must be true or false"),
        ({"_target_": "torch.nn.Identity", "_partial_": True}, "builds a partial, which is no network"),
        ({"_target_": "torch.nn.Sequential", "_args_": 5}, "_args_ must be a list"),
        ("x", "model.net must have a _target_"),
    ],
)  # fmt: skip
def test_other_networks_are_refused(net: object, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    settings = json.loads(json.dumps(net).replace("{ran}", str(tmp_path / "ran")))
    with pytest.raises(UserError) as error:
        build_network(settings, num_classes=2)
    assert why in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_partial_object_cannot_get_such_a_name_either() -> None:
    """Its owner builds it; the name is found in the result."""
    parts = {"_target_": "torch.nn.ModuleDict", "_partial_": True, "_args_": [[["a b", LAYER]]]}
    net = {"_target_": "torchvision.models.vgg.VGG", "features": {"_target_": "torch.nn.Sequential", "_args_": [LAYER]}}
    assert build_network(net, 2).features is not None
    with pytest.raises(UserError, match=r"cannot be built|a submodule is named 'a b'"):
        build_network({"_target_": "torchvision.models.resnet18", "norm_layer": parts}, 2)


OURS = """
import functools
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, inner=None, pretrained=True):
        super().__init__()
        self.inner, self.pretrained, self.layer = inner, pretrained, nn.Linear(2, num_classes)
    @classmethod
    def small(cls, num_classes):
        return cls(num_classes)

small = functools.partial(Net, inner=None)
loads = functools.partial(torch.load, weights_only=False)
def plain(num_classes, weights=(1, 2)):
    return Net(num_classes, weights)
def number(num_classes):
    return num_classes
def factory() -> "Callable[..., nn.Module]":
    return nn.ReLU
"""


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that the user added to `OWN`."""
    (tmp_path / "mynets.py").write_text(OURS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mynets", raising=False)
    monkeypatch.setattr(targets, "OWN", (*targets.OWN, "mynets"))
    monkeypatch.setattr(targets, "ALLOWED", (*targets.ALLOWED, "mynets"))


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize(
    "net",
    [
        {"_target_": "mynets.Net"},
        {"_target_": "mynets.Net.small"},
        {"_target_": "mynets.small"},
        {"_target_": "mynets.plain", "_args_": [2]},
        {"_target_": "mynets.Net", "inner": {"_target_": "mynets.factory"}},
        {"_target_": "mynets.Net", "inner": {"_target_": "torch.nn.functional.relu", "_partial_": True}},
        {"_target_": "mynets.Net", "inner": {"_target_": "torch.nn.functional.gelu", "_partial_": True}},
        {"_target_": "mynets.Net", "inner": {"_target_": "torch.nn.init.trunc_normal_", "_partial_": True, "std": 0.1}},
        {"_target_": "mynets.Net", "inner": {"_target_": "timm.layers.get_norm_layer", "norm_layer": "layernorm"}},
        {"_target_": "mynets.Net", "inner": {"_target_": "torch.nn.ModuleDict", "_args_": [{"conv-1": LAYER}]}},
        {"_target_": "torchvision.models.resnet18", "norm_layer": {"_target_": "torch.nn.GroupNorm", "_partial_": True,
                                                                   "_args_": [1]}},
    ],
)  # fmt: skip
def test_networks_of_ones_own_package_are_built(net: dict[str, object]) -> None:
    if net.get("_args_") == [2]:
        assert build(net).layer.out_features == 2
    elif net["_target_"] != "torchvision.models.resnet18":
        assert build_network(net, 3, fetch=True).layer.out_features == 3
        assert build_network(net, 3).layer.out_features == 3
    else:
        assert isinstance(build_network(net, 3).bn1, torch.nn.GroupNorm)


@pytest.mark.usefixtures("ours")
def test_what_ones_own_package_imports_is_refused() -> None:
    for target in ("mynets.loads", "mynets.torch.load", "mynets.functools.partial"):
        with pytest.raises(UserError, match="is not allowed"):
            targets.locate(target)
    with pytest.raises(UserError, match=r"model.net._target_=mynets.number builds a int, which is no network"):
        build_network({"_target_": "mynets.number"}, 2)
    assert build_network({"_target_": "mynets.Net"}, 2, fetch=True).pretrained is True
    assert build_network({"_target_": "mynets.Net"}, 2).pretrained is False, "instead of its default"
    assert without_weights({"_target_": "mynets.plain", "weights": [3, 4]})["weights"] == [3, 4], "these are numbers"


def test_weights_given_by_position_are_removed_too() -> None:
    """timm 1.0.15 would unpickle the file."""
    by_place = ["resnet18", True, {"url": "http://127.0.0.1/x.pth"}, None, "/evil.pth"]
    cleaned = without_weights({"_target_": "timm.create_model", "_args_": by_place})
    assert cleaned["_args_"] == ["resnet18", False, {"url": "http://127.0.0.1/x.pth"}, None, ""]
    entry = without_weights({"_target_": "timm.models.resnet.resnet18", "_args_": [True]})
    assert entry == {"_target_": "timm.models.resnet.resnet18", "_args_": [False]}
    pickled = re.search(r"timm>=([\d.]+)", (ROOT / "pyproject.toml").read_text())
    assert pickled is not None
    assert tuple(map(int, pickled[1].split("."))) >= (1, 0, 26), "whose loading is weights_only by default"


def test_a_resumed_run_fetches_nothing_either(a_run: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(a_run, tmp_path / "run")
    config = configs.read(run_dir / "config.yaml")
    evil = {"name": "resnet10t", "checkpoint_path": str(tmp_path / "evil.pth")}
    config["model"]["net"] |= {"_target_": f"{PRETRAINED}.timm_net", **evil}
    configs.save(config, run_dir / "config.yaml")
    done = command("train.py", f"resume={run_dir}", "trainer.max_epochs=2")
    assert done.returncode == 2
    assert "holds the weights of another network" in done.stderr, "evil.pth was not looked for"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: b: c", "cannot be read as yaml: line 1: mapping values are not allowed"),
        ("a: !!python/object:os.system x", "cannot be read as yaml: line 1: could not determine a constructor"),
        ("- a", "is not a run's config: it has no `model`"),
    ],
    ids=range(3),
)
def test_files_that_are_not_a_config_are_refused(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        configs.load(tmp_path / "config.yaml")
    assert str(tmp_path / "config.yaml") in str(error.value)
    assert why in str(error.value)


def test_a_config_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    """Reading it would wait for a writer forever."""
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"config.yaml is not a file"):
        configs.read(tmp_path / "config.yaml")


def test_names_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UserError, match=r"alexlab.models.alexnet contains no AlexNett: check the name"):
        targets.locate("alexlab.models.alexnet.AlexNett")
    with pytest.raises(UserError, match=r"alexlab.models contains no no_such_net"):
        targets.locate("alexlab.models.no_such_net.Net")
    with pytest.raises(UserError, match=r"is a float, and a class or a function is needed"):
        targets.locate("alexlab.models.alexnet.RELU_GAIN")


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(targets, "ALLOWED", ("needy", "gone"))
    with pytest.raises(UserError, match=r"No module named 'a_package_that_nobody_has'; install what it needs"):
        targets.locate("needy.Net")
    with pytest.raises(
        UserError, match=r"gone is not installed\. Install it, or put the folder that contains it on PYTHON"
    ):
        targets.locate("gone.Net")
    with pytest.raises(UserError, match=r"lightning is not installed\. It is installed as pytorch_lightning"):
        targets.locate("lightning.pytorch.callbacks.Timer", None)


def test_nested_objects_are_built_and_refused_values_are_named() -> None:
    made = build({"_target_": "torch.nn.Linear", "in_features": 2}, out_features=3)
    assert made.weight.shape == (3, 2)
    with pytest.raises(UserError, match=r"norm=x must be lrn.* \(alexlab.models.alexnet.AlexNet\)"):
        build({"_target_": "alexlab.models.alexnet.AlexNet", "norm": "x"}, num_classes=2)
    with pytest.raises(UserError, match=r"torch.nn.Linear cannot be built .*depth"):
        build({"_target_": "torch.nn.Linear", "depth": 2})
    nested = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "os.getcwd"}]}
    with pytest.raises(UserError, match=r"_target_=os.getcwd is not allowed"):
        build(nested)


def test_an_argument_that_a_class_does_not_take_is_answered_with_the_nearest() -> None:
    name = "alexlab.models.alexnet.AlexNet"
    assert targets.takes(targets.locate(name), "hidden")
    assert not targets.takes(targets.locate(name), "hiden")
    assert targets.takes(lambda **more: None, "any")
    with pytest.raises(UserError, match=r"'hiden'. Did you mean hidden\?$"):
        targets.build_network({"_target_": name, "hiden": [9, 9]}, num_classes=2)


def test_a_decorator_may_take_more_arguments_than_what_it_wraps() -> None:
    def renames(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **more: Any) -> Any:
            return function(*args, **{"new" if key == "old" else key: value for key, value in more.items()})

        return wrapper

    class Part:
        @renames
        def __init__(self, new: int) -> None:
            pass

    class Plain:
        def __init__(self, new: int) -> None:
            pass

    for part in (Part, renames(lambda new: new)):
        assert not targets.takes(part, "old")
        assert targets.may_take(part, "old")
    assert not targets.may_take(Plain, "old")


def test_packages_that_another_command_must_allow_are_found() -> None:
    config = {
        "model": {"net": {"_target_": "mypkg.Net", "act": {"_target_": "torch.nn.ReLU"}}},
        "x": [{"_target_": "b.C"}],
    }
    assert targets.packages_to_allow(config) == {"mypkg", "b"}
    assert targets.packages_to_allow(config, ["mypkg.nets", "b"]) == set()
    of_library = {"data": {"_target_": "torchvision.datasets.FakeData"}}
    assert targets.packages_to_allow(of_library) == {"torchvision.datasets"}
    assert targets.packages_to_allow(of_library, ["torchvision.datasets"]) == set()
    with pytest.raises(
        UserError, match=r"If you trust this run and torchvision.datasets, add allow=\[torchvision.data"
    ):
        targets.locate("torchvision.datasets.FakeData", ())
    assert targets.locate("torchvision.datasets.FakeData", ["torchvision.datasets"]).__name__ == "FakeData"
