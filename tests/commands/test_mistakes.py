"""A user's mistakes: one screen, exit code 2, no traceback, and the value, the rule and the fix."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, command, photo, tiny_train


def assert_refused(done: subprocess.CompletedProcess, *parts: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 24
    for part in parts:
        assert part in done.stderr


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["optimizer.lrr=1"], ["optimizer.lrr: there is no such key. Did you mean optimizer.lr?"]),
        (["model=alexnt"], ["model=alexnt: there is no such option. Did you mean model=alexnet?"]),
        (["data=folder"], ["data.root is missing: give the folder"]),
        (["data=folder", "data.root=/nowhere"], ["/nowhere does not exist: give the folder of the images"]),
        (["trainer=gpu"], ["trainer.accelerator=gpu needs a GPU"]),
        (["trainer=mps"], ["trainer.accelerator=mps needs Apple's GPU"]),
        (["trainer=fsdp"], ["trainer.accelerator=gpu needs a GPU"]),
        (["trainer=ddp_cpu", "data.batch_size=9"], ["data.batch_size=9", "does not divide by 2", "8 or 10"]),
        (["trainer.num_nodes=2", "data.batch_size=8"], ["trainer.num_nodes=2 needs torchrun or srun"]),
        (["optimizer.lr=fast", "seed=-1"], ["2 values of the config are wrong", "optimizer.lr=fast", "seed=-1"]),
        (["model=torchvision", "model.name=resnet19"], ["resnet19", "Did you mean"]),
        (["+trainer.turbo=1"], ["trainer.turbo is not a setting of Lightning's Trainer"]),
        (["model.net._target_=os.system"], ["_target_=os.system is not allowed"]),
        (["data.num_classes=7"], ["data.num_classes=7, but", "contains 10 classes"]),
        (["data.batch_size=1000"], ["data.batch_size=1000 is larger than the 40 training images"]),
        (
            ["data.image_size=32"],
            ["error: AlexNet needs images of at least 64 pixels, and these have 32 x 32: set data.image_size=64 or"],
        ),
        (["resume=latest"], ["resume=latest goes on in the run's own directory: leave hydra.run.dir="]),
        (["ckpt_path=https://x/y.ckpt"], ["ckpt_path=https://x/y.ckpt: must be a run or a file here, and no address"]),
        (["checkpoint.every_n_steps=0"], ["checkpoint.every_n_steps=0: must be a whole number, at least 1, or null"]),
        (["-m", "resume=latest"], ["resume=latest goes on with one run, and -m starts many"]),
        (["data.cache=disk"], ["data.cache=disk: must be device (ram was removed: pixels from prepare.py format=raw"]),
        (["data.cache=device"], ["data.cache=device caches images that the device crops, but data.crop_on=auto crops"]),
        (["ckpt_path=/none.ckpt"], ["/none.ckpt is not a file: give a checkpoint"]),
        (["logger=wandb", "logger.wandb.mode=online"], ["needs an API key", "wandb login"]),
        (["model.name=resnet18"], ["stay what it is; for that network say model=torchvision model.name=resnet18"]),
        (["model=resnet18"], ["no such option. Networks of torchvision and timm: model=torchvision model.name=resnet"]),
        (["run_dir=/tmp/x"], ["run_dir is filled in; a run's directory is chosen with hydra.run.dir=PATH"]),
        (["+model.net.num_classes=7"], ["the data has the number of classes; data.num_classes=7 refuses any other."]),
        (["+foo=1", "+data.size=3"], ["+foo=1: nobody reads foo", "+data.size=3: nobody reads data.size"]),
        (
            ["data=prepared", "data.root=/tmp"],
            ["/tmp holds no prepared.json: python prepare.py data.root=IMAGES out=/tmp"],
        ),
        (["ema=0.99"], ["ema=0.99: it holds keys, and one of them must be set, such as ema.decay"]),
        (["model.net=resnet18"], ["model.net=resnet18: it holds keys", "such as model.net._target_"]),
        (["logger=wandb", "logger.wandb=false"], ["logger.wandb=false: it holds keys", "logger=csv is without W&B"]),
        (["sweep=seeds"], ["sweep=seeds is for many runs: say -m sweep=seeds"]),
        (["+sweep=seeds"], ["that group has an option already; choose another as sweep=OPTION, without the +"]),
        (["data.root=~/nothing"], ["nothing does not exist: give the folder of the images"]),
        (["logs/train"], ["logs/train: settings are written key=value"]),
        (["epochs=3"], ["epochs: there is no such key. Did you mean trainer.max_epochs?"]),
        (["trainer.gpus=1"], ["trainer.gpus: there is no such key. Did you mean trainer.devices?"]),
        (["--epochs", "3"], ["--epochs: settings are written key=value, as in trainer.max_epochs=3\n"]),
        (["--momentum=0.8"], ["--momentum=0.8: settings are written key=value, as in optimizer.momentum=0.8\n"]),
        (["--max-epochs", "--x"], ["--max-epochs: settings are written key=value, as in trainer.max_epochs=...\n"]),
        (["--weight-decay=1e-3"], ["as in optimizer.weight_decay=1e-3\n"]),
        (["--data", "/x"], ["--data: settings are written key=value, as in data=folder data.root=/x\n"]),
        (["--sunshine"], ["as in optimizer.lr=0.01 (and none is called sunshine)\n"]),
        (["optimizer.lr=0.1,0.2"], ["several values are a sweep, python train.py -m optimizer.lr=0.1,0.2; one value"]),
        (["trainer.overfit_batches=null"], ["trainer.overfit_batches=null: must be a share"]),
        (["trainer.precision=16-mixed"], ["trainer.precision=16-mixed needs a GPU"]),
        (["optimizer._target_=torch.optim.Adam"], ["A key is taken out with ~optimizer.momentum"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "=" in value[0] and " " not in value[0] else "",
)
def test_mistake(words: list[str], parts: list[str], shapes: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available() and any(
        w in ("trainer=gpu", "trainer=fsdp", "trainer.precision=16-mixed") for w in words
    ):
        pytest.skip("this machine has a GPU")
    own_data = any(word.startswith("data=") for word in words)
    base = ["model=alexnet", "data.num_workers=0", "logger=csv", f"hydra.run.dir={tmp_path / 'run'}", "debug=fast"]
    if not own_data:
        base += ["data=folder", f"data.root={shapes}", "data.batch_size=8", "data.image_size=64"]
    assert_refused(command("train.py", *base, *words, env={"HOME": str(tmp_path), "WANDB_MODE": ""}), *parts)
    assert not (tmp_path / "run").exists(), "found wrong before the directory is made"


def test_a_port_in_use(shapes: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = tiny_train(shapes, tmp_path / "run", "trainer=ddp_cpu", f"trainer.master_port={port}")
    assert_refused(done, f"trainer.master_port={port} cannot be used (Address already in use)")
    assert not (tmp_path / "run").exists(), "found wrong before the directory is made"


def test_a_directory_that_holds_a_run(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    assert_refused(tiny_train(shapes, tmp_path), "gets a new directory too: leave hydra.run.dir out")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("open('/dev/full', 'wb', buffering=0).write(b'full')", "no space is left there"),
        ("raise PermissionError(13, 'Permission denied', '/locked')", "/locked: no permission there"),
        ("raise OSError(30, 'Read-only file system', '/cdrom')", "/cdrom: that file system is read-only"),
    ],
)
def test_no_space_and_no_permission(fault: str, words: str, tmp_path: Path) -> None:
    code = (
        "import sys; from alexlab.commands.cli import hydra_command\n"
        f"sys.argv = ['x', 'hydra.run.dir={tmp_path}']\n"
        f"def task(config):\n    {fault}\n"
        "hydra_command('train')(task)()"
    )
    assert_refused(command("-c", code), words)


def test_eval_without_a_run(tmp_path: Path) -> None:
    assert_refused(command("eval.py", "run=latest", f"paths.logs={tmp_path}"), "run=latest: there is no run below")
    assert_refused(command("eval.py", "run=/none", f"paths.logs={tmp_path}"), "run=/none is not a run's directory")
    for name in ("train/runs/2026-11-25_02-54-50_274", "train/multiruns/2026-11-25_03-00-00_100/0"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    for group in ("model", "data", "augment", "optimizer", "scheduler", "trainer"):
        told = f"{group} is missing: choose an option by its name, as {group}="
        assert_refused(command("train.py", f"~{group}", f"paths.logs={tmp_path}"), told)
    done = command("eval.py", "run=2026-11-25_02-54-50_27", f"paths.logs={tmp_path}")
    assert_refused(done, "give one, or latest. Did you mean 2026-11-25_02-54-50_274")
    done = command("eval.py", "run=2026-11-25_03-00-00_100", f"paths.logs={tmp_path}")
    assert_refused(done, "is a sweep: take one of its jobs, as run=2026-11-25_03-00-00_100/0.")


def test_checkpoint_of_another_network_and_other_classes(shapes: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert tiny_train(shapes, run_dir, "model.name=mobilenet_v3_small", "test=false").returncode == 0
    done = tiny_train(shapes, tmp_path / "other", f"ckpt_path={run_dir}/checkpoints/best.ckpt")
    assert_refused(done, "holds the weights of another network", "conv1.0.weight is missing")
    for split in ("train", "val"):
        for label in ("arrow", "zebra"):
            photo(tmp_path / "data" / split / label / "1.jpg")
    done = command(
        "eval.py", f"run={run_dir}", f"data.root={tmp_path}/data", f"paths.logs={tmp_path}", "data.num_workers=0"
    )
    assert_refused(done, "has other classes than the run", "new zebra", "missing bar, circle")
    (run_dir / "checkpoints/best.ckpt").write_bytes(b"x" * 100)
    assert_refused(command("eval.py", f"run={run_dir}", f"paths.logs={tmp_path}"), "cannot be read as a checkpoint")


def test_help_is_light() -> None:
    """Nothing heavy is imported before the task runs."""
    code = (
        "import sys, runpy; sys.argv = ['train.py', '--cfg', 'job']\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
        "heavy = {'torch', 'torchvision', 'pytorch_lightning', 'torchmetrics', 'wandb', 'numpy', 'optuna', 'PIL'}\n"
        "sys.exit(f'heavy: {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
