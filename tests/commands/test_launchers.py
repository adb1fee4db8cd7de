"""Jobs of a sweep side by side, by launchers of Hydra.

The table, the exit code and failed jobs are as with the basic launcher, which runs one job after the other.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import psutil
import pytest
from conftest import ROOT, TINY, clean_env, command, summary_of

from alexlab.commands import sweep
from alexlab.engine.errors import RunFailedError, UserError
from hydra_plugins.alexlab_launchers import options

SHORT = [*TINY, "trainer.max_epochs=1", "trainer.limit_train_batches=2"]
LOCAL = {"_target_": "hydra_plugins.alexlab_launchers.LocalLauncher"}
SLURM = {"_target_": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"}
BASIC = {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}


def words(shapes: Path, folder: Path, *more: str) -> list[str]:
    images = ["data=folder", f"data.root={shapes}", f"hydra.sweep.dir={folder}/sweep", f"paths.logs={folder}/logs"]
    return ["train.py", "-m", *SHORT, *images, *more]


@pytest.mark.parametrize("launcher", ["local", "ray"])
def test_jobs_side_by_side_end_as_with_the_basic_launcher(launcher: str, shapes: Path, tmp_path: Path) -> None:
    """A mistake of one job, found by no check of the config, is exit code 2 and stops no other job that runs."""
    pytest.importorskip("ray" if launcher == "ray" else "hydra")
    both = ["init_from=null,/nowhere/x.ckpt", "hydra.sweeper.n_jobs=2"]
    line = words(shapes, tmp_path, f"hydra/launcher={launcher}", *both)
    done = command(*line)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "jobs at once: 2" in done.stdout
    assert summary_of(tmp_path / "sweep/0")["status"] == "finished"
    assert "compare its jobs: alexlab compare runs=" in done.stdout
    error = done.stderr[done.stderr.index("error: ") :]
    assert error.startswith("error: 1 job of the sweep failed:\n  job 1 (")
    assert "init_from=/nowhere/x.ckpt" in error
    assert error.endswith("The sweep stops; sweep.keep_going=true continues.\n")
    kept = command(*line, "sweep.keep_going=true")
    assert kept.returncode == 1


def test_a_dry_run_shows_the_jobs_here(shapes: Path, tmp_path: Path) -> None:
    more = ["hydra/launcher=local", "hydra.sweeper.n_jobs=2", "seed=0,1", "dry_run=true"]
    done = command(*words(shapes, tmp_path, *more))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("global batch") == 2
    assert list(tmp_path.iterdir()) == []


def test_each_job_has_its_part_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs of its own if there are enough; otherwise jobs share one. A part of the cores, at least one."""

    def named(at_once: int, key: str) -> list[str]:
        found = [word for part in sweep.shares(at_once, {}) for word in part if f".{key}=" in word]
        return [word.partition("=")[2].strip("'") for word in found]

    monkeypatch.setattr(sweep, "cores", lambda: 16)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert named(4, "CUDA_VISIBLE_DEVICES") == ["4", "5", "6", "7"]
    assert named(2, "CUDA_VISIBLE_DEVICES") == ["4,5", "6,7"]
    assert named(6, "CUDA_VISIBLE_DEVICES") == ["4", "5", "6", "7", "4", "5"]
    assert named(4, "OMP_NUM_THREADS") == named(4, "ALEXLAB_CORES") == ["4"] * 4
    assert named(40, "ALEXLAB_CORES") == ["1"] * 40
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert all("CUDA" not in word for part in sweep.shares(2, {}) for word in part)


def test_the_processes_of_jobs_see_their_gpus(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "seen.py").write_text(
        "import os\nfrom pathlib import Path\nfrom pytorch_lightning import Callback\n"
        "from alexlab.engine.process import cores\n\n\n"
        "class Seen(Callback):\n    def on_fit_start(self, trainer, module):\n"
        "        text = f\"{os.environ['CUDA_VISIBLE_DEVICES']} {cores()}\"\n"
        "        Path(trainer.default_root_dir, 'seen').write_text(text)\n"
    )
    more = ["allow=[seen]", "+callbacks.seen._target_=seen.Seen", "seed=0,1", "hydra/launcher=local"]
    # without n_jobs, there are as many jobs at once as GPUs
    done = command(*words(shapes, tmp_path, *more), env={"CUDA_VISIBLE_DEVICES": "2,3", "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "jobs at once: 2" in done.stdout
    found = [(tmp_path / f"sweep/{number}/seen").read_text() for number in (0, 1)]
    half = max(1, len(os.sched_getaffinity(0)) // 2)
    assert found == [f"2 {half}", f"3 {half}"]


def test_a_job_that_is_killed_has_failed_and_the_others_go_on(shapes: Path, tmp_path: Path) -> None:
    line = words(
        shapes, tmp_path, "hydra/launcher=local", "hydra.sweeper.n_jobs=2", "seed=0,1", "sweep.keep_going=true"
    )
    more = ["trainer.max_epochs=20", "checkpoint.every_n_steps=1"]
    sweeping = start(*line, *more)
    try:
        victim = next(job_processes(sweeping.pid, tmp_path / "sweep/1"))
        victim.kill()
        printed, errors = sweeping.communicate(timeout=240)
    finally:
        sweeping.kill()
    assert sweeping.returncode == 1, errors
    assert "FAILED job 1: " in printed
    assert "no result: RuntimeError: its process was stopped by SIGKILL: see " in errors
    assert summary_of(tmp_path / "sweep/0")["status"] == "finished"
    assert "unfinished" in printed, "the table has the killed job"

    # the same command goes on with what is missing
    again = command(*line, *more, "resume=auto")
    assert again.returncode == 0, again.stderr
    log = (tmp_path / "sweep/1/train.log").read_text()
    assert summary_of(tmp_path / "sweep/1")["status"] == "finished"
    assert [log.count(f"epoch {number}/20 |") for number in range(2, 21)] == [1] * 19, "each epoch once"


def start(*line: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *line],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # `&` and nohup let it be ignored
        cwd=ROOT,
        env=clean_env({}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def job_processes(parent: int, run_dir: Path) -> Iterator[psutil.Process]:
    """Wait until a job has a checkpoint, and yield its process."""
    end = time.monotonic() + 120
    while not (run_dir / "checkpoints/last.ckpt").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    for process in psutil.Process(parent).children(recursive=True):
        opened = {Path(each.path).parent for each in process.open_files()}
        of_jobs = {"hydra_plugins.alexlab_launchers", "submitit.core._submit", "ray::run_on_ray"}
        if of_jobs & {*process.cmdline()} and run_dir in opened:
            yield process
    raise AssertionError(f"no process of {run_dir}")


def test_a_preemption_of_submitit_stops_a_run_with_a_checkpoint(shapes: Path, tmp_path: Path) -> None:
    """Without submitit, SIGUSR2 prints stacks."""
    pytest.importorskip("submitit")
    line = words(shapes, tmp_path, "hydra/launcher=submitit_local", "seed=0", "trainer.max_epochs=3000")
    sweeping = start(*line)
    try:
        next(job_processes(sweeping.pid, tmp_path / "sweep/0")).send_signal(signal.SIGUSR2)
        printed, errors = sweeping.communicate(timeout=120)
    finally:
        sweeping.kill()
    assert sweeping.returncode == 128 + signal.SIGUSR2, printed + errors
    assert summary_of(tmp_path / "sweep/0")["status"] == "preempted"
    assert "Stopped by SIGUSR2. Resume the run with" in (tmp_path / "sweep/0/train.log").read_text()


@pytest.mark.parametrize("launcher", ["local", "ray"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_command_stops_its_jobs_with_checkpoints(
    number: signal.Signals, launcher: str, shapes: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray" if launcher == "ray" else "hydra")
    line = words(shapes, tmp_path, f"hydra/launcher={launcher}", "hydra.sweeper.n_jobs=2", "seed=0,1")
    sweeping = start(*line, "trainer.max_epochs=3000")
    try:
        jobs = [next(job_processes(sweeping.pid, tmp_path / f"sweep/{job}")) for job in (0, 1)]
        sweeping.send_signal(number)
        _, errors = sweeping.communicate(timeout=120)
    finally:
        sweeping.kill()
    assert sweeping.returncode == 128 + number, errors
    assert not psutil.wait_procs(jobs, timeout=60)[1]
    assert [summary_of(tmp_path / f"sweep/{job}")["status"] for job in (0, 1)] == ["preempted"] * 2
    assert "Traceback" not in errors


def test_trials_side_by_side_are_pruned(shapes: Path, tmp_path: Path) -> None:
    """Each trial asks the pruner about itself: the second one at once is stopped by the values of better trials."""
    url = f"sqlite:///{tmp_path}/optuna.db"
    study = optuna.create_study(study_name="mine", storage=url, direction="maximize")
    space = {"optimizer.lr": optuna.distributions.FloatDistribution(0.001, 0.1)}
    study.add_trial(
        optuna.trial.create_trial(
            params={"optimizer.lr": 0.01}, distributions=space, value=2.0, intermediate_values={0: 2.0, 1: 2.0, 2: 2.0}
        )
    )
    more = ["sweep=optuna", "hydra/launcher=local", "hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=3"]
    more += [f"hydra.sweeper.storage={url}", "hydra.sweeper.study_name=mine", "optimizer.weight_decay=0"]
    more += [
        "optimizer.lr=interval(0.001,0.1)",
        "sweep.startup_trials=1",
        "sweep.warmup_epochs=1",
        "trainer.max_epochs=4",
    ]
    done = command(*words(shapes, tmp_path, *more))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "study mine: 1 complete, 2 pruned" in done.stdout
    found = optuna.load_study(study_name="mine", storage=url).trials
    assert [sorted(trial.intermediate_values) for trial in found[1:]] == [[0, 1], [0, 1]]
    for number in (1, 2):
        assert summary_of(tmp_path / f"sweep/{number}")["pruned"]


def test_jobs_take_the_places_that_become_free() -> None:
    """Job 0 waits for the end of job 2, which can only start at the place of job 1."""
    second = threading.Event()
    started: list[tuple[int, int]] = []

    def launch(number: int, overrides: list[str], place: int) -> sweep.End:
        started.append((number, place))
        if number == 0:
            assert second.wait(60)
        if number == 2:
            second.set()
        return sweep.End(float(number))

    jobs = iter([(number, list[str]()) for number in range(3)])
    ends = dict(sweep.run_jobs(launch, jobs, 2))
    assert started == [(0, 0), (1, 1), (2, 1)]
    assert {number: end.score for number, end in ends.items()} == {0: 0.0, 1: 1.0, 2: 2.0}


@pytest.mark.parametrize(
    ("launcher", "n_jobs", "message"),
    [
        (
            BASIC,
            2,
            "`hydra.sweeper.n_jobs=2`: Hydra's basic launcher runs one job after the other: add hydra/launcher=l",
        ),
        (LOCAL, 0, "`hydra.sweeper.n_jobs=0` must be a whole number of at least 1, or null."),
        (LOCAL, "x", "`hydra.sweeper.n_jobs=x` must be a whole number of at least 1, or null."),
    ],
)
def test_a_wrong_number_of_jobs_is_refused(launcher: dict[str, str], n_jobs: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sweep.check_launcher(launcher, n_jobs)


def test_no_more_places_than_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0, 1,2,3,-1,5")
    assert sweep.gpus() == ["0", "1", "2", "3"]
    assert [sweep.places(LOCAL, n_jobs, jobs) for n_jobs, jobs in [(None, 9), (None, 2), (8, 2), (3, 9)]] == [
        4,
        2,
        2,
        3,
    ]
    assert [sweep.places(SLURM, n_jobs, jobs) for n_jobs, jobs in [(None, 9), (3, 9)]] == [9, 3]
    assert sweep.places(BASIC, None, 9) == 1
    assert all("OMP" not in word for part in sweep.shares(2, {"OMP_NUM_THREADS": "7"}) for word in part)


def test_a_launcher_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"This hydra/launcher needs an extra: pip install 'alexlab\[slurm\]'."):
        sweep.check_launcher(SLURM, None)


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({"CPU": 16.0, "GPU": 4.0}, {"num_cpus": 4, "num_gpus": 1}),
        ({"CPU": 16.0}, {"num_cpus": 1, "num_gpus": 0}),
        ({"CPU": 2.0, "GPU": 8.0}, {"num_cpus": 1, "num_gpus": 1}),
    ],
)
def test_ray_gives_a_job_one_gpu_and_its_cores(there: dict[str, float], expected: dict[str, int]) -> None:
    assert options({"num_cpus": None, "max_calls": 1}, there) == {**expected, "max_calls": 1}
    assert options({"num_gpus": 2}, there)["num_gpus"] == 2


def test_failed_jobs_are_listed_at_the_end() -> None:
    ends = [
        sweep.End(0.5),
        sweep.End(failure="job 1 (seed=1): a", code=2),
        sweep.End(failure="job 2 (seed=2): b", code=1),
    ]
    with pytest.raises(
        RunFailedError, match=r"^2 jobs of the sweep failed:\n  job 1 \(seed=1\): a\n  job 2"
    ) as stopped:
        sweep.finish(ends, keep_going=False)
    assert stopped.value.code == 2
    with pytest.raises(RunFailedError) as continued:
        sweep.finish(ends, keep_going=True)
    assert continued.value.code == 1
    assert sweep.STOPS not in str(continued.value)
