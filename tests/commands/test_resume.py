"""ckpt_path and init_from: training continues exactly, or is refused."""

import csv
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, command, summary_of, tiny_train

from alexlab.engine.errors import UserError
from alexlab.models.pretrained import alexnet_owt, load_but_head, timm_net, torchvision_net
from alexlab.tasks.load import check_function

WORDS = ["scheduler=constant", "test=false", "trainer.limit_train_batches=null", "data.batch_size=8"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def two_epochs(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "two"
    done = tiny_train(shapes, folder, *WORDS, "trainer.max_epochs=2")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def three_epochs(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "three"
    assert tiny_train(shapes, folder, *WORDS, "trainer.max_epochs=3").returncode == 0
    return folder


def continue_run(shapes: Path, run_dir: Path, two_epochs: Path, *words: str):  # type: ignore[no-untyped-def]
    last = two_epochs / "checkpoints/last.ckpt"
    return tiny_train(shapes, run_dir, *WORDS, f"ckpt_path={last}", "trainer.max_epochs=3", *words)


def test_three_epochs_equal_two_and_one_more_bit_for_bit(
    shapes: Path, two_epochs: Path, three_epochs: Path, tmp_path: Path
) -> None:
    done = continue_run(shapes, tmp_path / "more", two_epochs, "data.num_workers=1")
    assert done.returncode == 0, done.stderr
    assert "epoch 3/3" in done.stdout
    assert "epoch 2/3" not in done.stdout
    a, b = weights(three_epochs), weights(tmp_path / "more")
    assert all(torch.equal(a[key], b[key]) for key in a)
    first, second = summary_of(three_epochs), summary_of(tmp_path / "more")
    assert (second["best"], second["best_epoch"]) == (first["best"], first["best_epoch"]), "of all three epochs"
    both = (three_epochs, tmp_path / "more")
    best = [torch.load(run_dir / "checkpoints/best.ckpt", weights_only=True) for run_dir in both]
    assert all(torch.equal(best[0]["state_dict"][key], best[1]["state_dict"][key]) for key in best[0]["state_dict"])


@pytest.mark.parametrize("neighbour", [None, "of another run"])
def test_best_counts_from_the_checkpoint_if_its_best_ckpt_is_missing(
    neighbour: str | None, shapes: Path, two_epochs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copied"
    folder.mkdir()
    shutil.copy(two_epochs / "checkpoints/last.ckpt", folder)
    if neighbour:
        other = torch.load(two_epochs / "checkpoints/best.ckpt", weights_only=True)
        other["alexlab"]["best"]["val/acc1"] = 0.99
        torch.save(other, folder / "best.ckpt")
    done = tiny_train(shapes, tmp_path / "run", *WORDS, f"ckpt_path={folder / 'last.ckpt'}", "trainer.max_epochs=3")
    assert done.returncode == 0, done.stderr
    assert "there is no best.ckpt by val/acc1 of the same moment" in done.stdout
    assert summary_of(tmp_path / "run")["best_epoch"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["optimizer.lr=0.5"],
            "was trained with different settings: optimizer.lr=0.5 (the checkpoint has 0.005). Give the same ones",
        ),
        (["scheduler=cosine"], "scheduler.name=cosine (the checkpoint has constant)"),
        (["seed=1", "data.batch_size=4"], "data.batch_size=4 (the checkpoint has 8), seed=1 (the checkpoint has 0)"),
    ],
)
def test_settings_that_the_checkpoint_would_ignore_are_refused(
    words: list[str], message: str, shapes: Path, two_epochs: Path, tmp_path: Path
) -> None:
    done = continue_run(shapes, tmp_path / "x", two_epochs, *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "x").exists(), "refused before the directory is created"


def test_other_classes_and_weights_only_checkpoints_are_refused(shapes: Path, two_epochs: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "data"
    for split in ("train", "val"):
        for folder in (shapes / split).iterdir():
            target = renamed / split / ("zebra" if folder.name == "arrow" else folder.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(folder)
    done = continue_run(renamed, tmp_path / "x", two_epochs)
    assert done.returncode == 2
    assert "and the run have different classes: missing arrow, new zebra." in done.stderr
    best = two_epochs / "checkpoints/best.ckpt"
    done = tiny_train(shapes, tmp_path / "x", *WORDS, f"ckpt_path={best}")
    assert done.returncode == 2
    assert "has weights only, and training cannot continue from it: give a last.ckpt" in done.stderr


def test_a_new_run_continues_from_the_middle_of_an_epoch(shapes: Path, tmp_path: Path) -> None:
    words = [*WORDS, "trainer.max_epochs=null"]
    assert tiny_train(shapes, tmp_path / "a", *words, "trainer.max_steps=3").returncode == 0
    last = tmp_path / "a/checkpoints/last.ckpt"
    done = tiny_train(shapes, tmp_path / "b", *words, "trainer.max_steps=8", f"ckpt_path={last}")
    assert done.returncode == 0, done.stderr
    assert tiny_train(shapes, tmp_path / "c", *words, "trainer.max_steps=8").returncode == 0
    b, c = weights(tmp_path / "b"), weights(tmp_path / "c")
    assert all(torch.equal(value, c[key]) for key, value in b.items())
    del (older := torch.load(last, weights_only=True))["callbacks"]["Checkpointing"]
    torch.save(older, tmp_path / "old.ckpt")
    done = tiny_train(shapes, tmp_path / "d", *words, "trainer.max_steps=8", f"ckpt_path={tmp_path / 'old.ckpt'}")
    assert done.returncode == 2
    assert "was written by an older version, and training cannot continue from it; a new run can" in done.stderr


def test_a_longer_run_continues_at_the_learning_rate_of_its_own_schedule(shapes: Path, tmp_path: Path) -> None:
    """Step 5 of 15: the checkpoint's schedule was at 0, and Lightning would take one more step with that."""
    words = [*WORDS, "scheduler=linear", "scheduler.warmup=0", "trainer.log_every_n_steps=1"]
    assert tiny_train(shapes, tmp_path / "a", *words).returncode == 0
    last = f"ckpt_path={tmp_path / 'a/checkpoints/last.ckpt'}"
    done = tiny_train(shapes, tmp_path / "b", *words, "trainer.max_epochs=3", last)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "b/metrics.csv").open() as file:
        rates = [float(row["lr/decay"]) for row in csv.DictReader(file) if row["lr/decay"]]
    assert rates == pytest.approx([0.005 * (1 - step / 15) for step in range(5, 15)])


def test_other_images_other_epochs_and_finished_runs_are_refused(
    shapes: Path, two_epochs: Path, tmp_path: Path
) -> None:
    grown = Path(shutil.copytree(shapes, tmp_path / "data"))
    shutil.copy(grown / "train/ring/0000.jpg", grown / "train/ring/more.jpg")
    done = continue_run(grown, tmp_path / "x", two_epochs)
    assert done.returncode == 2
    assert "was trained on different images from those of" in done.stderr
    assert "train 41 (the checkpoint has 40); names or sizes of the files differ" in done.stderr
    moved = shapes.rename(shapes.with_name("moved"))
    try:
        done = continue_run(moved, tmp_path / "y", two_epochs)
    finally:
        moved.rename(shapes)
    assert done.returncode == 0, "the same images in another folder"
    done = continue_run(shapes, tmp_path / "x", two_epochs, "trainer.limit_train_batches=2")
    assert done.returncode == 2
    assert "has done 10 steps in epochs of 5 steps. An epoch has 2 now, which does not fit its schedule" in done.stderr
    done = continue_run(shapes, tmp_path / "x", two_epochs, "trainer.max_epochs=2")
    assert done.returncode == 2
    assert (
        "has done 2 epochs (10 steps), and this run would end after 10 steps: set a trainer.max_epochs" in done.stderr
    )
    assert not (tmp_path / "x").exists()


def test_a_run_stopped_by_a_time_limit_continues(shapes: Path, three_epochs: Path, tmp_path: Path) -> None:
    """Lightning's Timer, with a count of steps as its clock, stops the run in the second step of the third epoch."""
    words = [*WORDS, "trainer.max_epochs=3"]
    script = tmp_path / "timed.py"
    script.write_text(
        "from pytorch_lightning.callbacks import Timer\n"
        "Timer._check_time_remaining = lambda self, trainer: setattr("
        "trainer, 'should_stop', trainer.should_stop or trainer.global_step >= 12)\n"
    )
    timer = "+callbacks.timer={_target_:pytorch_lightning.callbacks.Timer,duration:'00:12:00:00'}"
    done = tiny_train(shapes, tmp_path / "a", *words, timer, before=script)
    assert done.returncode == 0, done.stderr
    last = tmp_path / "a/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 12
    assert tiny_train(shapes, tmp_path / "b", *words, f"ckpt_path={last}").returncode == 0
    b, c = weights(tmp_path / "b"), weights(three_epochs)
    assert all(torch.equal(value, c[key]) for key, value in b.items())


def test_a_checkpoint_is_named_by_its_run_or_as_the_latest(shapes: Path, two_epochs: Path, tmp_path: Path) -> None:
    logs, words = f"paths.logs={tmp_path}", [*WORDS, "dry_run=true"]
    done = tiny_train(shapes, tmp_path / "x", *words, "ckpt_path=latest", logs)
    assert done.returncode == 2
    assert "`ckpt_path=latest`: there is no run below" in done.stderr
    folder = tmp_path / "train/runs/slurm-12.0"
    shutil.copytree(two_epochs, folder)
    for named in ("latest", str(folder), "slurm-12.0", str(folder / "checkpoints/last.ckpt")):
        done = tiny_train(shapes, tmp_path / "x", *words, f"ckpt_path={named}", "trainer.max_epochs=3", logs)
        assert done.returncode == 0, done.stderr
    done = tiny_train(shapes, tmp_path / "x", *words, "ckpt_path=two", logs)
    assert "`ckpt_path=two` is not a run's directory" in done.stderr
    done = tiny_train(shapes, tmp_path / "x", *words, "init_from=two", logs)
    assert "`init_from=two` is not a run's directory" in done.stderr


def test_a_run_starts_from_the_weights_of_another(shapes: Path, two_epochs: Path, tmp_path: Path) -> None:
    """All of them if the classes are the same; otherwise all but the head. Learning rate and epochs start again."""
    best = torch.load(two_epochs / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    few = tmp_path / "few"
    for split in ("train", "val"):
        for name in ("ring", "star"):
            shutil.copytree(shapes / split / name, few / split / name)
    for root, heads in ((shapes, set()), (few, {"net.fc.weight", "net.fc.bias"})):
        run_dir = tmp_path / root.name
        words = [f"init_from={two_epochs}", "optimizer.lr=1e-9", "optimizer.weight_decay=0", "test=false"]
        done = tiny_train(root, run_dir, *words, "trainer.max_epochs=1", "data.batch_size=4")
        assert done.returncode == 0, done.stderr
        assert summary_of(run_dir)["best_epoch"] == 1
        now = weights(run_dir)
        for key, value in best.items():
            if "running" not in key and "batches" not in key:
                same = now[key].shape == value.shape and torch.allclose(now[key], value, atol=1e-6)
                assert same == (key not in heads), key
    last = two_epochs / "checkpoints/last.ckpt"
    for words, message in (
        ([f"init_from={last}", "model.name=resnet18"], "The run of the checkpoint has model=torchvision model.name="),
        (["init_from=/none.ckpt"], "/none.ckpt is not a file"),
        (
            [f"init_from={last}", "model.std=[0.1,0.1,0.1]"],
            "was trained with another normalization of the inputs: add model.std=[0.229,0.224,0.225].",
        ),
    ):
        done = tiny_train(shapes, tmp_path / "x", *words)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False)
        assert message in done.stderr
    done = continue_run(shapes, tmp_path / "on", two_epochs, f"init_from={two_epochs}")
    assert done.returncode == 0, done.stderr
    assert "note: init_from is ignored: ckpt_path=" in done.stdout


def test_the_head_is_new_for_other_classes(shapes: Path, two_epochs: Path, tmp_path: Path) -> None:
    """Also if there are equally many."""
    for split in ("train", "val"):
        for number, folder in enumerate(sorted((shapes / split).iterdir())):
            shutil.copytree(folder, tmp_path / "data" / split / f"other{number}")
    words = [f"init_from={two_epochs}", "optimizer.lr=1e-9", "optimizer.weight_decay=0", "test=false"]
    done = tiny_train(tmp_path / "data", tmp_path / "run", *words)
    assert done.returncode == 0, done.stderr
    assert "best.ckpt; the last layer is new, because the classes differ" in done.stdout
    before = torch.load(two_epochs / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    now = weights(tmp_path / "run")
    assert torch.allclose(now["net.conv1.0.weight"], before["net.conv1.0.weight"], atol=1e-6)
    assert not torch.allclose(now["net.fc.weight"], before["net.fc.weight"], atol=1e-3)


def test_networks_with_other_outputs_are_refused(shapes: Path, tmp_path: Path) -> None:
    """The shapes of weights are the same. A setting that is equal to its default changes nothing."""
    words = ["model=alexnet", "model.name=alexnet", "+model.net.hidden=[16,16]", "test=false"]
    assert tiny_train(shapes, tmp_path / "run", *words).returncode == 0
    for key, epochs in (("init_from", 1), ("ckpt_path", 2)):
        more = [*words, f"{key}={tmp_path / 'run'}", f"trainer.max_epochs={epochs}"]
        done = tiny_train(shapes, tmp_path / f"other-{key}", *more, "+model.net.lrn={k:1.0}")
        assert done.returncode == 2
        message = rf"{key}=\S+: the network of the checkpoint, alexnet, gives different outputs with the same"
        assert re.search(message, done.stderr), done.stderr
        assert "use the model.net.* settings in the config.yaml of that run." in done.stderr
        done = tiny_train(shapes, tmp_path / f"same-{key}", *more, "+model.net.lrn={k:2.0}", "model.net.dropout=0.3")
        assert done.returncode == 0, done.stderr
        assert command("eval.py", f"run={tmp_path / f'same-{key}'}", f"paths.logs={tmp_path}").returncode == 0
    done = command("eval.py", f"run={tmp_path / 'run'}", f"ckpt={tmp_path / 'same-init_from/checkpoints/best.ckpt'}")
    assert done.returncode == 2
    assert "best.ckpt` is from a run with another model.net: give that run with run=PATH, or a" in done.stderr


@pytest.mark.parametrize(
    ("name", "other", "classes"),
    [
        ("test_convnext", {"drop_path_rate": 0.3}, 5),  # stochastic depth does nothing in evaluation
        ("deit_tiny_distilled_patch16_224", {}, 2),  # two heads
        ("test_vit", {"drop_rate": 0.5}, 2),
    ],
)
def test_settings_for_training_only_may_differ(name: str, other: dict, classes: int) -> None:
    source, net = timm_net(name, 5), timm_net(name, classes, **other)
    state = source.state_dict()
    load_but_head(net, state, keep_head=classes == 5, num_classes=classes)
    size = source.pretrained_cfg["input_size"][-1]
    check_function("init_from=x", checkpoint_of({"name": name}, state), net, size, same_classes=classes == 5)


def test_another_number_of_attention_heads_is_noticed() -> None:
    state = timm_net("test_vit", 5).state_dict()
    for key in state:
        if "qkv.weight" in key:  # at first attention is nearly uniform for any number of heads
            state[key] *= 20
    net = timm_net("test_vit", 5, num_heads=4)
    net.load_state_dict(state)
    with pytest.raises(UserError, match="init_from=x: the network of the checkpoint, test_vit, gives"):
        check_function("init_from=x", checkpoint_of({"name": "test_vit"}, state), net, 160, same_classes=True)


def checkpoint_of(settings: dict, state: dict) -> dict:
    """A checkpoint of a network of timm."""
    model = {"name": settings["name"], "net": {"_target_": "alexlab.models.pretrained.timm_net", **settings}}
    return {
        "alexlab": {"config": {"model": model}, "classes": ["a", "b", "c", "d", "e"]},
        "state_dict": {f"net.{key}": value for key, value in state.items()},
    }


def test_torchvisions_alexnet_and_ours_load_each_others_weights() -> None:
    source = torchvision_net("alexnet", 5)
    ours = alexnet_owt(5)
    ours.load_state_dict(source.state_dict())
    model = {"name": "alexnet", "net": {"_target_": "alexlab.models.pretrained.torchvision_net", "name": "alexnet"}}
    checkpoint = checkpoint_of({"name": "x"}, source.state_dict())
    checkpoint["alexlab"]["config"]["model"] = model
    check_function("init_from=x", checkpoint, ours, 64, same_classes=True)
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(images), source.eval()(images))


def test_all_jobs_of_a_sweep_start_from_the_same_run(shapes: Path, two_epochs: Path, tmp_path: Path) -> None:
    shutil.copytree(two_epochs, tmp_path / "train/runs/one")
    job = [*TINY, "data=folder", f"data.root={shapes}", *WORDS, "trainer.max_epochs=1", "trainer.limit_train_batches=2"]
    done = command("train.py", "-m", *job, f"paths.logs={tmp_path}", "init_from=latest", "seed=1,2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"initial weights: {tmp_path / 'train/runs/one/checkpoints/best.ckpt'}\n") == 2
