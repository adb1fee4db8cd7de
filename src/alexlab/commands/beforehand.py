"""The jobs of a sweep are looked at before the first one starts: a wrong value of the last must not wait for hours of
the others. Of a study's jobs, which are not known before, the ends of what it draws from are looked at. Light."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf, open_dict

from alexlab.engine import rules, sweeps
from alexlab.engine.errors import UserError

RULES_OF = {
    "train": [rules.RULES],
    "eval": [rules.EVAL_RULES],
    "predict": [rules.PREDICT_RULES],
    "figures": [rules.FIGURES_RULES],
    "export": [rules.EXPORT_RULES],
    "prepare": [rules.PREPARE_RULES],
    "benchmark": [rules.RULES, rules.BENCHMARK_RULES],
    "compare": [rules.COMPARE_RULES],
    "dashboard": [rules.DASHBOARD_RULES],
}
SHOWN = 12  # mistakes, for one screen
NAMED = 8  # jobs of a mistake


SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"

FillIn = Callable[[DictConfig, Any], None]


@dataclass(frozen=True)
class JobsOf:
    """Of which command jobs are, and what puts into a job's config what Hydra knows of it."""

    command: str
    fill_in: FillIn

    def composed(self, sweeper: Any, number: int, words: Iterable[str]) -> DictConfig:
        """The config of a job, as Hydra's launcher will make it and the command see it."""
        config: DictConfig = sweeper.hydra_context.config_loader.load_sweep_config(sweeper.config, list(words))
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(number), number
            config.hydra.runtime.output_dir = str(Path(config.hydra.sweep.dir, str(config.hydra.sweep.subdir)))
        HydraConfig.instance().set_config(config)
        config = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        self.fill_in(config, HydraConfig.get())
        return config

    def mistakes(self, config: DictConfig) -> list[str]:
        """Of a job; none where such a job is to be recorded as failed, and the sweep to go on."""
        if OmegaConf.select(config, "sweep.keep_going") is True:
            return []
        found = []
        for its in RULES_OF[self.command]:
            try:
                rules.check(config, its)
            except UserError as error:
                first, *others = str(error).split("\n  ")
                found += others if others and first.endswith(":") else [first, *others]
        return found


jobs_of: JobsOf | None = None  # of the sweep that this process is


def check_jobs_of(command: str, fill_in: FillIn) -> None:
    """Let the sweeper check all jobs of `command` before it starts one: Hydra's own between splitting the words into
    jobs and that, Optuna's by itself."""
    global jobs_of
    checked = jobs_of = JobsOf(command, fill_in)
    sweeper: Any = Plugins.instance().class_name_to_class[SWEEPER]  # Hydra takes no other one for it
    split = sweeper.split_arguments

    def split_arguments(self: Any, overrides: list[Any], max_batch_size: int | None) -> list[list[list[str]]]:
        batches: list[list[list[str]]] = split(overrides, max_batch_size)
        all_words = [words for batch in batches for words in batch]
        wrong: dict[str, list[int]] = {}
        for number, words in enumerate(all_words):
            for mistake in checked.mistakes(checked.composed(self, number, words)):
                wrong.setdefault(mistake, []).append(number)
        if wrong:
            raise UserError(_told(wrong, len(all_words)))
        sweeps.keep_note(Path(self.config.hydra.sweep.dir))  # Hydra writes one next
        return batches

    sweeper.split_arguments = split_arguments
    sweeper.validate_batch_is_legal = lambda self, batch: None  # it would compose them all again


def _told(wrong: dict[str, list[int]], jobs: int) -> str:
    """Each mistake once, with the jobs that have it."""
    some = len({number for numbers in wrong.values() for number in numbers})
    lines = []
    for mistake, numbers in list(wrong.items())[:SHOWN]:
        named = ", ".join(map(str, numbers[:NAMED])) + (", ..." if len(numbers) > NAMED else "")
        which = "all jobs" if len(numbers) == jobs else f"job{'s' if len(numbers) > 1 else ''} {named}"
        lines.append(f"{which}: {mistake}")
    if len(wrong) > SHOWN:
        lines.append(f"... and {len(wrong) - SHOWN} more mistakes")
    return (
        f"{some} of the sweep's {jobs} jobs have wrong values, and none was started (sweep.keep_going=true records "
        "them as failed, and goes on):\n  " + "\n  ".join(lines)
    )
