"""The same command under a real SLURM of two nodes."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import ROOT, clean_env, summary_of, wait_for
from machines import Cluster, train_words


def line(*words: str) -> str:
    return shlex.join(words)


def test_srun_starts_one_run_of_two_nodes(cluster: Cluster, shapes: Path, tmp_path: Path) -> None:
    done = cluster.run("srun", "-N2", "-n2", *train_words(shapes, f"paths.logs={tmp_path}"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run directory: ") == 1
    (folder,) = (tmp_path / "train/runs").iterdir()
    assert (summary_of(folder)["status"], summary_of(folder)["world_size"]) == ("finished", 2)


def test_a_forgotten_srun_is_one_sentence(cluster: Cluster, shapes: Path, tmp_path: Path) -> None:
    words = train_words(shapes, f"paths.logs={tmp_path}")
    job = cluster.submit(tmp_path, line(*words))
    wait_for(lambda: not cluster.state(job))
    (text,) = (tmp_path / "out").read_text().splitlines()
    assert text.startswith("error: This SLURM job has 2 tasks (SLURM_NTASKS), and srun has not started this process:")


def test_a_job_near_its_end_is_queued_again_and_resumes(cluster: Cluster, shapes: Path, tmp_path: Path) -> None:
    """Twice: USR1 comes, the run stops with a checkpoint, and SLURM runs the job again."""
    words = train_words(shapes, f"paths.logs={tmp_path}", "trainer.max_epochs=5000", "resume=auto")
    job = cluster.submit(tmp_path, f"srun {line(*words, 'resume.requeue=true')}")
    folder = tmp_path / f"train/runs/slurm-{job}.0"
    out = tmp_path / "out"

    def rows() -> int:
        return len((folder / "metrics.csv").read_text().splitlines()) if (folder / "metrics.csv").is_file() else 0

    for times in (1, 2):
        before = rows()
        wait_for(lambda before=before: rows() > before + 1)  # type: ignore[misc]
        assert cluster.run("scancel", "--signal=USR1", job).returncode == 0
        wait_for(lambda times=times: out.read_text().count(f"SLURM queued job {job} again.") == times)  # type: ignore[misc]
        cluster.start_again(job)
        wait_for(lambda times=times: out.read_text().count(", resumed") == times, 240)  # type: ignore[misc]
    assert cluster.run("scancel", job).returncode == 0
    wait_for(lambda: not cluster.state(job))
    assert summary_of(folder)["status"] == "preempted"


@pytest.mark.parametrize("rank", [1, 0])
def test_a_lost_rank_is_queued_again(rank: int, cluster: Cluster, shapes: Path, tmp_path: Path) -> None:
    """If rank 0 is lost, rank 1 asks SLURM."""
    words = train_words(shapes, f"paths.logs={tmp_path}", "trainer.max_epochs=5000", "resume=auto")
    job = cluster.submit(tmp_path, f"srun --kill-on-bad-exit=0 {line(*words, 'resume.requeue=true')}")
    folder, out = tmp_path / f"train/runs/slurm-{job}.0", tmp_path / "out"
    wait_for(lambda: (folder / "checkpoints/last.ckpt").is_file())
    ranks = [process for process in psutil.process_iter(["environ", "name"]) if is_rank(rank, process, job)]
    assert len(ranks) == 1
    ranks[0].kill()
    wait_for(lambda: f"SLURM queued job {job} again." in out.read_text())
    assert (folder / "summary.json").exists() == (rank == 1)
    cluster.start_again(job)
    wait_for(lambda: ", resumed" in out.read_text(), 240)
    cluster.run("scancel", job)
    wait_for(lambda: not cluster.state(job))


def is_rank(rank: int, process: psutil.Process, job: str) -> bool:
    env = process.info["environ"] or {}
    return env.get("SLURM_JOB_ID") == job and env.get("SLURM_PROCID") == str(rank) and "python" in process.info["name"]


def test_a_sweep_of_slurm_jobs_ends_with_its_table_also_after_a_preemption(
    cluster: Cluster, shapes: Path, tmp_path: Path
) -> None:
    """submitit sends SIGUSR2 to a job that SLURM preempts, or whose time is over."""
    pytest.importorskip("submitit")
    _, *words = train_words(shapes, f"hydra.sweep.dir={tmp_path}/sweep", f"paths.logs={tmp_path}/logs")
    words = [word for word in words if not word.startswith("trainer.max_epochs")]
    words += ["-m", "hydra/launcher=slurm", "hydra.launcher.timeout_min=30", "seed=0,1", "trainer.max_epochs=30"]
    words += ["resume=auto", "resume.requeue=true"]
    with subprocess.Popen(
        cluster.words(sys.executable, *words), cwd=ROOT, env=clean_env(cluster.env), stdout=subprocess.PIPE, text=True
    ) as sweeping:
        run_dir = tmp_path / "sweep/0"
        wait_for(lambda: (run_dir / "checkpoints/last.ckpt").is_file())
        log = run_dir / "train.log"
        jobs = {
            path.name.split("_")[0]: path.read_text() for path in (tmp_path / "sweep/.submitit").glob("*/*_0_log.out")
        }
        (job,) = [number for number, text in jobs.items() if f"run directory: {run_dir}" in text]
        assert cluster.run("scancel", "--signal=USR2", job).returncode == 0
        wait_for(lambda: f"SLURM queued job {job}" in log.read_text())
        cluster.start_again(job)
        printed, _ = sweeping.communicate(timeout=400)
    assert sweeping.returncode == 0, printed
    assert [summary_of(tmp_path / f"sweep/{number}")["status"] for number in (0, 1)] == ["finished"] * 2
    assert "Stopped by SIGUSR2. Resume the run with" in log.read_text()
    assert [log.read_text().count(f"epoch {number}/30 |") for number in range(1, 31)] == [1] * 30, "each epoch once"
    assert "compare its jobs: alexlab compare runs=" in printed


def test_the_example_of_a_job_trains_on_both_nodes(cluster: Cluster, shapes: Path, tmp_path: Path) -> None:
    _, _, *words = train_words(shapes, f"paths.logs={tmp_path}", "trainer=ddp_cpu", "trainer.devices=auto")
    less = ["--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "-o", str(tmp_path / "out")]
    done = cluster.run("sbatch", "--parsable", *less, "examples/job.sbatch", *words)
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    wait_for(lambda: not cluster.state(job))
    found = summary_of(tmp_path / f"train/runs/slurm-{job}.0")
    assert (found["status"], found["world_size"]) == ("finished", 2), (tmp_path / "out").read_text()


def test_tasks_of_an_array_are_runs_that_resume_before_their_time_is_over(
    cluster: Cluster, shapes: Path, tmp_path: Path
) -> None:
    """SLURM sends SIGUSR1 to the steps 60 seconds before the two minutes are over."""
    words = train_words(shapes, f"paths.logs={tmp_path}", "trainer.max_epochs=5000", "resume=auto")
    less = ("-N1", "-n1", "--array=0-1", "--time=2", "--signal=USR1@60", "-o", str(tmp_path / "out-%a"))
    cluster.submit(tmp_path, f"srun {line(*words, 'resume.requeue=true')} seed=$SLURM_ARRAY_TASK_ID", options=less)
    outs = [tmp_path / f"out-{task}" for task in (0, 1)]
    wait_for(lambda: all("queued job" in out.read_text() for out in outs if out.exists()) and outs[1].exists(), 240)
    tasks = [re.findall(r"SLURM queued job (\w+) again", out.read_text())[0] for out in outs]
    jobs = [path.name.removeprefix("slurm-").removesuffix(".0") for path in (tmp_path / "train/runs").iterdir()]
    for task in tasks:
        cluster.start_again(task)
    wait_for(lambda: all(", resumed" in out.read_text() for out in outs), 240)
    assert cluster.run("scancel", *jobs).returncode == 0
    wait_for(lambda: not any(cluster.state(job) for job in jobs))
    runs = [tmp_path / f"train/runs/slurm-{job}.0" for job in jobs]
    seeds = [yaml.safe_load((run / "config.yaml").read_text())["seed"] for run in runs]
    assert sorted(seeds) == [0, 1]
    for run in runs:  # a slow machine may have been asked to stop again before scancel
        queued = re.findall(r"SLURM queued job (\w+) again", (run / "train.log").read_text())
        assert len({*queued}) == 1, "each task only itself"


def test_a_job_whose_node_fails_is_queued_again_by_slurm_and_resumes(
    cluster: Cluster, shapes: Path, tmp_path: Path
) -> None:
    words = train_words(shapes, f"paths.logs={tmp_path}", "trainer.max_epochs=5000", "resume=auto")
    job = cluster.submit(tmp_path, f"srun {line(*words)}")
    folder, out = tmp_path / f"train/runs/slurm-{job}.0", tmp_path / "out"
    wait_for(lambda: (folder / "checkpoints/last.ckpt").is_file())
    try:
        assert cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test").returncode == 0
        wait_for(lambda: cluster.state(job) == "PENDING")
    finally:
        cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    cluster.start_again(job)
    wait_for(lambda: ", resumed" in out.read_text(), 240)
    cluster.run("scancel", job)
    wait_for(lambda: not cluster.state(job))
