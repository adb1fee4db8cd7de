"""What a config may name as `_target_`, and what not."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from alexlab import targets
from alexlab.errors import UserError
from alexlab.instantiate import build
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
