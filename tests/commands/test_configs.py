"""Every shipped yaml composes, opens with what it is for, and breaks no rule."""

from pathlib import Path

import hydra
import pytest
from conftest import ROOT
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from alexlab.commands.cli import register_resolvers
from alexlab.engine import config as configs
from alexlab.engine import rules
from alexlab.engine.errors import UserError

CONF = ROOT / "conf"
FILES = sorted(CONF.rglob("*.yaml"))
OTHER = ("hydra", "paths", "callbacks", "dashboard")  # groups that are no choice of train.py's
WANDBS = CONF / "sweep/wandb.yaml"  # is W&B's file and no option: tests/test_agent.py
CHOICES = [p for p in FILES if p.parent != CONF and p.parent.name not in OTHER and p != WANDBS and p.stem[0] != "_"]


def compose(*overrides: str, hydra_too: bool = False) -> DictConfig:
    register_resolvers("now")
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("train", overrides=list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(composed)
    if hydra_too:
        return composed
    OmegaConf.set_struct(composed, False)
    del composed["hydra"]
    return composed


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONF)))
def test_file_says_what_it_is_for(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# "), path
    assert len(lines[0]) > 10


@pytest.mark.parametrize("path", CHOICES, ids=lambda p: str(p.relative_to(CONF)))
def test_choice_composes_and_keeps_the_rules(path: Path, tmp_path: Path) -> None:
    (tmp_path / "prepared.json").touch()  # for data=prepared
    composed = compose(f"{path.parent.name}={path.stem}", f"data.root={tmp_path}")
    rules.check(composed)
    assert configs.resolved(composed).data.root == str(tmp_path)


def test_all_mistakes_are_told_together() -> None:
    composed = compose("optimizer.lr=-1", "data.batch_size=many", "trainer.precision=17", "data=folder")
    with pytest.raises(UserError) as told:
        rules.check(composed)
    text = str(told.value)
    assert text.startswith("4 values of the config are wrong")
    for part in (
        "optimizer.lr=-1: must be a number above 0",
        "data.batch_size=many: must be a whole number",
        "trainer.precision=17: must be one of auto",
        "data.root is missing",
    ):
        assert part in text


def test_seed_0_and_false_are_values() -> None:
    rules.check(compose("seed=0", "trainer.num_sanity_val_steps=0"))
    with pytest.raises(UserError, match="seed=-1: must be a whole number"):
        rules.check(compose("seed=-1"))


FREE = {
    "choices", "data.name", "logger", "logger.tensorboard", "model.name", "overrides", "paths.data", "paths.logs",
    "run_dir", "task",
}  # names, or what the network itself checks  # fmt: skip


def keys(node: dict, prefix: str = "") -> set[str]:
    found: set[str] = set()
    for key, value in node.items():
        found |= keys(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}"}
    return found


def test_every_key_has_a_rule_and_every_rule_a_key() -> None:
    """A key without a rule would be found wrong late; a rule without a key would never be asked."""
    held: set[str] = set()
    for path in CHOICES:
        held |= keys(OmegaConf.to_container(compose(f"{path.parent.name}={path.stem}"), resolve=False))  # type: ignore[arg-type]
    own = {key for key in held if key.startswith("model.net.") and key != "model.net._target_"}
    assert held - FREE - own == set(rules.RULES)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["experiment=finetune", "model=alexnet_bn", "data.root=x"],
            "model.pretrained=true: alexnet_bn has no published weights here",
        ),
        (["monitor=val/acc"], "monitor=val/acc: must be one of val/loss, val/acc1, val/acc5."),
        (["trainer.max_epochs=null"], "the run would never end; set one of them"),
        (["trainer.max_epochs=0"], "trainer.max_epochs=0: must be a whole number, at least 1, or null"),
        (["ema.decay=0.9", "trainer=fsdp"], "ema.decay=0.9 cannot average sharded weights: trainer=ddp"),
        (["scheduler=plateau", "trainer.limit_val_batches=0"], "scheduler=plateau needs validation"),
        (["callbacks.early_stopping=2", "trainer.limit_val_batches=0.0"], "callbacks.early_stopping needs validation"),
        (["optimizer.nesterov=true", "optimizer.momentum=0"], "needs optimizer.momentum above 0"),
        (["trainer.limit_train_batches=1.5"], "must be a share above 0.0 up to 1.0, or a whole number of batches"),
        (["augment.scale=[0.5,0.2]"], "augment.scale=[0.5, 0.2]: must be two shares of the area"),
        (["data.num_workers=true"], "data.num_workers=true: must be a whole number, at least 0, or null."),
        (["trainer.deterministic=1"], "trainer.deterministic=1: must be one of true, false, warn."),
        (["trainer.devices=[0,0]"], "must be auto, a whole number above 0, or a list of different GPU numbers"),
        (["logger.wandb.mode=on"], "logger.wandb.mode=on: must be one of auto, online, offline, disabled."),
    ],
)
def test_rule(words: list[str], told: str) -> None:
    with pytest.raises(UserError) as error:
        rules.check(compose(*words))
    assert told in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        ["trainer.max_epochs=null", "trainer.max_steps=5"],
        ["trainer.devices=[0,1]"],
        ["trainer.limit_train_batches=7", "trainer.limit_val_batches=0"],
        ["trainer.precision=16"],
        ["scheduler=multistep", "scheduler.milestones=[]"],
        ["logger=[wandb,tensorboard]"],
    ],
)
def test_what_rules_allow(words: list[str]) -> None:
    rules.check(compose(*words))


def test_optuna_looks_for_what_is_monitored() -> None:
    for metric, direction in (("val/acc1", "maximize"), ("val/loss", "minimize")):
        made = compose("sweep=optuna", f"monitor={metric}", hydra_too=True)
        assert made.hydra.sweeper.direction == direction
