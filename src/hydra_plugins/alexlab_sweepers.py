"""The two sweepers of train.py and the other commands. Hydra finds them because they are in this folder.

Hydra imports this module at each start, so it imports nothing heavy: alexlab/commands/sweep.py does the work.
"""

import copy
import itertools
from collections.abc import Iterator
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

    `params` are overrides that are used unless the command line has the same key; `n_jobs` run at once.
    """

    hydra_context: HydraContext
    config: DictConfig
    launcher: Launcher

    def __init__(self, params: DictConfig | None = None, n_jobs: int | None = None) -> None:
        self.params: Any = params or {}
        self.n_jobs = n_jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from alexlab.commands import sweep

        sweep.check_launcher(config.hydra.launcher, self.n_jobs)
        if OmegaConf.select(config, "dry_run"):  # what the jobs print is meant for this terminal
            basic = {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}
            config = copy.deepcopy(config)
            OmegaConf.update(config, "hydra.launcher", basic, merge=False, force_add=True)
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
        ends = [end for _, end in self.run(enumerate(jobs), len(jobs))]
        sweep.finish(ends, OmegaConf.select(self.config, "sweep.keep_going"))

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

    def run(self, jobs: Iterator[tuple[int, list[str]]], count: int) -> Iterator[tuple[int, Any]]:
        """Run jobs as `run_jobs` does. Without sweep.keep_going, no more jobs start after one that has failed."""
        from alexlab.commands import sweep

        launcher, has_failed = self.config.hydra.launcher, list[bool]()
        at_once = sweep.places(launcher, self.n_jobs, count)
        is_here, shares = sweep.runs_here(launcher), None
        if sweep.is_local(launcher):
            shares = sweep.shares(at_once, self.config.hydra.job.env_set)
        if not is_here:
            logs = ".submitit" if "submitit_folder" in launcher else ".jobs" if shares else None
            where = f"; what they print is in {self.folder}/{logs}" if logs else ""
            print(f"jobs at once: {at_once}{where}", flush=True)
            if (start := getattr(self.launcher, "start", None)) is not None:
                start()

        def launch(number: int, overrides: list[str], place: int) -> Any:
            if is_here:
                return self.launcher.launch([overrides], initial_job_idx=number)[0].return_value
            return self.launch(number, [*overrides, *(shares[place] if shares else [])])

        def following() -> Iterator[tuple[int, list[str]]]:
            while not has_failed and (job := next(jobs, None)) is not None:
                yield job

        try:
            for number, end in sweep.run_jobs(launch, following(), at_once):
                if end.failure and not OmegaConf.select(self.config, "sweep.keep_going"):
                    has_failed.append(True)
                yield number, end
        except BaseException:  # a signal
            if (stop := getattr(self.launcher, "stop", None)) is not None:
                stop()
            raise

    def launch(self, number: int, overrides: list[str]) -> Any:
        """Run one job outside of this process, and wait for it. If the launcher has lost it, it has failed."""
        from alexlab.commands import sweep
        from alexlab.engine.config import masker
        from alexlab.engine.text import printable

        shown = [each for each in overrides if not each.startswith("++hydra.job.env_set.")]
        mask = masker({"logger": shown})  # which may refer to secrets
        about = mask(f"job {number}: {', '.join(shown)}")
        print(printable(about), flush=True)
        try:
            end = self.launcher.launch([overrides], initial_job_idx=number)[0].return_value
        except Exception as error:
            # of a traceback or the job's whole log, the first lines and the last one
            first, *rest = f"{type(error).__name__}: {error}".strip().split("\n---")
            why = mask(" ".join([*first.split(), *"".join(rest).rstrip("- \n").split("\n")[-1].split()]))
            end = sweep.End(folder=str(self.folder), failure=f"{about}: no result: {why}", code=1)
        if end.failure:
            print(printable(f"FAILED {end.failure}", "\n"), flush=True)
        return end


class OptunaSweeper(CheckedSweeper):
    """Run the trials of an Optuna study. conf/hydra/sweeper/optuna.yaml describes the settings."""

    def __init__(self, params: DictConfig, n_jobs: int | None = None, **settings: Any) -> None:
        super().__init__(params, n_jobs)
        self.settings = settings

    def sweep(self, arguments: list[str]) -> None:
        from alexlab.commands import sweep

        given: Any = OmegaConf.to_container(OmegaConf.create(self.settings))
        overrides, count = self.parse(arguments), given["n_trials"]
        sweep.run_study(given, overrides, self.folder, self.compose, lambda jobs: self.run(jobs, count))
