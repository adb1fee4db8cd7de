"""Two machines without a common folder: ranks by RANK and WORLD_SIZE, which meet over a network."""

import subprocess
from pathlib import Path

from conftest import ROOT, clean_env, summary_of
from machines import NAMES, Machines, train_words


def both(machines: Machines, *commands: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """Run one rank per machine."""
    running = []
    for rank, words in enumerate(commands):
        env = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": NAMES[0], "MASTER_PORT": "29411"}
        started = subprocess.Popen(
            machines.words(rank, *words),
            cwd=ROOT,
            env=clean_env({**env, "OMP_NUM_THREADS": "1"}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(started)
    ended = [process.communicate(timeout=240) for process in running]
    pairs = zip(running, ended, strict=True)
    return [subprocess.CompletedProcess(process.args, process.returncode, *texts) for process, texts in pairs]


def test_two_machines_train_and_resume_one_run(machines: Machines, shapes: Path, tmp_path: Path) -> None:
    own = [[f"paths.logs={tmp_path / name}", f"hydra.run.dir={tmp_path / name}/run"] for name in NAMES]
    first = both(machines, *(train_words(shapes, *words, "trainer.max_epochs=1") for words in own))
    assert [done.returncode for done in first] == [0, 0], first[0].stderr + first[1].stderr
    more = ["resume=auto", "trainer.max_epochs=2"]
    second = both(machines, *(train_words(shapes, *words, *more) for words in own))
    assert [done.returncode for done in second] == [0, 0], second[0].stderr + second[1].stderr
    assert ", resumed" in second[0].stdout
    assert summary_of(tmp_path / "n1/run")["world_size"] == 2
    assert not [*tmp_path.glob("n2/**/config.yaml")]


def test_a_disagreement_names_rank_and_machine(machines: Machines, shapes: Path, tmp_path: Path) -> None:
    words = train_words(shapes, f"paths.logs={tmp_path}")
    first, second = both(machines, words, [*words, "seed=7"])
    assert (first.returncode, second.returncode) == (2, 2)
    expected = "error: rank 1 on n2 has other settings: seed=7 (rank 0 on n1 has 0). Start all ranks with"
    assert first.stderr.startswith(expected)
    first, second = both(machines, words, [*words, f"data.root={tmp_path}/none"])
    assert (first.returncode, second.returncode) == (2, 2)
    assert first.stderr.startswith(f"error: rank 1 on n2: `data.root={tmp_path}/none` does not exist")
