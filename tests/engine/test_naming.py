"""What a run is called, and what others are told of its config."""

import json
import re

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from alexlab.commands.cli import register_resolvers
from alexlab.engine import config as configs
from alexlab.engine import naming as identity
from alexlab.engine.config import CONF


def composed(*words: str) -> DictConfig:
    """As cli.py leaves it: with the words, and the option of each group."""
    register_resolvers("now")
    GlobalHydra.instance().clear()
    task = [word for word in words if not word.startswith("hydra.")]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", overrides=task, return_hydra_config=True)
    found: DictConfig = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    OmegaConf.set_struct(found, False)
    chosen = {key: name for key, name in config.hydra.runtime.choices.items() if (CONF / key).is_dir() and name}
    found.overrides, found.choices, found.run_dir = [configs.escaped(word) for word in task], chosen, "/logs/x"
    return configs.create(configs.plain(found))


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
        ("optimizer.lr=0.050 optimizer.weight_decay=1e-05 init_from=run", "alexnet-lr0.05-wd1e-05-init_fromrun"),
        ("seed=12345678 trainer.limit_train_batches=1", "alexnet-s12345678-limit_train_batches1"),
        ("trainer.limit_train_batches=1.0", "alexnet-limit_train_batches1.0"),
        ("data.root=/a/other", "alexnet-other"),
        ("monitor=val/loss ckpt_path=null test=false", "alexnet"),
    ],
)
def test_a_name_of_what_differs_from_the_defaults(words: str, name: str) -> None:
    assert identity.readable(composed(*words.split())) == name


@pytest.mark.parametrize(
    ("words", "others", "start"),
    [
        ("optimizer.lr=0.0123456", "optimizer.lr=0.0123457", "alexnet-lr0.012346-"),
        ("init_from=/r/A/checkpoints/best.ckpt", "init_from=/r/B/checkpoints/best.ckpt", "alexnet-init_frombest.ckpt-"),
        ("init_from=a/0", "init_from=b/0", "alexnet-init_from0-"),
        (" ".join(f"+a.some_setting_{n}=1" for n in range(20)),
         " ".join(f"+a.some_setting_{n}={2 if n == 9 else 1}" for n in range(20)), "alexnet-some_setting_01-"),
    ],
)  # fmt: skip
def test_a_name_that_leaves_something_out_ends_with_letters_of_the_whole(words: str, others: str, start: str) -> None:
    name, other = (identity.readable(composed(*line.split())) for line in (words, others))
    assert name.startswith(start)
    assert (name[:-6], len(name)) == (other[:-6], len(other))
    assert name != other
    assert re.fullmatch(r"[0-9a-f]{6}", name[-6:])
    assert len(name) <= 80
    assert identity.readable(composed(*words.split())) == name, "always the same"


def test_a_name_has_an_end() -> None:
    name = identity.readable(composed(*(f"+optimizer.some_setting_{number}=1" for number in range(20))))
    assert len(name) == 80
    assert name[:-7].endswith("some_setting_191"), "what tells a sweep's jobs apart comes last"


def test_runs_that_differ_in_their_seed_alone_are_a_group() -> None:
    def group(*words: str) -> str:
        return identity.group_of(composed(*words))

    one = group("model=alexnet_bn", "seed=7", "optimizer.lr=0.05")
    assert re.fullmatch(r"alexnet_bn-lr0\.05-[0-9a-f]{6}", one)
    for same in (
        ("model=alexnet_bn", "seed=8", "optimizer.lr=0.050"),
        ("optimizer.lr=5e-2", "model=alexnet_bn", "test=false", "logger=csv", "data.num_workers=0"),
    ):
        assert group(*same)[-6:] == one[-6:]
    names = [
        ("data=folder", "data.root=/a/photos"), ("data=folder", "data.root=/b/photos"),
        ("trainer.limit_train_batches=1",), ("trainer.limit_train_batches=1.0",),
        ("model=torchvision", "model.name=resnet18"), ("model=timm", "model.name=resnet18"),
        ("monitor=val/loss",), ("init_from=a/0",), ("init_from=b/0",),
    ]  # fmt: skip
    assert len({group(*words) for words in names}) == len(names)
    assert group("trainer.limit_train_batches=1.0") == group(), "all batches, as without it"


def test_a_group_is_of_settings_whatever_gave_them() -> None:
    config = composed("data=folder", "data.root=/a/photos")
    group = identity.group_of(config)
    for defaults in ("optimizer=sgd test=True", "optimizer.lr=0.005", "label_smoothing=0", "logger=csv seed=3"):
        same = identity.group_of(composed(*defaults.split(), "data.root=/a/photos", "data=folder"))
        assert same == group, "no other settings"
    config.optimizer.lr = 0.5  # as conf/ has it after it was edited
    assert identity.group_of(config)[-6:] != group[-6:]
    config.optimizer.lr = 0.005
    config.ckpt_path, config.resume.run = f"{config.run_dir}/checkpoints/last.ckpt", "auto"
    assert identity.group_of(config) == group, "after a resume"
    config.ckpt_path = "/logs/other/checkpoints/last.ckpt"
    assert identity.group_of(config) != group
    recipe = identity.group_of(composed("experiment=fashion_mnist"))
    assert recipe == identity.group_of(composed("optimizer.lr=0.03", "data=fashion_mnist", "experiment=fashion_mnist"))
    assert recipe != identity.group_of(composed("experiment=fashion_mnist", "optimizer.lr=0.005"))
    here, there = composed(), composed("paths.data=/elsewhere")
    assert here.data.root != there.data.root
    assert identity.group_of(here) == identity.group_of(there), "the images that every machine has"


def test_nothing_of_this_machines_folders_is_told() -> None:
    config = composed(
        "data=folder", "data.root=/secret/place/photos", "logger.wandb.notes=a/b", "ckpt_path=/secret/run"
    )
    config.run_dir = "/secret/logs/train/multiruns/sweep/3"
    told = identity.for_others(config)
    assert "/secret" not in json.dumps(told)
    assert str(identity.configs.ROOT) not in json.dumps(told)
    assert told["data"]["root"] == "photos"
    assert "data.root=photos" in told["overrides"]
    assert told["ckpt_path"] == "run"
    assert told["run"] == "sweep/3"
    assert told["logger"]["wandb"]["notes"] == "a/b", "no path"
    assert told["optimizer"]["lr"] == config.optimizer.lr
    assert {"paths", "run_dir"} & told.keys() == set()
    assert identity.tags_for(config) == ["alexnet", "photos"]


def test_a_checkpoint_is_told_with_its_runs_name() -> None:
    config = composed("init_from=/logs/train/runs/first/checkpoints/best.ckpt")
    assert identity.for_others(config)["init_from"] == "first/best.ckpt"
    config.init_from, config.ckpt_path = "/l/multiruns/s/3/checkpoints/best.ckpt", "/logs/y/checkpoints/last.ckpt"
    assert (identity.for_others(config)["init_from"], identity.for_others(config)["ckpt_path"]) == (
        "s/3/best.ckpt", "y/last.ckpt"
    )  # fmt: skip
    config.init_from, config.ckpt_path = "/w/weights.ckpt", f"{config.run_dir}/checkpoints/last.ckpt"
    config.resume.run = "auto"
    told = identity.for_others(config)
    assert (told["init_from"], told["ckpt_path"]) == ("weights.ckpt", "last.ckpt"), "its own, after a resume"


def test_whole_numbers_that_are_floats_are_told() -> None:
    """Of lists, too: W&B's JSON has 1 for each."""
    config = composed("augment.scale=[0.5,1.0]", "trainer.limit_val_batches=1.0", "trainer.limit_train_batches=1")
    floats = identity.for_others(config)["floats"]
    assert {"augment.scale.1", "trainer.limit_val_batches"} <= set(floats)
    assert {"augment.scale.0", "trainer.limit_train_batches", "seed"} & set(floats) == set()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data.root='/mnt/bob/q r'", "data.root='q r'"),
        ("+foo=[/mnt/bob/a,/b/c]", "+foo=[a,c]"),
        ("C:/Users/bob/w.ckpt", "w.ckpt"),
        ("C:\\Users\\bob\\w.ckpt", "w.ckpt"),
        ("file:///mnt/bob/x", "x"),
        ("logs/../../mnt/bob", "bob"),
        ("~/data/x", "x"),
        ("../x/y", "y"),
        ("{a: /x/y, b: ./z}", "{a: y, b: z}"),
        ("/mnt/John Doe/pets", "pets"),
        ("data.root='/mnt/run=3/the pets'", "data.root='the pets'"),
        ("/mnt/bob/a, b/c", "c"),
        ("/mnt/bob/it's/x", "x"),
        ("./My Data/x", "x"),
        ("~hydra/launcher", "~hydra/launcher"),
        ("/ or not, see a/b", "/ or not, see a/b"),
        ("1 / 255", "1 / 255"),
        ("val / acc", "val / acc"),
        ("train/loss", "train/loss"),
        ("https://host/a/b", "https://host/a/b"),
        ("a/b c/d", "a/b c/d"),
        ("0.5", "0.5"),
    ],
)  # fmt: skip
def test_folders_are_left_out_of_any_text(text: str, told: str) -> None:
    assert identity.without_paths({"x": [text]}) == {"x": [told]}
