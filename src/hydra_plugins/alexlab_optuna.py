"""Hydra takes sweepers from the package hydra_plugins alone, and imports all of it at each start: so this is light, and
alexlab/study.py does the work."""

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class StudySweeper(Sweeper):
    """hydra-optuna-sweeper's settings, for studies that go on after a kill and stop trials that look bad."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from alexlab.commands.study import StudySweep

        self.study = StudySweep(**self.settings)
        self.study.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        self.study.sweep(arguments)
