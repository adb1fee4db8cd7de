"""What the ranks of a run agree on before they train. Rank 0 decides, and all do the same.

They talk through a TCPStore that rank 0 serves at MASTER_ADDR:MASTER_PORT. `init_process_group` will use it too.
"""

import contextlib
import itertools
import json
import os
import re
import resource
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from alexlab.engine import launcher
from alexlab.engine.config import flat
from alexlab.engine.errors import RankLostError, UserError, lost_peer
from alexlab.engine.errors import mistake as mistake_of
from alexlab.engine.overrides import shown
from alexlab.engine.signals import Preempted

# Keys whose values a machine may have for itself
MACHINE = re.compile(r"paths\..*|run_dir|overrides|data\.(root|file|path|idx|class_names|disk_cache|disk_cache_gb)")
# open files of a rank, and more for each rank: 22 + 3 per rank were counted with up to 32 ranks on gloo, which connects
# all pairs in each process group; the rest is for images, loggers and a second group
FILES, FILES_PER_RANK = 512, 8
STEP = 0.5  # seconds after which a rank that waits asks again
TRY = 2  # seconds of a try to connect, after which signals are handled
Value = TypeVar("Value")


class Environment(TorchElasticEnvironment):
    """Ranks by RANK, WORLD_SIZE and LOCAL_RANK for Lightning. Machines may have different numbers of ranks."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        pass


class Ranks:
    """The ranks of a run, of which this process is one. `store` connects them, and a rank waits for `minutes`."""

    def __init__(self, store: Any = None, rank: int = 0, size: int = 1, minutes: float = 10) -> None:
        self.store, self.rank, self.size, self.minutes = store, rank, size, minutes
        self.hosts = [socket.gethostname()]  # of each rank
        self._numbers = itertools.count()
        self._gloo: Any = None

    @property
    def gloo(self) -> Any:
        """A process group for CPU tensors and objects. All ranks must ask for it at the same point."""
        self._gloo = self._gloo or dist.new_group(backend="gloo", timeout=timedelta(minutes=self.minutes))
        return self._gloo

    def first(self, work: Callable[[], Value]) -> Value:
        """Let rank 0 do `work`, and return the result, which must be plain values, on all ranks.

        Raises:
            Exception: what `work` raises, on rank 0.
            SystemExit: on all ranks but 0, if `work` fails.
        """
        if self.size == 1:
            return work()
        key = f"first/{next(self._numbers)}"
        if self.rank == 0:
            try:
                value = work()
            except BaseException as error:
                is_mistake = isinstance(error, Exception) and mistake_of(error) is not None
                code = 128 + error.number if isinstance(error, Preempted) else 2 if is_mistake else 1
                # ranks that wait already read it at once, and those that start just now need some seconds
                self._send(key, {"code": code}, 5 if isinstance(error, (RankLostError, Preempted)) else 30)
                raise
            self._send(key, {"value": value})
            return json.loads(json.dumps(value))  # as on all ranks
        answer = self._receive(key)
        if self.store.add(f"{key}/read", 1) == self.size - 1:
            self.store.set(f"{key}/all", "")
        if "code" in answer:
            raise SystemExit(answer["code"])
        return answer["value"]

    def report_failure(self) -> None:
        """Let `has_failed` be true on all ranks."""
        if self.size > 1:
            with contextlib.suppress(RuntimeError):  # the store is gone
                self.store.set("failed", "")

    def has_failed(self) -> bool:
        """Check whether a rank has ended with an error itself, so that it was not just lost."""
        try:
            return self.size > 1 and self.store.check(["failed"])
        except RuntimeError:  # the store is gone
            return False

    def first_is_gone(self) -> bool:
        """Check whether rank 0, which serves the store, has ended."""
        try:
            self.store.check(["failed"])
        except RuntimeError:
            return True
        return False

    def each(self, work: Callable[[], Value]) -> Value:
        """Do `work` on each rank. A mistake on any of them is raised by rank 0, which names rank and machine.

        Raises:
            Exception: what `work` raises on this rank, unless it is a mistake.
            RankLostError: `work` has failed on another rank.
            SystemExit: on all ranks but 0, after a mistake.
        """
        if self.size == 1:
            return work()
        mistake, failure = None, None
        try:
            value = work()
        except Exception as error:
            mistake = mistake_of(error)
            failure = error if mistake is None else None

        def judge(ends: list[Any]) -> str | None:
            failed = [rank for rank, end in enumerate(ends) if end["failed"]]
            if not failed:
                self.raise_mistakes([end["mistake"] for end in ends])
            return self.named(failed) if failed else None

        failed = self.collect({"mistake": mistake, "failed": failure is not None}, judge)
        if failure is not None:
            raise failure
        if failed is not None:
            raise RankLostError(f"{failed} failed.", 1)
        return value

    def raise_mistakes(self, texts: list[str | None]) -> None:
        """Raise UserError if any rank has a mistake; `texts` has an entry for each rank."""
        mistakes: dict[str, list[int]] = {}
        for rank, text in enumerate(texts):
            if text is not None:
                mistakes.setdefault(text, []).append(rank)
        if mistakes:
            everywhere = len(next(iter(mistakes.values()))) == self.size
            lines = (text if everywhere else f"{self.named(ranks)}: {text}" for text, ranks in mistakes.items())
            raise UserError("\n".join(lines))

    def named(self, ranks: list[int]) -> str:
        return ", ".join(f"rank {rank} on {self.hosts[rank]}" for rank in ranks)

    def check_same(self, config: dict[str, Any], advice: str) -> None:
        """Raise UserError on rank 0 if a rank has other settings, except for the keys of `MACHINE`."""

        def compare(configs: list[dict[str, Any]]) -> None:
            first, *rest = configs
            for rank, own in enumerate(rest, 1):
                differ = [
                    f"{key}={shown(own.get(key))} (rank 0 on {self.hosts[0]} has {shown(first.get(key))})"
                    for key in sorted({*first, *own})
                    if first.get(key) != own.get(key)
                ]
                if differ:
                    raise UserError(f"{self.named([rank])} has other settings: {', '.join(differ)}. {advice}")

        self.collect({key: value for key, value in flat(config).items() if not MACHINE.fullmatch(key)}, compare)

    def collect(self, value: Any, judge: Callable[[list[Any]], Value]) -> Value:
        """Send a plain value of each rank to rank 0, and return `judge(values)`, which rank 0 computes, on all."""
        if self.size == 1:
            return judge([value])
        key = f"collect/{next(self._numbers)}"
        self.store.set(f"{key}/{self.rank}", json.dumps(value, default=str))
        return self.first(lambda: judge([self._receive(f"{key}/{rank}") for rank in range(self.size)]))

    def _send(self, key: str, answer: Any, seconds: float = 30) -> None:
        """Send an answer, and wait until it was read, because the store ends with the process of rank 0."""
        self.store.set(key, json.dumps(answer))
        with contextlib.suppress(RuntimeError):  # a rank is gone
            self._receive(f"{key}/all", seconds)

    def _receive(self, key: str, seconds: float | None = None) -> Any:
        """Wait for a value. Unlike torch's own waiting, this lets signals be handled."""
        end, pause = time.monotonic() + (60 * self.minutes if seconds is None else seconds), 0.005
        try:
            while not self.store.check([key]):
                if time.monotonic() > end:
                    text = f"another rank did not answer within trainer.timeout={self.minutes:g} minutes."
                    raise RankLostError(text, 1)
                time.sleep(pause)
                pause = min(2 * pause, STEP)
            return json.loads(self.store.get(key) or "null")
        except RankLostError:
            raise
        except RuntimeError as error:
            raise lost_peer(error, self.minutes) or error from error


def meet(minutes: float, mistake: str | None = None) -> Ranks:
    """Connect all ranks. Sets the variables that torchrun sets: RANK, LOCAL_RANK, MASTER_ADDR and the like.

    `mistake` is what is wrong with the command on this rank.

    Raises:
        UserError: on rank 0, the mistakes of all ranks; the port of rank 0 is in use; or see `launcher.started`.
        SystemExit: on all ranks but 0, after a mistake.
        RankLostError: a rank does not come.
    """
    this = launcher.started()
    if this is None or this.world == 1:
        return Ranks(minutes=minutes)
    os.environ |= {"RANK": str(this.rank), "WORLD_SIZE": str(this.world)}
    if this.by == "srun":
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "127.0.0.1")
        # as Lightning's SLURMEnvironment, which refuses -n without --ntasks-per-node
        os.environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
        os.environ.setdefault("MASTER_PORT", str(15000 + int(os.environ["SLURM_JOB_ID"]) % 10000))
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    who = f"not all ranks came to {address}" if this.rank == 0 else f"rank 0 is not at {address}"
    late = RankLostError(f"{who} within trainer.timeout={minutes:g} minutes.", 1)
    try:
        store = connect(this, time.monotonic() + 60 * minutes)
    except (OSError, RuntimeError) as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"{address} (MASTER_ADDR:MASTER_PORT) is in use already: choose another port for all ranks."
            ) from None
        raise late from error

    ranks = Ranks(store, this.rank, this.world, minutes)
    try:
        ranks.hosts = ranks.collect(socket.gethostname(), list)
    except RankLostError as error:
        raise late from error
    same = [number for number, host in enumerate(ranks.hosts) if host == ranks.hosts[this.rank]]
    ranks.collect(mistake, ranks.raise_mistakes)
    raise_file_limit(FILES + FILES_PER_RANK * this.world)
    local_rank = same.index(this.rank) if this.local_rank is None else this.local_rank
    os.environ |= {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(this.local or len(same))}
    os.environ |= {"GROUP_RANK": str([*dict.fromkeys(ranks.hosts)].index(ranks.hosts[this.rank]))}
    return ranks


def connect(this: launcher.Started, end: float) -> Any:
    """Connect to the store that rank 0 serves at MASTER_ADDR:MASTER_PORT, in short steps, between which signals are
    handled, until the time `end`. torch's process group will use the same store.

    torchrun's agents have a store of their own, which keeps the keys of earlier starts: ranks that are started again,
    or joined by more, would fail or read old answers. It only says where rank 0 is.

    Raises:
        OSError, RuntimeError: rank 0 does not answer, or the port is in use.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        os.environ[launcher.AGENT] = f"{host}:{port}"
        agent = dist.TCPStore(host, port, is_master=False, timeout=timedelta(minutes=1), wait_for_workers=False)
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    key = "alexlab/address"
    more: Any = {"wait_for_workers": False, "multi_tenant": True}
    if this.rank == 0:
        host, port = (own_address(host, port), 0) if agent is not None else (host, port)
        store = dist.TCPStore(host, port, is_master=True, **more)
        if agent is not None:
            agent.set(key, f"{host} {store.port}")
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(store.port)}
        return dist.PrefixStore("alexlab", store)
    while True:
        try:
            if agent is not None and not agent.check([key]):
                raise RuntimeError("rank 0 has not come yet")
            if agent is not None:  # the address may be that of an earlier start
                host, text = agent.get(key).decode().split()
                port = int(text)
            # A plain socket could ask first whether somebody listens. But that would be twice as many connections, and
            # with 32 at once the store was seen to stall for five seconds
            with without_messages():
                store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=TRY), **more)
            store.set_timeout(timedelta(seconds=10))
            break
        except (OSError, RuntimeError):
            if time.monotonic() > end:
                raise
        time.sleep(0.1)
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
    return dist.PrefixStore("alexlab", store)


@contextlib.contextmanager
def without_messages() -> Iterator[None]:
    """Hide what libraries print on standard error: torch prints an error for each try to connect."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def own_address(host: str, port: int) -> str:
    """Return the address with which this machine reaches `host`; `host` itself if that is this machine."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
            way.connect((host, port))  # sends nothing
            address = way.getsockname()[0]
    except OSError:  # an address of IPv6
        return host
    return host if address.startswith("127.") else address


def raise_file_limit(needed: int) -> None:
    """Allow this process to open `needed` files, or print that it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = hard if hard != resource.RLIM_INFINITY else needed
    if soft == resource.RLIM_INFINITY:
        return
    if soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, allowed), hard))
    if allowed < needed and launcher.prints():
        print(
            f"warning: this run may need {needed} open files, and {allowed} are allowed: raise `ulimit -Hn`.",
            flush=True,
        )
