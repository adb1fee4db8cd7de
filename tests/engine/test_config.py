"""Configs of older runs."""

from pathlib import Path

import pytest

from alexlab.engine.config import read, save, use_own_disk_cache, with_current_targets


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


@pytest.mark.parametrize(("overridden", "expected"), [((), "/here/cache"), (("data.disk_cache",), "/elsewhere/cache")])
def test_the_disk_cache_is_that_of_this_machine_unless_it_is_overridden(
    overridden: tuple[str, ...], expected: str
) -> None:
    config = {"paths": {"data": "/here"}, "data": {"name": "prepared", "disk_cache": "/elsewhere/cache"}}
    use_own_disk_cache(config, overridden)
    assert config["data"]["disk_cache"] == expected
    folder = {"paths": {"data": "/here"}, "data": {"name": "folder"}}
    use_own_disk_cache(folder, overridden)
    assert folder["data"] == {"name": "folder"}, "other data have no such key"
