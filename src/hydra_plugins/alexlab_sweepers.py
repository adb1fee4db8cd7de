"""The two sweepers of train.py and the other commands. Hydra finds them because they are in this folder.

Hydra imports this module at each start, so it imports nothing heavy: alexlab/commands/sweep.py does the work.
"""

import itertools
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict


class CheckedSweeper(Sweeper):
    """Check the configs of all jobs, then run one job per combination of values, as Hydra's basic sweeper does.

    Args:
        params: overrides that are used unless the command line has the same key.
    """

    hydra_context: HydraContext
    config: DictConfig
    launcher: Launcher

    def __init__(self, params: DictConfig | None = None) -> None:
        self.params: Any = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.folder = Path(config.hydra.sweep.dir)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from alexlab.commands import cli, sweep

        options = [sweep.values_of_grid(override) for override in self.parse(arguments)]
        jobs = [list(job) for job in itertools.product(*options)]
        if not OmegaConf.select(self.config, "sweep.keep_going"):
            sweep.check_jobs(cli.COMMANDS[self.config.hydra.job.config_name].model, self.compose, jobs)
        if not OmegaConf.select(self.config, "dry_run"):
            self.folder.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(self.config, self.folder / "multirun.yaml")  # with references, as Hydra writes it
        self.launch(0, *jobs)

    def parse(self, arguments: list[str]) -> list[Override]:
        """Parse `params` and the command line's overrides; if several have the same key, the last one is used."""
        texts = [f"{key}={'null' if value is None else value}" for key, value in self.params.items()]
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        by_key = {each.get_key_element().lstrip("+"): each for each in parser.parse_overrides([*texts, *arguments])}
        return list(by_key.values())

    def compose(self, number: int, overrides: list[str]) -> dict[str, Any]:
        """Compose the config of a job as Hydra's launcher will, without starting the job."""
        from alexlab.commands.cli import COMMANDS, plain_config

        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(number), number
            config.hydra.runtime.output_dir = str(self.folder / str(config.hydra.sweep.subdir))
        HydraConfig.instance().set_config(config)  # for ${hydra:...}
        own: DictConfig = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        return plain_config(COMMANDS[self.config.hydra.job.config_name], own, HydraConfig.get())

    def launch(self, number: int, *jobs: list[str]) -> Any:
        """Run jobs, numbered from `number` on. Returns the result of the last job; raises the error of a job."""
        return [job.return_value for job in self.launcher.launch(jobs, initial_job_idx=number)][-1]


class OptunaSweeper(CheckedSweeper):
    """Run the trials of an Optuna study. conf/hydra/sweeper/optuna.yaml describes the settings."""

    def __init__(self, params: DictConfig, **settings: Any) -> None:
        super().__init__(params)
        self.settings = settings

    def sweep(self, arguments: list[str]) -> None:
        from alexlab.commands import sweep

        given: Any = OmegaConf.to_container(OmegaConf.create(self.settings))
        sweep.run_study(given, self.parse(arguments), self.folder, self.compose, self.launch)
