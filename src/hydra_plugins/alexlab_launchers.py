"""The launchers of conf/hydra/launcher/local.yaml and ray.yaml, which run the jobs of a sweep side by side.

submitit's launcher for one machine leaves jobs behind if the command is stopped, and kills them a second after Ctrl-C.
The plugin hydra-ray-launcher needs a cloudpickle of 2023 and boto3.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

GRACE = 60.0  # seconds in which a job that must stop writes a checkpoint


class LocalLauncher(Launcher):
    """Run each job in a process of this machine. What it prints is in `.jobs/` in the sweep's folder."""

    def __init__(self) -> None:
        self.running: list[subprocess.Popen[bytes]] = []

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        return [self.launch_one(list(each), number) for number, each in enumerate(job_overrides, initial_job_idx)]

    def launch_one(self, overrides: list[str], number: int) -> JobReturn:
        """Run a job and wait for it. Raises RuntimeError if its process is killed."""
        log = Path(self.config.hydra.sweep.dir) / f".jobs/{number}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        job = pickle.dumps((self.hydra_context, self.task_function, self.config, overrides, number, str(number)))
        with tempfile.TemporaryDirectory() as folder, log.open("ab") as out:
            result = Path(folder, "result")
            command = [sys.executable, "-m", "hydra_plugins.alexlab_launchers", str(result)]
            # in a session of its own, so that Ctrl-C reaches the job once, by `stop`
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True)
            self.running.append(process)
            with contextlib.suppress(BrokenPipeError):  # it has ended already
                process.communicate(job)
            code = process.wait()
            self.running.remove(process)
            if not result.exists():
                how = f"was stopped by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
                raise RuntimeError(f"its process {how}: see {log}")
            return pickle.loads(result.read_bytes())

    def stop(self) -> None:
        """Stop all jobs: each writes a checkpoint. After `GRACE` seconds, or a second Ctrl-C, they are killed."""
        running = list(self.running)
        try:
            for process in running:
                process.send_signal(signal.SIGTERM)
            for process in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
        finally:
            for process in running:
                process.kill()


def main() -> None:
    """Run the job that standard input has, and write its result to the file that the command line names."""
    from alexlab.commands.worker import stop_with_parent

    stop_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # SIGTERM stops it
    job = pickle.load(sys.stdin.buffer)
    result = Path(sys.argv[1])
    part = result.with_name("part")
    part.write_bytes(pickle.dumps(run(*job)))
    part.rename(result)


class RayLauncher(Launcher):
    """Run jobs as tasks of Ray, which starts each when its cores and GPUs are free.

    Args:
        init: arguments of ray.init.
        remote: arguments of ray.remote. Without num_gpus, a job gets one GPU if there are GPUs; without num_cpus, the
            cores divided by the GPUs, or one.
    """

    def __init__(self, init: DictConfig, remote: DictConfig) -> None:
        self.settings: Any = OmegaConf.to_container(OmegaConf.create({"init": init, "remote": remote}), resolve=True)
        self.starting = threading.Lock()
        self.running: set[Any] = set()

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def start(self) -> None:
        """Start Ray, or connect to it. In the main thread, SIGTERM stays what it was: Ray would abort on it."""
        import ray

        if not ray.is_initialized():
            handler = signal.getsignal(signal.SIGTERM)
            ray.init(**self.settings["init"])
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        import ray

        with self.starting:  # jobs are launched from several threads
            self.start()
            task = ray.remote(**options(self.settings["remote"], ray.cluster_resources()))(run_on_ray)
            state = Singleton.get_state()
            tasks = [
                task.remote(self.hydra_context, self.task_function, self.config, list(overrides), number, state)
                for number, overrides in enumerate(job_overrides, initial_job_idx)
            ]
            self.running.update(tasks)
        try:
            return ray.get(tasks)
        finally:
            self.running.difference_update(tasks)

    def stop(self) -> None:
        """Interrupt all jobs: each writes a checkpoint. After `GRACE` seconds, or a second Ctrl-C, they are killed."""
        import ray

        running = list(self.running)
        for task in running:
            ray.cancel(task)
        ray.wait(running, num_returns=len(running), timeout=GRACE)


def options(given: dict[str, Any], resources: dict[str, float]) -> dict[str, Any]:
    """Return the arguments of ray.remote; `resources` are the cluster's, as Ray names them."""
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    own = {"num_gpus": min(gpus, 1), "num_cpus": max(1, cpus // gpus) if gpus else 1}
    return own | {key: value for key, value in given.items() if value is not None}


def run_on_ray(
    context: HydraContext, function: TaskFunction, config: DictConfig, overrides: list[str], number: int, state: Any
) -> JobReturn:
    """Run a job in a process of Ray, with the cores that Ray has given it."""
    import ray

    from alexlab.engine.process import CORES

    task = ray.get_runtime_context()
    os.environ[CORES] = str(max(1, int(task.get_assigned_resources().get("CPU", 1))))
    return run(context, function, config, overrides, number, str(task.get_task_id()), state)


def run(
    context: HydraContext,
    function: TaskFunction,
    config: DictConfig,
    overrides: list[str],
    number: int,
    name: str,
    state: Any = None,
) -> JobReturn:
    """Run a job of the sweep `config` in this process; `name` is Hydra's ID of it, `state` is of Hydra's singletons."""
    setup_globals()
    if state is None:
        Plugins.instance()  # registers the options of plugins
    else:
        Singleton.set_state(state)
    composed = context.config_loader.load_sweep_config(config, overrides)
    with open_dict(composed):
        composed.hydra.job.id, composed.hydra.job.num = name, number
    HydraConfig.instance().set_config(composed)
    return run_job(
        hydra_context=context,
        task_function=function,
        config=composed,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


if __name__ == "__main__":
    from alexlab.engine.process import leave

    main()
    leave(0)
