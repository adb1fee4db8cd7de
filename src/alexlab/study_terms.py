"""Whether a command may go on with a study: who is at its storage, what it was begun with, what it draws from."""

import contextlib
import hashlib
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from omegaconf import DictConfig
from optuna import distributions as kinds
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import StorageInternalError
from optuna.study import Study
from optuna.trial import TrialState
from sqlalchemy.engine.url import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from alexlab import config as configs
from alexlab.compare.settings import same_as, settings_of
from alexlab.errors import UserError
from alexlab.kinds import shown

Space = dict[str, BaseDistribution]

SETTINGS = "settings"  # the study's attribute that has what it was begun with
WAITS = 60  # seconds for a file that another process has locked; SQLite's own 5 are few on a shared disk
SHOWN = 8  # settings, for one line
OPEN = (kinds.UniformDistribution, kinds.LogUniformDistribution)  # which never draw their upper end


# -- the storage


def patient(storage: str | None) -> str | None:
    """The storage's address; of an SQLite file with a longer wait, where it says none."""
    url = _address(storage)
    if url is None or _file(url) is None or "timeout" in url.query:
        return storage
    return str(url.update_query_dict({"timeout": str(WAITS)}))


def _address(storage: str | None) -> URL | None:
    try:
        return make_url(storage) if storage else None
    except ArgumentError:
        raise UserError(
            f"hydra.sweeper.storage={storage}: must be an address such as sqlite:///logs/optuna.db, or null."
        ) from None


def _file(url: URL) -> Path | None:
    """SQLite's; None where it is in the memory, and of a server's address."""
    if url.get_backend_name() != "sqlite" or url.database in (None, "", ":memory:"):
        return None
    return Path(str(url.database)).resolve()


@contextlib.contextmanager
def reached(storage: str | None) -> Iterator[None]:
    """Raises UserError where the storage does not answer: it needs another package, is locked or not to be written."""
    try:
        yield
    except (ImportError, StorageInternalError, SQLAlchemyError) as error:
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
    if file is not None:
        told = quote(name, safe="")
        path = file.with_name(f"{file.name}.{told if len(told) <= 100 else _hashed(name)}.lock")
    else:
        known_by = _hashed(f"{storage}\n{name}")
        path = Path(tempfile.gettempdir(), f"alexlab-study-{os.getuid()}-{known_by}.lock")
    opened = _taken(path, fcntl)
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


def _taken(path: Path, fcntl: Any) -> int | None:
    """The lock's file, opened and locked; None where another process has it."""
    while True:
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(opened)
            return None
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


def metric_of(study: Study) -> str | None:
    """What its trials' values are; None of one that has not been begun here."""
    settings = study.user_attrs.get(SETTINGS)
    return settings["monitor"] if settings else None


def check_settings(study: Study, now: dict[str, Any]) -> None:
    """Let a study that holds no value take the settings `now`, and name those that differ from an earlier command's.

    Raises:
        UserError: its values are another metric's.
    """
    then = study.user_attrs.get(SETTINGS)
    if then is None or all(trial.state == TrialState.FAIL for trial in study.trials):
        study.set_user_attr(SETTINGS, now)
        return
    if then["monitor"] != now["monitor"]:
        raise UserError(
            f"hydra.sweeper.study_name={study.study_name}: the values of that study are {then['monitor']}, and "
            f"monitor={now['monitor']} here: give monitor={then['monitor']}, or choose another name for another metric."
        )
    # what one alone has, an option brings that differs itself
    differ = [
        f"{key}={shown(now[key])} (there {shown(then[key])})"
        for key in sorted({*then} & {*now})
        if same_as(then[key]) != same_as(now[key])
    ]
    if differ:
        more = f" and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
        print(
            f"warning: study {study.study_name} was begun with other settings, and trials are compared that differ in "
            f"more than they draw: {', '.join(differ[:SHOWN])}{more}",
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
        return f"choice({','.join(map(str, kind.choices))})"
    low, high = kind.low, kind.high  # type: ignore[attr-defined]
    if isinstance(kind, kinds.DiscreteUniformDistribution):
        return f"range({low},{high},step={kind.q})"
    if getattr(kind, "step", 1) != 1:
        return f"range({low},{high},step={kind.step})"  # type: ignore[attr-defined]
    interval = f"interval({low},{high})"
    log = isinstance(kind, kinds.LogUniformDistribution | kinds.IntLogUniformDistribution)
    return f"tag(log,{interval})" if log else interval


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
