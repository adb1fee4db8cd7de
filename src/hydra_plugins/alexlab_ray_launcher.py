"""The launcher of conf/hydra/launcher/ray.yaml. The plugin hydra-ray-launcher needs a cloudpickle of 2023 and boto3."""

import threading
from collections.abc import Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict


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

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        import ray

        with self.starting:  # jobs are launched from several threads
            if not ray.is_initialized():
                ray.init(**self.settings["init"])
            task = ray.remote(**options(self.settings["remote"], ray.cluster_resources()))(run)
            tasks = [
                task.remote(
                    self.hydra_context, self.task_function, self.config, list(overrides), number, Singleton.get_state()
                )
                for number, overrides in enumerate(job_overrides, initial_job_idx)
            ]
        return ray.get(tasks)


def options(given: dict[str, Any], there: dict[str, float]) -> dict[str, Any]:
    """Return the arguments of ray.remote.

    Args:
        there: the resources of the cluster, as Ray names them.
    """
    gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 1))
    own = {"num_gpus": min(gpus, 1), "num_cpus": max(1, cpus // gpus) if gpus else 1}
    return own | {key: value for key, value in given.items() if value is not None}


def run(
    context: HydraContext, function: TaskFunction, config: DictConfig, overrides: list[str], number: int, state: Any
) -> JobReturn:
    """Run a job in a process of Ray."""
    import os

    import ray

    setup_globals()
    Singleton.set_state(state)
    composed = context.config_loader.load_sweep_config(config, overrides)
    with open_dict(composed):
        composed.hydra.job.id, composed.hydra.job.num = ray.get_runtime_context().get_task_id(), number
    HydraConfig.instance().set_config(composed)
    os.environ["ALEXLAB_CORES"] = str(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
    return run_job(
        hydra_context=context,
        task_function=function,
        config=composed,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
