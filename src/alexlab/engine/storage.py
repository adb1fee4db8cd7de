"""Objects in a bucket, s3://BUCKET/PATH, which obstore reads and writes (extra `remote`).

Server and credentials come from the environment, by the names that Amazon's tools have: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, and AWS_ENDPOINT_URL if the server is not Amazon's.
"""

import asyncio
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from alexlab.engine.errors import UserError

T = TypeVar("T")

REQUEST = 30  # seconds that one request may take
PART = 8 << 20  # bytes: larger objects are read in parts, so that a request takes less than REQUEST on slow links too
SENDS = 2  # parts of 5 MB that are sent at once
PATIENCE = 60.0  # seconds to wait for a server that does not answer, unless a caller has other limits
QUIET = 3.0  # seconds without an answer, after which a message says so
REPEAT = 30.0  # seconds between such messages
AT_ONCE = 64  # requests of a bucket


class Entry(NamedTuple):
    """An object of a list: the size, a tag of the content, and the time of writing, in seconds since 1970."""

    bytes: int
    tag: str
    time: float


class Bucket:
    """The objects below an address.

    A server that does not answer, or answers with an error that may pass (429, 500, 503, ...), is asked again, with a
    message on standard error after 3 seconds.

    Args:
        address: s3://BUCKET/PATH. Addresses of other kinds that obstore knows (gs://, az://) are not tested.
        patience: seconds after which a UserError says that the server does not answer.
    """

    def __init__(self, address: str, patience: float | None = None) -> None:
        self.address, self.patience = address.rstrip("/"), PATIENCE if patience is None else patience
        if find_spec("obstore") is None:
            raise UserError(f"`{address}` needs an extra: pip install 'alexlab[remote]'.")
        import obstore.store
        from obstore.exceptions import BaseError

        connect: Any = obstore.store.from_url
        limits = {"timeout": timedelta(seconds=min(REQUEST, self.patience)), "connect_timeout": timedelta(seconds=5)}
        is_plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
        kind, _, place = self.address.partition("://")
        try:
            self.store: Any = connect(
                f"{kind}://{quote(place)}",
                client_options=limits | ({"allow_http": True} if is_plain else {}),
                retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=REQUEST)},
            )
        except (BaseError, ValueError) as error:
            raise UserError(f"`{address}` is no address of objects, as s3://BUCKET/PATH: {reason(error)}.") from None
        self._told = 0.0
        self._places = asyncio.Semaphore(AT_ONCE)
        self._starting = threading.Lock()
        self._running: asyncio.AbstractEventLoop | None = None

    def path(self, name: str) -> str:
        """Return the address of an object, for people."""
        return f"{self.address}/{name}" if name else self.address

    def read(self, name: str) -> bytes:
        """Return an object. Raises FileNotFoundError if it does not exist."""

        def first() -> tuple[int, bytes]:
            answer = self.store.get(name)
            return answer.meta["size"], bytes(answer.bytes()) if answer.meta["size"] <= PART else b""

        size, content = self._patiently(name, first)
        if size <= PART:
            return content
        return b"".join(self.read_range(name, start, min(PART, size - start)) for start in range(0, size, PART))

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Return `length` bytes of an object from `start` on, or fewer at the end."""
        return bytes(self._patiently(name, lambda: self.store.get_range(name, start=start, length=length)))

    def read_ranges(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes | None]:
        """Return parts of objects, (name, start, length), which are asked for at the same time.

        None is a part of an object that does not exist.
        """
        parts: dict[int, bytes | None] = {}

        async def answers(numbers: list[int]) -> list[Any]:
            return await asyncio.gather(*(self._range(*wanted[n]) for n in numbers), return_exceptions=True)

        def ask() -> None:
            missing = [n for n in range(len(wanted)) if n not in parts]
            results = asyncio.run_coroutine_threadsafe(answers(missing), self._loop).result()
            for n, result in zip(missing, results, strict=True):
                if isinstance(result, bytes | FileNotFoundError):
                    parts[n] = result if isinstance(result, bytes) else None
            for result in results:
                if isinstance(result, BaseException) and not isinstance(result, FileNotFoundError):
                    raise result

        if wanted:
            self._patiently(wanted[0][0], ask)
        return [parts[n] for n in range(len(wanted))]

    async def _range(self, name: str, start: int, length: int) -> bytes:
        async with self._places:
            return bytes(await self.store.get_range_async(name, start=start, length=length))

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        with self._starting:
            if self._running is None:
                self._running = asyncio.new_event_loop()
                threading.Thread(target=self._running.run_forever, name="alexlab storage", daemon=True).start()
            return self._running

    def write(self, name: str, content: bytes | Path) -> None:
        """Write an object, as a whole or not at all."""
        self._patiently(name, lambda: self.store.put(name, content, max_concurrency=SENDS))

    def replace(self, name: str, content: bytes, tag: str | None) -> str | None:
        """Write an object if it still has this tag, or, for None, does not exist. Returns the new tag, or None."""
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        def put() -> str | None:
            try:
                written = self.store.put(name, content, mode="create" if tag is None else {"e_tag": tag})
            except (AlreadyExistsError, PreconditionError, FileNotFoundError):
                return None
            return str(written["e_tag"])

        return self._patiently(name, put)

    def entry(self, name: str) -> "Entry | None":
        """Return what a list has about an object, or None if it does not exist."""
        try:
            head = self._patiently(name, lambda: self.store.head(name))
        except FileNotFoundError:
            return None
        return Entry(head["size"], head["e_tag"] or "", head["last_modified"].timestamp())

    def copy(self, name: str, to: str) -> None:
        """Copy an object within the bucket."""
        self._patiently(name, lambda: self.store.copy(name, to))

    def delete(self, name: str) -> None:
        self._patiently(name, lambda: self.store.delete(name))

    def list(self, folder: str = "") -> dict[str, "Entry"]:
        """Return the objects below a folder by their names."""

        def entries() -> dict[str, Entry]:
            listed = [each for part in self.store.list(folder or None) for each in part]
            return {e["path"]: Entry(e["size"], e["e_tag"] or "", e["last_modified"].timestamp()) for e in listed}

        return self._patiently(folder, entries)

    def _patiently(self, name: str, ask: Callable[[], T]) -> T:
        """Call `ask` until it succeeds. Raises FileNotFoundError if the object does not exist."""
        first, pause = time.monotonic(), 0.1
        while True:
            began = time.monotonic()
            try:
                return ask()
            except Exception as error:
                if time.monotonic() - began > 3 * REQUEST:  # several requests were answered
                    first, pause = time.monotonic(), 0.1
                self.wait(name, error, first, pause)
                pause = min(2 * pause, 5.0)

    def wait(self, name: str, error: Exception, first: float, pause: float) -> None:
        """Wait before the next try, or raise what cannot pass. `first` is the time of the first try."""
        from obstore.exceptions import BaseError

        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{self.path(name)} does not exist") from None
        if not isinstance(error, (BaseError, OSError, TimeoutError)):
            raise error
        if not may_pass(error):
            is_known = re.match("40[13]", reason(error)) is None
            raise UserError(
                f"{self.path(name)}: the server refuses: {reason(error)}.{'' if is_known else f' {environment()}'}"
            ) from None
        now = time.monotonic()
        if now - first >= self.patience:
            raise UserError(
                f"{self.path(name)}: no success for {now - first:.0f} seconds: {reason(error)}. Is the server up, and "
                "is AWS_ENDPOINT_URL right? During training, it is asked again for trainer.timeout minutes."
            ) from None
        if now - first > QUIET and now - self._told > REPEAT:
            self._told = now
            print(
                f"{self.path(name)}: no success for {now - first:.0f} seconds ({reason(error)}): trying again for up "
                f"to {self.patience:.0f} seconds ...",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(min(pause, first + self.patience - now))


def environment() -> str:
    """Return where server and credentials come from, and what is not set."""
    names = ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    unset = [name for name in names if not os.environ.get(name)]
    text = "AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY name server and credentials."
    return f"{text} Not set: {', '.join(unset)}." if unset else text


def may_pass(error: Exception) -> bool:
    """Check whether an error may pass: no connection, too many requests, an error of the server."""
    from obstore.exceptions import InvalidPathError, NotSupportedError, PermissionDeniedError, UnauthenticatedError

    if isinstance(error, (PermissionDeniedError, UnauthenticatedError, InvalidPathError, NotSupportedError)):
        return False
    code = str(error).partition("non-2xx status code: ")[2][:3]
    return not code.startswith("4") or code in ("408", "429")


def reason(error: Exception) -> str:
    """Return what an error of obstore says, without the request and the state of the client."""
    text = str(error).partition("\n\nDebug source")[0]
    if code := text.partition("non-2xx status code: ")[2]:
        xml = code.partition("<Message>")[2].partition("</Message>")[0]
        text = f"{code.partition(':')[0]}: {xml}"
    return " ".join(text.rpartition(" - ")[2].split()).rstrip(": .")
