"""Two machines without a common folder: ranks by RANK and WORLD_SIZE, which meet over a network."""

import subprocess
from pathlib import Path

import psutil
from conftest import ROOT, clean_env, summary_of, wait_for
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


def test_a_run_goes_on_when_a_machine_is_gone(machines: Machines, shapes: Path, tmp_path: Path) -> None:
    """torchrun with --nnodes 1:2: the processes of the second machine are killed, and one rank finishes the run."""
    run_dir = tmp_path / "run"
    elastic = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
    elastic += ["--rdzv-id", "x", "--rdzv-endpoint", f"{NAMES[0]}:29412", "--rdzv-conf", "last_call_timeout=5"]
    python, *words = train_words(shapes, f"paths.logs={tmp_path}", f"hydra.run.dir={run_dir}", "trainer.timeout=1")
    words = [word for word in words if not word.startswith(("trainer.max_epochs", "data.batch_size"))]
    words += ["resume=auto", "trainer.max_epochs=40", "data.batch_size=9"]
    running = [
        subprocess.Popen(
            machines.words(node, python, "-m", "torch.distributed.run", *elastic, "--local-addr", name, *words),
            cwd=ROOT,
            env=clean_env({"OMP_NUM_THREADS": "1"}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node, name in enumerate(NAMES)
    ]
    try:
        wait_for(lambda: (run_dir / "checkpoints/last.ckpt").is_file())
        for process in [*psutil.Process(running[1].pid).children(recursive=True), running[1]]:
            process.kill()
        printed, errors = running[0].communicate(timeout=240)
    finally:
        for process in running:
            process.kill()
    assert running[0].returncode == 0, printed + errors
    assert "another rank on 10.77.0.2 was lost" in errors
    found = summary_of(run_dir)
    assert (found["status"], found["world_size"], found["epochs"]) == ("finished", 1, 40)
    first, second = found["world_sizes"]
    assert (first, second["world_size"]) == ({"step": 0, "world_size": 2}, 1)
    assert 0 < second["step"] < found["steps"]
