"""What a config may name as `_target_`, and what not."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import command, tiny_train
from omegaconf import OmegaConf

import alexlab
from alexlab import config as configs
from alexlab import targets
from alexlab.errors import UserError
from alexlab.instantiate import build, without_weights
from alexlab.models.alexnet import AlexNet


def test_allowed_classes_and_functions() -> None:
    assert targets.locate("alexlab.models.alexnet.AlexNet") is AlexNet
    assert targets.locate("torch.optim.SGD") is torch.optim.SGD
    assert targets.locate("torchvision.models.resnet18").__name__ == "resnet18"


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.hub.load",
        "torch.nnx.Linear",  # begins with an allowed name, and is no part of it
        "alexlab.models.zoo.torch.hub.load",  # an allowed module's import of something else
        "alexlab.models.zoo.torch.load",
        "torch.nn.modules.module.functools.partial",
        "pytorch_lightning.callbacks.model_checkpoint.os.system",
        "alexlab.launch.spawn",
    ],
)
def test_everything_else_is_refused(target: str) -> None:
    with pytest.raises(UserError, match=r"is not allowed.*it must be of alexlab\.models, .*targets\.py holds the list"):
        targets.locate(target)


@pytest.mark.parametrize(
    "target",
    [
        "timm.models._helpers.load_state_dict",  # loads any pickle with weights_only=false
        "torchvision.models.resnet.ResNet18_Weights.get_state_dict",  # of any address that it is given as self
        "torchvision.models._api.Weights",
        "torch.nn.init.normal_",
        "timm.models.load_checkpoint",
        "pytorch_lightning.callbacks.model_checkpoint.warning_cache.warn",
    ],
)
def test_of_others_only_what_makes_a_part(target: str) -> None:
    with pytest.raises(UserError, match=r"_target_=.* (is not allowed|and a class or a function is needed)"):
        targets.locate(target)


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    """What such a target would do, and did."""

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
            build(OmegaConf.create({"_target_": target, **settings}))
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
        ("callbacks.mine", "subprocess.call"),
    ],
)
def test_a_run_from_elsewhere_runs_nothing(key: str, target: str, a_run: Path, shapes: Path, tmp_path: Path) -> None:
    """Whatever its config says, and whichever command reads it."""
    run_dir = shutil.copytree(a_run, tmp_path / "run")
    config = OmegaConf.load(run_dir / "config.yaml")
    OmegaConf.update(config, key, {"_target_": target}, force_add=True)
    OmegaConf.save(config, run_dir / "config.yaml")
    image = next((shapes / "val").rglob("*.jpg"))
    words = {"eval.py": [], "predict.py": [f"images={image}"], "export.py": ["format=torch_export"], "figures.py": []}
    commands = [[name, f"run={run_dir}", *more] for name, more in words.items()] if key == "model.net" else []
    for words_ in [*commands, ["train.py", f"resume={run_dir}", "trainer.max_epochs=2"]]:
        done = command(*words_)
        assert done.returncode == 2, words_
        assert f"_target_={target} is not allowed" in done.stderr, words_
    if key == "model.net":
        with pytest.raises(UserError, match="is not allowed"):
            alexlab.load(run_dir)


def test_a_text_is_not_read_a_second_time(tmp_path: Path) -> None:
    """By which Hydra's own instantiate came to targets that nobody had checked, however deep they were escaped."""
    path, copied = tmp_path / "config.yaml", tmp_path / "copied"
    node = f"${{oc.create:{{_target_: shutil.copy, _args_: [{__file__}, {copied}]}}}}"
    for slashes in range(8):
        text = "\\" * slashes + node
        settings = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.Identity", "x": text}]}
        build(settings)
        build(configs.create({"net": settings}).net)
        path.write_text(json.dumps({"model": {"net": settings}}))
        with contextlib.suppress(UserError):  # "is nothing that one refers to"
            loaded = configs.load(path)
            build(loaded.model.net)
            build(configs.resolved(configs.create({**configs.plain(loaded), "data": {"root": "/x"}})).model.net)
    assert not copied.exists()


def test_a_run_from_elsewhere_fetches_nothing() -> None:
    """At any depth of its network's settings."""
    inner = {
        "_target_": "timm.create_model",
        "model_name": "resnet10t",
        "pretrained": True,
        "checkpoint_path": "/x.pth",
    }
    net = {"_target_": "torch.nn.Sequential", "_args_": [inner, {"_target_": "torch.nn.Identity"}]}
    cleaned = without_weights(net)
    assert cleaned["_args_"][0]["pretrained"] is False
    assert cleaned["_args_"][0]["checkpoint_path"] == ""
    assert isinstance(build(cleaned)[0], torch.nn.Module)


def test_a_config_that_would_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n")
    with pytest.raises(UserError, match=r"config.yaml is not a run's config: .* or has aliases"):
        configs.load(path)
    path.write_text("a: " + "x" * configs.LARGEST)
    with pytest.raises(UserError, match=r"config.yaml is not a run's config: it is larger than 1048576 bytes"):
        configs.load(path)


def test_names_that_do_not_exist() -> None:
    with pytest.raises(UserError, match=r"alexlab.models.alexnet holds no AlexNett: check its name"):
        targets.locate("alexlab.models.alexnet.AlexNett")
    with pytest.raises(UserError, match=r"alexlab.models holds no no_such_net"):
        targets.locate("alexlab.models.no_such_net.Net")
    with pytest.raises(UserError, match=r"is a float, and a class or a function is needed"):
        targets.locate("alexlab.models.alexnet.RELU_GAIN")


def test_a_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(targets, "ALLOWED", ("needy", "gone"))
    with pytest.raises(UserError, match=r"No module named 'a_package_that_nobody_has'; install what it needs"):
        targets.locate("needy.Net")
    with pytest.raises(UserError, match=r"the package gone is not installed"):
        targets.locate("gone.Net")


def test_build_makes_nested_objects_and_tells_what_is_refused() -> None:
    made = build(OmegaConf.create({"_target_": "torch.nn.Linear", "in_features": 2}), out_features=3)
    assert made.weight.shape == (3, 2)
    with pytest.raises(UserError, match=r"norm=x: must be lrn.* \(alexlab.models.alexnet.AlexNet\)"):
        build(OmegaConf.create({"_target_": "alexlab.models.alexnet.AlexNet", "norm": "x"}), num_classes=2)
    with pytest.raises(UserError, match=r"torch.nn.Linear cannot be made .*depth"):
        build(OmegaConf.create({"_target_": "torch.nn.Linear", "depth": 2}))
    nested = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "os.getcwd"}]}
    with pytest.raises(UserError, match=r"_target_=os.getcwd is not allowed"):
        build(OmegaConf.create(nested))
