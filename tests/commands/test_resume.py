"""ckpt_path and init_from: training continues exactly, or is refused."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import config_of, summary_of
from resuming import Harness, at_batch, rows_of

from alexlab.engine.errors import UserError
from alexlab.engine.schema import TrainConfig
from alexlab.models.alexnet import AlexNet
from alexlab.models.pretrained import alexnet_owt, load_but_head, timm_net, torchvision_net
from alexlab.tasks.load import check_fits, check_own, load_initial_weights

CONSTANT = ["scheduler=constant", "test=false"]
HEAD = {"net.head.weight", "net.head.bias"}


def weights(run_dir: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(run_dir / f"checkpoints/{name}.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def two_epochs(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        return Harness(shapes, tmp_path_factory.mktemp("resume"), patch).train("two", *CONSTANT)


def test_a_new_run_continues_another_exactly(
    two_epochs: Path, harness: Harness, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the end of an epoch, and from within one."""
    words = [*CONSTANT, "trainer.max_epochs=3"]
    straight = weights(harness.train("straight", *words))
    for first in (two_epochs, harness.stop(at_batch(3, "after"), "stopped", *words)):
        more = harness.train(f"after-{first.name}", *words, f"ckpt_path={first}", "data.num_workers=1")
        assert all(torch.equal(value, straight[key]) for key, value in weights(more).items())
    assert capsys.readouterr().out.count("note: `best` counts from here") == 2
    assert summary_of(harness.folder / "after-two")["best_epoch"] == 3


def test_a_longer_run_continues_at_the_learning_rate_of_its_own_schedule(harness: Harness) -> None:
    """Step 5 of 15: the checkpoint's schedule was at 0, and Lightning would take one more step with that."""
    words = ["scheduler=linear", "scheduler.warmup=0", "test=false"]
    first = harness.train("first", *words, "trainer.max_epochs=1")
    longer = rows_of(harness.train("longer", *words, "trainer.max_epochs=3", f"ckpt_path={first}"))
    rates = [float(row["lr/decay"]) for row in longer if "lr/decay" in row]
    assert rates == pytest.approx([0.005 * (1 - step / 15) for step in range(5, 15)])


def test_what_the_checkpoint_does_not_fit_is_refused(two_epochs: Path, harness: Harness) -> None:
    """Before the directory is created."""
    for words, message in (
        (
            ["optimizer.lr=0.5"],
            "was trained with different settings: optimizer.lr=0.5 (the checkpoint has 0.005). Give",
        ),
        (["scheduler=cosine"], "scheduler.name=cosine (the checkpoint has constant)"),
        (["seed=1", "data.batch_size=4"], "data.batch_size=4 (the checkpoint has 8), seed=1 (the checkpoint has 0)"),
        (
            ["trainer.limit_train_batches=2"],
            "has done 10 steps in epochs of 5 steps. An epoch has 2 now, which does not",
        ),
        (
            ["trainer.max_epochs=2"],
            "has done 2 epochs (10 steps), and this run would end after 10 steps: set a trainer.",
        ),
        (
            [f"ckpt_path={two_epochs}/checkpoints/best.ckpt"],
            "has weights only, and training cannot continue from it: gi",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            harness.train("x", *CONSTANT, f"ckpt_path={two_epochs}", "trainer.max_epochs=3", *words)
        assert not (harness.folder / "x").exists()


def test_other_images_and_other_classes_are_refused(two_epochs: Path, harness: Harness, tmp_path: Path) -> None:
    words = [*CONSTANT, f"ckpt_path={two_epochs}", "trainer.max_epochs=3"]
    harness.root = Path(shutil.copytree(harness.root, tmp_path / "data"))
    harness.train("moved", *words)  # the same images in another folder
    shutil.copy(harness.root / "train/ring/0000.jpg", harness.root / "train/ring/more.jpg")
    message = (
        "was trained on different images from those of .*: names or sizes of the files of train differ. Give the s"
    )
    with pytest.raises(UserError, match=message):
        harness.train("x", *words)
    for folder in harness.root.glob("*/arrow"):
        folder.rename(folder.with_name("zebra"))
    with pytest.raises(UserError, match=r"and the run have different classes: missing arrow, new zebra\."):
        harness.train("x", *words)
    assert not (tmp_path / "x").exists()


def test_a_run_starts_from_the_weights_of_another(
    two_epochs: Path, harness: Harness, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them if the classes are the same; otherwise all but the head, also if there are equally many."""
    few, other, best = tmp_path / "few", tmp_path / "other", weights(two_epochs, "best")
    for folder in (path for split in ("train", "val") for path in (harness.root / split).iterdir()):
        shutil.copytree(folder, other / folder.parent.name / f"other_{folder.name}")
        if folder.name in ("ring", "star"):
            shutil.copytree(folder, few / folder.parent.name / folder.name)
    words = [f"init_from={two_epochs}", "optimizer.lr=1e-9", "optimizer.weight_decay=0", "test=false"]
    for name, root, heads in (("same", harness.root, set[str]()), ("new", other, HEAD), ("two", few, HEAD)):
        harness.root = root
        now = weights(harness.train(name, *words, "trainer.max_epochs=1", "data.batch_size=4"))
        for key in best:
            if "running" not in key and "batches" not in key:
                same = now[key].shape == best[key].shape and torch.allclose(now[key], best[key], atol=1e-6)
                assert same == (key not in heads), key
    assert capsys.readouterr().out.count("best.ckpt; the last layer is new, because the classes differ") == 2


def test_weights_that_do_not_fit_are_refused(
    two_epochs: Path, harness: Harness, capsys: pytest.CaptureFixture[str]
) -> None:
    std = "another normalization of the inputs: add model.mean=[0.485,0.456,0.406] model.std=[0.229,0.224,0.225], or"
    with pytest.raises(UserError, match=re.escape(std)):
        harness.train("x", f"init_from={two_epochs}", "model.std=[0.1,0.1,0.1]")
    with pytest.raises(UserError, match=r"/none.ckpt is not a file"):
        harness.train("x", "init_from=/none.ckpt")
    last, net = two_epochs / "checkpoints/last.ckpt", torchvision_net("resnet18", 10)
    with pytest.raises(UserError, match=r"another network's: .* The run of the checkpoint has model.name=alexnet\."):
        load_initial_weights(net, last, [*"abcdefghij"], config_of())
    harness.train("on", *CONSTANT, f"ckpt_path={two_epochs}", "trainer.max_epochs=3", f"init_from={two_epochs}")
    assert "note: init_from is ignored: ckpt_path=" in capsys.readouterr().out


# -- networks whose weights have the same shapes


def sized(pixels: int) -> TrainConfig:
    return config_of(f"data.image_size={pixels}", "model.mean=auto", "model.std=auto")


def checkpoint_of(target: str, state: dict[str, torch.Tensor], **settings: Any) -> dict[str, Any]:
    """A checkpoint of a network for five classes."""
    model = {"name": "then", "mean": "auto", "std": "auto", "net": {"_target_": f"alexlab.models.{target}", **settings}}
    state = {f"net.{key}": value for key, value in state.items()}
    return {"alexlab": {"config": {"model": model}, "classes": [*"abcde"]}, "state_dict": state}


def test_a_network_with_other_outputs_is_refused(tmp_path: Path) -> None:
    """A setting that is equal to its default, or that acts in training only, changes nothing."""

    def net_of(**settings: Any) -> AlexNet:
        torch.manual_seed(0)
        return AlexNet(5, hidden=(16, 16), **settings)

    checkpoint, config = checkpoint_of("alexnet.AlexNet", net_of().state_dict(), hidden=[16, 16]), sized(64)
    check_fits("init_from=x", checkpoint, net_of(lrn={"k": 2.0}, dropout=0.3), config, same_classes=True)
    other = net_of(lrn={"k": 1.0})
    message = (
        r"=\S+: the network of the checkpoint, then, gives different outputs with the same .*: use the model.net.\* s"
    )
    with pytest.raises(UserError, match=message):
        check_fits("init_from=x", checkpoint, other, config, same_classes=True)
    with pytest.raises(UserError, match=message):  # eval.py ckpt=FILE
        check_own(checkpoint, config, other, tmp_path / "best.ckpt", tmp_path / "run")
    check_own(checkpoint, config, other, tmp_path / "run/checkpoints/best.ckpt", tmp_path / "run")


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
    check_fits(
        "init_from=x",
        checkpoint_of("pretrained.timm_net", state, name=name),
        net,
        sized(size),
        same_classes=classes == 5,
    )


def test_another_number_of_attention_heads_is_noticed() -> None:
    state = timm_net("test_vit", 5).state_dict()
    for key in state:
        if "qkv.weight" in key:  # at first attention is nearly uniform for any number of heads
            state[key] *= 20
    net = timm_net("test_vit", 5, num_heads=4)
    net.load_state_dict(state)
    with pytest.raises(UserError, match="init_from=x: the network of the checkpoint, then, gives"):
        check_fits(
            "init_from=x",
            checkpoint_of("pretrained.timm_net", state, name="test_vit"),
            net,
            sized(160),
            same_classes=True,
        )


def test_torchvisions_alexnet_and_ours_load_each_others_weights() -> None:
    source = torchvision_net("alexnet", 5)
    ours = alexnet_owt(5)
    ours.load_state_dict(source.state_dict())
    checkpoint = checkpoint_of("pretrained.torchvision_net", source.state_dict(), name="alexnet")
    check_fits("init_from=x", checkpoint, ours, sized(64), same_classes=True)
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(images), source.eval()(images))
