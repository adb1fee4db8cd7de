"""Data of one's own, by `_target_`, through all commands: a class by index, a table, and a LightningDataModule."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from conftest import ROOT, TINY, command, summary_of
from torch.utils.data import DataLoader, TensorDataset

from alexlab.data.fast import prepared
from alexlab.data.own_module import OwnDataModule
from alexlab.data.sources import build_data
from alexlab.engine.errors import UserError
from alexlab.engine.schema import DataConfig

PARTS = """
import os
import signal
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class Mine:
    def __init__(self, root, split):
        self.files = sorted(Path(root, split).glob("*/*.jpg"))
        self.targets = [path.parent.name for path in self.files]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return self.files[i].read_bytes(), self.targets[i]


class Stop(pl.Callback):
    def __init__(self, marker, epoch=0):
        self.marker, self.epoch = Path(marker), epoch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, 1) and not self.marker.exists():
            if trainer.is_global_zero:
                self.marker.touch()
                os.kill(os.getpid(), signal.SIGTERM)


class Module(pl.LightningDataModule):
    classes = ["a", "b"]

    def __init__(self, batch_size, kind="uint8"):
        super().__init__()
        self.batch_size, self.kind = batch_size, kind

    def setup(self, stage):
        images = torch.randint(0, 255, (42, 3, 64, 64), generator=torch.Generator().manual_seed(0))
        images = images.to(torch.uint8) if self.kind == "uint8" else images / 255
        self.data = TensorDataset(images, torch.arange(42) % 2)

    def train_dataloader(self):
        return DataLoader(self.data, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.data, self.batch_size)
"""
OPTION = """
defaults:
  - _base
_target_: mypkg.{name}
name: mine
root: null
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    (root / "MYCONF/data").mkdir(parents=True)
    (root / "mypkg.py").write_text(PARTS)
    for name in ("Mine", "Module"):
        (root / f"MYCONF/data/{name.lower()}.yaml").write_text(OPTION.format(name=name))
    return root


def run(project: Path, *words: str, **more: Any) -> Any:
    return command(*words, env={"PYTHONPATH": f"{project}:{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}, **more)


def train(project: Path, run_dir: Path, *words: str, **more: Any) -> Any:
    return run(
        project, "train.py", "--config-dir", str(project / "MYCONF"), *TINY, "data.batch_size=8",
        "trainer.max_epochs=2", "trainer.precision=32", "test=false", f"hydra.run.dir={run_dir}", *words, **more,
    )  # fmt: skip


def weights(run_dir: Path) -> dict[str, Any]:
    return torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_a_class_by_index_trains_as_its_folder_does(shapes: Path, project: Path, tmp_path: Path) -> None:
    """The same images in the same order give the same weights: on two ranks, and also if the run was stopped."""
    folder, own, stopped = tmp_path / "folder", tmp_path / "own", tmp_path / "stopped"
    ranks = ["trainer=ddp_cpu", "trainer.devices=2"]
    done = train(project, folder, "data=folder", f"data.root={shapes}", *ranks)
    assert done.returncode == 0, done.stderr
    done = train(project, own, "data=mine", f"data.root={shapes}", *ranks)
    assert done.returncode == 0, done.stderr
    assert summary_of(own)["dataset"]["images"] == {"train": 40, "val": 21, "test": 10}
    expected = weights(folder)
    assert all(torch.equal(value, expected[key]) for key, value in weights(own).items())

    stop = ["+callbacks.stop._target_=mypkg.Stop", f"+callbacks.stop.marker={tmp_path / 'marker'}"]
    done = train(project, stopped, "data=mine", f"data.root={shapes}", *ranks, *stop)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    step = torch.load(stopped / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert step in (2, 3, 4), "of 5 per epoch"
    done = run(project, "train.py", f"resume={stopped}")
    assert done.returncode == 2
    assert "_target_=mypkg" in done.stderr
    done = run(project, "train.py", f"resume={stopped}", "allow=[mypkg]")
    assert done.returncode == 0, done.stderr
    assert all(torch.equal(value, expected[key]) for key, value in weights(stopped).items())


def test_a_table_is_evaluated_exported_and_prepared(shapes: Path, project: Path, tmp_path: Path) -> None:
    rows = [f"{p.relative_to(shapes)},{p.parent.name},{p.parent.parent.name}" for p in sorted(shapes.glob("*/*/*.jpg"))]
    file, run_dir = tmp_path / "labels.csv", tmp_path / "run"
    file.write_text("\n".join(["path,label,split", *rows]))
    words = ["data=table", f"data.file={os.path.relpath(file, ROOT)}", f"data.root={shapes}"]
    done = command("train.py", *TINY, "data.batch_size=8", "trainer.max_epochs=1", f"hydra.run.dir={run_dir}", *words)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["data"]["file"] == str(file), "absolute"
    done = command("eval.py", f"run={run_dir}")
    assert done.returncode == 0, done.stderr
    assert json.loads((run_dir / "eval.json").read_text())["loss"] == summary_of(run_dir)["test"]["test/loss"]
    done = command("export", f"run={run_dir}", "format=torch_export")
    assert "10 of 10 top-1 classes are the same" in done.stdout, done.stderr
    done = command("prepare", *words, f"out={tmp_path / 'out'}", "num_workers=1")
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "out/prepared.json").read_text())
    assert {split: part["images"] for split, part in about["splits"].items()} == {"train": 40, "val": 21, "test": 10}
    assert about["classes"] == sorted(path.name for path in (shapes / "train").iterdir())


def test_a_preparation_keeps_several_labels_and_columns(shapes: Path, tmp_path: Path) -> None:
    names = [str(path.relative_to(shapes)) for path in sorted(shapes.glob("train/*/*.jpg"))]
    rows = [f"{name},{'odd all' if i % 2 else 'all'},{'train' if i > 4 else 'val'},{i}" for i, name in enumerate(names)]
    (tmp_path / "tags.csv").write_text("\n".join(["path,label,split,weight", *rows]))
    done = command(
        "prepare", "data=table", f"data.file={tmp_path / 'tags.csv'}", f"data.root={shapes}", "data.multilabel=true",
        f"out={tmp_path / 'out'}", "num_workers=1", "short_side=32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    splits = prepared.read(tmp_path / "out")
    assert splits["val"].targets.tolist() == [[1, i % 2] for i in range(5)]
    assert splits["val"].weights.tolist() == [0, 1, 2, 3, 4]
    assert splits["train"].folds is None


def test_a_datamodule_trains_is_evaluated_and_resumes_at_an_epoch_end(project: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    stop = ["+callbacks.stop._target_=mypkg.Stop", f"+callbacks.stop.marker={tmp_path / 'marker'}"]
    stop += ["+callbacks.stop.epoch=1", "callbacks.figures=true", "test=true"]
    done = train(project, run_dir, "data=module", *stop)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    printed = done.stdout + done.stderr
    assert printed.count("data from mypkg.Module: batches depend on its own workers; resume starts at epoch ends") == 1
    last = torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 6, "42 images in batches of 8, the last of which is short"
    done = run(project, "train.py", f"resume={run_dir}", "allow=[mypkg]")
    assert done.returncode == 0, done.stderr
    summary = summary_of(run_dir)
    assert (summary["steps"], summary["status"]) == (12, "finished")
    assert summary["dataset"]["images"] == {"train": 42, "val": 42}
    done = run(project, "eval.py", f"run={run_dir}", "allow=[mypkg]")
    assert done.returncode == 0, done.stderr
    assert json.loads((run_dir / "eval.json").read_text())["loss"] == pytest.approx(summary["test"]["test/loss"])
    for verb, word in (("export", "format=torch_export"), ("eval", "crops=10")):
        done = run(project, "-m", "alexlab", verb, f"run={run_dir}", word, "allow=[mypkg]")
        assert (done.returncode, "does not give by index" in done.stderr) == (2, True), done.stderr


def test_the_size_of_a_datamodules_batches_matters_in_training_only() -> None:
    """A run on two devices is evaluated in one process."""

    class Fixed(pl.LightningDataModule):
        classes = ("a", "b")

        def train_dataloader(self) -> DataLoader:
            return DataLoader(TensorDataset(torch.zeros(42, 3, 8, 8), torch.zeros(42)), 8)

        val_dataloader = train_dataloader

    def read(devices: int) -> OwnDataModule:
        return OwnDataModule(Fixed(), "mypkg.Fixed", ".", 16, world_size=devices).read()

    with pytest.raises(UserError, match=r"data.num_classes=3, but mypkg.Fixed has 2 classes"):
        OwnDataModule(Fixed(), "mypkg.Fixed", ".", 16, num_classes=3).read()
    assert read(1).images == read(2).images == {"train": 42, "val": 42}
    assert read(2).train_batches == 3
    with pytest.raises(UserError, match=r"makes batches of 8 images on 1 devices, and .* set data.batch_size=8"):
        _ = read(1).train_batches


def test_what_a_datamodule_does_not_follow_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(project))
    monkeypatch.delitem(sys.modules, "mypkg", raising=False)  # of another test
    for key, value in {"sampler": "balanced", "val_fraction": 0.2, "on_error": "skip"}.items():
        plain = {"name": "x", "root": None, "batch_size": 8, "image_size": 64, "_target_": "mypkg.Module", key: value}
        message = f"`data.{key}={value}` has no effect on the batches of mypkg.Module"
        with pytest.raises(UserError, match=message):
            build_data(DataConfig.model_validate(plain), {"world_size": 1}, trusted=None)


def test_a_datamodule_is_divided_among_two_ranks(project: Path, tmp_path: Path) -> None:
    words = ["data=module", "+data.kind=float", "trainer=ddp_cpu", "trainer.devices=2"]
    done = train(project, tmp_path / "run", *words)
    assert done.returncode == 0, done.stderr
    assert summary_of(tmp_path / "run")["steps"] == 12, "21 images per rank and epoch, in batches of 4"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=module", "+data.depth=3"], "`data.depth=3`: there is no such key, and mypkg.Module does not take it."),
        (
            ["data=mine", "data.root=/nowhere"],
            "mypkg.Mine has no training images (data.root=/nowhere): it has none for",
        ),
    ],
)
def test_a_mistake_leaves_nothing_behind(words: list[str], message: str, project: Path, tmp_path: Path) -> None:
    done = train(project, tmp_path / "run", *words)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_config_of_a_run_never_downloads(tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(ROOT / "tests/fixtures/runs/finished", tmp_path / "run"))
    conf = run_dir / "config.yaml"
    plain = yaml.safe_load(conf.read_text())
    plain["data"] |= {
        "_target_": "alexlab.data.torchvision_sets.TorchvisionSet",
        "name": "CIFAR10",
        "root": str(tmp_path / "new"),
        "download": True,
    }
    conf.write_text(yaml.safe_dump(plain))
    for verb, word in (("eval", "crops=1"), ("export", "format=torch_export")):
        done = command(verb, f"run={run_dir}", word)
        assert done.returncode == 2, done.stdout
        assert "and nothing is downloaded" in done.stderr
    assert not (tmp_path / "new").exists()
