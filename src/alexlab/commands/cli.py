"""The one Hydra wrapper of train.py and its sister scripts: composes the config, agrees on the run's directory, and
turns a user's mistake into one screen and exit code 2. Light: nothing heavy is imported before the task runs."""

import difflib
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alexlab.commands import beforehand, help, refound, words
from alexlab.engine import config as configs
from alexlab.engine import secrecy, sweeps
from alexlab.engine.config import CONF, ROOT
from alexlab.engine.errors import RunFailedError, UserError, mistake
from alexlab.engine.launcher import external
from alexlab.engine.process import leave, nothing_follows
from alexlab.engine.rules import mode_of
from alexlab.engine.secrecy import masked


class StopSweep(BaseException):
    """Ends a multirun at its first failed job; Hydra would go on and tell at the end. Not an Exception, as Hydra keeps
    those for later."""


def hydra_command(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Decorate a task(config) as a command: `conf/<config_name>.yaml` composed with the command line's overrides."""

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        def command() -> None:
            code = 0
            sys.excepthook = secrecy.show
            try:
                _main(config_name, task)
            except SystemExit as error:
                if not isinstance(error.code, int):
                    raise
                code = error.code
            if nothing_follows(sys._getframe(1)):
                leave(code)
            if code:
                sys.exit(code)

        return command

    return decorate


class Jobs:
    """What became of the command's one job, or of a sweep's many.

    Attributes:
        sweeps: the sweep's folder, where there is one, and whether it was only shown, with dry_run=true.
        failed: of jobs that failed and let the sweep go on: their number, words and why.
        mistake: of the one job; Hydra would print all overrides before it.
    """

    def __init__(self, task: Callable[[DictConfig], Any], command: str) -> None:
        self.task, self.command = task, command
        self.sweeps: dict[str, bool] = {}
        self.failed: list[str] = []
        self.mistake: Exception | None = None
        self.monitor = "val/acc1"

    def run(self, config: DictConfig) -> Any:
        hydra_config = HydraConfig.get()
        _fill_in(config, hydra_config)
        sweep = hydra_config.runtime.choices.get("sweep", "none")
        sweeping = hydra_config.mode == hydra.types.RunMode.MULTIRUN
        if sweeping:
            self.sweeps[hydra_config.sweep.dir] = config.get("dry_run") is True
            self.monitor = config.get("monitor", self.monitor)
            print(masked(f"job {hydra_config.job.num}: {', '.join(config.overrides)}"), flush=True)
        try:
            if not sweeping and sweep != "none":
                raise UserError(f"sweep={sweep} is for many runs: say -m sweep={sweep}.")
            sweeps.check_agent(config)
            if sweeps.given and "data" in config:
                refound.check(config, self.command)
            resumed = OmegaConf.select(config, "resume.run")
            if sweeping and resumed not in (None, "auto"):
                raise UserError(f"resume={resumed} goes on with one run, and -m starts many: leave one of them out.")
            elsewhere = [word for word in hydra_config.overrides.hydra if word.startswith("hydra.run.dir=")]
            if elsewhere and resumed not in (None, "auto"):
                raise UserError(
                    f"resume={resumed} goes on in the run's own directory: leave {elsewhere[0]} out, or start a new "
                    f"run from its checkpoint with ckpt_path={resumed}."
                )
            with sweeps.told():
                found = self.task(config)
            optimizes = sweeping and "optuna" in str(hydra_config.sweeper.get("_target_")).lower()
            if optimizes and config.get("dry_run"):
                print("dry_run=true shows the first job alone: what it would measure picks the next.", flush=True)
                sys.exit(0)
            if optimizes and found is None:
                raise UserError(f"nothing to optimize: the job has not measured {config.monitor}.")
            return found
        except Exception as error:
            self._failed(config, error, hydra_config.job.num if sweeping else None)
            return None
        finally:
            sweeps.remove_empty(Path(config.run_dir), Path(hydra_config.sweep.dir) if sweeping else None)

    def show(self, sweep: str) -> None:
        """The table of a sweep's jobs, the best first."""
        import shutil

        from alexlab.analysis.standing import of_sweep

        width = shutil.get_terminal_size((160, 24)).columns
        print("\n".join(of_sweep(Path(sweep), self.monitor, width)), flush=True)

    def _failed(self, config: DictConfig, error: Exception, number: int | None) -> None:
        """Keep why for the end, or end the sweep, or raise what needs its traceback."""
        told = mistake(error)
        needs_traceback = told is None and not isinstance(error, RunFailedError)
        if number is None:
            if needs_traceback:
                raise error
            self.mistake = UserError(told) if told else error
            return
        sweeps.record_failure(config, error)
        if needs_traceback:
            secrecy.show(type(error), error, error.__traceback__)
        told = told or f"{type(error).__name__}: {error}"
        if not config.get("sweep", {}).get("keep_going", False):
            raise StopSweep(
                f"Job {number} failed: {told}\nThe sweep ends here; sweep.keep_going=true goes on."
            ) from error
        self.failed.append(f"job {number} ({', '.join(config.overrides)}): {told}")
        print(masked(f"FAILED {self.failed[-1]}"), file=sys.stderr, flush=True)


def _main(config_name: str, task: Callable[[DictConfig], Any]) -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing its own answer and exiting with 1
    # with other flags, such as --config-dir, Hydra answers
    wants_help = any(w in ("--help", "-h") for w in sys.argv) and sum(w.startswith("-") for w in sys.argv[1:]) == 1
    try:
        sweeps.check_words(sys.argv[1:])
        sys.argv[1:] = words.tidied(sweeps.agent_words(sys.argv[1:]), lambda: _all_keys(config_name))
    except UserError as error:
        _leave(str(error), 2)
    secret = secrecy.mistakes_in(sys.argv[1:])
    if secret:  # before Hydra, which keeps a sweep's words
        _leave("\n  ".join(secret), 2)
    register_resolvers("" if wants_help else _stamp())
    jobs = Jobs(task, config_name)

    def job(config: DictConfig) -> Any:
        return jobs.run(config)

    main = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)
    try:
        if wants_help:
            print(help.text(CONF, config_name, _composed(config_name, sys.argv[1:])), flush=True)
            return
        if "-m" in sys.argv:
            beforehand.check_jobs_of(config_name, _fill_in)
        main()
        if jobs.mistake is not None:
            raise jobs.mistake
        for sweep in (folder for folder, only_shown in jobs.sweeps.items() if not only_shown):
            jobs.show(sweep)
            print(f"compare its jobs: python compare.py runs={sweep}", flush=True)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except KeyboardInterrupt:
        _leave("interrupted.", 130)
    except StopSweep as error:
        _leave(str(error), 2 if error.__cause__ is not None and mistake(error.__cause__) else 1)
    except RunFailedError as error:
        _leave(str(error), error.code)
    except (HydraException, OmegaConfBaseException) as error:
        _leave(_short(error, config_name), 2)
    except (UserError, OSError, ValueError) as error:
        if str(error).startswith("Config group override must be"):
            _leave(_wrong_choice(), 2)
        told = mistake(error)
        if told is None:
            raise
        _leave(told, 2)
    finally:
        for sweep in (folder for folder, only_shown in jobs.sweeps.items() if only_shown):
            sweeps.leave_nothing(Path(sweep))
    if jobs.failed:
        _leave(f"{len(jobs.failed)} job(s) of the sweep failed:\n  " + "\n  ".join(jobs.failed), 1)


def _fill_in(config: DictConfig, hydra_config: Any) -> None:
    """What Hydra knows of the run: its directory, the command line's words, the groups' options, its sweep."""
    OmegaConf.set_struct(config, False)
    secrecy.note(OmegaConf.to_container(config))
    config.run_dir = str(Path(hydra_config.runtime.output_dir).resolve())
    given: Any = OmegaConf.to_container(hydra_config.overrides.task)  # as it was, with nothing resolved
    config.overrides = [configs.escaped(word) for word in given]
    if "choices" in config:
        chosen = {key: name for key, name in sorted(hydra_config.runtime.choices.items()) if (CONF / key).is_dir()}
        config.choices = {k: name for k, name in chosen.items() if name and k not in ("hydra", "paths", "sweep")}
    board = OmegaConf.select(config, "logger.wandb")
    agent, sweeping = sweeps.agent(), hydra_config.mode == hydra.types.RunMode.MULTIRUN
    if (sweeping or agent) and OmegaConf.is_dict(board) and board.get("group") is None:
        board.group = agent[0] if agent else Path(hydra_config.sweep.dir).name


def register_resolvers(stamp: str) -> None:
    """What conf/ refers to: ${stamp:}, ${root:}, ${made:FOLDER} (made where it is missing) and ${direction:METRIC}
    (Optuna's "minimize" or "maximize")."""

    def made(folder: str) -> str:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return folder

    OmegaConf.register_new_resolver("made", made, replace=True)
    OmegaConf.register_new_resolver("stamp", lambda: stamp, replace=True)
    OmegaConf.register_new_resolver("root", lambda: str(ROOT), replace=True)
    OmegaConf.register_new_resolver("direction", lambda metric: f"{mode_of(metric)}imize", replace=True)


def _leave(text: str, code: int) -> None:
    print(f"error: {masked(text)}", file=sys.stderr, flush=True)
    sys.exit(code)


def _stamp() -> str:
    """The name of the run's directory: the same on all ranks of a run."""
    given = os.environ.get("ALEXLAB_STAMP")
    if given:
        return given
    agent = sweeps.agent()
    if agent is not None:  # which may give the same run again, to go on with
        return f"sweep-{agent[0]}/{agent[1]}"
    goes_on = "resume.run=auto" in sys.argv  # a job that SLURM starts again finds its directory by its number
    if "SLURM_JOB_ID" in os.environ and (external() or goes_on):
        return f"slurm-{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_STEP_ID', '0')}"
    now = time.strftime("%Y-%m-%d_%H-%M-%S") + f"_{time.time_ns() // 1_000_000 % 1000:03d}"
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        # there is no store before the ranks have made one; without --rdzv-id all runs have the id none
        return f"torchrun-{os.environ['TORCHELASTIC_RUN_ID']}-{os.environ.get('MASTER_PORT')}"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from datetime import timedelta

        from torch.distributed import TCPStore

        # torchrun's agent serves this store; rank 0 tells the others its time
        store = TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=60)
        )
        key = f"alexlab/stamp/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        if int(os.environ["RANK"]) == 0:
            store.set(key, now)
        return store.get(key).decode()
    return now


def _short(error: Exception, config_name: str) -> str:
    """Hydra's answer on one screen, with the nearest key or option."""
    text = str(error)
    wrong = re.search(r"Could not (?:override|delete from config\.) '([^']+)'|Key '([^']+)' is not in struct", text)
    option = re.search(r"Could not find '([^']+)'", text)
    if option:
        group, _, name = option.group(1).rpartition("/")
        options = help.options(CONF / group)
        near = difflib.get_close_matches(name, options, n=1)
        hint = f" Did you mean {group}={near[0]}?" if near else ""
        if group == "model" and not near:
            hint = f" Networks of torchvision and timm: model=torchvision model.name={name}."
        return f"{group}={name}: there is no such option.{hint} There are: {', '.join(options)}."
    if wrong:
        key, gone = wrong[1] or wrong[2], "delete" in wrong[0]
        keys = _all_keys(config_name)
        near = difflib.get_close_matches(key, [k for k in keys if not key.startswith(f"{k}.")], n=1, cutoff=0.5)
        leaf = [k for k in keys if k.split(".")[-1] == key.split(".")[-1]]
        if key in keys and not gone:
            inside = ", ".join(k for k in keys if k.startswith(f"{key}."))
            return f"{key} is no group of {config_name}.py: set one of its keys, {inside}."
        meant = words.SYNONYMS.get(key.split(".")[-1])
        best = ([meant] if meant in keys else []) or (leaf[:1] if "." not in key else []) or near or leaf[:1]
        hint = f" Did you mean {'~' if gone else ''}{best[0]}?" if best else ""
        adds = "" if best or gone else f"; +{key}=... adds it"
        return f"{key}: there is no such key.{hint} `python {config_name}.py --cfg job` lists all{adds}."
    if unfit := words.unfit(text, error.__cause__):
        return unfit
    several = re.search(r"Ambiguous value for argument '([^=']+)=([^']*)'", text)
    if several:
        return (
            f"{several[1]}={several[2]}: several values are a sweep, python {config_name}.py -m "
            f"{several[1]}={several[2]}; one value that is a list is written '{several[1]}=[{several[2]}]'."
        )
    twice = re.search(r"Multiple values for (\w+)\.", text)
    if twice:
        return f"+{twice[1]}=...: that group has an option already; choose another as {twice[1]}=OPTION, without the +."
    if isinstance(error, OverrideParseException) and "=" not in error.override:
        return f"{error.override}: settings are written key=value; `python {config_name}.py --help` shows them."
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: cannot be read as key=value ({text.splitlines()[0]}). Write lists as key=[1,2], and "
            "quote words with spaces or brackets for the shell: 'key=\"a b\"'."
        )
    return "\n".join(text.splitlines()[:12])


def _wrong_choice() -> str:
    """The answer to logger=null or trainer=5, of which Hydra does not say which word it means."""
    for word in sys.argv[1:]:
        group, sign, value = word.partition("=")
        if (
            sign
            and not group.startswith(("-", "/"))
            and (CONF / group).is_dir()
            and (value in ("null", "None", "") or value.isdigit())
        ):
            return f"{word}: choose an option by its name: {', '.join(help.options(CONF / group))}."
    return "a group's option must be chosen by its name: see --help."


def _composed(config_name: str, overrides: list[str]) -> DictConfig:
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(config_name, [word for word in overrides if not word.startswith("-")])


def _all_keys(config_name: str) -> list[str]:
    config = OmegaConf.to_container(_composed(config_name, []), resolve=False)
    keys: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.items():
            keys.append(prefix + str(key))
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")

    walk(config, "")
    return keys
