"""Two machines on this one: network namespaces with host names and addresses of their own; and a SLURM of two nodes."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from conftest import ROOT, SMALL_NET, clean_env, wait_for

NAMES = ("n1", "n2")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
SLURM = ("slurmctld", "slurmd", "srun", "munged")
SLURM_CONF = """
ClusterName=test
SlurmctldHost={controller}({address})
AuthType=auth/munge
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SlurmUser=root
SlurmdUser=root
ReturnToService=2
KillWait=30
MinJobAge=300
SchedulerParameters=sched_interval=1,bf_interval=1
JobRequeue=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort=16817
NodeName=n1 NodeAddr=10.77.0.1 NodeHostname=n1 Port=17001 CPUs=2 RealMemory=8000 State=UNKNOWN
NodeName=n2 NodeAddr=10.77.0.2 NodeHostname=n2 Port=17002 CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def sh(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, check=check, capture_output=True, text=True)


def missing() -> str | None:
    """Return what this machine lacks for two namespaces; None if it lacks nothing."""
    if os.geteuid() != 0:
        return "root"
    for tool in ("ip", "nsenter", "unshare"):
        if shutil.which(tool) is None:
            return tool
    probe = sh("ip", "netns", "add", "alexlab-probe", check=False)
    sh("ip", "netns", "del", "alexlab-probe", check=False)
    return None if probe.returncode == 0 else "NET_ADMIN"


class Machines:
    """Two namespaces on a bridge. `words(0, ...)` is a command that runs on the first one."""

    def __init__(self, folder: Path) -> None:
        self.hosts = folder / "hosts"
        lines = [f"{address} {name}" for name, address in zip(NAMES, ADDRESSES, strict=True)]
        self.hosts.write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")

    def words(self, machine: int, *words: str) -> list[str]:
        name = NAMES[machine]
        script = f'hostname {name}; mount --bind {self.hosts} /etc/hosts; exec "$@"'
        inside = ["unshare", "-u", "-m", "bash", "-c", script, "-"]
        return ["nsenter", f"--net=/run/netns/{name}", *inside, *words]


@contextmanager
def two_machines(folder: Path) -> Iterator[Machines]:
    with ExitStack() as stack:
        sh("ip", "link", "add", "alexlab0", "type", "bridge")
        stack.callback(sh, "ip", "link", "del", "alexlab0", check=False)
        sh("ip", "link", "set", "alexlab0", "up")
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            sh("ip", "netns", "add", name)
            stack.callback(sh, "ip", "netns", "del", name, check=False)
            sh("ip", "link", "add", f"veth-{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
            stack.callback(sh, "ip", "link", "del", f"veth-{name}", check=False)  # a process may keep the namespace
            sh("ip", "link", "set", f"veth-{name}", "master", "alexlab0", "up")
            sh("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            sh("ip", "-n", name, "link", "set", "eth0", "up")
            sh("ip", "-n", name, "link", "set", "lo", "up")
        yield Machines(folder)


@contextmanager
def slurm(machines: Machines, folder: Path) -> Iterator[dict[str, str]]:
    """Start munged, slurmctld and a slurmd on each machine; yields the environment of srun and sbatch."""
    with ExitStack() as stack:
        sh("install", "-d", "-o", "munge", "-g", "munge", "-m", "755", "/run/munge")
        munge = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged", "--foreground"]
        stack.enter_context(daemon([*munge, "--force"], folder / "munged.out"))
        wait_for(Path("/run/munge/munge.socket.2").exists)
        (folder / "state").mkdir()
        for name in NAMES:
            (folder / f"spool-{name}").mkdir()
        conf = folder / "slurm.conf"
        conf.write_text(SLURM_CONF.format(folder=folder, controller=NAMES[0], address=ADDRESSES[0]))
        env = {"SLURM_CONF": str(conf)}
        stack.enter_context(daemon(machines.words(0, "slurmctld", "-D"), folder / "slurmctld.out", env))
        for number, name in enumerate(NAMES):
            stack.enter_context(daemon(machines.words(number, "slurmd", "-D", "-N", name), folder / f"{name}.out", env))

        def idle() -> bool:
            shown = subprocess.run(
                machines.words(0, "sinfo", "-h", "-o", "%T %D"),
                env={**os.environ, **env},
                capture_output=True,
                text=True,
            )
            return shown.stdout.split() == ["idle", "2"]

        wait_for(idle)
        try:
            yield env
        finally:  # jobs that a failed test has left
            subprocess.run(machines.words(0, "scancel", "--user=root"), env={**os.environ, **env}, check=False)
            subprocess.run(
                machines.words(0, "scancel", "--full", "--signal=KILL", "--user=root"),
                env={**os.environ, **env},
                check=False,
            )


@contextmanager
def daemon(words: list[str], log: Path, env: dict[str, str] | None = None) -> Iterator[None]:
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})})
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


class Cluster:
    """A SLURM of two nodes with one task each."""

    def __init__(self, machines: Machines, env: dict[str, str]) -> None:
        self.machines, self.env = machines, env

    def words(self, *words: str) -> list[str]:
        return self.machines.words(0, *words)

    def run(self, *words: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
        env = clean_env(self.env)
        return subprocess.run(self.words(*words), cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)

    def submit(self, folder: Path, *lines: str, options: tuple[str, ...] = ()) -> str:
        """Queue a script, and return the number of the job. It prints to `folder/out`."""
        script = folder / "job.sh"
        script.write_text("\n".join(["#!/bin/bash", f"cd {ROOT}", *lines]) + "\n")
        more = ["--open-mode=append", "-o", str(folder / "out"), *options, str(script)]
        done = self.run("sbatch", "--parsable", "-N2", "-n2", "--requeue", *more)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def start_again(self, job: str) -> None:
        """Let a job that was queued again start in half a minute, when its processes are gone; SLURM waits for two."""
        wait_for(lambda: self.state(job) == "PENDING")
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+30")

    def state(self, job: str) -> str:
        return self.run("squeue", "-h", "-j", job, "-o", "%T").stdout.strip()


def train_words(data: Path, *more: str) -> list[str]:
    images = ["data=folder", f"data.root={data}", "data.image_size=64", "data.batch_size=8", "data.num_workers=0"]
    short = ["trainer.accelerator=cpu", "trainer.max_epochs=2", "trainer.limit_train_batches=3"]
    logs = ["logger=csv", "callbacks.figures=false", "checkpoint.every_n_steps=2"]
    return [sys.executable, "train.py", *SMALL_NET, *images, *short, *logs, *more]
