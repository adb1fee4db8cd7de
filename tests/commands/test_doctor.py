"""`alexlab doctor`: one screen, exit code 1 for what stops a training, and no secrets."""

import os
import re
import shutil
import socket
import subprocess
import threading
import tomllib
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, command, composed
from wandb_server import KEY, WandbServer

from alexlab.commands import doctor
from alexlab.engine.process import cores
from alexlab.engine.schema import DoctorConfig

SECRET = "a-password"  # pragma: allowlist secret


@pytest.fixture
def silent() -> Iterator[str]:
    """HOST:PORT of a server that accepts connections, and does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed() -> str:
    """HOST:PORT at which no server listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def findings(screen: str) -> dict[str, str]:
    """Return each finding in one line, with its mark: {"hub": "warning: HOST is not reachable ..."}."""
    found: dict[str, str] = {}
    name = ""
    for line in screen.splitlines()[:-1]:
        mark, name = line[:9].strip(), line[9:19].strip() or name
        found[name] = f"{found[name]} {line[19:]}" if name in found else f"{mark}: {line[19:]}".removeprefix(": ")
    return found


def test_one_screen_shows_what_a_training_finds(server: WandbServer) -> None:
    done = command("doctor", "trainer=ddp_cpu", "trainer.precision=32", env={**server.env(), "HF_ENDPOINT": server.url})
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert len(done.stdout.splitlines()) <= 40
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert KEY not in done.stdout
    found, host = findings(done.stdout), server.url.removeprefix("http://")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"commit {head[:10]}" in found["alexlab"]
    assert (
        f"torch {torch.__version__} ({f'CUDA {torch.version.cuda}' if torch.version.cuda else ''}" in found["packages"]
    )
    assert re.fullmatch(r"2 x cpu \(fast: (bf16|fp32 only)\); trainer.precision=32 is 32", found["devices"])
    assert found["cores"].startswith(f"{cores()} of {os.cpu_count()}; memory: ")
    assert re.fullmatch(rf"{ROOT}/logs: [\d,]+ GB free", found["logs"])
    assert found["W&B"] == f"online (WANDB_MODE is not set, an API key is set); {host} answers"
    assert found["hub"] == f"{host} answers"
    assert found["SLURM"] == f"{shutil.which('sbatch') or 'no sbatch'}; not in a job"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*project["optional-dependencies"]} <= {*re.findall(r"[\w-]+", found["extras"])}
    assert done.stdout.endswith("problems: 0; warnings: 0\n")


@pytest.mark.parametrize("hub", ["http://me:{}@{}", "me:{}@{}", "http://[{}@{}", "http://{}:x@{}/?token={}"])
def test_servers_that_do_not_answer_are_warnings_without_secrets(hub: str, closed: str) -> None:
    env = {"WANDB_API_KEY": KEY, "WANDB_MODE": "", "WANDB_BASE_URL": f"http://{closed}", "HF_TOKEN": SECRET}
    env |= {"HF_ENDPOINT": hub.format(SECRET, closed, SECRET), "PATH": "/nonexistent", "SLURM_JOB_ID": "77"}
    done = command("doctor", "trainer=cpu", env=env)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert SECRET not in done.stdout
    assert KEY not in done.stdout
    found = findings(done.stdout)
    assert found["W&B"].startswith(f"warning: online (WANDB_MODE is not set, an API key is set); {closed} is not reach")
    is_address = hub.startswith("http://") and "[" not in hub
    why = f"{closed} is not reachable ([Errno" if is_address else "HF_ENDPOINT is not reachable (not a web address"
    assert found["hub"].startswith(f"warning: {why}")
    assert found["SLURM"] == "no sbatch; in job 77"
    assert done.stdout.endswith("problems: 0; warnings: 2\n")


def test_a_server_that_hangs_is_given_up(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SECONDS", 0.1)
    monkeypatch.setenv("HF_ENDPOINT", f"http://{silent}")
    mark, text = doctor.Request("HF_ENDPOINT", "").finding()
    assert (mark, text.startswith(f"{silent} is not reachable (")) == ("warning", True), text


@pytest.mark.parametrize(
    ("handler", "mark", "answer"),
    [
        (partial(SimpleHTTPRequestHandler, directory="/nonexistent"), "", "answers"),  # with 404
        (BaseHTTPRequestHandler, "warning", "is not reachable (HTTP error 501)"),
    ],
)
def test_a_server_that_lacks_the_page_answers_and_one_with_an_error_does_not(
    handler: Any, mark: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        host = f"127.0.0.1:{server.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", f"http://{host}")
        found = doctor.Request("HF_ENDPOINT", "").finding()
        server.shutdown()
        thread.join()
    assert found == (mark, f"{host} {answer}")


@pytest.mark.parametrize(
    ("words", "env", "name", "text"),
    [
        (["paths.logs={}/file/logs"], {}, "logs", "{}/file/logs cannot be written (Not a directory): choose"),
        (["trainer=cpu", "trainer.devices=[0,1]"], {}, "devices", "`trainer.devices=[0, 1]` names GPUs, and"),
        ([], {"WANDB_MODE": "online"}, "W&B", "`WANDB_MODE=online` needs an API key: run `wandb login` or set"),
    ],
)  # fmt: skip
def test_what_stops_a_training_gives_exit_code_1(
    words: list[str], env: dict[str, str], name: str, text: str, server: WandbServer, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    urls = {"WANDB_BASE_URL": server.url, "HF_ENDPOINT": server.url}
    done = command("doctor", *(word.format(tmp_path) for word in words), env={**urls, **env})
    assert (done.returncode, done.stderr) == (1, ""), done.stdout
    assert findings(done.stdout)[name].startswith(f"PROBLEM: {text.format(tmp_path)}")
    assert done.stdout.endswith("problems: 1; warnings: 0\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU")
def test_a_gpu_that_torch_cannot_use(tmp_path: Path) -> None:
    """Without a GPU here, a script prints the line that nvidia-smi prints for one."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = command("doctor", env=env)
    found = findings(done.stdout)["devices"]
    assert (done.returncode, found[:8], "nvidia-smi lists a GPU that torch cannot use: " in found) == (
        1,
        "PROBLEM:",
        True,
    )
    for words, more in ((["trainer=cpu"], {}), ([], {"CUDA_VISIBLE_DEVICES": "9"})):
        assert command("doctor", *words, env={**env, **more}).returncode == 0, "the user does not want the GPU"


def test_a_torch_that_cannot_be_imported_is_a_problem_and_the_rest_is_shown(tmp_path: Path, closed: str) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}/src", "HF_ENDPOINT": f"http://{closed}"}
    done = command("doctor", env=env)
    found = findings(done.stdout)
    assert (done.returncode, done.stderr) == (1, "")
    assert (
        found["packages"] == found["devices"] == "PROBLEM: ImportError: libcudart.so.13: cannot open shared object file"
    )
    assert found["extras"].startswith("installed: ")


def test_a_full_disk_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config: Any = DoctorConfig.model_validate(composed(f"paths.logs={tmp_path}/new", command="doctor"))
    assert doctor.logs(config)[0] == ""
    monkeypatch.setattr(doctor, "LEAST_GB", 1e9)
    mark, text = doctor.logs(config)
    assert mark == "PROBLEM"
    assert re.fullmatch(rf"{tmp_path}/new: [\d.]+ GB free, less than 1e\+09 GB: choose another with .*", text)
    assert not (tmp_path / "new").exists()


def test_what_an_extra_lacks_is_read_from_the_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, lines in {
        "outer-1.0": ["numpy>=1; extra == 'met'", "numpy>=999; extra == 'old'", "inner[more]>=1; extra == 'deep'",
                      "absent>=2; extra == 'gone'", "absent; sys_platform == 'none' and extra == 'met'", "numpy>=1"],
        "inner-1.0": ["absent-too; extra == 'more'"],
    }.items():  # fmt: skip
        (tmp_path / f"{name}.dist-info").mkdir()
        required = "".join(f"Requires-Dist: {line}\n" for line in lines)
        head = f"Metadata-Version: 2.1\nName: {name.split('-')[0]}\nVersion: 1.0\n"
        (tmp_path / f"{name}.dist-info/METADATA").write_text(head + required)
    monkeypatch.syspath_prepend(tmp_path)
    unmet = {extra: doctor.missing("outer", extra) for extra in ("", "met", "old", "deep", "gone")}
    version = doctor.metadata.version("numpy")
    assert unmet == {
        "": [], "met": [], "old": [f"numpy>=999 (not {version})"], "deep": ["absent-too"], "gone": ["absent>=2"]
    }  # fmt: skip


def test_the_limit_of_a_container_is_shown(tmp_path: Path) -> None:
    own = Path("/proc/self/cgroup")
    if not own.is_file() or "0::" not in own.read_text():
        pytest.skip("needs Linux with cgroup 2")
    root = tmp_path / "cgroup"
    assert "may use" not in doctor.memory(root)
    group = Path(f"{root}/{own.read_text().rpartition('::')[2].strip()}")
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("500000000\n")
    assert doctor.memory(root).endswith("available, of which this process may use 0.5")
