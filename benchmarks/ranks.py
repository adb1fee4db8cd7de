"""What ranks cost on this machine: python benchmarks/ranks.py [--ranks 2 8 16 32] [--steps 200] [--megabytes 20]

Forks as many processes, which meet as the ranks of a run do, over gloo. Measured on rank 0:

    meet       until all ranks have met (engine/ranks.py); torch is imported before
    settings   the settings of all ranks are compared, and rank 0 sends the config (commands/start.py)
    group      torch makes the process group
    compare    one comparison of the signals, an all_reduce of three numbers (callbacks/preemption.py)
    per step   the mean time of that callback, in steps of 50 ms; it compares about once a second
    share      rank 0 sends the state of a checkpoint of --megabytes (engine/checkpoint_io.py)

The line below has the growth from one number of ranks to the next. All ranks share the cores of this machine.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from common import about, options

from alexlab.callbacks.preemption import Preemption
from alexlab.engine.checkpoint_io import share
from alexlab.engine.launcher import free_port
from alexlab.engine.ranks import Ranks, meet
from alexlab.engine.signals import SignalRecorder

STEP = 0.05  # seconds of a training step
COLUMNS = {"meet": "s", "settings": "s", "group": "s", "compare": "ms", "per step": "ms", "share": "s"}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def measure(steps: int, megabytes: int) -> dict[str, float]:
    """Be one rank; return seconds."""
    torch.set_num_threads(1)
    found: dict[str, float] = {}
    ranks: Ranks
    found["meet"], ranks = timed(lambda: meet(10))
    config = {"model": {f"key{number}": number for number in range(300)}}  # as many keys as a config has

    def agree() -> Any:
        ranks.check_same(config, "")
        return ranks.first(lambda: config)

    found["settings"], _ = timed(agree)
    found["group"], _ = timed(lambda: (dist.init_process_group("gloo"), ranks.gloo))
    values = torch.zeros(3, dtype=torch.int64)
    found["compare"] = median(timed(lambda: dist.all_reduce(values, group=ranks.gloo))[0] for _ in range(steps))
    callback: Any = Preemption(SignalRecorder(), ranks)
    trainer = SimpleNamespace(world_size=ranks.size)
    callback.setup(trainer, None, "fit")
    spent = 0.0
    for _ in range(steps):
        time.sleep(STEP)
        spent += timed(lambda: callback.on_train_batch_end(trainer))[0]
    found["per step"] = spent / steps
    state = {"state_dict": {"weight": torch.zeros(megabytes * 250_000)}}
    dist.barrier()
    found["share"], _ = timed(lambda: share(lambda: state, ranks))
    dist.barrier()
    return found


def run(size: int, steps: int, megabytes: int) -> dict[str, float]:
    """Fork `size` ranks, and return what rank 0 has measured."""
    os.environ |= {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port(None))}
    reading, writing = os.pipe()
    children = []
    for rank in range(size):
        if (child := os.fork()) == 0:
            code = 1
            try:
                os.environ["RANK"] = str(rank)
                found = measure(steps, megabytes)
                if rank == 0:
                    os.write(writing, json.dumps(found).encode())
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    os.close(writing)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        sys.exit(f"{sum(map(bool, codes))} of {size} ranks failed.")
    with os.fdopen(reading) as pipe:
        return json.loads(pipe.read())


def main() -> None:
    given = options(__doc__, ranks=[2, 8, 16, 32], steps=200, megabytes=20)
    print(f"{'ranks':>6}" + "".join(f"{f'{name}, {unit}':>14}" for name, unit in COLUMNS.items()))
    before: dict[str, float] = {}
    for size in given.ranks:
        found = run(size, given.steps, given.megabytes)
        values = {name: found[name] * (1000 if unit == "ms" else 1) for name, unit in COLUMNS.items()}
        print(f"{size:6}" + "".join(f"{value:14.3f}" for value in values.values()))
        if before:
            print(f"{'':6}" + "".join(f"{f'x {values[name] / before[name]:.1f}':>14}" for name in COLUMNS), flush=True)
        before = values
    print(about("torch", steps=given.steps, megabytes=given.megabytes))


if __name__ == "__main__":
    main()
