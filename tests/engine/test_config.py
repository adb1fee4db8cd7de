"""Configs of older runs."""

from alexlab.engine.config import with_current_targets


def test_a_target_of_an_older_run_names_the_module_of_today() -> None:
    old = {
        "model": {"net": {"_target_": "alexlab.models.zoo.timm_net", "name": "alexlab.models.zoo.timm_net"}},
        "callbacks": {"mine": [{"_target_": "alexlab.callbacks.agreement.SameConfig"}]},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
    }
    assert with_current_targets(old) == {
        "model": {"net": {"_target_": "alexlab.models.pretrained.timm_net", "name": "alexlab.models.zoo.timm_net"}},
        "callbacks": {"mine": [{"_target_": "alexlab.callbacks.same_config.SameConfig"}]},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
    }
