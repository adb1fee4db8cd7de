"""A study of Optuna in a real PostgreSQL, to which several processes add trials: `make clusters`."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import optuna
import psutil
import pytest
from conftest import ROOT, TINY, clean_env, wait_for
from machines import daemon

from alexlab.engine.launcher import free_port

psycopg = pytest.importorskip("psycopg", reason="needs the extra `postgres`")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address of a new database. The server runs as the user postgres, on loopback."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if os.geteuid() != 0 or not found:
        pytest.skip("needs root and PostgreSQL (apt-get install postgresql)")
    folder, port = Path(tempfile.mkdtemp(prefix="alexlab-postgres-")), free_port(None)
    shutil.chown(folder, "postgres")
    as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    subprocess.run([*as_user, found[-1] / "initdb", "-D", folder / "data", "-A", "trust"], check=True, cwd="/")
    server = [*as_user, str(found[-1] / "postgres"), "-D", str(folder / "data"), "-p", str(port), "-k", str(folder)]
    try:
        with daemon([*server, "-c", "listen_addresses=127.0.0.1"], folder / "out"):
            wait_for(lambda: "ready to accept connections" in (folder / "out").read_text())
            with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres", autocommit=True) as connection:
                connection.execute("create database optuna")
            yield f"postgresql+psycopg://postgres@127.0.0.1:{port}/optuna"
    finally:
        shutil.rmtree(folder)


def worker(url: str, name: str, trials: int, shapes: Path, folder: Path, *more: str) -> subprocess.Popen[str]:
    study = ["sweep=optuna", f"hydra.sweeper.storage={url}", f"hydra.sweeper.study_name={name}", "sweep.pruner=none"]
    study += [f"hydra.sweeper.n_trials={trials}", "optimizer.lr=interval(0.001,0.1)", "optimizer.weight_decay=0"]
    words = [*TINY, "data=folder", f"data.root={shapes}", "data.batch_size=8", "trainer.limit_train_batches=1"]
    words += ["trainer.max_epochs=1", f"paths.logs={folder}", *more]
    return subprocess.Popen(
        [sys.executable, "train.py", "-m", *study, *words],
        cwd=ROOT, env=clean_env({"OMP_NUM_THREADS": "1"}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_two_workers_add_trials_to_one_study(url: str, shapes: Path, tmp_path: Path) -> None:
    """Which start at the same time, with a database that has no tables."""
    first = worker(url, "both", 6, shapes, tmp_path, "trainer.max_epochs=5")
    second = worker(url, "both", 6, shapes, tmp_path, "trainer.max_epochs=5")
    printed = [each.communicate(timeout=240)[0] for each in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], "\n".join(printed)
    trials = optuna.load_study(study_name="both", storage=url).trials
    assert {trial.state.name for trial in trials} == {"COMPLETE"}
    assert 6 <= len(trials) <= 7, "one more may run"
    jobs = [text.count("\njob ") for text in printed]
    assert sum(jobs) == len(trials)
    assert min(jobs) > 0, printed


def test_the_trial_of_a_killed_worker_is_tried_again(url: str, shapes: Path, tmp_path: Path) -> None:
    killed = worker(url, "killed", 1, shapes, tmp_path, "trainer.max_epochs=1000")
    wait_for(lambda: (tmp_path / "train/multiruns/killed/0/checkpoints/last.ckpt").is_file())
    for process in [*psutil.Process(killed.pid).children(recursive=True), killed]:
        process.kill()
    killed.communicate()
    address = url.replace("+psycopg", "")
    with psycopg.connect(address) as connection:  # as if a minute had passed
        connection.execute("update trial_heartbeats set heartbeat = heartbeat - interval '61 seconds'")
    again = worker(url, "killed", 1, shapes, tmp_path)
    printed, _ = again.communicate(timeout=240)
    assert again.returncode == 0, printed
    first, second = optuna.load_study(study_name="killed", storage=url).trials
    assert (first.state.name, second.state.name) == ("FAIL", "COMPLETE")
    assert first.params == second.params
