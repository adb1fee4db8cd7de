"""The config of from_run=RUN with other words: that of the run's own command line with these words in it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from test_naming import composed

from alexlab.commands import repeat, reworded
from alexlab.engine import config as configs
from alexlab.engine import naming, options
from alexlab.engine.errors import UserError
from alexlab.loggers import wandb_api as fetch

FOLDER = "data=folder data.root={data}"
SHUFFLE = f"{FOLDER} model=torchvision model.name=shufflenet_v2_x0_5"
OWN = {"run_dir", "overrides", "paths", "repeats", "from_run"}  # of the run, and not of what it computes


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "photos").mkdir()
    (tmp_path / "other").mkdir()
    return {"data": str(tmp_path / "photos"), "other": str(tmp_path / "other"), "run": str(tmp_path / "runs/then")}


def plain(line: str, folders: dict[str, str]) -> dict[str, Any]:
    return configs.plain(configs.resolved(composed(*line.format(**folders).split())))


def ran(line: str, folders: dict[str, str], classes: int = 5) -> Path:
    """The directory of a run with these words, as far as it is looked at; its classes were counted."""
    config = plain(line, folders)
    config["data"]["num_classes"] = config["data"]["num_classes"] or classes
    config["run_dir"] = folders["run"]
    Path(folders["run"]).mkdir(parents=True)
    configs.save(configs.create(config), Path(folders["run"], "config.yaml"))
    return Path(folders["run"])


def repeated(line: str, folders: dict[str, str]) -> tuple[dict[str, Any], repeat.Origin]:
    config = configs.resolved(composed(f"from_run={folders['run']}", *line.format(**folders).split()))
    made, origin = repeat.repeat(config)
    assert origin is not None
    return configs.plain(made), origin


def of_board(
    told: dict[str, Any], line: str, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The config of from_wandb=a/b/c where W&B has `told` of that run, as its JSON has it."""
    text = re.sub(r"(\d)\.0\b(?!\.)", r"\1", json.dumps(told))
    monkeypatch.setattr(fetch, "fetch", lambda name: (json.loads(text), {}))
    made, _ = repeat.repeat(configs.resolved(composed("from_wandb=a/b/c", *line.format(**folders).split())))
    return configs.plain(made)


def without(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in configs.flat(config).items() if key.split(".")[0] not in OWN}


@pytest.mark.parametrize(
    ("words", "more"),
    [
        (SHUFFLE, "model=torchvision model.name=resnet18"),
        (SHUFFLE, "model.name=resnet18"),
        (SHUFFLE, "++model.pretrained=true"),
        (SHUFFLE, "++model.pretrained=true model.name=resnet18"),
        (SHUFFLE, "model=timm model.name=resnet50"),
        (f"{SHUFFLE} model.net.pretrained=false", "++model.pretrained=true"),
        (f"{SHUFFLE} model.net.name=mobilenet_v2", "model.name=resnet18"),
        (FOLDER, "model=torchvision model.name=resnet18"),
        (FOLDER, "model=alexnet_krizhevsky2012"),
        (FOLDER, "model=alexnet_krizhevsky2012 optimizer=adamw"),
        (FOLDER, "optimizer=adamw model=alexnet_krizhevsky2012"),
        (f"{FOLDER} model=alexnet_bn", "model=alexnet_krizhevsky2012"),
        (f"{FOLDER} model=alexnet_bn optimizer.bias_lr_factor=3", "model=alexnet_krizhevsky2012"),
        (f"{FOLDER} model=alexnet_krizhevsky2012", "model=alexnet_bn"),
        (f"{FOLDER} model=alexnet_krizhevsky2012", "optimizer=adamw"),
        (f"{FOLDER} model=alexnet_krizhevsky2012", "++model.bias_lr_factor=4"),
        (f"{FOLDER} scheduler=plateau", "monitor=val/loss"),
        (f"{FOLDER} scheduler=plateau scheduler.monitor=val/acc5", "monitor=val/loss"),
        (f"{FOLDER} monitor=val/loss", "scheduler=plateau"),
        (f"{FOLDER} ~optimizer.bias_lr_factor", "model=alexnet_krizhevsky2012"),
        (FOLDER + " optimizer.weight_decay=${{optimizer.lr}}", "optimizer.lr=0.5"),
        (f"{FOLDER} optimizer.lr=0.25", "optimizer.weight_decay=${{optimizer.lr}}"),
        (f"{FOLDER} seed=7 data.num_classes=5", "seed=8"),
        (FOLDER, "data.root={other}"),
        (f"{FOLDER} trainer=ddp_cpu trainer.devices=3", "logger=csv debug=limit"),
        ("experiment=demo", "monitor=val/loss scheduler=plateau"),
        # what stands above an option on a command line stays: a recipe's keys, and over a recipe's a word
        ("experiment=fashion_mnist", "optimizer=adamw"),
        ("experiment=fashion_mnist", "model=alexnet_half"),
        ("experiment=fashion_mnist", "augment=strong"),
        ("experiment=fashion_mnist", "data=demo"),
        ("experiment=fashion_mnist", "logger=none scheduler=plateau"),
        ("experiment=fashion_mnist logger=none", "logger=all"),
        ("experiment=fashion_mnist debug=limit", "trainer=ddp_cpu"),
        ("experiment=fashion_mnist", "debug=fast"),
        ("experiment=fashion_mnist optimizer.lr=0.2", "debug=fast augment=strong"),
        (f"{FOLDER} trainer.max_epochs=2", "debug=fast"),
        (f"{FOLDER} trainer.max_epochs=2 ~trainer.log_every_n_steps", "debug=fast"),
        (FOLDER + " trainer={{max_epochs:2}}", "debug=fast"),
        (f"{FOLDER} trainer.max_epochs=2", "debug=fast trainer.max_epochs=3"),
        (f"{FOLDER} trainer.max_epochs=2", "trainer=ddp_cpu debug=fast"),
        (f"{FOLDER} trainer.max_epochs=2", "trainer={{max_epochs:3}}"),
        # references in lists
        (FOLDER + " augment.scale=[${{label_smoothing}},0.99] label_smoothing=0.2", "label_smoothing=0.3"),
        (FOLDER + " augment.sizes=[[1,${{data.image_size}}],[3,64]]", "data.image_size=32"),
        (FOLDER + " augment.scale=[1e-3,${{optimizer.lr}}]", "optimizer.lr=0.5"),
        (FOLDER + " +a.b=['${{seed}}',x,\"${{seed}}_y\",[z,${{seed}}]]", "seed=3"),
        (FOLDER, "+a.b=[${{oc.select:seed,4}},1] seed=3"),
        (FOLDER + " +a.b=[{{c:${{seed}}}}]", "label_smoothing=0.1"),
        # where images are looked for
        ("paths.data={data}", "paths.data={other}"),
        ("seed=1", "paths.data={other}"),
        ("data.root={data} paths.data={data}", "paths.data={other}"),
        ("paths.data={data}", "paths.data={other} data=fashion_mnist"),
    ],
)
def test_it_is_that_of_the_whole_command_line(words: str, more: str, folders: dict[str, str]) -> None:
    ran(words, folders)
    made, _ = repeated(more, folders)
    assert without(made) == without(plain(f"{words} {more}", folders))


def test_a_word_of_the_run_holds_over_a_recipe_that_is_given_now(folders: dict[str, str]) -> None:
    """As words do over options: the name and the words say what the run does."""
    ran(f"{FOLDER} trainer.max_epochs=2", folders)
    made, origin = repeated("debug=fast", folders)
    assert made["trainer"]["max_epochs"] == 2
    assert made["trainer"]["limit_train_batches"] == 2, "what the recipe alone sets"
    assert "trainer.max_epochs=2" in made["overrides"]
    assert not any("max_epochs" in line for line in origin.changes)


def test_images_stay_where_no_word_says_otherwise(folders: dict[str, str]) -> None:
    ran("paths.data={data}", folders)
    assert repeated("seed=1", folders)[0]["data"]["root"] == f"{folders['data']}/demo"


def test_what_follows_from_a_word_is_told(folders: dict[str, str]) -> None:
    ran(SHUFFLE, folders)
    made, origin = repeated("model.name=resnet18", folders)
    shuffle = "shufflenet_v2_x0_5"
    assert origin.changes == [f"model.name=resnet18 (there {shuffle})", f"model.net.name=resnet18 (there {shuffle})"]
    assert made["model"]["net"]["name"] == "resnet18"
    _, origin = repeated("seed=1", folders)
    assert origin.changes == ["seed=1 (there 0)"], "nothing that was worked out is told as changed"


@pytest.mark.parametrize(
    ("words", "more", "kept"),
    [
        # of another option the words that the run gave the old one are none any more
        (SHUFFLE, "model=alexnet", FOLDER.split()),
        (f"{FOLDER} optimizer.lr=0.5 optimizer.decay_norm_and_bias=true", "optimizer=adamw",
         [*FOLDER.split(), "optimizer.decay_norm_and_bias=true"]),
        (f"{FOLDER} data.num_workers=0 augment=strong", "data=demo", ["data.num_workers=0", "augment=strong"]),
    ],
)  # fmt: skip
def test_words_of_an_option_that_is_exchanged_are_dropped(
    words: str, more: str, kept: list[str], folders: dict[str, str]
) -> None:
    ran(words, folders)
    made, _ = repeated(more, folders)
    given = [f"from_run={folders['run']}", *more.split()]
    assert made["overrides"] == [*(word.format(**folders) for word in kept), *given]
    clean = " ".join(kept) + f" {more}"
    assert without(made) == without(plain(clean, folders))


def test_other_images_may_have_other_classes(folders: dict[str, str]) -> None:
    """Their number was counted, and given only by a word that says so."""
    ran(f"{FOLDER}", folders, classes=5)
    made, origin = repeated("data.root={other}", folders)
    assert made["data"]["num_classes"] is None
    assert [line for line in origin.changes if "num_classes" in line] == []


def test_another_network_may_normalize_otherwise(folders: dict[str, str]) -> None:
    """model.mean=auto was worked out for the run's own."""
    run_dir = ran(f"{FOLDER} model=timm model.std=[0.5,0.5,0.5]", folders)
    config: Any = OmegaConf.load(run_dir / "config.yaml")
    config.model.mean = [0.1, 0.2, 0.3]
    configs.save(config, run_dir / "config.yaml")
    made, _ = repeated("model.name=vit_base_patch16_224", folders)
    assert (made["model"]["mean"], made["model"]["std"]) == ("auto", [0.5, 0.5, 0.5])
    _, origin = repeated("model.name=vit_base_patch16_224", folders)
    assert not any("model.mean" in line for line in origin.changes), "it is worked out again"
    _, origin = repeated("model.mean=[0.4,0.4,0.4]", folders)
    assert origin.changes == ["model.mean=[0.4, 0.4, 0.4] (there [0.1, 0.2, 0.3])"], "and not auto, that none had"
    _, origin = repeated("model.mean=[0.1,0.2,0.3]", folders)
    assert origin.changes == []
    made, _ = repeated("seed=1", folders)
    assert made["model"]["mean"] == [0.1, 0.2, 0.3]


def test_a_group_in_wandb_is_dropped_where_it_was_filled_in(folders: dict[str, str]) -> None:
    """As for a run of a sweep's agent; not where a word gave it, whatever it looks like."""
    run_dir = ran(f"{FOLDER} logger.wandb.group=baseline", folders)
    assert repeated("seed=1", folders)[0]["logger"]["wandb"]["group"] == "baseline"
    config: Any = OmegaConf.load(run_dir / "config.yaml")
    config.overrides = FOLDER.format(**folders).split()
    config.logger.wandb.group = "x7k2m9qa"
    configs.save(config, run_dir / "config.yaml")
    assert repeated("seed=1", folders)[0]["logger"]["wandb"]["group"] is None


def test_a_group_in_wandb_that_a_recipe_has_set_stays(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = ran(FOLDER, folders)
    config: Any = OmegaConf.load(run_dir / "config.yaml")
    config.choices.experiment, config.logger.wandb.group = "mine", "baseline"  # eight letters, as W&B's own have
    configs.save(config, run_dir / "config.yaml")
    shutil.copytree(options.CONF, tmp_path / "conf")
    (tmp_path / "conf/experiment/mine.yaml").write_text("# @package _global_\nlogger: {wandb: {group: baseline}}\n")
    monkeypatch.setattr(options, "CONF", tmp_path / "conf")
    assert repeated("seed=1", folders)[0]["logger"]["wandb"]["group"] == "baseline"


def test_what_another_option_derives_is_of_the_runs_own_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where both options come to one value there: what was taken is today's."""
    shutil.copytree(options.CONF, tmp_path / "conf")
    monkeypatch.setattr(options, "CONF", tmp_path / "conf")
    for name, reference in (("a", "label_smoothing"), ("b", "model.dropout")):
        (tmp_path / f"conf/optimizer/{name}.yaml").write_text(f"lr: ${{{reference}}}\n")
    there = {"label_smoothing": 0.5, "model": {"dropout": 0.5}, "optimizer": {"lr": 0.5}, "choices": {"optimizer": "a"}}
    today = {"label_smoothing": 0.0, "model": {"dropout": 0.1}, "optimizer": {"lr": 0.1}, "choices": {"optimizer": "b"}}
    changed = {**json.loads(json.dumps(there)), "paths": {}}
    renewed = options.exchange(changed, today, "optimizer", "optimizer=b", [])
    reworded.follow(there, changed, renewed, ([], []), [], {})
    assert changed["optimizer"] == {"lr": 0.5}


def test_a_recipe_stands_above_the_options_whatever_comes_first() -> None:
    """As train.yaml has them: of two recipes the later one counts."""
    for choices in (
        {"optimizer": "sgd", "trainer": "auto", "experiment": "fashion_mnist", "debug": "fast"},
        {"debug": "fast", "experiment": "fashion_mnist", "trainer": "auto", "optimizer": "sgd"},
    ):
        found = [options.default(choices, key) for key in ("optimizer.lr", "trainer.max_epochs", "scheduler.warmup")]
        assert found == [0.03, 1, 1]


def test_words_of_a_run_from_elsewhere_get_nothing_of_the_environment(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "hunter2hunter2")
    words = ["a.b=${oc.env:MY_TOKEN}", "a.c=${root:}", "a.d=x ${oc.decode:${a.b}}", "a.e=[${seed}]", "a.f=${seed}"]
    assert options.derived({}, words) == {"a.e": "[${seed}]", "a.f": "${seed}"}
    assert options.derived({}, words, words).keys() == {"a.b", "a.c", "a.d", "a.e", "a.f"}, "of one's own command line"


def test_a_word_takes_a_reference_out() -> None:
    choices = {"model": "torchvision"}
    both = {"model.net.name", "model.net.pretrained"}
    assert options.derived(choices, []).keys() == both
    for word in ("model.net.name=vgg11", "~model.net.name", "+model.net.name=a", "model.net={name: x}"):
        assert options.derived(choices, [word]).keys() == both - {"model.net.name"}
    assert options.derived(choices, ["model.net={name:x,pretrained:true}"]) == {}
    assert options.derived({"model": "../../x", "nothing": "y"}, []) == {}


def test_an_option_of_another_folder_is_refused(folders: dict[str, str]) -> None:
    ran(FOLDER, folders)
    config = configs.resolved(composed(f"from_run={folders['run']}", "optimizer=adamw"))
    config.choices.optimizer = "mine"
    with pytest.raises(UserError, match=r"optimizer=adamw: conf/optimizer/ has no mine"):
        repeat.repeat(config)


def test_whole_numbers_come_back_as_floats_from_wandb(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = f"{FOLDER} augment.scale=[0.5,1.0] trainer.limit_val_batches=1.0 trainer.limit_train_batches=1"
    then = plain(words, folders)
    told = naming.for_others({**then, "run_dir": "/logs/then"})
    made = of_board(told, "data.root={data}", folders, monkeypatch)
    assert str(without(made)) == str(without(then)), "a float is one again, and no other number"
    told["floats"] = ["trainer.limit_val_batches", "nowhere.0", "augment.scale.7", "seed.x", 3]  # of an older version
    made = of_board(told, "data.root={data}", folders, monkeypatch)
    assert repr(made["trainer"]["limit_val_batches"]) == "1.0"
    assert made["augment"]["scale"] == [0.5, 1]


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("init_from=/r/A/checkpoints/best.ckpt", r"give init_from=\.\.\. \(there A/best\.ckpt\)\."),
        ("data.class_names=/r/names.tsv", r"give data\.class_names=\.\.\. \(there names\.tsv\)\."),
    ],
)
def test_files_that_a_run_of_wandb_began_with_are_asked_for(
    words: str, asked: str, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = naming.for_others(configs.plain(composed(*f"{FOLDER} {words}".format(**folders).split())))
    with pytest.raises(UserError, match=asked):
        of_board(told, "data.root={data}", folders, monkeypatch)
    key = words.partition("=")[0]
    made = of_board(told, f"data.root={{data}} {key}={{other}}", folders, monkeypatch)
    assert options.at(made, key) == folders["other"]


def test_images_of_a_run_of_wandb_may_be_others(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And names that are shipped here are no file."""
    told = naming.for_others(configs.plain(composed(*f"{FOLDER} data.class_names=imagenet".format(**folders).split())))
    made = of_board(told, "data=demo", folders, monkeypatch)
    assert (made["data"]["name"], made["data"]["class_names"]) == ("demo", "imagenet")


def test_a_run_of_wandb_that_had_gone_on_begins_as_then(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(*FOLDER.format(**folders).split())
    for last in ("last.ckpt", "previous.ckpt"):
        config.ckpt_path, config.resume.run = f"{config.run_dir}/checkpoints/{last}", "latest"
        made = of_board(naming.for_others(configs.plain(config)), "data.root={data}", folders, monkeypatch)
        assert made["ckpt_path"] is None
