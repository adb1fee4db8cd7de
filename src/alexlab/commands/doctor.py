"""`alexlab doctor`: show on one screen what a training finds on this machine, and what is missing.

A problem gives exit code 1: a training would fail, might fill the disk, or would not use the GPU. A warning does not.
"""

import contextlib
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from packaging.requirements import Requirement

from alexlab.engine import provenance
from alexlab.engine.config import PACKAGE, is_address
from alexlab.engine.errors import UserError
from alexlab.engine.process import cores, importing
from alexlab.engine.schema import DoctorConfig, TrainerConfig
from alexlab.engine.text import printable

OK, WARNING, PROBLEM = "", "warning", "PROBLEM"
Finding = tuple[str, str]  # one of these, and a text
COLUMNS = 100  # of the screen
LEAST_GB = 2.0  # free disk space: a run of AlexNet has 1.2 GB while it trains
SECONDS = 3.0  # that a server has to answer


def doctor(config: DoctorConfig) -> None:
    """Print all findings. Raises SystemExit(1) if one of them is a problem."""
    hub, wandb = Request("HF_ENDPOINT", "https://huggingface.co"), Request("WANDB_BASE_URL", "https://api.wandb.ai")
    python = f"{platform.python_version()} in {sys.prefix}, {platform.system()} {platform.machine()}"
    job = os.environ.get("SLURM_JOB_ID")
    data = Path(config.paths.data).absolute()
    checks: dict[str, Callable[[], Finding]] = {
        "alexlab": lambda: (OK, version()),
        "python": lambda: (OK, python),
        "packages": packages,
        "devices": lambda: devices(config.trainer),
        "cores": lambda: (OK, f"{cores()} of {os.cpu_count()}; memory: {memory()}"),
        "logs": lambda: logs(config),
        "data": lambda: (OK, f"{data}: {shutil.disk_usage(existing(data)).free / 1e9:,.0f} GB free"),
        "W&B": lambda: wandb_mode(wandb),
        "hub": hub.finding,
        "SLURM": lambda: (OK, f"{shutil.which('sbatch') or 'no sbatch'}; {f'in job {job}' if job else 'not in a job'}"),
        "extras": extras,
    }
    marks = []
    for name, check in checks.items():
        try:
            mark, text = check()
        except Exception as error:  # also of a driver or a library that does not work
            what = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            mark, text = PROBLEM, what + str(error).partition("\n")[0]
        marks.append(mark)
        for number, line in enumerate(text.split("\n")):
            lead = f"{mark:9}{'' if number else name:10}"
            wrapper = textwrap.TextWrapper(COLUMNS, lead, " " * 19, break_long_words=False, break_on_hyphens=False)
            print(wrapper.fill(printable(line)), flush=True)
    print(f"problems: {marks.count(PROBLEM)}; warnings: {marks.count(WARNING)}")
    if PROBLEM in marks:
        raise SystemExit(1)


def version() -> str:
    """Return version and commit."""
    state = provenance.state()[0]
    commit = f"commit {state['commit'][:10]}" if state["commit"] else state["left_out"] or "no git repository"
    return f"{metadata.version(PACKAGE)}, {commit}{' with changes' if state['dirty'] else ''}"


def packages() -> Finding:
    """Find the versions of the main libraries, and required ones that are missing or too old."""
    with importing():
        import torch
    builds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "XPU": getattr(torch.version, "xpu", None)}
    build = ", ".join(f"{kind} {number}" for kind, number in builds.items() if number) or "CPU only"
    names = {"lightning": "pytorch-lightning", "hydra": "hydra-core", "wandb": "wandb", "torchvision": "torchvision"}
    others = ", ".join(f"{short} {metadata.version(name)}" for short, name in names.items())
    unmet = missing(PACKAGE)
    lacks = f"; missing: {', '.join(unmet)}: run `make setup`" if unmet else ""
    return WARNING if unmet else OK, f"torch {torch.__version__} ({build}), {others}{lacks}"


def missing(name: str, extra: str = "") -> list[str]:
    """Return the requirements of an installed package, or of one of its extras, that are not met."""
    unmet = []
    for needed in map(Requirement, metadata.requires(name) or []):
        applies, always = (needed.marker is None or needed.marker.evaluate({"extra": each}) for each in (extra, ""))
        if not applies or (extra and always):
            continue
        try:
            installed = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            unmet.append(f"{needed.name}{needed.specifier}")
            continue
        if not needed.specifier.contains(installed, prereleases=True):
            unmet.append(f"{needed.name}{needed.specifier} (not {installed})")
        unmet += [each for of in needed.extras for each in missing(needed.name, of)]  # as in ray[tune]
    return unmet


def devices(trainer: TrainerConfig) -> Finding:
    """Find the devices that a training would use, and the precision. Raises UserError, as a training would."""
    import torch

    from alexlab.engine.devices import choose_precision, find_devices

    used = find_devices(trainer)
    numbers = trainer.devices if isinstance(trainer.devices, list) else range(used.local)
    each = Counter(described(used.kind, number) for number in numbers)
    text = "; ".join(f"{count} x {name}" for name, count in each.items())
    text += f"; trainer.precision={trainer.precision} is {choose_precision(trainer.precision, used.kind)}"
    if used.kind == "cpu" and trainer.accelerator == "auto" and "CUDA_VISIBLE_DEVICES" not in os.environ:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # no nvidia-smi
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=False)
            if listed.stdout.startswith("GPU "):
                cuda = torch.version.cuda
                fix = f"check that the driver supports CUDA {cuda}, or" if cuda else "this build has no CUDA:"
                text += f"; nvidia-smi lists a GPU that torch cannot use: {fix} run `make setup TORCH=auto`"
                return PROBLEM, text
    return OK, text


def described(kind: str, number: int) -> str:
    """Return the name of a device and what it is fast at. Raises RuntimeError if it cannot multiply matrices."""
    import torch

    from alexlab.engine.devices import choose_precision

    ones = torch.ones(8, 8, device=kind if kind == "cpu" else f"{kind}:{number}")
    assert (ones @ ones).sum().item() == 512
    if kind != "cuda":
        fast = "bf16" if choose_precision("auto", kind) == "bf16-mixed" else "fp32 only"
        return kind if kind == "mps" else f"{kind} (fast: {fast})"
    device, least = torch.cuda.get_device_properties(number), {"bf16": 8, "fp16": 7}  # compute capability
    least |= {} if torch.version.hip else {"tf32": 8}
    fast = ", ".join(name for name, first in least.items() if device.major >= first)
    return f"{device.name}, {device.total_memory / 2**30:.0f} GiB (fast: {fast or 'fp32 only'})"


def memory(cgroups: Path = Path("/sys/fs/cgroup")) -> str:
    """Return the memory of the machine, and the limit of a container or a job."""
    seen, limit = psutil.virtual_memory(), math.inf
    with contextlib.suppress(OSError):  # not Linux, or the root, which has no limit
        group = Path(f"{cgroups}/{Path('/proc/self/cgroup').read_text().rpartition('::')[2].strip()}")
        for folder in (group, *group.parents):
            text = (folder / "memory.max").read_text().strip()
            limit = min(limit, int(text)) if text.isdecimal() else limit
    more = f", of which this process may use {limit / 1e9:.1f}" if limit < seen.total else ""
    return f"{seen.available / 1e9:.1f} of {seen.total / 1e9:.1f} GB available{more}"


def existing(folder: Path) -> Path:
    """Return the folder, or the first above it that exists."""
    return next(each for each in (folder, *folder.parents) if each.exists())


def logs(config: DoctorConfig) -> Finding:
    """Find out whether the folder of the runs can be written, and has space."""
    folder, instead = config.paths.local, "choose another with paths.logs=PATH"
    free = shutil.disk_usage(existing(folder)).free / 1e9
    try:
        tempfile.TemporaryFile(dir=existing(folder)).close()
    except OSError as error:
        return PROBLEM, f"{folder} cannot be written ({error.strerror}): {instead}"
    if free < LEAST_GB:
        return PROBLEM, f"{folder}: {free:.1f} GB free, less than {LEAST_GB:g} GB: {instead}"
    return OK, f"{folder}: {free:,.0f} GB free{'; the bucket is not checked' if is_address(config.paths.logs) else ''}"


class Request(threading.Thread):
    """Ask the server in a variable of the environment whether it answers; looking up its name has no time limit.

    Only the host is sent and shown: the rest of the value may be a password.
    """

    def __init__(self, variable: str, default: str) -> None:
        super().__init__(daemon=True)
        self.address, self.host = os.environ.get(variable) or default, variable
        self.problem: object = f"no answer in {SECONDS:g} s"
        self.end = time.monotonic() + SECONDS
        self.start()

    def run(self) -> None:
        try:
            parts = urlsplit(self.address)
            self.host = parts.netloc.rpartition("@")[2] or self.host
            urllib.request.urlopen(f"{parts.scheme}://{self.host}", timeout=SECONDS).close()
            self.problem = None
        except urllib.error.HTTPError as error:  # below 500 it concerns this path alone
            self.problem = f"HTTP error {error.code}" if error.code >= 500 else None
        except Exception as error:
            reason = getattr(error, "reason", error)
            self.problem = reason if isinstance(reason, OSError) else "not a web address such as https://HOST"

    def finding(self) -> Finding:
        self.join(max(0, self.end - time.monotonic()))
        problem = self.problem
        return (WARNING, f"{self.host} is not reachable ({problem})") if problem else (OK, f"{self.host} answers")


def wandb_mode(server: Request) -> Finding:
    """Find the mode of a run with logger=wandb. Raises UserError, as a training would."""
    with importing():
        from alexlab.loggers.wandb_logger import choose_mode, has_api_key
    mode, mark, answer = choose_mode("auto")[0], *server.finding()
    known = "an API key is set" if has_api_key() else "no API key: `wandb login` stores one"
    variable = f"WANDB_MODE={os.environ['WANDB_MODE']}" if "WANDB_MODE" in os.environ else "WANDB_MODE is not set"
    return mark if mode == "online" else OK, f"{mode} ({variable}, {known}); {answer}"


def extras() -> Finding:
    """Find the extras that are installed, and what is missing for the rest, a line for each."""
    unmet = {extra: missing(PACKAGE, extra) for extra in metadata.metadata(PACKAGE).get_all("Provides-Extra") or []}
    lines = [f"installed: {', '.join(extra for extra in unmet if not unmet[extra]) or 'none'}"]
    lines += [
        f"pip install '{PACKAGE}[{extra}]' installs {', '.join(names)}" for extra, names in unmet.items() if names
    ]
    return OK, "\n".join(lines)
