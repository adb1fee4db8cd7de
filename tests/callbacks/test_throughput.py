"""Images per second and the fraction of waiting, by a clock that the test sets."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from alexlab.callbacks import throughput


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, in a list."""
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    return now


def logging_to(logged: dict[str, float]) -> Any:
    return SimpleNamespace(log=lambda name, value, **more: logged.update({name: value}), log_dict=logged.update)


def test_speed_and_waiting_are_measured_by_the_clock(clock: list[float]) -> None:
    logged: dict[str, float] = {}
    module, trainer = logging_to(logged), cast(Any, SimpleNamespace(global_step=0, log_every_n_steps=2))
    watch = throughput.Throughput(global_batch=100)
    watch.on_train_epoch_start(trainer, module)
    for step in range(1, 5):  # 1 s of waiting and 3 s of work each
        clock[0] += 1
        watch.on_train_batch_start(trainer, module, None, step - 1)
        clock[0] += 3
        trainer.global_step = step
        watch.on_train_batch_end(trainer, module, None, None, step - 1)
    assert logged == {"perf/images_per_second_step": 25.0, "perf/images": 400, "perf/seconds": 16.0}
    assert watch.state_dict() == {"images": 400, "seconds": 16.0, "waited": 4.0}, "also within an epoch"
    assert watch.axes(ahead=1) == {"perf/images": 500, "perf/seconds": 16.0}
    clock[0] += 50  # validation and checkpoints do not count
    watch.on_train_epoch_end(trainer, module)
    assert logged["perf/images_per_second"] == 25.0
    assert logged["perf/data_wait"] == 0.25
    assert (watch.total_images, watch.total_seconds) == (400, 16.0)
    assert watch.state_dict() == {"images": 400, "seconds": 16.0, "waited": 4.0}, "nothing counts twice"


def test_an_epoch_without_steps_logs_no_speed(clock: list[float]) -> None:
    """As after a resume from the last step of an epoch. The totals stay."""
    logged: dict[str, float] = {}
    module, trainer = logging_to(logged), cast(Any, SimpleNamespace(global_step=5, log_every_n_steps=2))
    watch = throughput.Throughput(global_batch=100)
    watch.load_state_dict({"images": 400, "seconds": 16.0, "waited": 4.0})
    watch.on_train_epoch_start(trainer, module)
    clock[0] += 1
    watch.on_train_epoch_end(trainer, module)
    assert logged == {}
    assert watch.state_dict() == {"images": 400, "seconds": 16.0, "waited": 4.0}


def test_the_seconds_of_a_resumed_run_include_the_training_before(clock: list[float]) -> None:
    watch = throughput.Throughput(global_batch=100)
    watch.load_state_dict({"images": 400, "seconds": 1000.0, "waited": 4.0})
    module, trainer = logging_to({}), cast(Any, SimpleNamespace(global_step=0, log_every_n_steps=2, callbacks=[watch]))
    watch.on_train_epoch_start(trainer, module)
    clock[0] += 8
    watch.on_train_batch_end(trainer, module, None, None, 0)
    watch.on_train_epoch_end(trainer, module)
    assert watch.state_dict()["seconds"] == 1008.0
    assert watch.seconds_before == 1000.0
