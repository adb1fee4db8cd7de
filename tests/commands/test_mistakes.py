"""A user's mistakes: one screen, exit code 2, no traceback, no run directory; the value, the rule and the fix."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, command, photo, tiny_train

from alexlab.commands import cli

EXTENDING = (ROOT / "docs/extending.md").read_text()


def assert_refused(done: subprocess.CompletedProcess, *parts: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 14
    for part in parts:
        assert part in done.stderr


def assert_no_run(folder: Path) -> None:
    assert not [path for path in folder.rglob("*") if path.is_file() or path.parent.name == "runs"]


# -- in overrides


@pytest.mark.parametrize(
    ("words", "part"),
    [
        # keys
        (
            ["optimizer.lrr=1"],
            "`optimizer.lrr=1`: there is no such key. Did you mean `optimizer.lr`? torch.optim.SGD takes ",
        ),
        (
            ["optimizer=adamw", "optimizer.momentum=0.9"],
            "`optimizer.momentum=0.9`: there is no such key. optimizer=adamw has lr, betas, weight_dec",
        ),
        (["scheduler.gamma=0.5"], "scheduler=cosine has name, unit, warmup, min_factor. `python train.py --help`"),
        (["+scheduler.gamma=0.5"], "has no effect with scheduler.name=cosine, which has name, unit, warmup, min_fact"),
        (["optimizer=adamw", "optimizer.epss=1"], "Did you mean `optimizer.eps`? torch.optim.AdamW takes amsgrad, "),
        (["model.net.hiden=[9,9]"], "Did you mean `model.net.hidden`? alexlab.models.alexnet.AlexNet takes ceil_mode,"),
        (["trainer.max_tme=1"], "there is no such key. Did you mean `trainer.max_time`?"),
        (["trainer.enable_progress_bar=false"], "is not available: choose with callbacks.progress=rich, plain or none"),
        (["+trainer.logger=x"], "`trainer.logger=x` is not available: choose loggers with logger=csv, wandb"),
        (["~logger"], "`logger` is missing: choose an option by its name, such as logger=csv."),
        (["~ckpt_path"], "`~ckpt_path`: the key is null, which is as if it were deleted: remove the override."),
        (["~hydra.run"], "`~hydra.run`: settings of Hydra cannot be deleted: set them, as in hydra.run.dir=PATH."),
        (["batch_size=1"], "`batch_size=1`: there is no such key. Did you mean `data.batch_size`?"),
        (["modle=alexnet"], "`modle=alexnet`: there is no such key. Did you mean `model`?"),
        (["~optimizer.momentun"], "there is no such key. Did you mean `~optimizer.momentum`?"),
        (["~qq.zz"], "`~qq.zz`: there is no such key. `python train.py --help` lists all."),
        (["run_dir=/x"], "`run_dir=/x` is filled in: choose a run directory with hydra.run.dir=PATH."),
        (["callbacks.mine={_target_: a.B}"], "there is no such key. `+callbacks.mine={_target_: a.B}` adds it."),
        (["my.note=1"], "`my.note=1`: there is no such key. `+my.note=1` adds it."),
        (
            ["trainer.maxepochs=3", "seed=1", "optimizer.lrr=1", "~logger.x"],
            (
                "3 values of the config are wrong:\n  `trainer.maxepochs=3`: there is no such key. Did you mean "
                "`trainer.max_epochs`? `python train.py --help` lists all.\n  `optimizer.lrr=1`: there is no such key."
            ),
        ),
        (
            ["callbacks=early_stopping", "callbacks.early_stopping.patence=2"],
            "callbacks.early_stopping is the value 10, with no keys below it: write callbacks.early_stopping=VALUE.",
        ),
        (
            ["seed=1", "optimizer.lr", "=", "0.1"],
            "`optimizer.lr =`: settings have no spaces around the =: write optimizer.lr=0.1.",
        ),
        (["model.mean=[123,117,104]"], "the net gets (pixel / 255 - mean) / std, so give numbers from 0 to 1: divide"),
        (["model.std=[58,57,57]"], "`model.std=[58, 57, 57]`: the net gets (pixel / 255 - mean) / std, so give num"),
        (["data=table", "data.file=x", "data.root=/tmp", "data.columns=x"], "`data.columns=x` must be a mapping, such"),
        (["data.batch=8"], "`data.batch=8`: there is no such key. Did you mean `data.batch_size`?"),
        (["allow=mypkg"], "`allow=mypkg` must be a list: write allow=[mypkg]."),
        (["hydra.run.dir=/proc/x"], "/proc/x: nothing can be created in /proc: choose another place."),
        (["+foo=1", "+data.size=3"], "2 values of the config are wrong:\n  `data.size=3`: there is no such key."),
        # options
        (
            ["data=/my/photos"],
            "For a folder of images write `data=folder data.root=/my/photos`.",
        ),
        (["--config-name", "x"], "--config-name: add your own options with --config-dir DIR, and choose them with"),
        (["trainer=dpp"], "`trainer=dpp`: there is no such option. Did you mean `trainer=ddp`? The options are auto, "),
        (
            ["hydra/launcher=qq"],
            "`hydra/launcher=qq`: there is no such option. The options are basic, local, ray, slurm",
        ),
        (["-m", "seed=0,1", "hydra.sweep.subdir=x"], "all jobs: each would write over the results of the others: give"),
        (["model=resnet18"], "Networks of torchvision and timm: model=torchvision model.name=resnet18."),
        (["logger=null"], "`logger=null`: choose an option by its name: all, csv, mlflow, none, "),
        (["+sweep=seeds"], "`sweep` is chosen twice: choose it once, without +, and in a yaml with `overr"),
        (["sweep=seeds"], "sweep=seeds is for many runs: add -m"),
        (["model.name=resnet18"], "would rename model=alexnet without changing the network"),
        (["model.net=resnet18"], "`model.net=resnet18` must be a mapping with a _target_, which names a class."),
        # values
        (["optimizer.lr=[1"], "`optimizer.lr=[1` must be a number."),
        (["optimizer.lr=0.1,0.2"], "several values are for several jobs: add -m, or put a list in brackets"),
        (["data.cache=ram"], "`data.cache=ram` was removed: prepare pixels with `alexlab prepare format=raw`"),
        (["data=folder"], "`data.root` is missing: give the folder of the images with data.root=PATH."),
        (["data=folder", "data.root=~/none"], "/none` does not exist: give the folder of the images with data.root="),
        (["resume=latest", "hydra.run.dir=/x"], "continues in the run's own directory: remove hydra.run.dir=/x"),
        (["-m", "resume=latest"], "`resume.run=latest` continues one run, and -m starts many: remove one of them."),
        # another program's form
        (["logs/train"], "`logs/train`: settings are written key=value"),
        (["--epochs", "3"], "--epochs: settings are written key=value, as in trainer.max_epochs=3.\n"),
        (["-c", "job", "--epochs", "3"], "--epochs: settings are written key=value, as in trainer.max_epochs=3.\n"),
        (["--weight-decay=1e-3"], "as in optimizer.weight_decay=1e-3.\n"),
        (["--data", "/x"], "as in data=folder data.root=/x.\n"),
        (["--sunshine"], "as in optimizer.lr=0.01 (there is no key sunshine).\n"),
        (["seed=1", "--cfg", "job", "-m"], "--cfg and -m: only one of them is possible at once: remove the rest."),
        (["--config-dir", "/nowhere"], "--config-dir=/nowhere: there is no such folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_override_of_train_is_refused(words: list[str], part: str, tmp_path: Path) -> None:
    done = command("train.py", f"paths.logs={tmp_path}/logs", *words, env={"HOME": str(tmp_path), "WANDB_MODE": ""})
    assert_refused(done, part)
    assert_no_run(tmp_path)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["eval.py"], "`run` is missing: give a run's directory with run=PATH, or run=latest."),
        (
            ["eval.py", "run=latst"],
            "`run=latst` is not a run's directory (it has no config.yaml): give one, or latest. ",
        ),
        (["eval.py", "latest"], "`latest`: settings are written key=value, such as run=latest."),
        (["eval.py", "run=x", "checkpoint=best"], "`checkpoint=best`: there is no such key."),
        (["eval.py", "run=x", "trainer=cpu"], "has no options of trainer. Set one of its keys: accelerator, precision"),
        (["predict", "-m", "run=x", "images=a,b"], "all jobs: each would write over the results of the others: give"),
        (["compare", "runs=[]"], "`runs=[]` must be a text that is not empty or a list that is not empty."),
        (["predict", "-m", "run="], "1 of the sweep's 1 job has wrong values, so no job was started"),
        (["compare", "srot=val/loss"], "Did you mean `sort`? `alexlab compare --help` lists all."),
        (["dashboard", "~dashboard.sections.picture"], "Did you mean `~dashboard.sections.pictures`?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_override_of_another_command_is_refused(words: list[str], part: str, tmp_path: Path) -> None:
    done = command(*words, f"paths.logs={tmp_path}/logs")
    assert_refused(done, part)
    assert ("Did you mean latest?" in done.stderr) == ("run=latst" in words)
    assert_no_run(tmp_path)


# -- in yaml files


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Options of a user, each with a mistake."""
    conf = tmp_path_factory.mktemp("conf")
    for name, text in {
        "experiment/slips": (
            "# @package _global_\nlabel_smothing: 0.1\ndata: {bach_size: 4}\naugment: {mixpu: 0.1}\n"
            "scheduler: {warmpu: 1}\nema: {decya: 0.9}\n"
        ),
        "experiment/no_package": "optimizer: {lr: 0.3}\n",
        "experiment/no_package_override": "defaults: [override /model: alexnet_bn]\noptimizer: {lr: 0.3}\n",
        "experiment/arguments": (
            "# @package _global_\noptimizer: {lrr: 0.1}\nloss: {smoothin: 0.2}\n"
            "augment: {transforms: [{_target_: torchvision.transforms.v2.RandomInvert, pp: 1}]}\n"
        ),
        "loss/empty": "",
        "loss/nested": "tempered: {_target_: mypkg.Tempered}\n",
        "task/misspelt": "_target: mypkg.Task\n",
        "experiment/mapping": "# @package _global_\ndefaults:\n  override /model: alexnet_bn\n",
        "experiment/package": "# @package global\ndefaults: [override /model: alexnet_bn]\n",
        "experiment/bare": "# @package _global_\ndefaults: [model: alexnet_bn]\n",
        "experiment/types": "# @package _global_\nseed: 3x\noptimizer: {lr: '0,01'}\n",
        "augment/extends": "defaults: [base]\n",
        "augment/mapping": "defaults: [_base]\ntransforms: {_target_: torchvision.transforms.v2.RandomInvert}\n",
        "metrics/top": "_target_: torchmetrics.classification.MulticlassF1Score\n",
        "callbacks/unindented": "defaults: [_base]\ntimer:\n_target_: lightning.Timer\n",
        "scheduler/named": "_target_: torch.optim.lr_scheduler.StepLR\nstep_size: 2\nwarmup: 3\n",
        "experiment/marked": "\ufeff# @package _global_\noptimizer: {lr: 0.3}\n",
        "experiment/group": "# @package _global_\ndefaults: [override /modl: alexnet_bn]\n",
        "experiment/resumes": "# @package _global_\nresume: {run: latest}\n",
        "augment/mine": "defaults: [_base]\ncustom: {x: 1}\n",
        "logger/mine": "defaults: [csv]\nmlflow: {_target_: mlflow.Logger}\n",
        "model/mynet": (
            "name: mynet\nmean: auto\nstd: auto\nnet: {_target_: alexlab.models.alexnet.AlexNet, width: 0.5}\n"
        ),
        "model/plain": "name: plain\nmean: auto\nstd: auto\nnet: {_target_: alexlab.models.mynet.MyNet}\n",
        "optimizer/mine": "_target_: torch.optim.SGD\nlearning_rate: 0.1\n",
        "scheduler/mine": "warmup: 1\n",
    }.items():
        path = conf / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return conf


NEAR = "there is no such key. Did you mean"
PACKAGE = "its yaml must begin with `# @package _global_`, or its keys have no effect."


@pytest.mark.parametrize(
    ("words", "sentences"),
    [
        (
            ["experiment=slips", "~logger"],
            [
                "6 values of the config are wrong:",
                "`logger` is missing: choose an option by its name, such as logger=csv.",
                f"`label_smothing=0.1`: {NEAR} `label_smoothing`? (CONF/experiment/slips.yaml)",
                f"`data.bach_size=4`: {NEAR} `data.batch_size`? (CONF/experiment/slips.yaml)",
                f"`augment.mixpu=0.1`: {NEAR} `augment.mixup`? (CONF/experiment/slips.yaml)",
                f"`scheduler.warmpu=1`: {NEAR} `scheduler.warmup`? (CONF/experiment/slips.yaml)",
                f"`ema.decya=0.9`: {NEAR} `ema.decay`? (CONF/experiment/slips.yaml)",
            ],
        ),
        (["experiment=no_package"], [f"`experiment=no_package`: {PACKAGE}"]),
        (["experiment=no_package_override"], [f"`experiment=no_package_override`: {PACKAGE}"]),
        (
            ["experiment=arguments", "+callbacks.x={_target_: alexlab.callbacks.grad_norm.GradNorm, evry: 3}"],
            [
                "4 values of the config are wrong:",
                (
                    "`loss.smoothin=0.2`: alexlab.tasks.losses.CrossEntropy has no argument of this name. Did you mean "
                    "`loss.label_smoothing`? (CONF/experiment/arguments.yaml)"
                ),
                (
                    "`optimizer.lrr=0.1`: torch.optim.SGD has no argument of this name. Did you mean `optimizer.lr`? "
                    "(CONF/experiment/arguments.yaml)"
                ),
                (
                    "`augment.transforms.0.pp=1`: torchvision.transforms.v2.RandomInvert has no argument of this name. "
                    "Did you mean `augment.transforms.0.p`?"
                ),
                "`callbacks.x.evry=3`: alexlab.callbacks.grad_norm.GradNorm has no argument of this name. It takes no",
            ],
        ),
        (["loss=empty"], ["`loss=empty`: its yaml has no _target_ at the top: write `_target_: mypkg.MyClass`, and"]),
        (["loss=nested"], ["`loss=nested`: its yaml has no _target_ at the top: write `_target_: mypkg.MyClass`, and"]),
        (["task=misspelt"], ["`task=misspelt`: its yaml has no _target_ at the top: write `_target_: mypkg.MyClass`"]),
        (["experiment=mapping"], ["`experiment=mapping`: each line below `defaults:` of its yaml begins with `- `."]),
        (["experiment=package"], [f"`experiment=package`: {PACKAGE}"]),
        (
            ["experiment=bare"],
            ["An option of /model is chosen in a yaml with `override /model: OPTION`, with overrid"],
        ),
        (
            ["experiment=types"],
            ["`seed=3x` must be a whole number. (CONF/experiment/types.yaml)", "number. (CONF/experiment/types.yaml)"],
        ),
        (["augment=extends"], ["`augment=base`: there is no such option. Did you mean `augment=basic`?"]),
        (
            ["augment=mapping"],
            ["`augment=mapping`: its yaml has a mapping where conf/ has a list, or the reverse: en"],
        ),
        (["metrics=top"], ["Put it below a name of your choice: `mine: {_target_: torchmetrics.classification.Mu"]),
        (
            ["callbacks=unindented"],
            [
                "`callbacks.timer=null`: there is no such key. A callback of your own must be a mapping with a _targe",
                "Put it below a name of your choice: `mine: {_target_: lightning.Timer}`. (CONF/callbacks/unindented.y",
            ],
        ),
        (
            ["scheduler=named"],
            ["`scheduler.warmup=3`: torch.optim.lr_scheduler.StepLR has no argument of this name. It takes gamma, "],
        ),
        (["experiment=marked"], ["CONF/experiment/marked.yaml begins with a byte order mark: save it as UTF-8 with"]),
        (
            ["experiment=group"],
            [
                (
                    "`override /modl` (CONF/experiment/group.yaml): there is no such group. Did you mean `override "
                    "/model`? The groups are augment, callbacks, "
                )
            ],
        ),
        (
            ["experiment=resumes", "-m", "seed=1,2"],
            ["`resume.run=latest` continues one run, and -m starts many: remove one of them."],
        ),
        (["augment=mine"], ["`augment.custom`: there is no such key. augment has crop,", "(CONF/augment/mine.yaml)"]),
        (["logger=mine"], ["`logger.mlflow._target_=mlflow.Logger`: there is no", "(CONF/logger/mine.yaml)"]),
        (
            ["optimizer=mine"],
            [f"`optimizer.learning_rate=0.1`: {NEAR} `optimizer.lr`? (CONF/optimizer/mine.yaml)"],
        ),
        (
            ["scheduler=mine"],
            ["`scheduler.name` is missing: give the name of a schedule, or a class as scheduler._target_."],
        ),
        (["model=mynt"], ["`model=mynt`: there is no such option. Did you mean `model=mynet`?"]),
        (
            ["model=mynet", "model.net.dropot=0.5"],
            ["there is no such key. Did you mean `model.net.dropout`? alexlab.models.alexnet.AlexNet takes ceil_mode,"],
        ),
        (
            ["model=plain", "model.net.dropout=0.5"],
            ["_target_=alexlab.models.mynet.MyNet: alexlab.models contains no"],
        ),
    ],
    ids=lambda value: value[0],
)
def test_a_mistake_in_a_yaml_is_refused(words: list[str], sentences: list[str], conf: Path, tmp_path: Path) -> None:
    done = command("train.py", "--config-dir", str(conf), f"paths.logs={tmp_path}/logs", *words)
    assert_refused(done, *(sentence.replace("CONF", str(conf)) for sentence in sentences))
    assert_no_run(tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ["loss._target_=timm.loss.LabelSmoothingCrossEntropy", "+loss.smoothing=0.1"],  # of docs/extending.md
        ["loss=focal", "loss._target_=torch.nn.CrossEntropyLoss", "~loss.gamma", "label_smoothing=0.1"],
        ["task=multilabel", "loss._target_=torch.nn.BCEWithLogitsLoss", "--cfg", "job"],
        ["+my.loss=torch.nn.CrossEntropyLoss", "loss._target_=${my.loss}"],
        ["scheduler=cosine", "optimizer=adamw", "+optimizer.eps=1e-6", "+metrics.f1={_target_: torchmetrics.F1Score}"],
        ["augment.transforms=[{_target_: torchvision.transforms.v2.RandomInvert, p: 0.1}]", "logger=all"],
        ["callbacks=[early_stopping,grad_norm]", "model=timm", "model.name=resnet10t", "+model.net.drop_rate=0.1"],
    ],
    ids=lambda words: words[0],
)
def test_arguments_that_a_class_takes_are_not_refused(words: list[str], shapes: Path, tmp_path: Path) -> None:
    assert "loss._target_=timm.loss.LabelSmoothingCrossEntropy '+loss.smoothing=0.1'" in EXTENDING
    done = tiny_train(shapes, tmp_path / "run", *words, "dry_run=true")
    assert done.returncode == 0, done.stderr


def test_overrides_of_an_earlier_run_are_not_compared_with_todays_options(shapes: Path, tmp_path: Path) -> None:
    done = tiny_train(shapes, tmp_path / "run", "loss=focal", "trainer.max_epochs=1")
    assert done.returncode == 0, done.stderr
    done = command(
        "train.py", f"from_run={tmp_path / 'run'}", "+loss.gamma=3", "dry_run=true", f"paths.logs={tmp_path}"
    )
    assert done.returncode == 0, done.stderr


def test_a_module_that_fails_at_import_is_imported_once(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "flaky.py").write_text("print('imported', flush=True)\nimport missing_dep\n")
    words = [f"hydra.run.dir={tmp_path / 'run'}", "loss._target_=flaky.Loss", "data=folder", f"data.root={shapes}"]
    done = command("train.py", *words, env={"PYTHONPATH": f"{tmp_path}:{ROOT}/src"})
    assert_refused(done, "_target_=flaky.Loss: No module named 'missing_dep'; install what it needs.")
    assert done.stdout.count("imported") == 1


def test_keys_of_the_section_my_are_the_users_own(shapes: Path, tmp_path: Path) -> None:
    done = tiny_train(shapes, tmp_path / "run", "+my.note=x", "+my.deep.list=[1,a]", "dry_run=true")
    assert done.returncode == 0, done.stderr


# -- found with the images and the network at hand


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["trainer.accelerator=gpu"], ["`trainer.accelerator=gpu` needs a GPU"]),
        (["trainer.accelerator=mps"], ["`trainer.accelerator=mps` needs a GPU"]),
        (
            ["trainer=ddp_cpu", "data.batch_size=1"],
            ["`data.batch_size=1` is the global batch", "2 devices", "=2 or more"],
        ),
        (
            ["trainer.grad_compression=bf16"],
            ["`trainer.grad_compression=bf16` needs trainer=ddp on several GPUs, and this run has 1 device (cpu)"],
        ),
        (["paths.logs=gs://b/x"], ["`paths.logs=gs://b/x` must be a folder, or s3://BUCKET/PATH."]),
        (["paths.data=s3://b/x"], ["`paths.data=s3://b/x` must be a folder of this machine, no address."]),
        (["hydra.run.dir=s3://b/x"], ["`hydra.run.dir=s3://b/x` must be a folder of this machine, no address."]),
        (["trainer.num_nodes=2"], ["`trainer.num_nodes=2` needs torchrun, srun or another launcher"]),
        (["trainer.precision=16-mixed"], ["`trainer.precision=16-mixed` needs a GPU"]),
        (["model=torchvision", "model.name=resnet19"], ["resnet19", "Did you mean"]),
        (["data.num_classes=7"], ["data.num_classes=7", "10 classes"]),
        (["data.batch_size=1000"], ["data.batch_size=1000", "40 training images"]),
        (["data.image_size=32"], ["AlexNet needs images of at least 64 pixels"]),
        (["data.cache=device"], ["data.cache=device", "data.crop_on"]),
        (["ckpt_path=/none.ckpt"], ["/none.ckpt"]),
        (["logger=wandb", "logger.wandb.mode=online"], ["needs an API key", "wandb login"]),
        (["optimizer._target_=torch.optim.Adam"], ["~optimizer.momentum ~optimizer.nesterov"]),
        (
            ["optimizer=adamw", "~optimizer.betas", "optimizer._target_=torch.optim.Muon"],
            ["Muon cannot be built from its settings (", "2D"],
        ),
        (
            ["+scheduler._target_=torch.optim.lr_scheduler.StepLR", "+scheduler.step_size=3"],
            ["`scheduler._target_` replaces scheduler=cosine", "'+scheduler={_target_: torch.optim.lr_scheduler"],
        ),
    ],
    ids=lambda value: " ".join(value) if "=" in value[0] and " " not in value[0] else "",
)
def test_a_setting_that_does_not_fit_is_refused_before_the_run_exists(
    words: list[str], parts: list[str], shapes: Path, tmp_path: Path
) -> None:
    import torch

    if torch.cuda.is_available() and words[0] in ("trainer.accelerator=gpu", "trainer.precision=16-mixed"):
        pytest.skip("this machine has a GPU")
    net = ["model=alexnet", "model.name=alexnet"] if "model=torchvision" not in words else []
    done = tiny_train(shapes, tmp_path / "run", "debug=fast", *net, *words, env={"WANDB_MODE": ""})
    assert_refused(done, *parts)
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_is_refused(shapes: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = tiny_train(shapes, tmp_path / "run", "trainer=ddp_cpu", f"trainer.master_port={port}")
    assert_refused(done, f"trainer.master_port={port}` cannot be used (Address already in use)")
    assert not (tmp_path / "run").exists()


def test_a_directory_with_a_run_is_refused(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    assert_refused(tiny_train(shapes, tmp_path), f"{tmp_path} holds a run already: remove hydra.run.dir")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(28, "No space left on device", "/full"), "/full: no space is left on that disk: free some"),
        (PermissionError(13, "Permission denied", "/locked"), "/locked: permission denied"),
        (OSError(36, "File name too long", "/ddd"), "/ddd: that name is too long: choose a shorter one"),
        (FileExistsError(17, "File exists", "/file"), "/file: that is a file or a broken link, and a folder is needed"),
        (NotADirectoryError(20, "Not a directory", "/file/x"), "/file/x: that is below a file, and a folder is needed"),
        (OSError(30, "Read-only file system", "/cdrom"), "/cdrom: that file system is read-only"),
    ],
    ids=["full", "locked", "too long", "file", "below a file", "read-only"],
)
def test_errors_of_the_disk_are_answered_without_a_traceback(
    error: OSError, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    def fail(config: object) -> None:
        raise error

    monkeypatch.setattr(cli.Command, "load", lambda self: fail)
    monkeypatch.setattr(cli, "leave", sys.exit)
    monkeypatch.setattr("sys.argv", ["train.py", f"paths.logs={tmp_path}"])
    with pytest.raises(SystemExit) as left:
        cli.run("train")
    assert left.value.code == 2
    printed = capsys.readouterr().err
    assert sentence in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["data", "=", "folder"], "`data =`: settings have no spaces around the =: write data=folder."),
        (["seed=", "1"], "`seed= 1`: settings have no spaces around the =: write seed=1."),
        (["data.root=", "seed=1"], "`data.root=` must be a text that is not empty."),
        (["hydra.run.dir="], "`hydra.run.dir=` must be a text that is not empty."),
        (["--resolve"], "--resolve is for --cfg job, which prints the config: add it."),
        (["--config-dir"], "--config-dir=: there is no such folder: give one with options of your own."),
        (["hydra.sweeper.study_name=x"], "`hydra.sweeper.study_name=x` is a key of Optuna's sweeps: add -m sweep=optu"),
        (
            ["hydra.foo=1"],
            "`hydra.foo=1`: there is no such key. `python train.py --cfg hydra` lists the keys of Hydra.",
        ),
        (["experiment=tab"], "/tab.yaml, line 2: found character '\\t' that cannot start any token. Yaml is indented"),
        (["experiment=twice"], "/twice.yaml, line 3: found duplicate key seed. Yaml is indented with spaces, and has"),
        (["experiment=latin"], "/experiment/latin.yaml is not UTF-8: save it as UTF-8 in your editor."),
        (
            ["experiment=items"],
            "`experiment=items`: its yaml has a mapping where conf/ has a list, or the reverse: entries",
        ),
        (["experiment=reference"], "`seed`: its ${...} cannot be read: check the brackets."),
        (
            ["experiment=adds"],
            "`model` is chosen twice: choose it once, without +, and in a yaml with `override /model",
        ),
        (
            ["experiment=slash"],
            "An option of /model is chosen in a yaml with `override /model: OPTION`, with the slash.",
        ),
        (["experiment=no_override"], "An option of /loss is chosen in a yaml with `override /loss: OPTION`, with the "),
        (["experiment=sets", "model.name=x"], "`model.name=x`: a yaml sets model to `alexnet_bn`. It chooses an opti"),
        (["experiment=dots"], "Nest it in yaml: optimizer: {lr: 0.1}.\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_answered_before_the_first_job(
    words: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "experiment").mkdir()
    for name, text in {
        "tab.yaml": "seed:\t3\ndata:\n\tbatch_size: 4\n",
        "twice.yaml": "seed: 3\nseed: 4\n",
        "latin.yaml": "my: {name: caf\xe9}\n",
        "items.yaml": "- seed\n",
        "reference.yaml": 'seed: "${seed"\n',
        "adds.yaml": "defaults: [/model: alexnet_bn]\n",
        "slash.yaml": "defaults: [override model: alexnet_bn]\n",
        "no_override.yaml": "defaults: [override /model: alexnet_bn, loss: focal]\n",
        "sets.yaml": "model: alexnet_bn\n",
        "dots.yaml": "optimizer.lr: 0.1\n",
    }.items():
        (tmp_path / "experiment" / name).write_text(f"# @package _global_\n{text}", encoding="latin-1")
    further = ["--config-dir", str(tmp_path), f"paths.logs={tmp_path}/logs"] if "experiment" in words[0] else []
    monkeypatch.setattr(cli, "leave", sys.exit)
    monkeypatch.setattr("sys.argv", ["train.py", *further, *words])
    with pytest.raises(SystemExit) as left:
        cli.run("train")
    assert left.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert sentence in printed
    assert "Traceback" not in printed
    assert_no_run(tmp_path / "logs")


# -- runs and checkpoints


def test_a_run_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    assert_refused(command("eval.py", "run=latest", f"paths.logs={tmp_path}"), "`run=latest`: no run exists below")
    for name in ("train/runs/2026-11-25_02-54-50_274", "train/multiruns/2026-11-25_03-00-00_100/0"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    for name, parts in {
        "/none": ["`run=/none` is not a run's directory"],
        "2026-11-25_02-54-50_27": ["give one, or latest. Did you mean 2026-11-25_02-54-50_274"],
        "2026-11-25_03-00-00_100": ["is a sweep: choose a job, such as run=2026-11-25_03-00-00_100/0."],
    }.items():
        assert_refused(command("eval.py", f"run={name}", f"paths.logs={tmp_path}"), *parts)


def test_a_checkpoint_of_another_network_or_of_other_classes_is_refused(shapes: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert tiny_train(shapes, run_dir, "model.name=mobilenet_v3_small", "test=false").returncode == 0
    done = tiny_train(shapes, tmp_path / "other", f"ckpt_path={run_dir}/checkpoints/best.ckpt")
    assert_refused(done, "holds the weights of another network", "Missing key", "conv1.0.weight")
    for split in ("train", "val"):
        for label in ("arrow", "zebra"):
            photo(tmp_path / "data" / split / label / "1.jpg")
    words = ["eval.py", f"run={run_dir}", f"paths.logs={tmp_path}", "data.num_workers=0"]
    assert_refused(
        command(*words, f"data.root={tmp_path}/data"),
        "contains classes that the training images do not: zebra",
        "bar, circle",
    )
    (run_dir / "checkpoints/best.ckpt").write_bytes(b"x" * 100)
    assert_refused(command(*words), "cannot be read as a checkpoint")


def test_a_command_that_does_not_exist_is_answered_with_the_nearest() -> None:
    done = command("-m", "alexlab", "trian")
    assert done.returncode == 2
    assert done.stderr == "error: alexlab trian: there is no such command. Did you mean train?\n"
    for words in ([], ["--help"]):
        listed = command("-m", "alexlab", *words)
        assert (listed.returncode, listed.stderr) == (0, "")
        assert re.findall(r"^  (\w+) +\S", listed.stdout, re.M) == list(cli.COMMANDS)
        assert listed.stdout.startswith("alexlab COMMAND key=value ...")
