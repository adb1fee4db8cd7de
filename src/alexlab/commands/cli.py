"""Every command: `alexlab VERB key=value ...`; train.py and eval.py are two of them.

Hydra composes conf/<command>.yaml with the overrides, and the schema checks the result. Only then are torch and
Lightning imported, so that `--help` and answers to most mistakes take half a second.
"""

import bdb
import contextlib
import importlib
import io
import itertools
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Sweep
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from alexlab.commands import sweep
from alexlab.engine import config as configs
from alexlab.engine import launcher, schema
from alexlab.engine.config import CONF, ROOT, Plain
from alexlab.engine.errors import RunFailedError, UserError, did_you_mean, mistake, short_traceback
from alexlab.engine.overrides import has, in_quotes, key_of, shown, split_list
from alexlab.engine.process import complete_environment, importing, leave, read_env
from alexlab.engine.schema import fields_of
from alexlab.engine.signals import Preempted, SignalRecorder
from alexlab.engine.sweeps import agent
from alexlab.engine.text import printable
from alexlab.engine.validation import (
    FILLED_IN,
    RECIPES,
    REPLACED,
    group_at,
    keys_of_schedule,
    listed,
    nearest,
    reset,
    takes_text,
    validate,
    value_at,
)


@dataclass(frozen=True)
class Command:
    """A command. `function` is "module:function" in alexlab.commands, imported after the config was checked."""

    name: str
    function: str

    @property
    def model(self) -> type[schema.Group]:
        return getattr(schema, f"{self.name.title()}Config")

    @property
    def shown(self) -> str:
        return f"python {self.name}.py" if self.name in ("train", "eval") else f"alexlab {self.name}"

    def load(self) -> Callable[[Any], Any]:
        module, _, function = self.function.partition(":")
        with importing():
            return getattr(importlib.import_module(f"alexlab.commands.{module}"), function)


COMMANDS = {
    "train": Command("train", "train:train"),
    "eval": Command("eval", "evaluate:evaluate"),
    "predict": Command("predict", "predict:predict"),
    "export": Command("export", "export:export"),
    "figures": Command("figures", "figures:redraw"),
    "prepare": Command("prepare", "prepare:prepare"),
    "benchmark": Command("benchmark", "benchmark:benchmark"),
    "compare": Command("compare", "compare:show"),
    "dashboard": Command("dashboard", "dashboard:save_dashboard"),
    "clean": Command("clean", "clean:clean"),
    "doctor": Command("doctor", "doctor:doctor"),
}


def main() -> None:
    """Run `alexlab VERB ...`, the console script."""
    verb, *sys.argv[1:] = sys.argv[1:] or ["--help"]
    if verb in COMPLETION:  # Hydra's completion, of the command whose name has been typed
        typed = re.match(r"\S+\s+(\S+)(\s.*)", os.environ.get("COMP_LINE", ""))
        if typed is None and any(word.startswith("query=") for word in sys.argv[1:]):
            print("\n".join(COMMANDS))
            return
        if typed and typed[1] not in COMMANDS:
            return
        verb, sys.argv[1:] = typed[1] if typed else "train", ["-sc", *sys.argv[1:]]
        os.environ["COMP_LINE"] = f"alexlab{typed[2] if typed else ''}"
    if verb in COMMANDS:
        run(verb)
        return
    if verb not in ("--help", "-h"):
        print(f"error: alexlab {verb}: there is no such command.{did_you_mean(verb, COMMANDS)}", file=sys.stderr)
    lines = [f"  {name:10} {_summary(name)}" for name in COMMANDS]
    print("alexlab COMMAND key=value ...  (alexlab COMMAND --help shows its keys)\n\n" + "\n".join(lines), flush=True)
    sys.exit(0 if verb in ("--help", "-h") else 2)


def run(name: str) -> None:
    """Run a command with the overrides of sys.argv; exit with 0, with 2 after a user's mistake, or otherwise."""
    complete_environment()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises; otherwise it prints its own message and exits with 1
    command, words, code = COMMANDS[name], sys.argv[1:], 0
    jobs = Jobs(command)
    register_resolvers("")
    try:
        read_env(ROOT / ".env")
        if name == "train":  # Ctrl-C has a handler of Python's own
            jobs.stack.enter_context(jobs.recorder.recording((signal.SIGTERM, signal.SIGUSR1)))
        words = to_overrides(words, command)
        if [word for word in words if word.startswith("-") and not word.startswith(CONFIG_DIR)] in (["--help"], ["-h"]):
            print(help_of(command, words))
        else:
            (complete if COMPLETION & {*words} else start)(jobs, words)
        sys.stdout.flush()
    except BaseException as error:
        jobs.stack.close()  # from here on a signal ends the process
        code = _report(error, words, jobs)
    if jobs.run_dir is not None:
        sweep.remove_empty(jobs.run_dir, jobs.run_dir.parent)
    is_watched = sys.getprofile() is not None or sys.gettrace() is not None or sys.flags.interactive  # by a debugger
    if "torch" in sys.modules and not is_watched:
        leave(code)
    if code:
        sys.exit(code)


def _report(error: Any, words: list[str], jobs: "Jobs") -> int:
    """Print a mistake on one screen, or the traceback of a bug; return the exit code."""
    command, mask = jobs.command, jobs.mask
    of_yaml = () if isinstance(error, JobError) else (yaml.YAMLError, UnicodeDecodeError)
    error = error.error if isinstance(error, JobError) else error
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, Preempted):
        when = "" if {"-m", "--multirun"} & {*words} else " while no run was training"
        print(f"Stopped by {signal.Signals(error.number).name}{when}.", flush=True)
        wants = jobs.requeues or any(word.lstrip("+").lower() == "resume.requeue=true" for word in words)
        if wants and error.number == signal.SIGUSR1 and launcher.rank() == 0:
            print(f"{launcher.requeue()}.", flush=True)
        return 128 + error.number
    if isinstance(error, BrokenPipeError):  # nobody reads the output any more, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    text, code = mistake(error), 2
    if isinstance(error, KeyboardInterrupt):
        text, code = "interrupted.", 130
    elif isinstance(error, RunFailedError):
        text, code = str(error), error.code
    elif isinstance(error, (HydraException, OmegaConfBaseException, *of_yaml)) or OF_HYDRA.search(str(error)):
        text = mistakes_of(error, command, words)
    elif text is None:
        print(printable(mask(short_traceback(error)), "\n\t"), file=sys.stderr, flush=True)
        return 1
    if code == 2 and command.name == "train" and not jobs.has_started:
        text = _of_all_ranks(mask(text))
        if text is None:
            return code
    print(printable(f"error: {mask(text)}", "\n\t"), file=sys.stderr, flush=True)
    return code


def _of_all_ranks(text: str) -> str | None:
    """Let rank 0 print a mistake of any rank. Returns the mistakes of all on rank 0, and None on the rest."""
    try:
        this = launcher.started()
        if this is None or this.world == 1:
            return text
        with importing():
            from alexlab.engine.ranks import meet

        meet(MISTAKE_MINUTES, text)
    except UserError as error:
        return str(error)
    except SystemExit:
        return None
    except (RuntimeError, KeyError):  # a rank is gone, or does not come; or no address is known
        pass
    return text


OF_HYDRA = re.compile("Config group override|Invalid defaults list")  # errors that are no HydraException
MISTAKE_MINUTES = 2  # for which a rank with a mistake waits for all ranks


# -- the jobs that Hydra composes


class JobError(BaseException):
    """The error of a job. If it were an Exception, Hydra would print all overrides first, and continue a sweep."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def start(jobs: "Jobs", words: list[str]) -> None:
    """Let Hydra compose the config, and run the job or the jobs. Sets sys.argv, which Hydra reads."""
    trains = jobs.command.name == "train"
    jobs.stamp = launcher.run_stamp(resumes="resume.run=auto" in words) if trains else ""
    register_resolvers(jobs.stamp)
    if trains and launcher.external():  # hides warnings of addresses without a name, and of ranks that stop
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    run_hydra = hydra.main(version_base="1.3", config_path=str(CONF), config_name=jobs.command.name)(jobs.run)
    try:
        sys.argv[1:] = words
        run_hydra()
    except HydraException:  # before the first job
        with_added = with_added_keys(words, jobs.command)
        if with_added == words:
            raise
        GlobalHydra.instance().clear()
        sys.argv[1:] = with_added
        run_hydra()


COMPLETION = {"-sc", "--shell-completion"}


def complete(jobs: "Jobs", words: list[str]) -> None:
    """Print Hydra's completion for a shell, changed to run scripts of this project only; Hydra's runs any script.

    The files of conf/ that options extend, such as data/_base.yaml, are not suggested.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            start(jobs, words)
    except ValueError:
        raise UserError(f"{' '.join(words)}: write -sc install=bash, install=zsh or install=fish.") from None
    script = printed.getvalue().replace('"@hydra.main" $file_path -q', f'"{__name__}" $file_path -q || return')
    print(re.sub(r"\S+=_\w+\s", "", script.replace("@hydra.main", __name__)), end="")


def train(*overrides: str) -> Path:
    """Train in this process, as `python train.py OVERRIDES`, for a notebook; return the run's directory.

    Raises:
        UserError: the overrides, the images or the network have a mistake.
        RunFailedError: the run failed on several devices, or was stopped.
    """
    read_env(ROOT / ".env")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    jobs, before = Jobs(COMMANDS["train"]), sys.argv
    if flags := [word for word in overrides if word.startswith("-")]:
        raise UserError(f"{flags[0]}: flags are for the command line. Call alexlab.train once per run, with overrides.")
    try:
        sys.argv = ["train.py"]
        start(jobs, to_overrides(list(overrides), jobs.command))
    except JobError as error:
        raise (UserError(mistake(error.error)) if isinstance(error.error, bdb.BdbQuit) else error.error) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(mistakes_of(error, jobs.command, list(overrides))) from None
    except SystemExit as error:
        raise RunFailedError(f"The run has stopped with exit code {error.code}.", 1) from None
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()
    assert jobs.run_dir is not None
    return jobs.run_dir


@dataclass
class Jobs:
    """Check and run the jobs of a command: a single one, or those of a sweep."""

    command: Command
    mask: Callable[[str], str] = str  # hides the values of secrets in a text
    run_dir: Path | None = None  # of a single job
    has_started: bool = False  # whether the command itself was called
    requeues: bool = False  # resume.requeue of the job
    recorder: SignalRecorder = field(default_factory=SignalRecorder)  # of signals before that
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    stamp: str = ""  # of the run, or of the sweep

    def __reduce__(self) -> tuple[Any, ...]:
        """A launcher of Hydra brings the jobs of a sweep to processes of its own."""
        return elsewhere, (self.command.name, self.stamp)

    def run(self, composed: DictConfig) -> Any:
        """Run the job whose config Hydra has composed, and return the result."""
        hydra_config = HydraConfig.get()
        run_dir = Path(hydra_config.runtime.output_dir).resolve()  # Hydra has created it
        if hydra_config.mode == hydra.types.RunMode.MULTIRUN:
            return self._run_in_sweep(composed, hydra_config, run_dir)
        self.run_dir = run_dir
        try:
            config = self._check(composed, hydra_config)
            self.requeues = isinstance(config, schema.TrainConfig) and config.resume.requeue
            with self.recorder.waiting():
                run = self.command.load()
                check_arguments(self.command, composed, hydra_config)
            self.has_started = True
            return run(config)
        except Exception as error:
            raise JobError(error) from None

    def _check(self, composed: DictConfig, hydra_config: Any) -> Any:
        plain = plain_config(self.command, composed, hydra_config)
        self.mask = configs.masker(plain)
        config = checked_config(self.command, plain, hydra_config)
        _check_start(config, hydra_config)
        return config

    def _run_in_sweep(self, composed: DictConfig, hydra_config: Any, run_dir: Path) -> sweep.End:
        number, overrides = hydra_config.job.num, ", ".join(overrides_of(hydra_config))
        is_here = sweep.runs_here(hydra_config.launcher)
        if agent() is None and (shared := os.environ.pop("WANDB_RUN_ID", None)):
            print(f"note: WANDB_RUN_ID={shared} is ignored, because each job of a sweep is a run of its own.")
        folder, is_dry = Path(hydra_config.sweep.dir).resolve(), bool(composed.get("dry_run"))
        end = sweep.End(
            folder=None if is_dry else hydra_config.sweep.dir, monitor=composed.get("monitor", sweep.End.monitor)
        )
        print(printable(f"job {number}: {overrides}"), flush=True)
        requeues = False
        if not is_here and threading.current_thread() is threading.main_thread():
            self.stack.enter_context(self.recorder.recording())  # also while torch is imported
        try:
            config = self._check(composed, hydra_config)
            requeues = isinstance(config, schema.TrainConfig) and config.resume.requeue
            with self.recorder.waiting():
                function = self.command.load()
                check_arguments(self.command, composed, hydra_config)
            with sweep.as_trial(hydra_config, is_dry):
                result = function(config)
            if result is None and "study_name" in hydra_config.sweeper and not is_dry:
                raise UserError(f"Nothing to optimize: the job has not measured `monitor={config.monitor}`.")
            return replace(end, score=result)
        except (SystemExit, Preempted) as error:  # a signal stopped the run
            if is_here:
                raise
            code = 128 + error.number if isinstance(error, Preempted) else error.code
            if requeues and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":  # SLURM starts the job again
                if isinstance(error, Preempted) and error.number != signal.SIGTERM:
                    print(f"{launcher.requeue()}.", flush=True)
                raise SystemExit(code) from None
            code = code if isinstance(code, int) else 1
            return replace(end, failure=f"job {number} ({overrides}): exited with code {code}", code=code)
        except Exception as error:
            if not is_dry:
                unresolved: Any = OmegaConf.to_container(composed, resolve=False)
                sweep.record_failure(run_dir, unresolved, self.mask(f"{type(error).__name__}: {error}"))
            text = mistake(error)
            if text is None and not isinstance(error, RunFailedError):
                print(self.mask(short_traceback(error)), file=sys.stderr, flush=True)
            why, code = self.mask(text or f"{type(error).__name__}: {error}"), 1 if text is None else 2
            if is_here and not OmegaConf.select(composed, "sweep.keep_going"):
                raise JobError(RunFailedError(f"Job {number} failed: {why}\n{sweep.STOPS}", code)) from None
            end = replace(end, failure=f"job {number} ({overrides}): {why}", code=code)
            print(printable(f"FAILED {end.failure}", "\n"), file=sys.stderr, flush=True)
            return end
        finally:
            if not is_here:
                self.stack.close()
            sweep.remove_empty(run_dir, folder.parent if is_dry else folder)


def elsewhere(name: str, stamp: str) -> Jobs:
    """Prepare a process that a launcher has started for jobs of the command `name`."""
    complete_environment()
    read_env(ROOT / ".env")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    register_resolvers(stamp)
    return Jobs(COMMANDS[name], stamp=stamp)


def _check_start(config: Any, hydra_config: Any) -> None:
    """Raise UserError for combinations of `resume`, `sweep`, -m and W&B's agent that contradict each other."""
    option, is_sweep = hydra_config.runtime.choices.get("sweep", "none"), hydra_config.mode.name == "MULTIRUN"
    if not is_sweep and option != "none":
        raise UserError(f"sweep={option} is for many runs: add -m, as in -m sweep={option}.")
    if not isinstance(config, schema.TrainConfig):
        return
    sweep.check_agent(config)
    resumed = config.resume.run
    if resumed in (None, "auto"):
        return
    if words := [word for word in hydra_config.overrides.hydra if word.startswith("hydra.run.dir=")]:
        raise UserError(
            f"resume={resumed} continues in the run's own directory: remove {words[0]}, or start a new run from its "
            f"checkpoint with ckpt_path={resumed}."
        )


def register_resolvers(stamp: str) -> None:
    """Register what conf/ refers to: ${stamp:} and ${root:}; ${logs:}, the folder of this machine that has the runs;
    ${folds:}, the numbers of the folds; and ${direction:METRIC}, "minimize" or "maximize" for Optuna."""

    def direction(metric: str, _root_: Any) -> str:
        mode, entry = _root_.get("monitor_mode"), OmegaConf.select(_root_, f"metrics.{metric.removeprefix('val/')}")
        if mode is None and entry is not None:  # as build_task decides, which reports a mode that is unknown
            from alexlab.tasks.metrics import better  # imports torch

            mode = better(hydra.utils.get_class(entry["_target_"]))
        return f"{mode or schema.mode_of(metric)}imize"

    def folds(_root_: Any) -> str:
        count = OmegaConf.select(_root_, "data.folds")
        if count is None:
            raise UserError("sweep=folds needs the number of folds, one for all jobs: add data.folds=5, for example.")
        return ",".join(map(str, range(count))) if isinstance(count, int) and count > 1 else "0"  # which is refused

    def logs(_root_: Any) -> str:
        return configs.local_logs(_root_.paths.logs, _root_.paths.get("scratch") or f"{ROOT}/logs")

    OmegaConf.register_new_resolver("folds", folds, replace=True)
    OmegaConf.register_new_resolver("logs", logs, replace=True)
    OmegaConf.register_new_resolver("stamp", lambda: stamp, replace=True)
    OmegaConf.register_new_resolver("root", lambda: str(ROOT), replace=True)
    OmegaConf.register_new_resolver("direction", direction, replace=True)


# -- the command line -> Hydra's overrides

FLAGS = re.compile(
    "--(help|hydra-help|version|cfg|resolve|package|run|multirun|info|shell-completion|config-dir"
    "|experimental-rerun)(=.*)?"
)
CONFIG_DIR = "--config-dir="
# Flags that are followed by a value
WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--experimental-rerun")


def to_overrides(argv: list[str], command: Command) -> list[str]:
    """Turn a command line into overrides that Hydra's grammar reads as they are meant.

    `resume=X` becomes `resume.run=X`, and `--config-dir DIR` becomes `--config-dir=PATH`. The values of keys that are
    texts in the schema stay the texts that were typed: they are quoted if Hydra would read them as something else, such
    as `26_20` as a number. With -m, a comma still separates the values of several jobs. Other values are quoted if
    Hydra cannot parse them. A ~ before a path becomes the home folder. Python literals from W&B's agent become Hydra's
    values. Flags are put first, because argparse reads none between overrides.

    Raises:
        UserError: an option in another program's form (--lr 0.1), a value that the shell has divided, or a sweep under
            torchrun or srun.
    """
    flags, words = list[str](), list[str]()
    rest = iter(argv)
    for word in rest:
        if word in ("--config-dir", "-cd") or word.startswith(CONFIG_DIR):
            name = word.partition("=")[2] or next(rest, "")
            if not name or not (folder := Path(configs.absolute(name))).is_dir():
                raise UserError(f"--config-dir={name}: there is no such folder: give one with options of your own.")
            flags.append(f"{CONFIG_DIR}{folder}")
        elif re.match("(--config-path|--config-name|-cp|-cn)(=|$)", word):
            raise UserError(f"{word}: add your own options with --config-dir DIR, and choose them with group=option.")
        elif word.startswith("--") and not FLAGS.fullmatch(word):
            meant = _as_ours(word, list(rest), command)
            raise UserError(f"{word}: settings are written key=value, as in {meant}.")
        elif word.startswith("-"):
            flags += [word, *([value] if word in WITH_VALUE and (value := next(rest, "")) else [])]
        else:
            words.append(word)
    printed = [flag for flag in flags if re.match("-c$|--cfg$|--cfg=|-h$|--help$", flag)]
    if not printed and (of_cfg := [flag for flag in flags if re.match("-p$|--package|--resolve", flag)]):
        raise UserError(f"{of_cfg[0]} is for --cfg job, which prints the config: add it.")
    for number, (before, word) in enumerate(itertools.pairwise(words), 1):
        if word[:1] == "=" or (before[-1:] == "=" and "=" not in word and word[:1] != "~"):
            whole = "".join(words[number - 1 : number + 1 + (word == "=")])
            raise UserError(f"`{before} {word}`: settings have no spaces around the =: write {shlex.quote(whole)}.")
    for number, (before, word) in enumerate(itertools.pairwise(words), 1):
        if "=" in before and "=" not in word and not word.startswith("~"):
            rest_of_value = itertools.takewhile(lambda each: "=" not in each, words[number:])
            whole = ("" if before.endswith(",") else " ").join([before, *rest_of_value])
            raise UserError(
                f"`{word}`: settings are written key=value. If it belongs to `{before}`, write {shlex.quote(whole)}."
            )
    if any(word.lstrip("+") == "sweep=wandb" for word in words):
        raise UserError("sweep=wandb is for W&B's agents: `wandb sweep conf/sweep/wandb.yaml` prints how to start one.")
    if deleted := [word for word in words if re.match(r"~hydra\b", word)]:
        raise UserError(f"`{deleted[0]}`: settings of Hydra cannot be deleted: set them, as in hydra.run.dir=PATH.")
    folders = ("paths.data", "paths.scratch", "hydra.run.dir", "hydra.sweep.dir")  # which Hydra would create
    if addresses := [word for word in words if word.lstrip("+").split("=")[0] in folders and "://" in word]:
        raise UserError(f"`{addresses[0]}` must be a folder of this machine, no address.")
    modes = [flag for flag in flags if re.match(r"-[mrci]$|--(multi)?run$|--(cfg|info)\b", flag)]
    if len(modes) > 1:
        raise UserError(f"{' and '.join(modes)}: only one of them is possible at once: remove the rest.")
    is_sweep = bool({"-m", "--multirun"} & {*flags}) or "hydra.mode=MULTIRUN" in words
    words = sweep.agent_overrides([*flags, *words])[len(flags) :] if agent() is not None else words
    words = [re.sub(r"^(\+{0,2})resume=", r"\1resume.run=", word) for word in words]
    words = [re.sub(r"(^[^=]*=\[?|,)~(?=/)", lambda m: m[1] + str(Path.home()), word) for word in words]
    words = [_as_typed(word, command, is_sweep) for word in words]
    if is_sweep and launcher.external():
        raise UserError("A sweep starts the ranks of each of its jobs itself: run it without torchrun or srun.")
    return [*flags, *words]


def folders_of(words: list[str]) -> list[Path]:
    """Return the folders of configs: conf/, and that of --config-dir."""
    return [CONF, *(Path(word.removeprefix(CONFIG_DIR)).resolve() for word in words if word.startswith(CONFIG_DIR))]


def _as_typed(word: str, command: Command, is_sweep: bool) -> str:
    """Return an override in which Hydra reads the value as it was typed, see `to_overrides`."""
    key, sign, text = word.partition("=")
    if not sign or key.startswith("~"):
        return word
    if not text and key.lstrip("+") in schema.OTHER_TEXTS:
        raise UserError(f"`{word}` must be a text that is not empty.")
    kinds = takes_text(command.model, key.lstrip("+"))
    if kinds:
        return f"{key}={_text(text, kinds, is_sweep and not key.startswith('hydra.'))}"
    return word if _read(text) is not UNREADABLE else f"{key}={in_quotes(text)}"


def _text(text: str, kinds: set[type], is_sweep: bool = False) -> str:
    """Return a text in Hydra's grammar. `kinds` says whether null and lists in brackets are meant as such."""
    if is_sweep and (call := re.fullmatch(r"choice\((.*)\)", text)):
        text = call[1]  # whose jobs would lose their quotes
    if is_sweep and len(parts := split_list(text)) > 1:
        return ",".join(_text(part, kinds) for part in parts)
    if list in kinds and text[:1] == "[" and text[-1:] == "]":
        return f"[{','.join(_text(part, {str}) for part in split_list(text[1:-1]))}]"
    value = _read(text)
    is_meant = isinstance(value, str) and text == text.strip()
    is_meant |= (value is None and type(None) in kinds) or (is_sweep and isinstance(value, Sweep)) or str not in kinds
    return text if is_meant else in_quotes(text)


UNREADABLE = object()


def _read(text: str) -> Any:
    """Return the value that Hydra reads, or UNREADABLE."""
    if re.fullmatch(r"[\w.+-]*/[\w./:+-]*", text, re.ASCII):  # saves the time of the parser
        return text
    try:
        return OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        return UNREADABLE


def _as_ours(word: str, after: list[str], command: Command) -> str:
    """Translate an option of another program, `--max-epochs 3`, to `trainer.max_epochs=3`."""
    name, sign, value = word.lstrip("-").partition("=")
    name = name.replace("-", "_")
    if not sign and after and not after[0].startswith("-") and "=" not in after[0]:
        value = after[0]
    if name == "data":
        return f"data=folder data.root={value or 'PATH'}"
    key = nearest(command.model, compose(command, [])[0], (name,))
    return f"{key}={value or '...'}" if key else f"optimizer.lr=0.01 (there is no key {name})"


def with_added_keys(words: list[str], command: Command) -> list[str]:
    """Put + before the keys that the chosen options do not set, but that the schema or the class of a group takes."""
    plain, _ = _chosen(command, words)
    return [f"+{word}" if word[:1] not in "+~-" and _is_taken(command, plain, key_of(word)) else word for word in words]


def _chosen(command: Command, words: list[str]) -> tuple[Any, Plain]:
    """Compose the chosen options and classes without other overrides, of a sweep those of the first job."""
    groups, kept = groups_of(command), [word for word in words if word.startswith(CONFIG_DIR)]
    chosen = [word for word in words if key_of(word) in groups or key_of(word).endswith("._target_")]
    first = [f"{word.partition('=')[0]}={split_list(word.partition('=')[2])[0]}" for word in chosen if "=" in word]
    try:
        composed, choices = compose(command, kept + first)
    except HydraException:  # one of them is the mistake
        composed, choices = compose(command, kept)
    return OmegaConf.to_container(composed, resolve=False), choices


# Keys of the schema that an optimizer gets only if the class has them
OF_SOME_OPTIMIZERS = ("momentum", "nesterov", "betas")


def _is_taken(command: Command, plain: Any, key: str) -> bool:
    """Check for a key that the options do not set, although the schema or the class of the group takes it."""
    *above, name = key.split(".")
    node, group = value_at(plain, above), group_at(command.model, tuple(above))
    if not isinstance(node, dict) or name in node or not above or key in REPLACED:
        return False
    if group is not None and name in fields_of(group) and not (above == ["optimizer"] and name in OF_SOME_OPTIMIZERS):
        return above != ["scheduler"] or name in keys_of_schedule(node)
    return _arguments(node, name) is True


def _arguments(node: Plain, name: str) -> "bool | list[str]":
    """Return True if the class of a node takes the argument `name`, or the arguments that it takes instead."""
    if not isinstance(node.get("_target_"), str):
        return []
    with importing():
        from alexlab.engine import targets  # imports torch

    target = targets.locate(node["_target_"], None)
    return targets.takes(target, name) or sorted(
        targets.names_of(node["_target_"], None) - {"self", "params", "num_classes"}
    )


# -- composed config -> checked config


def compose(command: Command, words: list[str]) -> tuple[Any, Plain]:
    """Compose a config from --config-dir and the overrides among `words`; return it and the option of each group.

    For messages, --help and from_run: Hydra itself composes the config of a job.
    """
    GlobalHydra.instance().clear()
    further = ",".join(in_quotes(f"file://{folder}") for folder in folders_of(words)[1:])
    overrides = [word for word in words if not word.startswith("-")] + [f"hydra.searchpath=[{further}]"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose(command.name, overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(composed)  # for ${hydra:...}
    own = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    return own, composed.hydra.runtime.choices


def plain_config(command: Command, composed: DictConfig, hydra_config: Any) -> Plain:
    """Return a composed config as plain values, with what only Hydra knows: run directory, overrides, options."""
    if hydra_config.job.chdir:
        raise UserError(
            "`hydra.job.chdir=true` is not supported: remove it. A run writes into the run directory anyway."
        )
    plain = configs.resolve(composed)
    run_dir = str(Path(hydra_config.runtime.output_dir).resolve())
    plain |= {"run_dir": run_dir, "overrides": overrides_of(hydra_config)}
    for word in plain["overrides"]:
        if word.startswith("~"):
            reset(command.model, plain, key_of(word))
    for folder in folders_of(sys.argv)[1:] if isinstance(plain.get("allow"), list) else ():
        if (file := folder / "allow.yaml").is_file():  # Hydra itself reads that of conf/ alone
            more = configs.read(file)
            if not isinstance(more, dict) or not isinstance(more.get("allow"), list):
                raise UserError(f"{file} must hold a list of packages, as in `allow: [mypkg]`.")
            plain["allow"] = [*plain["allow"], *more["allow"]]
    if issubclass(command.model, schema.TrainConfig):
        resumed = value_at(plain, ("resume", "run"))
        if hydra_config.mode == hydra.types.RunMode.MULTIRUN and resumed not in (None, "auto"):
            raise UserError(f"`resume.run={resumed}` continues one run, and -m starts many: remove one of them.")
        choices, hidden = _choices(hydra_config), ("hydra", "paths", "sweep")
        plain["choices"] = {key: name for key, name in choices.items() if name and key.split("/")[0] not in hidden}
    if issubclass(command.model, schema.TrainConfig | schema.PrepareConfig):
        make_paths_absolute(plain)
    return plain


def overrides_of(hydra_config: Any) -> list[str]:
    """Return a job's overrides as the user wrote them: OmegaConf would resolve the references in them."""
    return OmegaConf.to_container(hydra_config.overrides.task, resolve=False)  # type: ignore[return-value]


def checked_config(command: Command, plain: Plain, hydra_config: Any) -> Any:
    """Return the checked, frozen config of a job; raise UserError with all mistakes."""
    return validate(command.model, plain, finder(command, hydra_config))


def finder(command: Command, hydra_config: Any) -> Callable[[str], str | None]:
    """Return the function that finds the yaml of a key among the chosen options of a job.

    Raises:
        UserError: a yaml begins with a byte order mark, which hides `# @package _global_` from Hydra.
    """
    files = list[tuple[str, Path]]()
    for group, names in {"": command.name, **_choices(hydra_config)}.items():
        for name in names if isinstance(names, list) else [names]:
            paths = (folder / group / f"{name}.yaml" for folder in folders_of(sys.argv))
            if (path := next((path for path in paths if path.is_file()), None)) is not None:
                files.append((group, path))
                if re.match(rb"\xef\xbb\xbf\s*# *@package", path.read_bytes()):
                    raise UserError(f"{path} begins with a byte order mark: save it as UTF-8 without one.")

    def file_of(key: str) -> str | None:
        """Return the yaml of a chosen option that sets `key`; None if no file sets it, or several ones do."""
        setting = list[Path]()
        for group, path in files:
            content: Any = configs.read(path)
            if has(content, key) or (group and has(content, key.removeprefix(f"{group}."))):
                setting.append(path)
        recipes = [path for path in setting if path.parent.name in RECIPES]  # which come after the groups
        setting = recipes or setting
        return str(setting[0]) if len(setting) == 1 else None

    return file_of


def check_arguments(command: Command, composed: DictConfig, hydra_config: Any) -> None:
    """Check the keys below each `_target_` of a training against the arguments of the class, before images are read.

    Raises:
        UserError: with all keys that no class takes; or a class cannot be imported.
    """
    named = [composed.get(key) for key in ("from_run", "from_wandb")] + [OmegaConf.select(composed, "resume.run")]
    if not issubclass(command.model, schema.TrainConfig) or any(named):  # another run's config is trained with
        return
    from alexlab.engine import targets  # imports torch, which the command has imported

    plain: Any = OmegaConf.to_container(composed, resolve=False)
    wrong = list[tuple[str, str]]()  # key and message
    for path, node in targets.nodes_in({key: plain[key] for key in plain if key not in ("data", "my")}):
        name, above = str(node["_target_"]), ".".join(path)
        if "${" in name:  # a reference, which is looked up when the class is built
            continue
        target, keys = targets.locate(name, None), {key for key in node if isinstance(key, str) and key[:1] != "_"}
        if path == ("scheduler",):
            keys -= {"interval", "monitor"}
        elif (group := group_at(command.model, path)) is not None:
            keys -= {*fields_of(group)}
        if path == ("loss",):
            keys = {key for key in keys if node[key] is not None}  # null is unset there
        with contextlib.suppress(Exception):  # of the user's signatures
            known = sorted(targets.names_of(name, None) - {"self", "params", "num_classes", "optimizer"})
            for key in sorted(key for key in keys if not targets.may_take(target, key)):
                hint = did_you_mean(key, known, f"`{above}.{{}}`") or f" It takes {', '.join(known) or 'no arguments'}."
                text = f"`{above}.{key}={shown(node[key])}`: {name} has no argument of this name.{hint}"
                wrong.append((f"{above}.{key}", text))
    if wrong:
        overridden, file_of = {key_of(word) for word in overrides_of(hydra_config)}, finder(command, hydra_config)
        files = [None if key in overridden else file_of(key) for key, _ in wrong]
        raise UserError(
            listed([f"{text} ({file})" if file else text for (_, text), file in zip(wrong, files, strict=True)])
        )


def _choices(hydra_config: Any) -> Plain:
    """Return the chosen option of each group of conf/; a list of them for `callbacks=[early_stopping,grad_norm]`."""
    choices = {key: name for key, name in sorted(hydra_config.runtime.choices.items()) if (CONF / key).is_dir()}
    several = {*groups_of(COMMANDS["train"])} - {*choices} if "model" in choices else set()
    if several:  # Hydra does not record lists
        name, overrides = hydra_config.job.config_name, [*hydra_config.overrides.hydra, *overrides_of(hydra_config)]
        found = GlobalHydra.instance().config_loader().compute_defaults_list(name, overrides, hydra.types.RunMode.RUN)
        for each in found.defaults:
            group, _, option = str(each.config_path).rpartition("/")
            is_extended = option.startswith("_") or str(each.parent).startswith(f"{group}/")  # by another option
            if group in several and not is_extended:
                choices.setdefault(group, []).append(option)
    return {key: name[0] if isinstance(name, list) and len(name) == 1 else name for key, name in choices.items()}


def make_paths_absolute(plain: Plain) -> None:
    """Make the paths of `data` absolute, because a resumed run may have another working directory."""
    data = plain.get("data")
    if not isinstance(data, dict):
        return
    root = data.get("root")
    if isinstance(root, str) and root not in ("", "???") and not configs.is_address(root):
        data["root"] = configs.absolute(root)
    for key in ("class_names", "file", "path"):  # of which some values are no paths
        value = data.get(key)
        path = Path(configs.absolute(value)) if isinstance(value, str) else None
        if path is not None and (path.is_file() or (key == "path" and path.is_dir())):
            data[key] = str(path)


# -- what is printed


def help_of(command: Command, words: list[str]) -> str:
    """Return the help of a command: groups, keys with values and meanings, and Hydra's flags."""
    shown_groups = [group for group in groups_of(command) if group not in ("hydra", "paths") and "/" not in group]
    groups = "".join(f"\n  {group:11} {', '.join(options(group, folders_of(words)))}" for group in shown_groups)
    of_groups = """
  -m, --multirun       sweep: key=A,B,... starts a job for each value
  --config-dir DIR     a further folder of options, besides conf/"""
    composed, chosen = compose(command, words)
    meanings, plain = schema.describe(command.model), OmegaConf.to_container(composed, resolve=False)
    for group, option in chosen.items():
        for file in (folder / group / f"{option}.yaml" for folder in folders_of(words)):
            meanings = {**(comments_of(file, group) if file.is_file() else {}), **meanings}
    further = "".join(
        f"\n{f'+{key}=':38} # {meaning}"
        for key, meaning in meanings.items()
        if key not in FILLED_IN and _is_addable(command, plain, tuple(key.split(".")))
    )
    parts = [
        _summary(command.name),
        f"Groups: choose with group=option{groups}" if groups else "",
        f"""Flags
  --cfg job            print the composed config and stop; --resolve resolves its references{of_groups * bool(groups)}
  --info, --hydra-help Hydra's own information""",
        "Keys: override any with key=value",
        "\n".join(_lines(plain, meanings)),
        f"Keys that these options do not set: add any with +key=value\n{further}" if further else "",
    ]
    return "\n\n".join(filter(None, parts))


def comments_of(file: Path, group: str) -> dict[str, str]:
    """Return the comments in a yaml of conf/: {"model.net.norm": "lrn, bn or none"}."""
    comments: dict[str, str] = {}
    above: list[str] = []
    for line in file.read_text().splitlines():
        if match := re.fullmatch(r"( *)(\w+):(?:.*? # +(.*)|.*)", line):
            above[len(match[1]) // 2 :] = [match[2]]
            comments |= {".".join([group, *above]): match[3]} if match[3] else {}
    return comments


def _is_addable(command: Command, plain: Any, path: tuple[str, ...]) -> bool:
    """Check for a key with a plain value that the options do not set, although they set the group above it."""
    above = value_at(plain, path[:-1])
    return isinstance(above, dict) and path[-1] not in above and group_at(command.model, path) is None


def _lines(node: Any, meanings: dict[str, str], prefix: str = "") -> list[str]:
    lines = []
    for key, value in node.items():
        indent = "  " * prefix.count(".")
        if isinstance(value, dict) and value:
            lines += [f"{indent}{key}:", *_lines(value, meanings, f"{prefix}{key}.")]
            continue
        line, meaning = f"{indent}{key}: {shown(value)}", meanings.get(f"{prefix}{key}")
        lines.append(f"{line:38} # {meaning}" if meaning else line)
    return lines


def _summary(name: str) -> str:
    """Return the first line of a command's yaml, which says what the command does."""
    return (CONF / f"{name}.yaml").read_text().splitlines()[0].lstrip("# ")


def groups_of(command: Command) -> list[str]:
    """Return the groups of which a command has an option, sorted."""
    defaults = configs.read(CONF / f"{command.name}.yaml")["defaults"]
    defaults = configs.read(CONF / "train.yaml")["defaults"] if "train" in defaults else defaults  # of benchmark
    return sorted({str(key).split("@")[0] for entry in defaults if isinstance(entry, dict) for key in entry})


def options(group: str, folders: list[Path]) -> list[str]:
    """Return the options of a group: the names of the yaml files, but not _base, which options extend."""
    return sorted({path.stem for folder in folders for path in (folder / group).glob("[!_]*.yaml")})


def mistakes_of(error: Exception, command: Command, words: list[str]) -> str:
    """Return the message about Hydra's error, and about further keys among the overrides that do not exist."""
    texts, left = [hydra_mistake(error, command, words)], words
    while (key := _unknown_key(error)) is not None and any(key_of(word) == key for word in left):
        left = [word for word in left if key_of(word) != key]
        try:
            compose(command, with_added_keys(left, command))
            break
        except Exception as further:
            if _unknown_key(error := further) is not None:
                texts.append(hydra_mistake(further, command, left))
    return listed(texts)


def _unknown_key(error: Exception) -> str | None:
    """Return the key that does not exist, if that is what Hydra says."""
    match = re.search(
        r"Could not (?:override|delete from config\.) '([^']+)'|Key '([^']+)' is not in struct", str(error)
    )
    return match and (match[1] or match[2])


def hydra_mistake(error: Exception, command: Command, words: list[str]) -> str:
    """Return Hydra's message about an override, or a sentence that names the nearest key or option."""
    text = re.sub(r"^\w+ raised while resolving interpolation: ", "", str(error))
    folders = folders_of(words)
    if isinstance(error, yaml.YAMLError):
        return f"{configs.yaml_mistake(error)}. Yaml is indented with spaces, and has each key once."
    if isinstance(error, UnicodeDecodeError):
        of = [file for each in folders for file in each.rglob("*.yaml") if error.object[:512] in file.read_bytes()]
        return f"{of[0] if of else 'a yaml'} is not UTF-8: save it as UTF-8 in your editor."
    if match := re.search(r"Invalid defaults list in '([\w/]+)', defaults must be a list", text):
        return f"`{match[1].replace('/', '=', 1)}`: each line below `defaults:` of its yaml begins with `- `."
    if match := re.search(r"In '([\w/]+)': ConfigTypeError raised while composing config:\nCannot merge", text):
        rule = "entries of a list begin with `- `, and those of a mapping do not"
        return (
            f"`{match[1].replace('/', '=', 1)}`: its yaml has a mapping where conf/ has a list, or the reverse: {rule}."
        )
    if isinstance(cause := error.__cause__ or error, GrammarParseError):
        return f"`{cause.full_key}`: its ${{...}} cannot be read: check the brackets."
    if match := re.search("Ambiguous value for argument '(.*)'", text):
        return f"`{match[1]}`: several values are for several jobs: add -m, or put a list in brackets: key=[A,B]."
    if match := re.search(r"^([\w/]+) appears more than once|Multiple values for ([\w/]+)\.", text):
        group = match[1] or match[2]
        return f"`{group}` is chosen twice: choose it once, without +, and in a yaml with `override /{group}: OPTION`."
    if match := re.search("(?:Could not override|is defined before) '(?:experiment|debug)/([^@']+)", text):
        return f"An option of /{match[1]} is chosen in a yaml with `override /{match[1]}: OPTION`, with the slash."
    if match := re.search("Could not (?:find|load) '((?:experiment|debug)/([^'/]+))/", text):
        group = match[2]
        return f"An option of /{group} is chosen in a yaml with `override /{group}: OPTION`, with override and slash."
    recipe = next((word for word in words if re.match(r"\+?(experiment|debug|sweep)=", word)), None)
    if recipe is not None and re.search(r"Could not override '[\w/]+@", text):
        chosen = recipe.lstrip("+")
        return f"`{chosen}`: its yaml must begin with `# @package _global_`, or its keys have no effect."
    if match := re.search(r"(?:Could not find|In '[\w/]+': Could not load) '([^']+)'", text):
        group, _, name = match[1].rpartition("/")
        for word in words:  # an option may have a / itself
            if word.replace("=", "/", 1).lstrip("+") == match[1]:
                group, _, name = word.lstrip("+").partition("=")
        known = options(group, folders)
        if group.startswith("hydra/") or not known:  # Hydra and plugins have more
            known = sorted({*known, *re.findall("^\t([\\w-]+)$", text, re.MULTILINE)})
        if group == "data" and (os.sep in name or name in (".", "..")):
            folder = f"data=folder {shlex.quote(f'data.root={name}')}"
            return f"`data={name}`: there is no such option. For a folder of images write `{folder}`."
        hint = did_you_mean(name, known, f"`{group}={{}}`")
        if group == "model" and not hint:
            hint = f" Networks of torchvision and timm: model=torchvision model.name={name}."
        listed = f" The option{'s are' if len(known) > 1 else ' is'} {', '.join(known)}." if known else ""
        return f"`{group}={name}`: there is no such option.{hint}{listed}"
    if (key := _unknown_key(error)) is not None:
        config = re.search(r"In '([\w/-]+)': Could not override", text)
        return _no_such_key(key, command, words, config and config[1])
    if "Config group override" in text:
        for word in words:
            group, sign, value = word.partition("=")
            if sign and (CONF / group).is_dir() and (value in ("null", "None", "") or value.isdigit()):
                return f"`{word}`: choose an option by its name: {', '.join(options(group, folders))}."
    if isinstance(error, OverrideParseException):
        reason = text.splitlines()[0]
        if "run" in command.model.model_fields and "=" not in str(error.override):
            return f"`{error.override}`: settings are written key=value, such as run={error.override}."
        return f"`{error.override}`: settings are written key=value; `{command.shown} --help` shows them ({reason})."
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return f"`{error.full_key}`: {text.splitlines()[0]}."
    return "\n".join(text.splitlines()[:12])


def _no_such_key(key: str, command: Command, words: list[str], config: str | None = None) -> str:
    """Return the message for an override of an unknown key: which key is meant, or which keys the option has.

    `config` is the option whose yaml has it, such as experiment/mine; None for the command line.
    """
    word = next((word for word in words if key_of(word) == key), key)
    if config is not None:  # a yaml chooses an option of a group that does not exist
        known = groups_of(command)
        hint = did_you_mean(key, known, "`override /{}`")
        file = next((file for each in folders_of(words) if (file := each / f"{config}.yaml").is_file()), config)
        return f"`override /{key}` ({file}): there is no such group.{hint} The groups are {', '.join(known)}."
    if key in REPLACED:
        return f"`{word}` {REPLACED[key]}"
    plain, choices = _chosen(command, words)
    path = tuple(key.split("."))
    node, group = value_at(plain, path), value_at(plain, path[:-1]) or {}
    if not isinstance(group, dict):
        above = ".".join(path[:-1])
        if above not in groups_of(command):
            return f"`{word}`: {above} is the value {shown(group)}, with no keys below it: write {above}=VALUE."
        return f"`{word}`: a yaml sets {above} to `{group}`. It chooses an option with `override /{above}: OPTION`."
    if isinstance(node, dict):
        return f"`{word}`: {command.shown} has no options of {key}. Set one of its keys: {', '.join(node)}."
    if path[0] == "hydra":
        if path[-1] in configs.read(CONF / "hydra/sweeper/optuna.yaml") and path[1:-1] == ("sweeper",):
            return f"`{word}` is a key of Optuna's sweeps: add -m sweep=optuna."
        return f"`{word}`: there is no such key. `{command.shown} --cfg hydra` lists the keys of Hydra."
    deletes = "~" * word.startswith("~")
    if deletes and path[-1] in group:
        return f"`{word}`: the key is null, which is as if it were deleted: remove the override."
    if not deletes and (path[0] == "my" or (path[0] == "callbacks" and "_target_" in word)):
        return f"`{word}`: there is no such key. `+{word}` adds it."
    arguments = [] if deletes else _arguments(group, path[-1])
    known, form = arguments if isinstance(arguments, list) else [], f"`{deletes}{'.'.join((*path[:-1], '{}'))}`"
    near = nearest(command.model, plain, path)
    hint = did_you_mean(path[-1], [*group, *known], form) if known else ""
    hint = hint or (f" Did you mean `{deletes}{near}`?" if near not in (None, key) else "")
    hint = hint or did_you_mean(path[-1], group, form)
    if not hint and path[0] in choices:
        keys = [name for name in group if name != "_target_"]
        hint = f" {path[0]}={choices[path[0]]} has {', '.join(keys) or 'no keys'}."
    hint += f" {group['_target_']} takes {', '.join(known)}." if known else ""
    adds = f" `+{word}` adds it." if not deletes and arguments is True else ""
    return f"`{word}`: there is no such key.{hint}{adds} `{command.shown} --help` lists all."
