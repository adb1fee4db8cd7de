"""Configs of older runs."""

from pathlib import Path

from alexlab.engine.config import read, save, with_current_targets


def test_a_target_of_an_older_run_names_the_module_of_today() -> None:
    old = {
        "model": {"net": {"_target_": "alexlab.models.zoo.timm_net", "name": "alexlab.models.zoo.timm_net"}},
        "callbacks": {"mine": [{"_target_": "alexlab.callbacks.snapshots.Checkpointing"}]},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
    }
    assert with_current_targets(old) == {
        "model": {"net": {"_target_": "alexlab.models.pretrained.timm_net", "name": "alexlab.models.zoo.timm_net"}},
        "callbacks": {"mine": [{"_target_": "alexlab.callbacks.checkpointing.Checkpointing"}]},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
    }


def test_a_path_in_no_encoding_is_read_as_it_was_written(tmp_path: Path) -> None:
    plain = {"data": {"root": "/caf\udce9/犬\n"}}
    save(plain, tmp_path / "config.yaml")
    assert read(tmp_path / "config.yaml") == plain
