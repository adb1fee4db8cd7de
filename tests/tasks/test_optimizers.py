"""Learning rates against their formulas; which parameters have weight decay."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from alexlab.engine.errors import UserError
from alexlab.tasks import optimizers as optim

SGD = {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "lr_reference_batch": None}
PLATEAU = {"name": "plateau", "factor": 0.1, "patience": 0, "min_lr": 0}


def learning_rates(steps: int, epochs: int, **settings: Any) -> list[float]:
    net = nn.Linear(2, 2)
    optimizer = optim.build_optimizer(net, SGD, 64)
    (entry,) = optim.build_schedulers(optimizer, {"unit": "epoch", "warmup": 0, **settings}, steps, steps // epochs)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        entry["scheduler"].step()
    return found


def test_cosine_with_warmup() -> None:
    found = learning_rates(100, 10, name="cosine", warmup=1, min_factor=0.0)
    assert found[:10] == pytest.approx([0.1 * (i + 1) / 11 for i in range(10)])
    assert found[10:] == pytest.approx([0.05 * (1 + math.cos(math.pi * i / 90)) for i in range(90)])


def test_linear_decays_to_its_floor() -> None:
    found = learning_rates(100, 10, name="linear", min_factor=0.1)
    assert found[50] == pytest.approx(0.1 * (0.1 + 0.9 * 0.5))


def test_step_and_multistep_in_epochs_and_steps() -> None:
    assert learning_rates(90, 9, name="step", step_size=3, gamma=0.1)[::30] == pytest.approx([0.1, 0.01, 0.001])
    found = learning_rates(100, 10, name="multistep", milestones=[25, 50], gamma=0.5, unit="step")
    assert (found[24], found[25], found[50]) == pytest.approx((0.1, 0.05, 0.025))
    assert set(learning_rates(20, 2, name="constant")) == {0.1}


def test_plateau_combines_with_warmup() -> None:
    optimizer = optim.build_optimizer(nn.Linear(2, 2), SGD, 64)
    settings = {**PLATEAU, "unit": "step", "warmup": 4, "monitor": "val/acc1"}
    entries = optim.build_schedulers(optimizer, settings, 10, 5, check_val_every_n_epoch=2)
    plateau, ramp = (entry["scheduler"] for entry in entries)
    assert entries[0]["frequency"] == 2, "it needs a validation"
    seen = []
    for _ in range(6):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        ramp.step()
    assert seen == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])
    plateau.step(0.5)
    plateau.step(0.4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_plateau_of_a_loss_expects_smaller_values() -> None:
    optimizer = optim.build_optimizer(nn.Linear(2, 2), SGD, 64)
    settings = {**PLATEAU, "unit": "epoch", "warmup": 0, "monitor": "val/loss"}
    (entry,) = optim.build_schedulers(optimizer, settings, 10, 5)
    for loss in (0.5, 0.4, 0.3):
        entry["scheduler"].step(loss)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_an_epoch_of_warmup_has_as_many_steps_if_the_run_stops_early() -> None:
    """max_steps=15 of 10 epochs of 10 steps: the warm-up is still 10 steps."""
    optimizer = optim.build_optimizer(nn.Linear(2, 2), SGD, 64)
    settings = {"name": "linear", "unit": "epoch", "warmup": 1}
    (entry,) = optim.build_schedulers(optimizer, settings, steps=15, steps_per_epoch=10)
    factor = entry["scheduler"].lr_lambdas[0]
    assert [factor(step) for step in (0, 9, 10, 15)] == pytest.approx([1 / 11, 10 / 11, 1, 0])


def test_settings_that_the_optimizer_refuses_are_an_error() -> None:
    with pytest.raises(UserError, match=r"torch.optim.SGD does not take these settings .*optimizer.turbo=1.*turbo"):
        optim.build_optimizer(nn.Linear(2, 2), {**SGD, "turbo": 1}, 64)
    with pytest.raises(UserError, match=r"_target_=os.system is not allowed"):
        optim.build_optimizer(nn.Linear(2, 2), {**SGD, "_target_": "os.system"}, 64)


def test_state_tensors_per_parameter() -> None:
    adamw = {"_target_": "torch.optim.AdamW", "lr": 1e-3}
    assert optim.state_tensors(SGD) == 1
    assert optim.state_tensors({**SGD, "momentum": 0.0}) == 0
    assert optim.state_tensors(adamw) == 2


def test_learning_rate_scales_with_the_batch_only_if_wanted() -> None:
    assert optim.effective_lr(SGD, 1024) == 0.1
    assert optim.effective_lr({**SGD, "lr_reference_batch": 256}, 1024) == pytest.approx(0.4)


def test_weight_decay_depends_on_the_module_type() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    decayed, plain = optim.parameter_groups(net, 0.1, SGD)
    assert [p.shape for p in decayed["params"]] == [torch.Size([4, 3, 3, 3]), torch.Size([2, 4])]
    assert (decayed["weight_decay"], plain["weight_decay"], len(plain["params"])) == (5e-4, 0.0, 4)
    assert len(optim.parameter_groups(net, 0.1, {**SGD, "decay_norm_and_bias": True})) == 1


def test_biases_have_twice_the_learning_rate() -> None:
    """As in Krizhevsky's code, through the whole schedule."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    optimizer = optim.build_optimizer(net, {**SGD, "bias_lr_factor": 2.0}, 64)
    (entry,) = optim.build_schedulers(optimizer, {"name": "linear", "unit": "step", "warmup": 0}, 10, 10)
    biases = {id(parameter) for name, parameter in net.named_parameters() if name.endswith("bias")}
    for step in range(10):
        lrs = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert len(lrs) == 6
        for key, lr in lrs.items():
            assert lr == pytest.approx((0.2 if key in biases else 0.1) * (1 - step / 10))
        optimizer.step()
        entry["scheduler"].step()
    decays = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {"decay": 5e-4, "no_decay": 0.0, "no_decay_bias": 0.0}


def test_the_backbone_has_its_own_learning_rate() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    settings = {**SGD, "bias_lr_factor": 2.0, "backbone_lr_factor": 0.1}
    built = optim.build_optimizer(net, settings, 64).param_groups
    groups = {id(p): (group["lr"], group["weight_decay"]) for group in built for p in group["params"]}
    expected = {"0.weight": (0.01, 5e-4), "0.bias": (0.02, 0.0), "1.weight": (0.01, 0.0), "1.bias": (0.02, 0.0)}
    expected |= {"3.weight": (0.1, 5e-4), "3.bias": (0.2, 0.0)}
    for name, parameter in net.named_parameters():
        assert groups[id(parameter)] == pytest.approx(expected[name])
    assert len(groups) == 6
