"""What a run is called, and what others are told of its config."""

import json

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from alexlab import identity
from alexlab.cli import register_resolvers
from alexlab.config import CONF


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
    found.overrides, found.choices, found.run_dir = task, chosen, "/logs/x"
    return OmegaConf.create(OmegaConf.to_container(found, resolve=True))


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
        ("optimizer.lr=0.010066097770334917 optimizer.weight_decay=1e-05", "alexnet-lr0.010066-wd1e-05"),
        ("optimizer.lr=0.050 seed=12345678 init_from=/a/b/run", "alexnet-lr0.05-s12345678-init_fromrun"),
        ("data.root=/a/other", "alexnet-other"),
        ("monitor=val/loss ckpt_path=null test=false", "alexnet"),
    ],
)
def test_a_name_of_what_differs_from_the_defaults(words: str, name: str) -> None:
    assert identity.readable(composed(*words.split())) == name


def test_runs_that_differ_in_their_seed_alone_share_a_name_without_it() -> None:
    assert identity.readable(composed("model=alexnet_bn", "seed=7", "optimizer.lr=0.05"), "seed") == "alexnet_bn-lr0.05"


def test_a_name_has_an_end() -> None:
    config = composed(*(f"+optimizer.some_setting_{number}=1" for number in range(20)))
    name = identity.readable(config)
    assert len(name) == 80
    assert name.endswith("some_setting_191"), "what tells a sweep's jobs apart comes last"


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
        ("~bob/a b/c", "c"),
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
