"""One rank of two machines is killed at random, again and again. `make faults-clusters` does it far more often."""

import os
import random
import subprocess
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, clean_env, wait_for
from machines import NAMES, Machines, train_words
from resuming import difference
from test_faults import rows

TIMES = int(os.environ.get("ALEXLAB_FAULTS", "1"))
KILLS = 6  # of a run


def start(machines: Machines, words: list[list[str]]) -> list[subprocess.Popen[str]]:
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": NAMES[0], "MASTER_PORT": "29413", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            machines.words(rank, *own),
            cwd=ROOT,
            env=clean_env({**env, "RANK": str(rank)}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, own in enumerate(words)
    ]


def ends(ranks: list[subprocess.Popen[str]]) -> list[str]:
    """Wait for both ranks, and return what they printed. A rank that hangs fails the test."""
    try:
        return [rank.communicate(timeout=150)[0] for rank in ranks]
    finally:
        for rank in ranks:
            for process in [*psutil.Process(rank.pid).children(recursive=True), rank] if rank.poll() is None else []:
                process.kill()


@pytest.mark.parametrize("part", range(TIMES))
def test_kills_of_a_rank_change_no_result(part: int, machines: Machines, shapes: Path, tmp_path: Path) -> None:
    """Each machine has a folder of its own. Without a hang, and with the weights, metrics and states of a run that was
    not killed."""
    draw = random.Random(part)
    exact = ["trainer.precision=32-true", "trainer.log_every_n_steps=1", f"trainer.max_epochs={KILLS + 2}"]

    def words(folder: str) -> list[list[str]]:
        own = [[f"paths.logs={tmp_path}/{name}", f"hydra.run.dir={tmp_path}/{name}/{folder}"] for name in NAMES]
        return [train_words(shapes, *each, *exact, "checkpoint.every_n_steps=1", "resume=auto") for each in own]

    straight = start(machines, words("straight"))
    printed = ends(straight)
    assert [rank.returncode for rank in straight] == [0, 0], "\n".join(printed)

    run_dir = tmp_path / NAMES[0] / "run"
    for _ in range(KILLS):
        ranks, victim, after = start(machines, words("run")), draw.randrange(2), rows(run_dir) + draw.randrange(1, 4)
        wait_for(lambda after=after: rows(run_dir) >= after)  # type: ignore[misc]
        for process in [*psutil.Process(ranks[victim].pid).children(recursive=True), ranks[victim]]:
            process.kill()
        printed = ends(ranks)
        assert ranks[1 - victim].returncode == 1, printed[1 - victim]
        assert f"another rank on 10.77.0.{victim + 1} was lost" in printed[1 - victim]
    last = start(machines, words("run"))
    printed = ends(last)
    assert [rank.returncode for rank in last] == [0, 0], "\n".join(printed)
    assert difference(tmp_path / NAMES[0] / "straight", run_dir) is None
