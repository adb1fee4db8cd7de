"""Learning rates against their formulas; which parameters have weight decay."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import timm.optim
import timm.scheduler
import torch
import yaml
from torch import nn
from torch.optim import lr_scheduler

from alexlab.engine.config import CONF
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


def test_onecycle_equals_torchs() -> None:
    steps = 37
    settings = {"pct_start": 0.3, "div_factor": 20.0, "final_div_factor": 500.0}
    reference = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    torchs = lr_scheduler.OneCycleLR(reference, 0.1, total_steps=steps, cycle_momentum=False, **settings)  # type: ignore[arg-type]
    expected = []
    for _ in range(steps):
        expected.append(reference.param_groups[0]["lr"])
        reference.step()
        torchs.step()
    own = {**yaml.safe_load((CONF / "scheduler/onecycle.yaml").read_text()), **settings}
    assert rates_of(build_own(own, steps)["scheduler"], steps) == pytest.approx(expected, rel=1e-9, abs=0)
    assert expected[-1] == pytest.approx(0.1 / 20 / 500)


@pytest.mark.parametrize("warmup", [0, 2])
def test_wsd_equals_timms(warmup: int) -> None:
    reference = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    timms = timm.scheduler.WSDLRScheduler(
        reference, t_initial=100 - 10 * warmup, decay_t=20, lr_min=0.01, decay_fn="1-sqrt", warmup_t=10 * warmup,
        warmup_lr_init=0.1 / (10 * warmup + 1), t_in_epochs=False,
    )  # fmt: skip
    expected = [timms._get_lr(step)[0] for step in range(100)]
    found = learning_rates(100, 10, name="wsd", warmup=warmup, decay_fraction=0.2, min_factor=0.1)
    assert found == pytest.approx(expected)
    assert (found[80], found[81]) == pytest.approx((0.1, 0.01 + 0.09 * (1 - math.sqrt(1 / 20))))


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


# -- schedules by _target_


def build_own(settings: dict[str, Any], steps: int = 20, optimizer: Any = None, **more: Any) -> dict[str, Any]:
    """Build a schedule for epochs of 5 steps."""
    optimizer = optimizer or torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    (entry,) = optim.build_schedulers(optimizer, settings, steps, 5, trusted=None, **more)
    return entry


def rates_of(scheduler: Any, count: int) -> list[float]:
    group, found = scheduler.optimizer.param_groups[0], []
    for _ in range(count):
        found.append(group["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return found


TORCHS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # the class, its settings, and what the run's 4 epochs of 5 steps add to them
    ("MultiStepLR", {"milestones": [2, 4], "gamma": 0.5}, {}),
    ("LinearLR", {"start_factor": 0.1}, {}),
    ("PolynomialLR", {"total_iters": 3, "power": 2.0}, {}),
    ("PolynomialLR", {}, {"total_iters": 4}),
    ("PolynomialLR", {"interval": "step"}, {"total_iters": 20}),
    ("CosineAnnealingLR", {}, {"T_max": 4}),
    ("CosineAnnealingLR", {"T_max": 7}, {}),
    ("CosineAnnealingLR", {"interval": "step"}, {"T_max": 20}),
    ("CyclicLR", {"base_lr": 0.01, "step_size_up": 3}, {"max_lr": 0.1}),
    ("OneCycleLR", {}, {"total_steps": 4, "max_lr": 0.1}),
    ("OneCycleLR", {"interval": "step"}, {"total_steps": 20, "max_lr": 0.1}),
    ("OneCycleLR", {"interval": "step", "epochs": 6, "max_lr": 0.3}, {"steps_per_epoch": 5}),
    ("OneCycleLR", {"interval": "step", "total_steps": 40}, {"max_lr": 0.1}),
]


@pytest.mark.parametrize(("name", "settings", "added"), TORCHS, ids=lambda value: str(value))
def test_a_schedule_of_torch_gets_what_follows_from_the_length_of_the_run(
    name: str, settings: dict[str, Any], added: dict[str, Any]
) -> None:
    entry = build_own({"_target_": f"torch.optim.lr_scheduler.{name}", **settings})
    reference = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    own = {key: value for key, value in settings.items() if key != "interval"}
    expected = getattr(lr_scheduler, name)(reference, **own, **added)
    assert entry["interval"] == settings.get("interval", "epoch")
    assert entry["name"] == "lr"
    assert "monitor" not in entry
    count = 20 if entry["interval"] == "step" else 4
    assert rates_of(entry["scheduler"], count) == rates_of(expected, count)


def test_onecycle_of_torch_keeps_the_ratio_of_the_groups() -> None:
    """A single max_lr would give all groups the same learning rate."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = optim.build_optimizer(net, {**SGD, "bias_lr_factor": 2.0, "backbone_lr_factor": 0.1}, 64)
    before = [group["lr"] for group in optimizer.param_groups]
    entry = build_own({"_target_": "torch.optim.lr_scheduler.OneCycleLR", "interval": "step"}, optimizer=optimizer)
    for _ in range(7):
        ratios = [group["lr"] / lr for group, lr in zip(optimizer.param_groups, before, strict=True)]
        assert ratios == pytest.approx([ratios[0]] * 4)
        optimizer.step()
        entry["scheduler"].step()


def test_schedules_within_a_schedule_get_the_optimizer() -> None:
    target = "torch.optim.lr_scheduler."
    parts = [
        {"_target_": f"{target}LinearLR", "start_factor": 0.1, "total_iters": 5},
        {"_target_": f"{target}CosineAnnealingLR", "T_max": 15},
    ]
    own = {"_target_": f"{target}SequentialLR", "interval": "step", "milestones": [5], "schedulers": parts}
    reference = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    ramp = lr_scheduler.LinearLR(reference, start_factor=0.1, total_iters=5)
    expected = lr_scheduler.SequentialLR(reference, [ramp, lr_scheduler.CosineAnnealingLR(reference, 15)], [5])
    assert rates_of(build_own(own)["scheduler"], 20) == rates_of(expected, 20)
    del parts[1]["T_max"]
    with pytest.raises(UserError, match=r"CosineAnnealingLR cannot be built from its settings: .*'T_max'"):
        build_own(own)


def test_a_schedule_may_be_a_function_of_the_step() -> None:
    curve = {"_target_": "math.pow", "_partial_": True, "_args_": [0.5]}
    entry = build_own({"_target_": "torch.optim.lr_scheduler.LambdaLR", "interval": "step", "lr_lambda": curve})
    assert rates_of(entry["scheduler"], 4) == pytest.approx([0.1, 0.05, 0.025, 0.0125])


TIMMS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("CosineLRScheduler", {"warmup_t": 1, "warmup_lr_init": 0.01}, {"t_initial": 4}),
    ("CosineLRScheduler", {"warmup_t": 1, "warmup_prefix": True}, {"t_initial": 3}),
    ("CosineLRScheduler", {"interval": "step"}, {"t_initial": 20}),
    ("PolyLRScheduler", {"t_initial": 9}, {}),
    ("WSDLRScheduler", {"decay_t": 2, "warmup_t": 1}, {"t_initial": 3}),
]


@pytest.mark.parametrize(("name", "settings", "added"), TIMMS, ids=lambda value: str(value))
def test_a_schedule_of_timm_gets_what_follows_from_the_length_of_the_run(
    name: str, settings: dict[str, Any], added: dict[str, Any]
) -> None:
    entry = build_own({"_target_": f"timm.scheduler.{name}", **settings})
    reference = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    own = {key: value for key, value in settings.items() if key != "interval"}
    by_epoch = entry["interval"] == "epoch"
    expected = getattr(timm.scheduler, name)(reference, **own, **added, t_in_epochs=by_epoch)
    assert entry["scheduler"].t_in_epochs == by_epoch
    assert [entry["scheduler"]._get_lr(t) for t in range(20)] == [expected._get_lr(t) for t in range(20)]


@pytest.mark.parametrize(
    ("monitor", "mode", "expected"),
    [("val/loss", None, "min"), ("val/acc1", None, "max"), ("val/acc1", "min", "min")],
)
def test_a_plateau_of_torch_follows_the_metric(monitor: str, mode: Any, expected: str) -> None:
    own = {"_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau", "patience": 0, "monitor": monitor}
    entry = build_own(own, check_val_every_n_epoch=3, mode=mode)
    assert (entry["monitor"], entry["reduce_on_plateau"], entry["frequency"]) == (monitor, True, 3)
    assert entry["scheduler"].mode == expected
    assert build_own({**own, "mode": "max"}, mode="min")["scheduler"].mode == "max"


class NoSchedule:
    def __init__(self, optimizer: Any) -> None:
        pass


class KeepsAFunction(lr_scheduler.LRScheduler):
    def __init__(self, optimizer: Any) -> None:
        self.curve = lambda step: 0.5**step
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:  # type: ignore[override]
        return [base * self.curve(self.last_epoch) for base in self.base_lrs]


@pytest.mark.parametrize(
    ("target", "settings", "why"),
    [
        ("torch.optim.lr_scheduler.StepLR", {"step_sze": 3}, "StepLR cannot be built from its settings: .*'step_sze'"),
        ("torch.optim.lr_scheduler.Steplr", {}, "lr_scheduler contains no Steplr: check the name"),
        (
            "torch.optim.lr_scheduler.StepLR",
            {"step_size": "3"},
            "StepLR fails in its first step: .*Check the values in",
        ),
        ("torch.optim.lr_scheduler.ReduceLROnPlateau", {}, "`scheduler.monitor` is missing: torch.* needs a metric"),
        (
            "torch.optim.lr_scheduler.StepLR",
            {"step_size": 1, "monitor": "val/loss"},
            "`scheduler.monitor=val/loss` has no effect: torch.optim.lr_scheduler.StepLR reads no metric. Remove the",
        ),
        ("timm.scheduler.PlateauLRScheduler", {}, "does not save its counters, so no run could resume: use sched"),
        ("test_optimizers.NoSchedule", {}, "builds a NoSchedule, which is no schedule of the optimizer: derive it"),
        ("test_optimizers.KeepsAFunction", {}, "KeepsAFunction: checkpoints need tensors and plain values from state"),
        ("torch.optim.lr_scheduler.OneCycleLR", {"total_steps": -1}, "total_steps.* \\(torch.optim.lr_scheduler.OneC"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_schedule_of_a_run_is_an_error(target: str, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        build_own({"_target_": target, **settings})


def test_a_foreign_schedule_must_be_of_a_known_library() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    optim.build_schedulers(optimizer, {"_target_": "timm.scheduler.CosineLRScheduler"}, 20, 5, trusted=())
    with pytest.raises(UserError, match=r"_target_=test_optimizers.NoSchedule is not allowed"):
        optim.build_schedulers(optimizer, {"_target_": "test_optimizers.NoSchedule"}, 20, 5, trusted=())


# -- optimizers


OPTIMIZERS = sorted(
    f"{package.__name__}.{name}"
    for package in (torch.optim, timm.optim)
    for name, cls in vars(package).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
)
REFUSED = {
    "torch.optim.LBFGS": "LBFGS does not take these settings: optimizer.weight_decay",
    "torch.optim.Muon": "Muon cannot be built from its settings .*2D",
    "torch.optim.Rprop": "Rprop does not take these settings: optimizer.weight_decay",
    "torch.optim.SparseAdam": "SparseAdam does not take these settings: optimizer.weight_decay",
    "timm.optim.Adahessian": "Adahessian fails in its first step: ",
    "timm.optim.Lookahead": "Lookahead does not take these settings: optimizer.weight_decay",
}


@pytest.mark.parametrize("target", OPTIMIZERS)
def test_an_optimizer_of_torch_or_timm_steps_with_our_groups_or_is_refused(target: str) -> None:
    settings = {"_target_": target, "lr": 0.01, "weight_decay": 0.1, "bias_lr_factor": 2.0, "fused": "auto"}
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))
    if target in REFUSED:
        with pytest.raises(UserError, match=REFUSED[target]):
            (optim.try_step(settings), optim.build_optimizer(net, settings, 64))
        return
    optim.try_step(settings)
    optimizer = optim.build_optimizer(net, settings, 64)
    before = [parameter.clone() for parameter in net.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.ones(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()
    groups = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert groups == {"decay": (0.01, 0.1), "no_decay": (0.01, 0.0), "no_decay_bias": (0.02, 0.0)}
    moved = [not torch.equal(parameter, old) for parameter, old in zip(net.parameters(), before, strict=True)]
    assert moved[-2:] == [True, True]


def test_a_misspelt_key_of_an_optimizer_is_answered_with_the_nearest() -> None:
    settings = {"_target_": "torch.optim.SGD", "lrr": 1, "lr": 0.1, "weight_decay": 0.0}
    with pytest.raises(UserError, match=r"settings: optimizer.lrr=1. Remove .* Did you mean `optimizer.lr`\?$"):
        optim.build_optimizer(nn.Linear(2, 2), settings, 64)


def test_keys_that_an_optimizer_does_not_have_are_an_error() -> None:
    """All at once, and the weight decay that it would ignore too."""
    message = (
        "timm.optim.Lion does not take these settings: optimizer.momentum=0.9, optimizer.nesterov=False. "
        "Remove them with ~optimizer.momentum ~optimizer.nesterov."
    )
    with pytest.raises(UserError, match=f"^{message}$"):
        optim.build_optimizer(nn.Linear(2, 2), {**SGD, "_target_": "timm.optim.Lion", "nesterov": False}, 64)
    with pytest.raises(UserError, match=r"Rprop does not take these settings: optimizer.weight_decay=0.1. Remove"):
        optim.build_optimizer(nn.Linear(2, 2), {"_target_": "torch.optim.Rprop", "lr": 0.1, "weight_decay": 0.1}, 64)
    with pytest.raises(UserError, match=r"Lion does not take these settings: optimizer.fused=True"):
        optim.build_optimizer(nn.Linear(2, 2), {"_target_": "timm.optim.Lion", "lr": 0.1, "fused": True}, 64)
    with pytest.raises(UserError, match=r"_target_=os.system is not allowed"):
        optim.build_optimizer(nn.Linear(2, 2), {**SGD, "_target_": "os.system"}, 64)
    with pytest.raises(UserError, match=r"_target_=test_optimizers.no_optimizer builds a dict, which is no opt"):
        optim.build_optimizer(
            nn.Linear(2, 2), {"_target_": "test_optimizers.no_optimizer", "lr": 0.1}, 64, trusted=None
        )


# -- layer-wise learning rates


def no_optimizer(params: Any, **settings: Any) -> dict[str, Any]:
    return settings


def rates_by_name(net: nn.Module, **settings: Any) -> dict[str, float]:
    optimizer = optim.build_optimizer(net, {"_target_": "torch.optim.SGD", "lr": 0.1, **settings}, 64)
    assert len({group["name"] for group in optimizer.param_groups}) == len(optimizer.param_groups)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: rates[id(parameter)] for name, parameter in net.named_parameters()}


def timms_rates(net: nn.Module, layer_decay: float) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = timm.optim.param_groups_layer_decay(net, layer_decay=layer_decay)
    return {names[id(p)]: 0.1 * group["lr_scale"] for group in groups for p in group["params"]}


@pytest.mark.parametrize(
    "name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "efficientnet_lite0", "swin_tiny_patch4_window7_224"]
)
def test_layer_decay_equals_timms(name: str) -> None:
    net = timm.create_model(name, num_classes=5)
    expected = timms_rates(net, 0.75)
    assert rates_by_name(net, layer_decay=0.75) == pytest.approx(expected)
    assert len(set(expected.values())) > 7
    assert len(set(rates_by_name(net, layer_decay=None).values())) == 1


def test_layer_decay_multiplies_with_the_other_factors() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    net.group_matcher = lambda coarse: lambda name: int(name.startswith("3."))  # type: ignore[assignment]
    found = rates_by_name(net, layer_decay=0.5, bias_lr_factor=2.0, backbone_lr_factor=0.1)
    expected = {"0.weight": 0.005, "0.bias": 0.01, "1.weight": 0.005, "1.bias": 0.01, "3.weight": 0.1, "3.bias": 0.2}
    assert found == pytest.approx(expected)


def test_layer_decay_needs_layers() -> None:
    with pytest.raises(UserError, match=r"`optimizer.layer_decay`: the layers of Linear are unknown. Use model=timm"):
        rates_by_name(nn.Linear(2, 2), layer_decay=0.5)


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


@pytest.mark.parametrize(("precision", "clip", "fused"), [("16-mixed", 1.0, False), ("bf16-mixed", 1.0, True)])
def test_an_optimizer_that_clips_scaled_gradients_is_not_fused(precision: str, clip: float, fused: bool) -> None:
    settings = optim.OptimizerSettings(
        {**SGD, "fused": "auto"}, {"name": "constant", "unit": "step", "warmup": 0}, 8, 4, 2
    )
    trainer: Any = SimpleNamespace(precision=precision, gradient_clip_val=clip, check_val_every_n_epoch=1)
    (optimizer,), _ = settings.build(nn.Linear(2, 2), trainer)
    assert optimizer.defaults["fused"] is fused
