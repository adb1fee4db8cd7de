"""Every choice of every group makes its objects."""

from pathlib import Path

import pytest
import torch
from alexlab.commands.trainer import build_trainer
from conftest import ROOT
from conftest import config_of as compose

from alexlab.commands import build as assemble
from alexlab.commands.plan import make_plan
from alexlab.engine import config as configs
from alexlab.engine import rules
from alexlab.engine.devices import Devices, choose_precision, find_devices
from alexlab.engine.errors import UserError
from alexlab.tasks import optimizers as optim


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("[!_]*.yaml"))


@pytest.mark.parametrize("name", choices("model"))
def test_model(name: str, shapes: Path) -> None:
    composed = configs.resolved(compose(f"model={name}", "data=folder", f"data.root={shapes}", "data.image_size=64"))
    data = assemble.build_data(composed, Devices("cpu", 1, 1)).read()
    model = assemble.build_model(composed, data, "cpu")
    assert not model.channels_last
    assert model(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, 10)


@pytest.mark.parametrize("name", choices("augment"))
@pytest.mark.parametrize("data", choices("data"))
def test_data_and_augment(name: str, data: str, shapes: Path) -> None:
    words = [f"data={data}", f"augment={name}", f"data.root={shapes}", "data.num_classes=10", "data.demo_seed=null"]
    composed = configs.resolved(compose(*words, "data.batch_size=8", "data.image_size=64", "data.num_workers=0"))
    made = assemble.build_data(composed, Devices("cpu", 1, 1)).read()
    images, targets, skipped, _ = next(iter(made.train_dataloader()))
    assert (images.shape, images.dtype, targets.dtype, skipped) == ((8, 3, 64, 64), torch.uint8, torch.int64, {})


@pytest.mark.parametrize("scheduler", choices("scheduler"))
@pytest.mark.parametrize("optimizer", choices("optimizer"))
def test_optimizer_and_scheduler(optimizer: str, scheduler: str) -> None:
    composed = compose(f"optimizer={optimizer}", f"scheduler={scheduler}")
    settings = configs.plain(composed.optimizer)
    made = optim.build_optimizer(torch.nn.Linear(2, 2), settings, 64)
    assert made.defaults["fused"] is True
    assert optim.build_optimizer(torch.nn.Linear(2, 2), settings, 64, may_fuse=False).defaults["fused"] is False
    built = optim.build_schedulers(made, configs.plain(composed.scheduler), 100, 10)
    for entry in built:
        made.step()
        entry["scheduler"].step(*([1.0] if scheduler == "plateau" and entry["interval"] == "epoch" else []))
    assert 0 < made.param_groups[0]["lr"] <= settings["lr"]


@pytest.mark.parametrize("name", choices("trainer"))
def test_trainer(name: str, tmp_path: Path) -> None:
    composed = configs.resolved(compose(f"trainer={name}", "callbacks.early_stopping=3", "callbacks.device_stats=true"))
    composed.run_dir = str(tmp_path)
    try:
        devices = find_devices(composed)
    except UserError as error:
        assert name in ("gpu", "fsdp", "mps"), error  # noqa: PT017
        return
    trainer = build_trainer(composed, devices, {})
    assert trainer.max_epochs == 10
    assert devices.world_size == (2 if name == "ddp_cpu" else max(1, torch.cuda.device_count() if name != "cpu" else 1))


@pytest.mark.parametrize("name", choices("logger"))
def test_logger(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    composed = configs.resolved(compose(f"logger={name}"))
    composed.run_dir = str(tmp_path)
    loggers, board = assemble.build_loggers(composed)
    kinds = {type(logger).__name__ for logger in loggers}
    wanted = {
        "wandb": {"WandbLogger"},
        "tensorboard": {"TensorBoardLogger"},
        "all": {"WandbLogger", "TensorBoardLogger"},
    }
    assert kinds == {"CsvLogger"} | wanted.get(name, set())
    assert (board is not None) == (name in ("wandb", "all"))


@pytest.mark.parametrize("name", [*choices("experiment"), *choices("debug"), *choices("callbacks")])
def test_recipe_breaks_no_rule(name: str) -> None:
    group = next(g for g in ("experiment", "debug", "callbacks") if name in choices(g))
    rules.check(compose(f"{group}={name}", f"data.root={ROOT}"))


@pytest.mark.parametrize(
    ("capability", "wanted"), [((7, 5), "16-mixed"), ((8, 0), "bf16-mixed"), ((9, 0), "bf16-mixed")]
)
def test_precision_that_is_fast(capability: tuple[int, int], wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert choose_precision("auto", "cuda") == wanted
    assert choose_precision("32-true", "cuda") == "32-true"
    assert choose_precision("auto", "mps") == "32-true"


def test_devices_are_those_that_another_launcher_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3", "RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("ALEXLAB_RANKS", raising=False)
    assert find_devices(compose("trainer.accelerator=cpu")) == Devices("cpu", 3, 2)
    assert find_devices(compose("trainer.accelerator=cpu", "trainer.devices=3", "trainer.num_nodes=2")).world_size == 6
    with pytest.raises(UserError, match=r"6 ranks were started, 3 on this machine, and trainer.devices=2 .* makes 4"):
        find_devices(compose("trainer.accelerator=cpu", "trainer.devices=2"))


def test_gpu_numbers_on_a_cpu() -> None:
    with pytest.raises(UserError, match=r"trainer.devices=\[0, 1\] names GPUs, and this run is on cpu"):
        find_devices(compose("trainer.accelerator=cpu", "trainer.devices=[0,1]"))


def test_mixed_half_precision_on_a_cpu_is_refused() -> None:
    for wanted in ("16-mixed", 16):
        with pytest.raises(UserError, match=rf"trainer.precision={wanted} needs a GPU; on a CPU take bf16-mixed, 32"):
            choose_precision(wanted, "cpu")
    assert choose_precision("16-mixed", "cuda") == "16-mixed"


def test_weights_come_with_their_own_mean_and_std(shapes: Path) -> None:
    """As timm says of them: vit_tiny_patch16_224's were trained on -1 to 1."""
    words = ["model=timm", "data=folder", f"data.root={shapes}", "data.image_size=224"]
    for name, more, mean, std in (
        ("vit_tiny_patch16_224", [], [0.5] * 3, [0.5] * 3),
        ("vit_tiny_patch16_224", ["model.std=[1,1,1]"], [0.5] * 3, [1] * 3),
        ("resnet18", [], [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ):
        composed = configs.resolved(compose(*words, f"model.name={name}", *more))
        rules.check(composed)
        data = assemble.build_data(composed, Devices("cpu", 1, 1)).read()
        assemble.build_model(composed, data, "cpu")
        assert (list(composed.model.mean), list(composed.model.std)) == (mean, std), "told in the run's config"


def test_what_a_models_yaml_must_have_and_what_it_must_not(shapes: Path) -> None:
    """As a user's own may be."""
    composed = configs.resolved(compose("model=alexnet_half", "data=folder", f"data.root={shapes}"))
    composed.choices = {"model": "mine"}
    data = assemble.build_data(composed, Devices("cpu", 1, 1)).read()
    composed.model.net.num_classes = 7
    with pytest.raises(UserError, match=r"model\.net\.num_classes=7: the images are of 10 classes, and the network is"):
        assemble.build_model(composed, data, "cpu", make_plan(composed, 1, data.images))
    composed.model.net.num_classes = 10
    del composed.model["mean"], composed.model["name"]
    with pytest.raises(UserError) as told:
        rules.check(composed)
    assert "model.mean is missing: conf/model/mine.yaml must have it, as conf/model/alexnet.yaml has." in str(
        told.value
    )
    assert "model.name is missing: " in str(told.value)
