"""What a run is called, and what W&B gets of its config."""

import json
import re
from typing import Any

import pytest
from conftest import composed

from alexlab.engine import config as configs
from alexlab.engine import naming


def plain(*words: str) -> dict[str, Any]:
    """Compose the config of train.py; hydra.* is no key of it."""
    return composed(*(word for word in words if not word.startswith("hydra.")), run_dir="/logs/x")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("", "alexnet"),
        ("model=alexnet_bn optimizer.lr=0.05 seed=1", "alexnet_bn-lr0.05-s1"),
        ("model=torchvision model.name=resnet18 augment=strong trainer.max_epochs=3", "resnet18-strong-ep3"),
        ("data=folder data.root=/somewhere/photos data.batch_size=64 compile=true", "alexnet-photos-bs64-compile"),
        ("logger=csv trainer=ddp_cpu debug=fast hydra.run.dir=x data.num_workers=0", "alexnet-fast"),
        ("~optimizer.momentum +optimizer.foreach=false", "alexnet-no_momentum-foreachfalse"),
        ("augment.scale=[0.2,1.0] experiment=demo", "alexnet-scale_0.2_1.0-demo"),
        ("optimizer.weight_decay=1e-05 init_from=run", "alexnet-wd1e-05-init_fromrun"),
        ("seed=1 seed=12345678 trainer.limit_train_batches=1", "alexnet-s12345678-limit_train_batches1"),
        ("trainer.limit_train_batches=1.0", "alexnet-limit_train_batches1.0"),
        ("data.root=/a/other", "alexnet-other"),
        ("monitor=val/loss ckpt_path=null test=false", "alexnet"),
    ],
)
def test_a_name_shows_what_the_command_line_changed(words: str, name: str) -> None:
    assert naming.run_name(plain(*words.split())) == name


@pytest.mark.parametrize(
    ("words", "others", "start"),
    [
        ("optimizer.lr=0.0123456", "optimizer.lr=0.0123457", "alexnet-lr0.012346-"),
        ("init_from=a/0", "init_from=b/0", "alexnet-init_from0-"),
        (
            " ".join(f"+optimizer.some_setting_{n}=1" for n in range(20)),
            " ".join(f"+optimizer.some_setting_{n}={2 if n == 9 else 1}" for n in range(20)),
            "alexnet-some_setting_01-",
        ),
    ],
)
def test_a_name_that_leaves_something_out_ends_with_a_hash(words: str, others: str, start: str) -> None:
    name, other = (naming.run_name(plain(*line.split())) for line in (words, others))
    assert name.startswith(start)
    assert name[:-6] == other[:-6]
    assert name[-6:] != other[-6:]
    assert len(name) <= 80
    assert len(name) < 80 or name[:-7].endswith("some_setting_191"), "the last override, which distinguishes jobs"


def test_runs_that_differ_only_in_their_seed_or_fold_are_a_group() -> None:
    def group(*words: str) -> str:
        return naming.group_name(plain(*words))

    one = group("model=alexnet_bn", "seed=7", "optimizer.lr=0.05")
    assert re.fullmatch(r"alexnet_bn-lr0\.05-[0-9a-f]{6}", one)
    assert group("optimizer.lr=0.05", "model=alexnet_bn", "seed=8", "test=false", "logger=csv") == one
    assert group("optimizer.lr=5e-2", "model=alexnet_bn")[-6:] == one[-6:], "the hash is of the values"
    folds = ("model=alexnet_bn", "data.folds=3", "optimizer.lr=0.05")
    assert group(*folds, "data.fold=0") == group(*folds, "seed=1", "data.fold=2") != one
    assert group("model=alexnet_bn", "optimizer.lr=0.05", "data.sampler=shuffle")[-6:] == one[-6:]
    others = [
        ("data.sampler=balanced",), ("data=folder", "data.root=/a/photos"), ("data=folder", "data.root=/b/photos"),
        ("trainer.limit_train_batches=1",), ("trainer.limit_train_batches=1.0",), ("init_from=a/0",),
        ("model=torchvision", "model.name=resnet18"), ("model=timm", "model.name=resnet18"), ("init_from=b/0",),
    ]  # fmt: skip
    assert len({group(*words) for words in others}) == len(others)


def test_the_hash_of_a_group_is_of_the_settings_whatever_set_them() -> None:
    def digest(config: dict[str, Any]) -> str:
        return naming.group_name(config)[-6:]

    config = plain("data=folder", "data.root=/a/photos")
    before = digest(config)
    words = ("optimizer=sgd", "optimizer.lr=0.005", "label_smoothing=0", "logger=csv", "seed=3")
    assert digest(plain(*words, "data.root=/a/photos", "data=folder")) == before, "these are the defaults"
    config["optimizer"]["lr"] = 0.5  # as if conf/ had been edited
    assert digest(config) != before
    config["optimizer"]["lr"] = 0.005
    config["ckpt_path"], config["resume"]["run"] = f"{config['run_dir']}/checkpoints/last.ckpt", "auto"
    assert digest(config) == before, "the same run, resumed"
    config["ckpt_path"] = "/logs/other/checkpoints/last.ckpt"
    assert digest(config) != before
    recipe = digest(plain("experiment=fashion_mnist"))
    assert recipe == digest(plain("optimizer.lr=0.03", "experiment=fashion_mnist")), "the experiment sets it too"
    assert recipe != digest(plain("experiment=fashion_mnist", "optimizer.lr=0.005"))


def test_wandb_gets_no_folder_of_this_machine() -> None:
    config = plain("data=folder", "data.root=/secret/place/photos", "logger.wandb.notes=a/b", "ckpt_path=/secret/run")
    config["run_dir"] = "/secret/logs/train/multiruns/sweep/3"
    shared = naming.for_others(config)
    assert "/secret" not in json.dumps(shared)
    assert str(configs.ROOT) not in json.dumps(shared)
    assert shared["data"]["root"] == "photos"
    assert "data.root=photos" in shared["overrides"]
    assert shared["ckpt_path"] == "run"
    assert shared["run"] == "sweep/3"
    assert shared["logger"]["wandb"]["notes"] == "a/b", "not a path"
    assert shared["optimizer"] == config["optimizer"]
    assert {"paths", "run_dir"} & shared.keys() == set()
    assert naming.tags(config) == ["alexnet", "photos"]


def test_a_checkpoint_is_shown_with_the_name_of_its_run() -> None:
    def shared(**more: Any) -> dict[str, Any]:
        return naming.for_others({**config, **more})

    config = plain("init_from=/logs/train/runs/first/checkpoints/best.ckpt")
    assert shared()["init_from"] == "first/best.ckpt"
    both = shared(init_from="/l/multiruns/s/3/checkpoints/best.ckpt", ckpt_path="/logs/y/checkpoints/last.ckpt")
    assert (both["init_from"], both["ckpt_path"]) == ("s/3/best.ckpt", "y/last.ckpt")
    config["resume"]["run"] = "auto"
    own = shared(init_from="/w/weights.ckpt", ckpt_path=f"{config['run_dir']}/checkpoints/last.ckpt")
    assert (own["init_from"], own["ckpt_path"]) == ("weights.ckpt", "last.ckpt")


def test_the_keys_of_whole_floats_are_listed() -> None:
    """W&B's JSON has 1 for 1.0."""
    config = plain("augment.scale=[0.5,1.0]", "trainer.limit_val_batches=1.0", "trainer.limit_train_batches=1")
    floats = naming.for_others(config)["floats"]
    assert {"augment.scale.1", "trainer.limit_val_batches"} <= set(floats)
    assert {"augment.scale.0", "trainer.limit_train_batches", "seed"} & set(floats) == set()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data.root='/mnt/bob/q r'", "data.root='q r'"),
        ("+foo=[/mnt/bob/a,/b/c]", "+foo=[a,c]"),
        ("~/data/x", "x"),
        ("../x/y", "y"),
        ("{a: /x/y, b: ./z}", "{a: y, b: z}"),
        ("/mnt/John Doe/pets", "pets"),
        ("data.root='/mnt/run=3/the pets'", "data.root='the pets'"),
        ("/mnt/bob/a, b/c", "c"),
        ("/mnt/bob/it's/x", "x"),
        ("./My Data/x", "x"),
        *((text, text) for text in (
            "~hydra/launcher", "/ or not, see a/b", "1 / 255", "val / acc", "train/loss", "https://host/a/b",
            "a/b c/d", "0.5",
        )),
    ],
)  # fmt: skip
def test_paths_in_any_text_are_replaced_by_their_last_part(text: str, expected: str) -> None:
    assert naming.without_paths({"x": [text]}) == {"x": [expected]}


def test_tags_and_paths_are_what_wandb_accepts() -> None:
    config = plain("data=folder", f"data.root=/a/{'x' * 70}end")
    assert [len(tag) for tag in naming.tags(config)] == [7, 64]
    assert naming.tags(config)[1].endswith("xend")
    config["data"]["root"] = "/a/caf\udce9"
    assert naming.tags(config) == ["alexnet", r"caf\xe9"]
    assert naming.for_others({**config, "overrides": ["data.root=b/caf\udce9"]})["data"]["root"] == r"caf\xe9"
    assert naming.without_paths(["b/caf\udce9", "two\nlines"]) == [r"b/caf\xe9", "two\nlines"]
