"""Every shipped yaml composes, opens with what it is for, and breaks no rule."""

from pathlib import Path

import hydra
import pytest
from conftest import ROOT
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from alexlab import config as configs
from alexlab.errors import UserError

CONF = ROOT / "conf"
FILES = sorted(CONF.rglob("*.yaml"))
CHOICES = [p for p in FILES if p.parent != CONF and p.parent.name not in ("hydra", "paths", "callbacks")]


def compose(*overrides: str) -> DictConfig:
    OmegaConf.register_new_resolver("stamp", lambda: "now", replace=True)
    OmegaConf.register_new_resolver("root", lambda: str(ROOT), replace=True)
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("train", overrides=list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(composed)
    OmegaConf.set_struct(composed, False)
    del composed["hydra"]
    return composed


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONF)))
def test_file_says_what_it_is_for(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# "), path
    assert len(lines[0]) > 15


@pytest.mark.parametrize("path", CHOICES, ids=lambda p: str(p.relative_to(CONF)))
def test_choice_composes_and_keeps_the_rules(path: Path) -> None:
    composed = compose(f"{path.parent.name}={path.stem}", "data.root=/somewhere")
    configs.check(composed)
    assert configs.resolved(composed).data.root == "/somewhere"


def test_all_mistakes_are_told_together() -> None:
    composed = compose("optimizer.lr=-1", "data.batch_size=many", "trainer.precision=17", "data=folder")
    with pytest.raises(UserError) as told:
        configs.check(composed)
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
    configs.check(compose("seed=0", "trainer.num_sanity_val_steps=0"))
    with pytest.raises(UserError, match="seed=-1: must be a whole number"):
        configs.check(compose("seed=-1"))


def test_every_rule_has_a_key() -> None:
    """A rule for a key that no yaml holds would never be asked."""
    held: set[str] = set()
    for overrides in ([], ["scheduler=step"], ["scheduler=plateau"], ["scheduler=multistep"]):
        plain = OmegaConf.to_container(compose(*overrides), resolve=False)
        waiting = [("", plain)]
        while waiting:
            prefix, node = waiting.pop()
            for key, value in node.items():  # type: ignore[union-attr]
                held.add(f"{prefix}{key}")
                if isinstance(value, dict):
                    waiting.append((f"{prefix}{key}.", value))
    assert set(configs.RULES) <= held
