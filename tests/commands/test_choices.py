"""Every option of every group builds its objects."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT, config_of

from alexlab.commands import build
from alexlab.commands.plan import make_plan
from alexlab.engine.devices import Devices, choose_precision, find_devices
from alexlab.engine.errors import UserError
from alexlab.engine.signals import SignalRecorder
from alexlab.tasks import optimizers

CPU = Devices("cpu", 1, 1)


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("[!_]*.yaml"))


def yaml_of(group: str, name: str) -> str:
    return (ROOT / "conf" / group / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", choices("model"))
def test_each_model_gives_logits(name: str, shapes: Path) -> None:
    config = config_of(f"model={name}", "data=folder", f"data.root={shapes}", "data.image_size=64")
    task = build.build_task(config, build.build_data(config, CPU).read(), "cpu")
    assert not task.run.channels_last
    assert task(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, 10)


@pytest.mark.parametrize("name", choices("augment"))
@pytest.mark.parametrize("data", [name for name in choices("data") if "_target_" not in yaml_of("data", name)])
def test_each_data_and_augment_give_a_batch(name: str, data: str, shapes: Path) -> None:
    overrides = [f"data={data}", f"augment={name}", f"data.root={shapes}", "data.num_classes=10", "data.demo_seed=null"]
    config = config_of(*overrides, "data.batch_size=8", "data.image_size=64", "data.num_workers=0")
    images, targets, skipped, _ = next(iter(build.build_data(config, CPU).read().train_dataloader()))
    assert (images.shape, images.dtype, targets.dtype, skipped) == ((8, 3, 64, 64), torch.uint8, torch.int64, {})


@pytest.mark.parametrize("scheduler", choices("scheduler"))
@pytest.mark.parametrize("optimizer", choices("optimizer"))
def test_each_optimizer_steps_with_each_scheduler(optimizer: str, scheduler: str) -> None:
    config = config_of(f"optimizer={optimizer}", f"scheduler={scheduler}")
    settings = config.optimizer.model_dump(exclude_unset=True)
    built = optimizers.build_optimizer(torch.nn.Linear(2, 2), settings, 64)
    assert built.defaults["fused"] is True
    not_fused = optimizers.build_optimizer(torch.nn.Linear(2, 2), settings, 64, may_fuse=False)
    assert not_fused.defaults["fused"] is False
    schedule = config.scheduler.model_dump(exclude_unset=config.scheduler.target is not None)
    for entry in optimizers.build_schedulers(built, schedule, 100, 10):
        built.step()
        entry["scheduler"].step(*([1.0] if scheduler == "plateau" and entry["interval"] == "epoch" else []))
    assert 0 < built.param_groups[0]["lr"] <= settings["lr"]


@pytest.mark.parametrize("name", choices("trainer"))
def test_each_trainer_is_built_or_needs_a_gpu(name: str, tmp_path: Path) -> None:
    overrides = [f"trainer={name}", "callbacks.early_stopping=3", "callbacks.device_stats=true", "logger=csv"]
    config = config_of(*overrides, run_dir=tmp_path)
    try:
        devices = find_devices(config.trainer)
    except UserError as error:
        assert name in ("gpu", "fsdp", "mps"), error  # noqa: PT017
        return
    plan = make_plan(config, devices.world_size, {"train": 640, "val": 64})
    _, _, callbacks = build.build_callbacks(config, SignalRecorder(), plan, None)
    trainer = build.build_trainer(config, devices, [], callbacks)
    assert trainer.max_epochs == 10
    assert devices.world_size == (2 if name == "ddp_cpu" else max(1, torch.cuda.device_count() if name != "cpu" else 1))


@pytest.mark.parametrize("name", choices("logger"))
def test_each_logger_is_built_and_writes_nothing_yet(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = config_of(f"logger={name}", f"paths.logs={tmp_path / 'logs'}", run_dir=tmp_path / "run")
    loggers, wandb = build.build_loggers(config)
    built = [*loggers, *(tracker.logger for tracker in build.build_trackers(config))]
    further = {"wandb": {"WandbLogger"}, "tensorboard": {"TensorBoardLogger"}, "mlflow": {"MlflowLogger"}}
    further["all"] = further["wandb"] | further["tensorboard"]
    assert {type(logger).__name__ for logger in built} == {"CsvLogger"} | further.get(name, set())
    assert (wandb is not None) == (name in ("wandb", "all"))
    assert not (tmp_path / "run").exists(), "a logger writes nothing before the run starts"


@pytest.mark.parametrize(
    ("capability", "wanted"), [((7, 5), "16-mixed"), ((8, 0), "bf16-mixed"), ((9, 0), "bf16-mixed")]
)
def test_auto_precision_is_what_the_device_is_fast_at(
    capability: tuple[int, int], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert choose_precision("auto", "cuda") == wanted
    assert choose_precision("32-true", "cuda") == "32-true"
    assert choose_precision("auto", "mps") == "32-true"


def test_devices_are_those_that_another_launcher_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3", "RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("ALEXLAB_RANKS", raising=False)

    def found(*overrides: str) -> Devices:
        return find_devices(config_of("trainer.accelerator=cpu", *overrides).trainer)

    assert found() == Devices("cpu", 3, 2, 6)
    assert found("trainer.devices=3", "trainer.num_nodes=2").world_size == 6
    with pytest.raises(UserError, match=r"6 ranks were started, 3 on this machine, but `trainer.devices=2` .* makes 4"):
        found("trainer.devices=2")


def test_more_devices_or_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"`trainer.devices=2`: this machine has 1. Choose 1 or less, or auto"):
        find_devices(config_of("trainer=gpu", "trainer.devices=2").trainer)
    for key, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("ALEXLAB_RANKS", raising=False)
    sentence = (
        r"^2 ranks were started on this machine, and this one finds 1 GPU: each rank must see all 2 GPUs, .* --gpus"
    )
    sentence += "-per-node=2 without --gpus-per-task"
    with pytest.raises(UserError, match=sentence):
        find_devices(config_of("trainer=ddp", "trainer.accelerator=gpu").trainer)


def test_gpu_numbers_and_half_precision_on_a_cpu_are_refused() -> None:
    with pytest.raises(UserError, match=r"`trainer.devices=\[0, 1\]` names GPUs, and this run uses cpu"):
        find_devices(config_of("trainer.accelerator=cpu", "trainer.devices=[0,1]").trainer)
    for wanted in ("16-mixed", 16):
        with pytest.raises(UserError, match=rf"`trainer.precision={wanted}` needs a GPU: on a CPU use bf16-mixed, 32"):
            choose_precision(wanted, "cpu")
    assert choose_precision("16-mixed", "cuda") == "16-mixed"


@pytest.mark.parametrize(
    ("name", "more", "mean", "std"),
    [
        ("vit_tiny_patch16_224", [], [0.5] * 3, [0.5] * 3),
        ("vit_tiny_patch16_224", ["model.std=[1,1,1]"], [0.5] * 3, [1] * 3),
        ("resnet18", [], [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ],
)
def test_auto_mean_and_std_are_those_of_timms_weights(
    name: str, more: list[str], mean: list[float], std: list[float], shapes: Path
) -> None:
    overrides = ["model=timm", f"model.name={name}", "data=folder", f"data.root={shapes}", "data.image_size=224"]
    config = config_of(*overrides, *more)
    augment = build.build_task(config, build.build_data(config, CPU).read(), "cpu").augment
    assert (1 / augment.scale.flatten() / 255).tolist() == pytest.approx(std)
    assert (-augment.shift.flatten() * torch.tensor(std)).tolist() == pytest.approx(mean)


def test_a_monitor_that_no_metric_has_is_refused_before_training(shapes: Path) -> None:
    config = config_of("monitor=val/acc", "data=folder", f"data.root={shapes}", "data.image_size=64")
    with pytest.raises(UserError, match=r"`monitor=val/acc` is not a metric of the validation: choose one of val/loss"):
        build.build_task(config, build.build_data(config, CPU).read(), "cpu")


@pytest.mark.parametrize(
    ("entry", "built"),
    [("_target_: torch.nn.ReLU", "ReLU"), ("_target_: pytorch_lightning.callbacks.Timer, _partial_: true", "partial")],
)
def test_an_entry_of_callbacks_that_is_no_callback_is_refused(entry: str, built: str, tmp_path: Path) -> None:
    config = config_of(f"+callbacks.mine={{{entry}}}", run_dir=tmp_path)
    with pytest.raises(UserError, match=f"^callbacks.mine._target_=.* builds a {built}, which is no callback: "):
        build.build_own_callbacks(config)
