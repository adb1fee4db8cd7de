"""Whether a command may go on with a study: who is at its storage, what it was begun with, what it draws from."""

import contextlib
import errno
import hashlib
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from omegaconf import DictConfig
from optuna import distributions as kinds
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import StorageInternalError
from optuna.study import Study
from optuna.trial import TrialState
from sqlalchemy.engine.url import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from alexlab.engine import config as configs
from alexlab.engine.errors import UserError
from alexlab.engine.kinds import shown
from alexlab.engine.settings import canonical, settings_of

Space = dict[str, BaseDistribution]

SETTINGS = "settings"  # the study's attribute that has what it was begun with
WAITS = 60  # seconds for a file that another process has locked; SQLite's own 5 are few on a shared disk
SHOWN = 8  # settings, for one line
UNREACHED = (StorageInternalError, SQLAlchemyError)
TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # of a lock; others say that a file system has none
OPEN = (kinds.UniformDistribution, kinds.LogUniformDistribution)  # which never draw their upper end


# -- the storage


def patient(storage: str | None) -> str | None:
    """The storage's address; of an SQLite file with a longer wait, where it says none."""
    url = _address(storage)
    if url is None or _file(url) is None or "timeout" in url.query:
        return storage
    return str(url.update_query_dict({"timeout": str(WAITS)}))


def _address(storage: str | None) -> URL | None:
    if storage is None:
        return None
    try:
        if isinstance(storage, str):
            return make_url(storage)
    except ArgumentError:
        pass
    raise UserError(f"hydra.sweeper.storage={storage}: must be an address such as sqlite:///logs/optuna.db, or null.")


def _file(url: URL) -> Path | None:
    """SQLite's; None where it is in the memory, and of a server's address."""
    name = url.database or ""
    if url.get_backend_name() != "sqlite" or name in ("", ":memory:"):
        return None
    if name.startswith("file:") and str(url.query.get("uri")).lower() in ("true", "1", "yes", "on"):  # SQLite's own
        name = unquote(name.removeprefix("file:"))
        name = f"/{name.lstrip('/').removeprefix('localhost/')}" if name.startswith("//") else name
        if name in ("", ":memory:") or url.query.get("mode") == "memory":
            return None
    return Path(name).resolve()


def there(storage: str) -> bool:
    """Whether there may be a study in it; an SQLite file is not made to look."""
    url = _address(storage)
    file = _file(url) if url is not None else None
    return file.is_file() if file is not None else url is not None and url.get_backend_name() != "sqlite"


@contextlib.contextmanager
def reached(storage: str | None) -> Iterator[None]:
    """Raises UserError where the storage does not answer: it needs another package, is locked or not to be written, or
    another Optuna has made it."""
    try:
        yield
    except (ImportError, RuntimeError, *UNREACHED) as error:
        if isinstance(error, RuntimeError) and "table schema" not in str(error):
            raise
        why = str(error.__cause__ or error).splitlines()[0]
        raise UserError(
            f"hydra.sweeper.storage={_address(storage)!r}: it does not answer ({why}): try again, or give another."
        ) from error


@contextlib.contextmanager
def only_one(storage: str | None, name: str | None) -> Iterator[None]:
    """Keep other processes of this machine from a study, as a trial of theirs looks like one that was left: by a lock
    beside SQLite's file, which is one however its path is written, or in the folder for temporary files.

    Raises:
        UserError: another process is at it, or the storage is no address, or in no folder.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    url = _address(storage)
    if url is None or name is None:
        yield
        return
    file = _file(url)
    if file is not None and not file.parent.is_dir():
        raise UserError(f"hydra.sweeper.storage={storage}: there is no folder {file.parent}: make it, or give another.")
    known_by = _hashed(f"{file or storage}\n{name}")
    paths = [Path(tempfile.gettempdir(), f"alexlab-study-{os.getuid()}-{known_by}.lock")]
    if file is not None:
        told = quote(name, safe="")
        paths.insert(0, file.with_name(f"{file.name}.{told if len(told) <= 100 else _hashed(name)}.lock"))
    for path in paths:
        try:
            opened = _taken(path, fcntl)
            break
        except NoLocksError:
            continue
        except PermissionError:
            if not path.exists():
                raise
            raise UserError(
                f"hydra.sweeper.study_name={name}: another user's process is at that study: wait for it, remove {path} "
                "where none is left, or choose another name."
            ) from None
    else:
        print(f"warning: no file system here has locks: see that no other process is at study {name}.", flush=True)
        yield
        return
    if opened is None:
        raise UserError(
            f"hydra.sweeper.study_name={name}: another process is at that study: wait for it, or choose another name."
        )
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held; see _taken
        os.close(opened)


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class NoLocksError(Exception):
    """The file system has none, as some in networks."""


def _taken(path: Path, fcntl: Any) -> int | None:
    """The lock's file, opened and locked; None where another process has it.

    Raises:
        NoLocksError: no file can be locked there.
    """
    while True:
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(opened)
            if error.errno in TAKEN:
                return None
            path.unlink(missing_ok=True)
            raise NoLocksError from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(opened)):
                return opened
        os.close(opened)  # who had it before has removed it: it keeps nobody from a new one


# -- what it was begun with


def kept(config: DictConfig, space: Space) -> dict[str, Any]:
    """The settings that all trials share, flat, as a study keeps them.

    Args:
        config: of a trial.
        space: what sets the trials apart.
    """
    drawn = {name.lstrip("+") for name in space}
    drawn |= {f"choices.{name}" for name in drawn}
    return {
        key: value
        for key, value in settings_of(configs.told(configs.resolved(config))).items()
        if key not in drawn and not any(key.startswith(f"{name}.") for name in drawn)
    }


def metric_of(study: Study, folder: Path) -> str | None:
    """What its trials' values are; of a study that an older version began, what its command line or its first run's
    config says. None where neither does.

    Args:
        folder: the study's, with its runs.
    """
    settings = study.user_attrs.get(SETTINGS)
    if settings:
        return str(settings["monitor"])
    for trial in study.trials:
        told = next((value for key, value in trial.user_attrs.items() if key.lstrip("+") == "monitor"), None)
        with contextlib.suppress(UserError, OSError, AttributeError):
            told = told or configs.read(folder / str(trial.number) / "config.yaml").get("monitor")
        if isinstance(told, str):
            return told
    return None


def check_settings(study: Study, now: dict[str, Any], space: Space, folder: Path, keep: bool = True) -> None:
    """Let a study that holds no value take the settings `now`, and name those that differ from an earlier command's.

    Args:
        space: what is drawn now.
        folder: the study's.
        keep: write to the study, as a command that is only shown does not.

    Raises:
        UserError: its values are another metric's.
    """
    then: dict[str, Any] = study.user_attrs.get(SETTINGS) or {}
    held = [trial for trial in study.trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    metric = metric_of(study, folder) if held else now["monitor"]
    if metric is None:
        print(
            f"warning: study {study.study_name} does not say what its values are: they are taken for "
            f"monitor={now['monitor']}",
            flush=True,
        )
    elif metric != now["monitor"]:
        raise UserError(
            f"hydra.sweeper.study_name={study.study_name}: the values of that study are {metric}, and "
            f"monitor={now['monitor']} here: give monitor={metric}, or choose another name for another metric."
        )
    if keep and not (then and held):
        study.set_user_attr(SETTINGS, now)
    if not held:
        return
    # what one alone has, an option brings that differs itself
    differ = {
        key: f"{key}={shown(now[key])} (there {shown(then[key])})"
        for key in {*then} & {*now}
        if canonical(then[key], key) != canonical(now[key], key)
    }
    before = {name.lstrip("+") for trial in held for name in trial.params}
    drawn = {name.lstrip("+") for name in space}
    for name in before - drawn:
        value = now.get(name, now.get(f"choices.{name}"))
        differ[name] = f"{name}{' not drawn' if value is None else f'={shown(value)}'} (there drawn)"
    for name in drawn - before:
        value = then.get(name, then.get(f"choices.{name}"))
        differ[name] = f"{name} drawn (there {'not' if value is None else shown(value)})"
    if differ:
        more = f" and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
        print(
            f"warning: study {study.study_name} was begun with other settings, and trials are compared that differ in "
            f"more than they draw: {', '.join([differ[key] for key in sorted(differ)][:SHOWN])}{more}",
            flush=True,
        )


# -- what it draws from


def check_space(study: Study, space: Space) -> None:
    """Raises UserError where a parameter is of another kind than in earlier trials, which a study cannot hold."""
    for trial in study.trials:
        for name, then in trial.distributions.items():
            now = space.get(name, then)
            try:
                kinds.check_distribution_compatibility(then, now)
            except ValueError:
                raise UserError(
                    f"{name}={written(now)}: study {study.study_name} has drawn it from {written(then)}, and within a "
                    "study an interval may be moved, but its kind and a choice's values stay: give the same, or "
                    "another hydra.sweeper.study_name."
                ) from None


def written(kind: BaseDistribution) -> str:
    """A distribution as a word of the command line has it."""
    if isinstance(kind, CategoricalDistribution):
        words = [str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in kind.choices]
        if "null" in words:  # which choice() does not take
            return ",".join(words)
        return f"choice({','.join(words)})"
    low, high = kind.low, kind.high  # type: ignore[attr-defined]
    if isinstance(kind, kinds.DiscreteUniformDistribution):
        return f"range({low},{high},step={kind.q})"
    if isinstance(kind, kinds.IntUniformDistribution):
        return f"range({low},{high}{'' if kind.step == 1 else f',step={kind.step}'})"
    if isinstance(kind, kinds.IntLogUniformDistribution):
        return f"tag(log,int(interval({low},{high})))"
    interval = f"interval({low},{high})"
    return f"tag(log,{interval})" if isinstance(kind, kinds.LogUniformDistribution) else interval


def extremes(space: Space) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Values of a trial that show whether all that can be drawn is right, if each parameter is right by itself: all at
    their first, then each at its others, an interval at its end.

    Yields:
        The values, and such to take where they are wrong: of an interval without its end those just within it; or {}.
    """
    first = {name: _ends(kind)[0] for name, kind in space.items()}
    yield first, {}
    for name, kind in space.items():
        for value in _ends(kind)[1:]:
            within = {**first, name: math.nextafter(value, -math.inf)} if isinstance(kind, OPEN) else {}
            yield {**first, name: value}, within


def _ends(kind: BaseDistribution) -> Sequence[Any]:
    if isinstance(kind, CategoricalDistribution):
        return kind.choices
    return [kind.low] if kind.single() else [kind.low, kind.high]  # type: ignore[attr-defined]
